"""How answers become the numbers of a rung; loading and timing of real models is tested in tests/integration/test_ctranslate2.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.examples import TaskExample, write_examples
from data.prompts import TextFormat
from data.records import TeacherRecord
from data.store import shard_path, write_shard
from train import serving
from train.artifacts import EvalResult, Records
from train.evaluate import Answer, EvalRequest, command, main, run, score, timed
from train.runtimes import TransformersRuntime, answers, device_for, model_bytes, open_runtime, pad, until
from train.serving import peak_resident_bytes

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [
    TaskExample("a", "two and two", "4"),
    TaskExample("b", "half of five", "2.5"),
    TaskExample("c", "one", "1"),
    TaskExample("d", "none", "0"),
]


class Parrot:
    """A model whose tokens are characters and whose answer to a prompt is the prompt turned around; it notes each batch."""

    family = "decoder_only"
    device = "cpu"
    format = TextFormat("decoder_only", eos_id=0, pad_id=0, max_input_tokens=200, max_label_tokens=8, max_rationale_tokens=8)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        self.batches.append([len(prompt) for prompt in prompts])
        return [list(prompt)[::-1][:max_new_tokens] for prompt in prompts]

    def peak_device_bytes(self) -> int | None:
        return 1234


def test_answers_come_in_the_order_of_the_inputs_and_batches_are_sorted_by_length() -> None:
    parrot, seen = Parrot(), []
    inputs = ["mid..", "a", "the longest of all", "bb", "ccc"]
    frame = len(parrot.format.prompt("predict", ""))
    texts = answers(parrot, inputs, "predict", batch_size=2, max_new_tokens=100, advance=seen.append)
    assert texts == [parrot.format.prompt("predict", text)[::-1] for text in inputs]
    assert parrot.batches == [[frame + 18, frame + 5], [frame + 3, frame + 2], [frame + 1]]
    assert seen == [2, 2, 1]
    assert answers(parrot, [], "predict", batch_size=2, max_new_tokens=4) == []


def test_the_mask_follows_the_lengths_and_not_the_padding_id() -> None:
    ids, mask = pad([[7, 0, 0], [5]], 0, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[7, 0, 0], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]])
    ids, mask = pad([[7, 0, 0], [5]], 9, left=False)
    assert (ids.tolist(), mask.tolist()) == ([[7, 0, 0], [5, 9, 9]], [[1, 1, 1], [1, 0, 0]])


def test_until_cuts_before_the_first_end() -> None:
    assert until([4, 1, 5, 1], 1) == [4]
    assert until([4, 5], 1) == [4, 5]
    assert until([1], 1) == []


def test_score_by_hand() -> None:
    written = [Answer("4.0", "4.0"), Answer("about 7", "about 7"), Answer("so it is", None), Answer("x Answer: 5", "5")]
    lines = score(EXAMPLES, written, "number", ["4", "2.5", "1", "5.00"])
    assert [line["id"] for line in lines] == ["a", "b", "c", "d"]
    assert [line["answer"] for line in lines] == ["4.0", "about 7", "so it is", "x Answer: 5"]
    assert [line["parsed"] for line in lines] == ["4", None, None, "5"]
    assert [line["correct"] for line in lines] == [True, False, False, False]
    assert [line["agrees"] for line in lines] == [True, False, False, True]


def test_an_unusable_answer_of_the_teacher_agrees_with_nothing() -> None:
    written = [Answer("4", "4"), Answer("nothing", "nothing"), Answer("1", "1"), Answer("", None)]
    lines = score(EXAMPLES, written, "number", [None, "nothing", "1", None])
    assert [line["agrees"] for line in lines] == [False, False, True, False]
    assert [line["agrees"] for line in score(EXAMPLES, written, "number", None)] == [None] * 4


def test_choices_are_those_of_the_item() -> None:
    examples = [TaskExample("a", "?", "yes", ("yes", "no")), TaskExample("b", "?", "red", ("red", "blue"))]
    lines = score(examples, [Answer("yes", "yes"), Answer("yes", "yes")], "choice", ["no", "red"])
    assert [(line["parsed"], line["correct"], line["agrees"]) for line in lines] == [("yes", True, False), (None, False, False)]


@pytest.fixture
def request_(tmp_path: Path) -> EvalRequest:
    """A request for the teacher's rung: four items, of which the teacher got two right and left one without a label."""
    (tmp_path / "task").mkdir()
    write_examples(tmp_path / "task" / "test.jsonl", EXAMPLES)
    records = tmp_path / "records"
    records.mkdir()
    labels = ["4", "7", None, "0"]
    write_shard(
        shard_path(records, "test", 0),
        [TeacherRecord(e.id, "test", f"why Answer: {label}", "why", label, True, True) for e, label in zip(EXAMPLES, labels, strict=True)],
    )
    Records(rows={"test": 4}, parseable={"test": 3}, agreeing={"test": 2}).write(records)
    return EvalRequest(
        rung="teacher", runtime="records", model_folder=None, records_folder=str(records), task_folder=str(tmp_path / "task"),
        metric="number", part="solve", max_new_tokens=100, batch_size=2, timed_examples=3,
        out_folder=str(tmp_path / "out"), notes=["a remark"],
    )  # fmt: skip


