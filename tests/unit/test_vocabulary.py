"""Tokens left out: texts of the kept ones are cut as before, others still round-trip, and logits of the kept ones are as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

from data.prompts import TextFormat
from train.models import encoder
from train.tokenization import text_format, train_tokenizer
from train.vocabulary import kept_ids, trim

SEEN = ["the cat sat on the mat", "a cat and a dog ran home", "what is 12 plus 30?"]
UNSEEN = ["the weather in the north was colder than they thought", "12 seals swam; naïve penguins dived"] * 20


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SEEN * 20 + UNSEEN, trainer)
    return T5TokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_ids=0)


def opening() -> PreTrainedTokenizerFast:
    """Puts a token before every text, and has merges as pairs; a word that is a token is not merged (Llama 3's way)."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<unused>"], show_progress=False)
    tokenizer.train_from_iterator(SEEN * 20 + UNSEEN, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B </s>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


TOKENIZERS = {"bytes": lambda: train_tokenizer(SEEN * 20 + UNSEEN, 400), "unigram": unigram, "opening": opening}


def model_of(family: str, rows: int, *, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "t5":
        config: Any = T5Config(
            vocab_size=rows, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=tied, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config).eval()
        if not tied:  # as a checkpoint of T5 v1.1 is loaded: the configuration does not say it
            model.lm_head.weight = torch.nn.Parameter(torch.randn(rows, 16))
        return model
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes, tie_word_embeddings=tied)).eval()


def form_of(tokenizer: PreTrainedTokenizerFast, family: str) -> TextFormat:
    named: Any = "encoder_decoder" if family == "t5" else "decoder_only"
    return text_format(tokenizer, named, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8)


def used_by(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {token for text in SEEN for token in encoder(tokenizer)(text)}


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_texts_of_the_kept_tokens_are_cut_as_before_and_others_round_trip(name: str, family: str) -> None:
    tokenizer = TOKENIZERS[name]()
    form = form_of(tokenizer, family)
    smaller, smaller_form, new = trim(model_of(family, len(tokenizer), tied=True), tokenizer, form, used_by(tokenizer))
    assert len(smaller) == len(new) < len(tokenizer) - 10
    before, after = encoder(tokenizer), encoder(smaller)
    for text in SEEN:
        assert [new[token] for token in before(text)] == after(text)
    assert all(len(after(text)) > len(before(text)) for text in UNSEEN)
    assert [smaller.decode(after(text)) for text in SEEN + UNSEEN[:1]] == SEEN + UNSEEN[:1]
    for new_id, old_id in ((smaller_form.eos_id, form.eos_id), (smaller_form.pad_id, form.pad_id)):
        assert smaller.convert_ids_to_tokens(new_id) == tokenizer.convert_ids_to_tokens(old_id)
    assert text_format(smaller, form.family, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8) == smaller_form
    assert (len(smaller_form.prefix_ids) == 1) == (name == "opening" and family == "llama")


BYTES = train_tokenizer(SEEN * 20 + UNSEEN, 400)
TRIMMED = trim(model_of("llama", len(BYTES), tied=True), BYTES, form_of(BYTES, "llama"), used_by(BYTES))[0]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TRIMMED.decode(encoder(TRIMMED)(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(" ".join(SEEN).split()), min_size=1))
def test_any_text_whose_tokens_are_all_kept_is_cut_as_before(words: list[str]) -> None:
    text = " ".join(words)
    before, vocabulary = BYTES.tokenize(text), TRIMMED.get_vocab()
    assert TRIMMED.tokenize(text) == before or not vocabulary.keys() >= set(before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_logits_of_the_kept_tokens_are_the_whole_models(family: str, tied: bool) -> None:
    tokenizer = TOKENIZERS["bytes"]()
    rows = len(tokenizer) + 7  # rows that no token has, as in T5
    model = model_of(family, rows, tied=tied)
    ids = torch.tensor([encoder(tokenizer)(SEEN[0])])

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, **({"decoder_input_ids": ids} if family == "t5" else {})).logits[0]

    whole, parameters = logits(ids), sum(parameter.numel() for parameter in model.parameters())
    _, _, new = trim(model, tokenizer, form_of(tokenizer, family), used_by(tokenizer))
    kept = sorted(new, key=new.__getitem__)
    smaller = logits(torch.tensor([[new[int(token)] for token in ids[0]]]))
    assert smaller.shape[-1] == model.config.vocab_size == len(kept)
    torch.testing.assert_close(smaller, whole[:, kept])
    assert parameters - sum(parameter.numel() for parameter in model.parameters()) == 16 * (rows - len(kept)) * (1 if tied else 2)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.pad_token_id in (None, new.get(tokenizer.pad_token_id))


def test_what_a_token_is_merged_from_stays_and_what_else_was_merged_goes() -> None:
    """`abc` is merged from `ab` and `c`; `cc` and `<x>` are of no use to it."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "cc": 4, "abc": 5}
    merges = [["a", "b"], ["c", "c"], ["ab", "c"]]
    described = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "added_tokens": [{"id": 6, "content": "<x>"}]}
    assert kept_ids(described, {5}) == [0, 1, 2, 3, 5, 6]
    assert kept_ids(described, {7, -1}) == [0, 1, 2, 6]
    assert kept_ids(described, set(), at_least=5) == [0, 1, 2, 3, 6]
    assert kept_ids(described, set(), at_least=99) == list(range(7))


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    told = "deploy.vocabulary takes tokens out of byte-pair encodings and Unigram models, but the student's tokenizer is of type WordPiece"
    with pytest.raises(ValueError, match=told):
        kept_ids({"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": []}, [])
