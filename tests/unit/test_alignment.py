from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from data.prompts import Encode, TextFormat
from data.soft_labels import TopK
from train.teacher.alignment import Vocabulary, align, read_tokens, soft_labels, vocabulary_of
from train.teacher.writing import ServerToken
from train.tokenization import encoder, text_format, train_tokenizer

TEXTS = ["Two threes are 6. Answer: 6", "Three fours make 12. Answer: 12", "caf\u00e9 \u2212 42"] * 3
TOKENIZER = train_tokenizer(TEXTS, 400)
ENCODE: Encode = encoder(TOKENIZER)
VOCABULARY = vocabulary_of(TOKENIZER)
FORM: TextFormat = text_format(TOKENIZER, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=64)
EOS = FORM.eos_id


def token(index: int, *others: tuple[int, float], log_prob: float = -0.5) -> ServerToken:
    """A token of the vocabulary with its own and the other probabilities."""
    text = b"" if index == EOS else VOCABULARY.texts[index]
    return ServerToken(text, index, log_prob, ((index, log_prob), *others))


def written(text: str, *, ended: bool = True) -> list[ServerToken]:
    """What a server with our tokenizer would send: each token at -0.5, the one of the next id at -2."""
    return [token(index, (index + 1, -2.0)) for index in [*ENCODE(text), *([EOS] if ended else [])]]


# ----- the vocabulary -----


def test_every_token_is_found_by_its_bytes() -> None:
    assert VOCABULARY.size == len(TOKENIZER)
    assert set(VOCABULARY.texts) == set(range(len(TOKENIZER)))
    assert VOCABULARY.ids == {text: index for index, text in VOCABULARY.texts.items()}
    for text in TEXTS:
        assert b"".join(VOCABULARY.texts[index] for index in ENCODE(text)) == text.encode()
    assert VOCABULARY.texts[EOS] == b"</s>"
    assert {bytes([byte]) for byte in range(256)} <= set(VOCABULARY.ids)


def test_of_a_vocabulary_whose_bytes_depend_on_the_place_only_the_size_is_known() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), token_decoders.Metaspace()
    assert vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=backend)) == Vocabulary(3, {}, {})


# ----- what servers send -----

A, B = ENCODE(" A")[0], ENCODE(" 6")[0]


def with_id(index: int, log_prob: float) -> dict[str, Any]:
    return {"id": index, "token": "?", "bytes": list(VOCABULARY.texts[index]), "logprob": log_prob}


def with_bytes(index: int, log_prob: float) -> dict[str, Any]:
    return {"token": "?", "bytes": list(VOCABULARY.texts[index]), "logprob": log_prob}


def with_text(index: int, log_prob: float) -> dict[str, Any]:
    return {"token": VOCABULARY.texts[index].decode(), "bytes": None, "logprob": log_prob}


def with_id_as_text(index: int, log_prob: float) -> dict[str, Any]:
    return {"token": f"token_id:{index}", "bytes": list(f"token_id:{index}".encode()), "logprob": log_prob}


@pytest.mark.parametrize("form", [with_id, with_bytes, with_text, with_id_as_text])
def test_the_form_of_chat(form: Any) -> None:
    sent = {"content": [{**form(B, -0.25), "top_logprobs": [form(A, -2.0), form(B, -0.25)]}]}
    assert read_tokens(sent, VOCABULARY) == (ServerToken(b" 6", B, -0.25, ((B, -0.25), (A, -2.0))),)


@pytest.mark.parametrize("form", [with_text, with_id_as_text])
def test_the_older_form_of_completions(form: Any) -> None:
    first, second = form(B, -0.25)["token"], form(A, -2.0)["token"]
    sent = {"tokens": [first], "token_logprobs": [-0.25], "top_logprobs": [{second: -2.0, first: -0.25}], "text_offset": [0]}
    assert read_tokens(sent, VOCABULARY) == (ServerToken(b" 6", B, -0.25, ((B, -0.25), (A, -2.0))),)


def test_tokens_that_no_tokenizer_knows_are_left_to_the_missing_mass() -> None:
    top = [with_id(B, -0.25), {"id": VOCABULARY.size, "token": "", "bytes": [], "logprob": -2.0}, {"token": "\ufffd", "logprob": -3.0}]
    assert read_tokens({"content": [{**top[0], "top_logprobs": top}]}, VOCABULARY)[0].top == ((B, -0.25),)


def test_ids_are_enough_where_bytes_tell_nothing() -> None:
    sent = {"content": [{**with_id_as_text(5, -0.25), "top_logprobs": [with_id_as_text(5, -0.25)]}]}
    assert read_tokens(sent, Vocabulary(9, {}, {})) == (ServerToken(b"", 5, -0.25, ((5, -0.25),)),)