def test_a_recorded_teacher_is_scored_on_its_records(request_: EvalRequest, tmp_path: Path) -> None:
    result = run(request_)
    assert EvalResult.read(tmp_path / "out") == result
    assert (result.runtime, result.device, result.num_items, result.num_correct, result.num_unparseable) == ("recorded", "none", 4, 2, 1)
    assert (result.examples_per_second, result.peak_memory_bytes, result.load_seconds, result.num_agreeing_with_teacher) == (
        None,
        None,
        None,
        None,
    )
    assert (result.weight_bytes, result.total_bytes, result.num_parameters) == (None, None, None)
    assert result.notes == ["a remark", "the answers are the teacher's records; no model was run"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [line["parsed"] for line in lines] == ["4", "7", None, "0"]
    assert lines[0] == {"id": "a", "answer": "why Answer: 4", "parsed": "4", "correct": True, "agrees": None}


@pytest.mark.parametrize(
    ("sharding", "runtime"),
    [
        ("recorded", "recorded"),
        ("endpoint", "endpoint"),
        ("vllm", "vllm"),
        ("replica", "deepspeed"),
        ("tensor", "deepspeed"),
        ("zero3", "deepspeed"),
    ],
)
def test_the_result_names_who_answered(request_: EvalRequest, tmp_path: Path, sharding: str, runtime: str) -> None:
    records = Records(rows={"test": 4}, parseable={"test": 3}, agreeing={"test": 2}, sharding=sharding)
    records.write(tmp_path / "records")
    assert run(request_).runtime == runtime


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every model that is opened is a parrot; what it was opened with."""
    opened: dict[str, Any] = {}

    def open_parrot(kind: str, folder: Path, **settings: Any) -> Parrot:
        opened.update(settings, kind=kind, folder=folder, runtime=Parrot())
        return opened["runtime"]

    monkeypatch.setattr(serving, "open_runtime", open_parrot)
    return opened


def test_a_live_teacher_is_scored_on_its_records_and_timed_on_its_model(
    request_: EvalRequest, parrot: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model" / "config.json").write_bytes(b"y" * 5)
    records = tmp_path / "records"
    Records(rows={}, parseable={}, agreeing={}, sharding="replica").write(records)
    result = run(replace(request_, model_folder=str(tmp_path / "model"), threads=3))
    assert (result.runtime, result.num_correct, result.device, result.weight_bytes, result.total_bytes) == ("deepspeed", 2, "cpu", 10, 15)
    assert parrot["kind"] == "transformers"
    assert parrot["threads"] == 3
    assert set(result.examples_per_second or {}) == {"1", "32"}
    assert result.peak_memory_bytes
    # Three timed items: one by one after a warm-up of one, then together after a warm-up of all, then the first token and all of each.
    assert [len(batch) for batch in parrot["runtime"].batches] == [1, 1, 1, 1, 3, 3, *[1, 1] * 3]
    assert result.first_token_seconds is not None
    assert result.token_seconds is not None
    assert result.first_token_seconds > 0 <= result.token_seconds


def test_a_model_is_scored_whole_and_then_timed(
    request_: EvalRequest, parrot: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    said = {"two and two": "2 + 2 Answer: 4", "half of five": "Answer: 2.5", "one": "1", "none": "Answer:"}
    monkeypatch.setattr(
        Parrot, "answer", lambda self, prompts, limit: [self.encode(said[_asked(self.decode(prompt))]) for prompt in prompts]
    )
    request = replace(
        request_, runtime="transformers", model_folder=str(tmp_path), records_folder=None, teacher_records_folder=request_.records_folder
    )
    result = run(request)
    assert (result.runtime, result.num_correct, result.num_unparseable, result.num_agreeing_with_teacher) == ("transformers", 2, 2, 1)
    assert (parrot["threads"], parrot["device"], parrot["dtype"]) == (2, "auto", "float32")


def _asked(prompt: str) -> str:
    return prompt.removeprefix("solve: ").split("\n")[0]


def test_on_a_gpu_the_peak_is_the_engines_or_unknown(
    request_: EvalRequest, parrot: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parrot, "device", "cuda")
    request = replace(request_, model_folder=str(tmp_path))
    assert run(request).peak_memory_bytes == 1234
    monkeypatch.setattr(Parrot, "peak_device_bytes", lambda self: None)
    result = run(request)
    assert result.peak_memory_bytes is None
    assert result.notes[1] == "peak memory is unknown: this engine does not tell how much GPU memory it holds"


def test_timing_stops_when_its_time_is_over(
    request_: EvalRequest, parrot: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by 1 s at each look: with 2 s, the second item ends the timing at batch 1."""
    monkeypatch.setattr(serving, "TIMED_SECONDS", 2.0)
    clock = iter(range(1000))
    monkeypatch.setattr(serving.time, "perf_counter", lambda: float(next(clock)))
    result = run(replace(request_, model_folder=str(tmp_path)))
    assert result.examples_per_second == {"1": 1 / 3, "32": 3 / 2}
    assert [len(batch) for batch in parrot["runtime"].batches] == [1, 1, 3, 3, 1, 1]


def test_a_model_is_timed_alone(request_: EvalRequest, parrot: dict[str, Any], tmp_path: Path) -> None:
    asked = replace(request_, runtime="transformers", model_folder=str(tmp_path))
    path, out = tmp_path / "request.json", tmp_path / "serving.json"
    asked.write(path)
    assert main([str(path), str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["examples_per_second"]) == {"1", "32"}
    assert found["latency"]["first_token_seconds"] > 0
    assert not (Path(asked.out_folder) / "answers.jsonl").exists()
    with pytest.raises(ValueError, match="the answers are records, and no model serves them"):
        timed(request_)


def test_engines_built_for_cpus_take_a_gpu_where_they_can() -> None:
    assert [device_for(kind, "cuda") for kind in ("transformers", "compressed_tensors")] == ["cuda", "cuda"]
    assert [device_for(kind, "cuda") for kind in ("ctranslate2", "llama_cpp", "onnx")] == ["auto", "auto", "auto"]
    assert device_for("onnx", "cpu") == "cpu"


def test_peak_memory_is_what_the_kernel_counts() -> None:
    import resource

    before = peak_resident_bytes()
    block = bytearray(64 << 20)
    for i in range(0, len(block), 4096):
        block[i] = 1
    held = peak_resident_bytes()
    assert before <= held
    assert held >= 64 << 20
    assert held == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.02)


def test_model_bytes_counts_weights_apart(tmp_path: Path) -> None:
    for name, size in (("model-1.safetensors", 100), ("model-2.safetensors", 20), ("config.json", 7)):
        (tmp_path / name).write_bytes(b"0" * size)
    assert model_bytes(tmp_path) == (120, 127)
    (tmp_path / "model.bin").write_bytes(b"0" * 3)
    assert model_bytes(tmp_path) == (123, 130)


def test_a_request_survives_its_file_and_names_the_process(request_: EvalRequest, tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    request_.write(path)
    assert EvalRequest.read(path) == request_
    assert command(path) == [sys.executable, "-m", "train.evaluate", str(path)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records_folder": None}, "runtime is records, but records_folder is null: name the folder of the teacher's records"),
        ({"runtime": "ctranslate2"}, "runtime is ctranslate2, but model_folder is null: name the folder of the model"),
        ({"task_folder": "nowhere"}, "nowhere/test.jsonl does not exist: prepare the task first"),
    ],
)
def test_a_request_that_does_not_fit_ends_in_one_line(
    request_: EvalRequest, change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(request_, **change).write(tmp_path / "request.json")
    assert main([str(tmp_path / "request.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "artifact.json").exists()


def test_errors_of_the_request_and_of_its_inputs(request_: EvalRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "request.json"
    assert main([]) == 2
    assert capsys.readouterr().err == "usage: python -m train.evaluate REQUEST.json [SERVING.json]\n"
    assert main([str(path)]) == 1
    assert f"error: {path} is not an evaluation request: " in capsys.readouterr().err
    path.write_text('{"rung": "x"}')
    assert main([str(path)]) == 1
    assert "missing" in capsys.readouterr().err
    (tmp_path / "task" / "test.jsonl").write_text("")
    request_.write(path)
    assert main([str(path)]) == 1
    assert "holds no examples: an empty test split cannot be scored; give task.test rows" in capsys.readouterr().err


def test_records_of_other_items_are_refused(request_: EvalRequest, tmp_path: Path) -> None:
    write_examples(tmp_path / "task" / "test.jsonl", [*EXAMPLES, TaskExample("e", "more", "1")])
    with pytest.raises(RuntimeError, match=r"4 records for 5 examples \(1 missing, 0 of other examples\)"):
        run(request_)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="device is cuda, but torch finds no GPU: choose cpu or auto"):
        TransformersRuntime(tmp_path, device="cuda")


def test_a_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no stepdown.json: it is not a model folder that stepdown made"):
        open_runtime("transformers", tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"is not a CTranslate2 model \(it needs model.bin and a vocabulary\): run deploy"):
        open_runtime("ctranslate2", tmp_path, device="cpu")


def test_the_stage_and_its_runtimes_import_no_torch() -> None:
    program = "import sys, train.evaluate, train.runtimes, train.deploy.stage; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())
