"""From a checkpoint to CTranslate2 and to the rung of a ladder, for both families.

The students are trained here, on adding two digits, until their answers are sure: on a model with random weights the best token leads
by so little that rounding decides it.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from data.examples import TaskExample, write_examples
from data.prompts import TextFormat
from data.records import TeacherRecord
from data.store import shard_path, write_shard
from train import vocabulary
from train.artifacts import Checkpoint, DeployedModel, EvalResult, Family
from train.config import ScratchModel
from train.deploy import stage
from train.deploy.ctranslate2 import Ctranslate2Runtime, convert, stored
from train.deploy.request import DeployRequest
from train.deploy.targets import TARGETS
from train.evaluate import EvalRequest, command
from train.models import encoder, load_model, num_parameters, save_model, text_format
from train.runtimes import TransformersRuntime, answers
from train.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    (f"{opening} {a} plus {b} ?", str(a + b))
    for opening in ("what is", "say", "now add")
    for a, b in itertools.product(range(10), repeat=2)
]
PAIRS += [("say nothing ?", "")] * 3
WRITTEN = [text for text, _ in PAIRS] + [label for _, label in PAIRS]


@dataclass
class Student:
    """A trained model in `folder/model`, as the training stage leaves it, and its deployed forms."""

    folder: Path
    checkpoint: Checkpoint
    deployed: dict[str, DeployedModel]

    def model(self, target: str | None = None) -> Path:
        return self.folder / (target or "") / "model"


def _train(architecture: str, folder: Path) -> Checkpoint:
    family: Family = "encoder_decoder" if architecture == "t5" else "decoder_only"
    tokenizer = train_tokenizer(WRITTEN * 3, 512)
    layout = text_format(tokenizer, family, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    source = ScratchModel(from_scratch=architecture, d_model=64, layers=2, heads=4, d_ff=128)  # type: ignore[arg-type]
    model = load_model(source, tokenizer, seed=0, dtype=torch.float32).train()
    batch = _batch(layout, encoder(tokenizer), PAIRS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    for step in range(320):
        rows = torch.randperm(len(PAIRS), generator=order)[:48]
        loss = model(**{name: value[rows] for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (320 - step) / 80)
        optimizer.step()
        optimizer.zero_grad()
    save_model(model.eval(), tokenizer, layout, folder / "model")
    bytes_ = (folder / "model" / "model.safetensors").stat().st_size
    return Checkpoint(family, num_parameters(model), bytes_, 320, 320, {}, {}, 64, 8, 32)


def _batch(layout: TextFormat, encode: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    prompts = [layout.prompt_ids("predict", text, encode)[0] for text, _ in pairs]
    labels = [layout.label_ids(label, encode)[0] for _, label in pairs]

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    if layout.family == "encoder_decoder":
        return {
            "input_ids": padded(prompts, 0),
            "attention_mask": padded([[1] * len(p) for p in prompts], 0),
            "labels": padded(labels, -100),
        }
    rows = [p + t for p, t in zip(prompts, labels, strict=True)]
    targets = [[-100] * len(p) + t for p, t in zip(prompts, labels, strict=True)]
    return {"input_ids": padded(rows, 0), "attention_mask": padded([[1] * len(r) for r in rows], 0), "labels": padded(targets, -100)}


@pytest.fixture(scope="module", params=["t5", "llama"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = _train(request.param, folder)
    targets = ("ctranslate2-float32", "ctranslate2-int8")
    checkpoint.write(folder)
    return Student(folder, checkpoint, {target: _deployed(target, folder, folder / target) for target in targets})


def _deployed(target: str, trained: Path, out: Path, tokens: str | int = "whole", rows: int = 20) -> DeployedModel:
    """The stage as the pipeline runs it, on a task whose training rows are the first pairs."""
    task = out.with_name(f"{out.name}-task")
    task.mkdir(exist_ok=True)
    for split, pairs in {"train": PAIRS[:rows], "test": PAIRS[rows : rows + 10]}.items():
        write_examples(task / f"{split}.jsonl", [TaskExample(str(i), text, label) for i, (text, label) in enumerate(pairs)])
    return stage.run(DeployRequest(target, str(trained), str(task), str(task), str(out), tokens))


def _predictions(runtime: Any, batch_size: int = 32) -> list[str]:
    return answers(runtime, [text for text, _ in PAIRS], "predict", batch_size=batch_size, max_new_tokens=8)


def test_deployed_answers_are_those_of_transformers(student: Student) -> None:
    reference = _predictions(TransformersRuntime(student.model(), device="cpu"))
    right = sum(answer == label for answer, (_, label) in zip(reference, PAIRS, strict=True))
    assert right >= 0.9 * len(PAIRS), f"the toy student learnt too little ({right} of {len(PAIRS)}) for this test to mean something"
    assert reference[-1] == "", "an answer of no tokens is part of the comparison"
    assert _predictions(Ctranslate2Runtime(student.model("ctranslate2-float32"), device="cpu")) == reference
    int8 = _predictions(Ctranslate2Runtime(student.model("ctranslate2-int8"), device="cpu"))
    assert sum(a == b for a, b in zip(int8, reference, strict=True)) >= 0.98 * len(PAIRS)


@pytest.mark.parametrize("target", [None, "ctranslate2-float32", "ctranslate2-int8"])
def test_a_batch_of_unequal_lengths_answers_as_one_by_one(student: Student, target: str | None) -> None:
    runtime = Ctranslate2Runtime(student.model(target), device="cpu") if target else TransformersRuntime(student.model(), device="cpu")
    prompts = [runtime.format.prompt_ids("predict", text, runtime.encode)[0] for text, _ in PAIRS[::9]]
    assert len(set(map(len, prompts))) > 1
    # Ten tokens and no label before them: answers that end early and answers that are cut stand in one batch.
    prompts += [prompt[: len(prompt) // 2] for prompt in prompts]
    assert runtime.answer(prompts, 10) == [runtime.answer([prompt], 10)[0] for prompt in prompts]


def test_an_answer_is_cut_at_its_most_tokens_as_in_transformers(student: Student) -> None:
    reference, deployed = (
        TransformersRuntime(student.model(), device="cpu"),
        Ctranslate2Runtime(student.model("ctranslate2-float32"), device="cpu"),
    )
    prompts = [reference.format.prompt_ids("predict", text, reference.encode)[0] for text, label in PAIRS if len(label) == 2]
    # Which sums a toy learns is chance; one of those of two digits that it did is cut here.
    prompt, whole = next((p, w) for p, w in zip(prompts, deployed.answer(prompts, 8), strict=True) if len(deployed.decode(w)) == 2)
    for limit in range(1, 5):
        assert deployed.answer([prompt], limit) == reference.answer([prompt], limit) == [whole[:limit]]
    assert deployed.answer([], 8) == reference.answer([], 8) == []


def test_log_probabilities_are_those_of_torch(student: Student) -> None:
    runtime = TransformersRuntime(student.model(), device="cpu")
    deployed = Ctranslate2Runtime(student.model("ctranslate2-float32"), device="cpu")
    for text, label in PAIRS[:5]:
        prompt, target = runtime.format.prompt_ids("predict", text, runtime.encode)[0], runtime.format.label_ids(label, runtime.encode)[0]
        expected = _torch_log_probs(runtime._model, runtime.family, prompt, target)
        np.testing.assert_allclose(deployed.log_probs(prompt, target), expected, atol=2e-4)


def _torch_log_probs(model: Any, family: Family, prompt: list[int], target: list[int], start: int = 0) -> list[float]:
    with torch.inference_mode():
        if family == "encoder_decoder":
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *target[:-1]]])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return [float(row[i]) for row, i in zip(logits.log_softmax(-1), target, strict=True)]


def test_without_the_tokens_that_no_row_uses_it_answers_the_same_from_a_smaller_file(student: Student, tmp_path: Path) -> None:
    whole = student.deployed["ctranslate2-float32"]
    made = {name: _deployed("ctranslate2-float32", student.folder, tmp_path / str(name), name, 90) for name in ("task", 290)}
    # Pairs of another opening are not among the rows; what the tokenizer has of them is cut into letters.
    assert 256 < made["task"].num_tokens < made[290].num_tokens == 290 < whole.num_tokens
    assert made["task"].weight_bytes < made[290].weight_bytes < whole.weight_bytes
    assert {one.source_weight_bytes for one in made.values()} == {whole.source_weight_bytes}
    files = {name: Ctranslate2Runtime(tmp_path / str(name) / "model", device="cpu") for name in made}
    expected = _predictions(TransformersRuntime(student.model(), device="cpu"))[:100]
    assert [_predictions(file)[:90] for file in files.values()] == [expected[:90]] * 2
    assert not list(tmp_path.glob("*/.*")), "nothing is left behind"


def test_a_vocabulary_that_cannot_be_left_out_is_told(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"^deploy.vocabulary is task, but every training input is one of the test split: set it to whole$"
    ):
        _deployed("ctranslate2-float32", student.folder, tmp_path / "none", "task", 0)
    real = vocabulary.trim

    def off_by_one(*given: Any) -> Any:
        smaller, form, new = real(*given)
        return smaller, form, {old: (place + 1) % len(new) for old, place in new.items()}

    monkeypatch.setattr(vocabulary, "trim", off_by_one)
    with pytest.raises(RuntimeError, match=r"^deploy.vocabulary is task, but .* training texts are cut otherwise: set it to whole$"):
        _deployed("ctranslate2-float32", student.folder, tmp_path / "other", "task")


def test_channels_of_unlike_sizes_lose_less_where_rows_are_given(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(WRITTEN * 3, 512)
    layout = text_format(tokenizer, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
    model = load_model(ScratchModel(from_scratch="llama", d_model=64, layers=2, heads=4), tokenizer, seed=0, dtype=torch.float32)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[::9] = 30.0
        layer.mlp.up_proj.weight.data[::7] *= 50.0
    save_model(model, tokenizer, layout, tmp_path / "model")
    encode = encoder(tokenizer)
    rows = [(layout.prompt_ids("predict", text, encode)[0], layout.label_ids(label, encode)[0]) for text, label in PAIRS[:64]]
    errors = []
    for name, samples in (("without", []), ("with", rows)):
        reference = TransformersRuntime(tmp_path / "model", device="cpu")
        stage.deploy(TARGETS["ctranslate2-int8"], tmp_path / "model", tmp_path / name, samples, rows[:16], reference)
        file = Ctranslate2Runtime(tmp_path / name / "model", device="cpu")
        reference = TransformersRuntime(tmp_path / "model", device="cpu")
        expected, found = (np.concatenate([runtime.log_probs(*row) for row in rows[:16]]) for runtime in (reference, file))
        errors.append(float(np.linalg.norm(found - expected)))
    assert errors[1] < 0.85 * errors[0]


def test_tokens_are_those_of_training(student: Student) -> None:
    runtime, deployed = (
        TransformersRuntime(student.model(), device="cpu"),
        Ctranslate2Runtime(student.model("ctranslate2-int8"), device="cpu"),
    )
    for text in ("predict: what is 12 + 30 ?", "  spaces  and\nlines ", "naïve café 中文", "it spells </s> and <pad> out", ""):
        ids = runtime.encode(text)
        assert deployed.encode(text) == ids
        assert deployed.decode([*ids, 1]) == runtime.decode([*ids, 1]) == text.strip()


def test_int8_is_under_thirty_per_cent_of_fp32(student: Student) -> None:
    int8, float32 = student.deployed["ctranslate2-int8"], student.deployed["ctranslate2-float32"]
    assert int8.source_weight_bytes == student.model().joinpath("model.safetensors").stat().st_size
    assert int8.weight_bytes == student.model("ctranslate2-int8").joinpath("model.bin").stat().st_size
    assert int8.weight_bytes < 0.3 * int8.source_weight_bytes
    assert 0.99 < float32.weight_bytes / float32.source_weight_bytes < 1.0
    assert int8.total_bytes == sum(path.stat().st_size for path in student.model("ctranslate2-int8").iterdir())
    assert DeployedModel.read(student.folder / "ctranslate2-int8") == int8
    assert (int8.runtime, int8.family, int8.num_parameters) == ("ctranslate2", student.checkpoint.family, student.checkpoint.num_parameters)
    assert not list(student.folder.glob("ctranslate2-*/.model*"))


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_examples(folder / "test.jsonl", [TaskExample(str(i), text, label) for i, (text, label) in enumerate(PAIRS[:40])])
    return folder


@pytest.fixture(scope="module")
def records_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is right but on its first item, and gives no label on its second."""
    folder = tmp_path_factory.mktemp("records")
    labels: list[str | None] = ["77", None, *(label for _, label in PAIRS[2:40])]
    write_shard(
        shard_path(folder, "test", 0),
        [TeacherRecord(str(i), "test", f"so Answer: {label}", "so", label, label is not None, i > 1) for i, label in enumerate(labels)],
    )
    return folder