def test_no_log_probabilities_give_no_tokens() -> None:
    assert read_tokens(None, VOCABULARY) == ()


@pytest.mark.parametrize("sent", [[], {"content": [{"token": "a"}]}, {"tokens": ["a"]}, {"content": 3}, "text"])
def test_another_form_is_told(sent: Any) -> None:
    with pytest.raises(ValueError, match=r"\Alog-probabilities of no known form \(\w+: .*\): "):
        read_tokens(sent, VOCABULARY)


# ----- alignment -----


def check(found: TopK | None, ids: list[int]) -> None:
    assert found is not None
    assert found.ids.tolist() == [[index, index + 1] for index in ids]
    np.testing.assert_array_equal(found.log_probs, np.array([[-0.5, -2.0]] * len(ids), np.float32))
    np.testing.assert_array_equal(found.target_log_probs, np.array([-0.5] * len(ids), np.float32))


def test_rationale_and_label_of_an_answer() -> None:
    tokens = written(" Two threes are 6. Answer: 6")
    rationale, label = soft_labels(tokens, "Two threes are 6.", "6", FORM, ENCODE, k=2)
    check(rationale, ENCODE(" Two threes are 6."))
    check(label, [*ENCODE(" 6"), EOS])


def test_the_label_is_the_one_after_the_mark() -> None:
    tokens = [
        ServerToken(t.text, t.id, -1.0 - n, ((t.id or 0, -1.0 - n), (9, -9.0)))
        for n, t in enumerate(written(" 6 is 6. Answer: 6", ended=False))
    ]
    label = soft_labels(tokens, "6 is 6.", "6", FORM, ENCODE, k=1)[1]
    assert label is not None
    assert label.target_log_probs.tolist() == [-float(len(tokens))]


def test_without_an_end_of_sequence_the_label_has_none() -> None:
    check(soft_labels(written(" Two. Answer: 6", ended=False), "Two.", "6", FORM, ENCODE, k=2)[1], ENCODE(" 6"))
    check(soft_labels(written(" Two. Answer: 6\nQuestion:"), "Two.", "6", FORM, ENCODE, k=2)[1], ENCODE(" 6"))


@pytest.mark.parametrize(
    ("text", "rationale", "label"),
    [
        ("Two. Answer: 6", "Two.", None),  # a chat answer opens without the space that a student's target has
        (" Two.", "Three.", None),  # not there
        (" Two. Answer: 62", None, "6"),  # the label goes on
        (" Two. So it is 6", None, "6"),  # without its mark
        (" Two.", "", None),
    ],
)
def test_what_is_not_there_has_no_soft_labels(text: str, rationale: str | None, label: str | None) -> None:
    assert soft_labels(written(text), rationale or "", label, FORM, ENCODE, k=2) == (None, None)


def test_a_part_that_the_server_tokenized_otherwise_has_none() -> None:
    whole = ENCODE(" Answer")
    assert len(whole) == 1
    letters = [VOCABULARY.ids[bytes([byte])] for byte in b" Answer"]
    assert align([token(i, (i + 1, -2.0)) for i in letters], " Answer", ENCODE, 2) is None
    check(align([token(i, (i + 1, -2.0)) for i in whole], " Answer", ENCODE, 2), whole)


def test_a_part_that_begins_inside_a_token_has_none() -> None:
    assert align(written(" Answer"), "nswer", ENCODE, 2) is None


def test_the_search_starts_where_it_is_told() -> None:
    tokens = written(" 6 6", ended=False)
    tokens[1] = token(B, (A, -3.0), log_prob=-0.1)
    found = align(tokens, " 6", ENCODE, 2, start=2)
    assert found is not None
    assert found.target_log_probs.tolist() == [np.float32(-0.1)]


@pytest.mark.parametrize(
    "bad",
    [
        token(B),  # one probability where two are wanted
        token(B, (A, -0.5), log_prob=-0.5),  # 0.61 + 0.61
        ServerToken(b" 6", B, -math.inf, ((A, -0.5), (5, -2.0))),
        ServerToken(b" 6", None, -0.5, ((A, -0.5), (5, -2.0))),
    ],
)
def test_a_token_without_a_whole_distribution_spoils_its_part(bad: ServerToken) -> None:
    assert align([token(A, (B, -2.0)), bad], " A 6", ENCODE, 2) is None


def test_more_probabilities_than_wanted_are_left_to_the_missing_mass() -> None:
    found = align([token(B, (A, -2.0), (5, -4.0))], " 6", ENCODE, 2)
    assert found is not None
    assert found.ids.tolist() == [[B, A]]