def _evaluate(request: EvalRequest, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    request.write(tmp_path / "request.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(tmp_path / "request.json"), env=environment, capture_output=True, text=True, timeout=120, check=False)


def _request(student: Student, task_folder: Path, records_folder: Path, out: Path) -> EvalRequest:
    return EvalRequest(
        rung="deployed", runtime="ctranslate2", model_folder=str(student.model("ctranslate2-int8")), records_folder=None,
        task_folder=str(task_folder), metric="number", part="predict", max_new_tokens=8, batch_size=16, timed_examples=20,
        out_folder=str(out), device="cpu", teacher_records_folder=str(records_folder), num_parameters=7,
    )  # fmt: skip


def test_a_deployed_rung_in_its_own_process(student: Student, task_folder: Path, records_folder: Path, tmp_path: Path) -> None:
    done = _evaluate(_request(student, task_folder, records_folder, tmp_path / "out"), tmp_path)
    assert done.returncode == 0, done.stderr
    result = EvalResult.read(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    expected = _predictions(Ctranslate2Runtime(student.model("ctranslate2-int8"), device="cpu", threads=1))[:40]
    assert [line["answer"] for line in lines] == expected
    assert [line["correct"] for line in lines] == [answer == label for answer, (_, label) in zip(expected, PAIRS[:40], strict=True)]
    assert result.num_correct == sum(line["correct"] for line in lines) >= 36
    assert [line["agrees"] for line in lines[:2]] == [False, False]
    assert result.num_agreeing_with_teacher == sum(line["correct"] for line in lines[2:])
    deployed = student.deployed["ctranslate2-int8"]
    assert (result.weight_bytes, result.total_bytes, result.num_parameters) == (deployed.weight_bytes, deployed.total_bytes, 7)
    assert set(result.examples_per_second or {}) == {"1", "32"}
    assert 10 << 20 < (result.peak_memory_bytes or 0) < 300 << 20, "a process with torch in it takes more"
    assert (result.runtime, result.device, result.num_items, result.num_unparseable) == ("ctranslate2", "cpu", 40, 0)


def test_serving_a_deployed_model_imports_no_torch(student: Student, task_folder: Path, records_folder: Path, tmp_path: Path) -> None:
    _request(student, task_folder, records_folder, tmp_path / "out").write(tmp_path / "request.json")
    program = "import sys; from train.evaluate import main; status = main(sys.argv[1:]); print(*sys.modules); sys.exit(status)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "request.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "ctranslate2" in done.stdout.split()
    assert not {"torch", "transformers", "deepspeed"} & set(done.stdout.split())


def test_a_damaged_file_ends_in_one_line(student: Student, task_folder: Path, records_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for path in student.model("ctranslate2-int8").iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 5000 if path.name == "model.bin" else None])
    request = _request(student, task_folder, records_folder, tmp_path / "out")
    done = _evaluate(replace(request, model_folder=str(broken)), tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: CTranslate2 cannot load {broken} on device 'cpu' (")
    assert done.stderr.endswith("run deploy again, or choose device cpu\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "artifact.json").exists()


def test_a_gpu_that_cannot_be_used_is_no_fault_of_the_file(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 0)
    with pytest.raises(RuntimeError, match=r"\Adevice is cuda, but CTranslate2 needs a GPU .*, or choose device cpu\Z"):
        Ctranslate2Runtime(student.model("ctranslate2-int8"), device="cuda")


def test_a_folder_without_weights_is_refused(student: Student, tmp_path: Path) -> None:
    (tmp_path / "stepdown.json").write_text(student.model().joinpath("stepdown.json").read_text())
    with pytest.raises(ValueError, match=r"is not a CTranslate2 model \(it needs model.bin and a vocabulary\): run deploy"):
        Ctranslate2Runtime(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"has no tokenizer.json, which the deployed model needs"):
        convert(tmp_path, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match=r"has no .safetensors file"):
        stage.fp32_bytes(tmp_path)


def test_deploy_again_replaces_what_a_killed_run_left(student: Student, tmp_path: Path) -> None:
    left = tmp_path / "out" / ".model.unchecked"
    left.mkdir(parents=True)
    (left / "model.bin").write_bytes(b"half")
    again = _deployed("ctranslate2-int8", student.folder, tmp_path / "out")
    assert (again.weight_bytes, again.total_bytes) == (
        student.deployed["ctranslate2-int8"].weight_bytes,
        student.deployed["ctranslate2-int8"].total_bytes,
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["artifact.json", "model", "verified.json", "verify.json"]


def test_what_the_file_holds_adds_up_to_its_bytes(student: Student) -> None:
    for target, kind, bits in (("ctranslate2-float32", "float32", 32.0), ("ctranslate2-int8", "int8", 8.3)):
        tensors, path = stored(student.model(target)), student.model(target) / "model.bin"
        matrices = [tensor for tensor in tensors if tensor.is_matrix]
        assert 0 < path.stat().st_size - sum(tensor.num_bytes for tensor in tensors) < 0.1 * path.stat().st_size, "names and sizes"
        assert {tensor.type for tensor in matrices} == {kind}
        assert max(tensor.bits for tensor in matrices) == pytest.approx(bits, abs=0.8)
        made = student.deployed[target]
        assert (made.fallbacks, sum(made.types.values())) == ([], len(tensors))
        assert made.error_nats is not None
        assert made.error_nats < (1e-4 if target.endswith("float32") else 0.1)


def test_a_full_disk_is_told_and_leaves_nothing(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(source: Path, out: Path, *_: object) -> None:
        out.mkdir(parents=True)
        (out / "model.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage, "module_of", lambda target: SimpleNamespace(make=fills))
    with pytest.raises(
        RuntimeError, match=r"deploy.targets: ctranslate2-int8 needs more room than .*/out has left: free some, or set output"
    ):
        _deployed("ctranslate2-int8", student.folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_are_not_finite_are_told(student: Student, tmp_path: Path) -> None:
    runtime = TransformersRuntime(student.model(), device="cpu")
    with torch.no_grad():
        runtime._model.get_input_embeddings().weight.fill_(float("nan"))
    save_model(runtime._model, runtime._tokenizer, runtime.format, tmp_path / "model")
    student.checkpoint.write(tmp_path)
    with pytest.raises(RuntimeError, match=r"ctranslate2-float32 gives log-probabilities that are not finite"):
        _deployed("ctranslate2-float32", tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*model*"))
    assert not (tmp_path / "out" / ".model.unchecked").exists()
    assert not (tmp_path / "out" / "artifact.json").exists()


def _random_t5(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int, **settings: Any) -> TransformersRuntime:
    config = T5Config(
        vocab_size=rows, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=6, eos_token_id=1,
        decoder_start_token_id=6, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    layout = TextFormat("encoder_decoder", eos_id=1, pad_id=6, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8)
    model = T5ForConditionalGeneration(config)
    if not settings.get("tie_word_embeddings", True):  # transformers 5.17 ties them all the same, unless a checkpoint holds another head
        model.lm_head.weight = torch.nn.Parameter(torch.randn(rows, 32))
    save_model(model, tokenizer, layout, folder)
    return TransformersRuntime(folder, device="cpu")


@pytest.mark.parametrize("settings", [{}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}])
def test_gaps_in_the_vocabulary_and_both_kinds_of_t5(settings: dict[str, Any], tmp_path: Path) -> None:
    """The ids 2 and 5 name no token, and 5 rows of the embedding are beyond the tokenizer; T5 v1.1 does not scale its output."""
    names = {"<extra_id_0>": 0, "</s>": 1, "a": 3, "b": 4, "<pad>": 6, "c": 7, "predict": 8, ":": 9, "<unk>": 10}
    words = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    runtime = _random_t5(tmp_path / "model", tokenizer, 16, **settings)
    convert(tmp_path / "model", tmp_path / "out", "float32")
    deployed = Ctranslate2Runtime(tmp_path / "out", device="cpu")
    for text in ("a b c", "c c"):
        prompt = runtime.format.prompt_ids("predict", text, runtime.encode)[0]
        assert deployed.answer([prompt], 6) == runtime.answer([prompt], 6)
        for target in ([7, 4, 1], [3, 12, 1]):
            expected = _torch_log_probs(runtime._model, "encoder_decoder", prompt, target, start=6)
            np.testing.assert_allclose(deployed.log_probs(prompt, target), expected, atol=2e-4)
    rows = json.loads((tmp_path / "out" / "shared_vocabulary.json").read_text())
    assert len(set(rows)) == len(rows) == 16
    assert {name: i for i, name in enumerate(rows) if name in names} == names


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoder_only_families_with_grouped_heads_and_untied_embeddings(model_type: str, tmp_path: Path) -> None:
    """The embedding has 12 rows more than the tokenizer has tokens, as Qwen's."""
    tokenizer = train_tokenizer(WRITTEN, 300)
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer) + 12, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        head_dim=8, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    layout = text_format(tokenizer, "decoder_only", max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, layout, tmp_path / "model")
    runtime = TransformersRuntime(tmp_path / "model", device="cpu")
    convert(tmp_path / "model", tmp_path / "out", "float32")
    deployed = Ctranslate2Runtime(tmp_path / "out", device="cpu")
    for text in ("what is 3 plus 4 ?", "hm"):
        prompt, target = runtime.format.prompt_ids("predict", text, runtime.encode)[0], runtime.encode(" 75 or so")
        expected = _torch_log_probs(runtime._model, "decoder_only", prompt, target)
        np.testing.assert_allclose(deployed.log_probs(prompt, target), expected, atol=2e-4)


def test_an_architecture_without_a_converter_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(WRITTEN, 300)
    config = LongT5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    layout = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8)
    save_model(LongT5ForConditionalGeneration(config), tokenizer, layout, tmp_path / "model")
    with pytest.raises(
        ValueError,
        match=r"^deploy.targets: CTranslate2 [\d.]+ cannot convert a student of model type 'longt5' .*; choose a student of a family",
    ):
        convert(tmp_path / "model", tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
