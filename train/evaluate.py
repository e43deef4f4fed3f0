"""The evaluate stage: one rung of the ladder on the test split, in a fresh process, so that its memory is its own.

    python -m train.evaluate REQUEST.json [SERVING.json]

The request is an `EvalRequest` in JSON. `answers.jsonl` and then `artifact.json` appear in its `out_folder`; with a second file nothing is
scored, and what serving the model takes is written there. A deployed model is served without torch in the process: nothing here imports it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from data.config import Metric
from data.examples import TaskExample, read_examples
from data.prompts import Part, label_of
from train.artifacts import EvalResult, Records, write_json
from train.progress import StageProgress
from train.runtimes import Device, Runtime, RuntimeKind, answers, model_bytes
from train.scoring import equal, parse_answer
from train.serving import Serving, load, measure
from train.signals import die_with_parent
from train.told import status_of

ANSWERS = "answers.jsonl"
REQUEST = "request.json"
"""Lies in the out_folder of what was evaluated."""


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What to measure; paths are text, so that the request is plain JSON."""

    rung: str
    runtime: RuntimeKind | Literal["records"]
    """records: the answers stand in the teacher's records already."""
    model_folder: str | None
    """The model to load; with `records` it is only timed (a teacher that fits one device)."""
    records_folder: str | None
    """The records that answer; only with runtime `records`."""
    task_folder: str
    """Where the task stage wrote test.jsonl."""
    metric: Metric
    part: Part
    """predict: the model writes the label; solve: a rationale and then the label."""
    max_new_tokens: int
    batch_size: int
    timed_examples: int
    out_folder: str
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the transformers runtime; a deployed model has its own."""
    threads: int = 0
    """CPU threads; 0: OMP_NUM_THREADS, or all that this process may use. Both runtimes get the same number."""
    teacher_records_folder: str | None = None
    """The teacher's records, for agreement; None where the rung is the teacher."""
    num_parameters: int | None = None
    notes: list[str] = field(default_factory=list)
    """Remarks to hand on into the result."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The request in a JSON file.

        Raises:
            ValueError: if a field is missing or unknown, or the fields do not fit one another.
        """
        try:
            request = cls(**json.loads(path.read_text()))
        except (TypeError, json.JSONDecodeError, FileNotFoundError) as error:
            raise ValueError(f"{path} is not an evaluation request: {error}") from error
        if request.runtime == "records" and request.records_folder is None:
            raise ValueError(f"{path}: runtime is records, but records_folder is null: name the folder of the teacher's records")
        if request.runtime != "records" and request.model_folder is None:
            raise ValueError(f"{path}: runtime is {request.runtime}, but model_folder is null: name the folder of the model")
        return request

    def write(self, path: Path) -> None:
        """Writes the request as JSON."""
        write_json(path, asdict(self))


@dataclass(frozen=True, slots=True)
class Answer:
    """What was written for one item, and the part of it that is the label (None where there is none)."""

    text: str
    label: str | None


def command(path: Path, serving: Path | None = None) -> list[str]:
    """The command line of a process that evaluates the request in the file `path`, or only writes what serving its model takes."""
    return [sys.executable, "-m", "train.evaluate", str(path), *([str(serving)] if serving else [])]


def run(request: EvalRequest) -> EvalResult:
    """Measures one rung; writes `answers.jsonl` and, last, `artifact.json` into the request's `out_folder`.

    Raises:
        ValueError: if an input is not what the request says.
        RuntimeError: if records lack an answer, or the device or a file cannot be used.
    """
    begin = time.monotonic()
    examples = _test_split(Path(request.task_folder))
    written, serving = _from_records(request, examples) if request.runtime == "records" else _from_model(request, examples)
    # The teacher's records are read only now: the memory measured above is that of serving.
    teacher = None if request.teacher_records_folder is None else _recorded(Path(request.teacher_records_folder), examples)
    lines = score(examples, written, request.metric, None if teacher is None else [answer.label for answer in teacher])
    folder = Path(request.out_folder)
    _write_answers(folder, lines)
    weight_bytes, total_bytes = model_bytes(Path(request.model_folder)) if request.model_folder is not None else (None, None)
    result = EvalResult(
        rung=request.rung,
        runtime=_answered_by(request),
        num_items=len(lines),
        num_correct=sum(line["correct"] is True for line in lines),
        num_unparseable=sum(line["parsed"] is None for line in lines),
        num_agreeing_with_teacher=None if teacher is None else sum(line["agrees"] is True for line in lines),
        num_parameters=request.num_parameters,
        weight_bytes=weight_bytes,
        total_bytes=total_bytes,
        examples_per_second=serving.examples_per_second,
        peak_memory_bytes=serving.peak_memory_bytes,
        device=serving.device,
        load_seconds=serving.load_seconds,
        first_token_seconds=serving.latency.first_token_seconds if serving.latency else None,
        token_seconds=serving.latency.token_seconds if serving.latency else None,
        seconds=time.monotonic() - begin,
        notes=[*request.notes, *serving.notes],
    )
    result.write(folder)
    return result


def score(
    examples: Sequence[TaskExample], written: Sequence[Answer], metric: Metric, teacher: Sequence[str | None] | None
) -> list[dict[str, str | bool | None]]:
    """One line an item: id, answer (raw), parsed (None: unusable), correct, and agrees (None where there is no teacher to agree with).

    Args:
        examples: the items.
        written: what was written for each.
        metric: how answers are read and compared.
        teacher: the teacher's label for each item, as it wrote it; nothing agrees with a missing or unusable one.
    """
    lines: list[dict[str, str | bool | None]] = []
    for i, (example, answer) in enumerate(zip(examples, written, strict=True)):
        parsed = None if answer.label is None else parse_answer(answer.label, metric, example.choices)
        agrees = None
        if teacher is not None:
            wanted = teacher[i]
            agrees = wanted is not None and equal(parsed, wanted, metric, example.choices)
        correct = equal(parsed, example.label, metric, example.choices)
        lines.append({"id": example.id, "answer": answer.text, "parsed": parsed, "correct": correct, "agrees": agrees})
    return lines


def _from_model(request: EvalRequest, examples: Sequence[TaskExample]) -> tuple[list[Answer], Serving]:
    assert request.runtime != "records"
    assert request.model_folder is not None, "EvalRequest.read lets no such request pass"
    runtime, load_seconds = _load(request, request.runtime)
    inputs = [example.input for example in examples]
    with StageProgress(f"{request.rung}: answering", len(inputs), "items") as progress:
        texts = answers(
            runtime, inputs, request.part, batch_size=request.batch_size, max_new_tokens=request.max_new_tokens, advance=progress.advance
        )
    return [Answer(text, label_of(text, request.part)) for text in texts], _measure(request, runtime, inputs, load_seconds)


def _from_records(request: EvalRequest, examples: Sequence[TaskExample]) -> tuple[list[Answer], Serving]:
    """The answers that stand in the records; the teacher's model, where it is given, is only timed."""
    serving = Serving(notes=("the answers are the teacher's records; no model was run",))
    if request.model_folder is not None:
        runtime, load_seconds = _load(request, "transformers")
        serving = _measure(request, runtime, [example.input for example in examples], load_seconds)
        note = "the answers are the teacher's records; speed and memory are those of plain transformers"
        serving = replace(serving, notes=(*serving.notes, note))
    assert request.records_folder is not None
    return _recorded(Path(request.records_folder), examples), serving


def _load(request: EvalRequest, kind: RuntimeKind) -> tuple[Runtime, float]:
    assert request.model_folder is not None, "EvalRequest.read lets no such request pass"
    return load(kind, Path(request.model_folder), device=request.device, dtype=request.dtype, threads=request.threads)


def _measure(request: EvalRequest, runtime: Runtime, inputs: Sequence[str], load_seconds: float) -> Serving:
    return measure(
        runtime,
        inputs[: request.timed_examples],
        request.part,
        max_new_tokens=request.max_new_tokens,
        load_seconds=load_seconds,
        title=f"{request.rung}: timing",
    )


def timed(request: EvalRequest) -> Serving:
    """Only what serving the model of a request takes; nothing is written.

    Raises:
        ValueError: if an input is not what the request says.
        RuntimeError: if the device or a file cannot be used.
    """
    if request.runtime == "records":
        raise ValueError(f"{request.rung}: the answers are records, and no model serves them")
    runtime, load_seconds = _load(request, request.runtime)
    return _measure(request, runtime, [example.input for example in _test_split(Path(request.task_folder))], load_seconds)


def _answered_by(request: EvalRequest) -> str:
    if request.runtime != "records":
        return request.runtime
    assert request.records_folder is not None
    # Where the teacher did not run in our processes, this is its source.
    sharding = Records.read(Path(request.records_folder)).sharding
    return "deepspeed" if sharding in ("replica", "tensor", "zero3") else sharding


def _test_split(task_folder: Path) -> list[TaskExample]:
    path = task_folder / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: prepare the task first")
    examples = list(read_examples(path))
    if not examples:
        raise ValueError(f"{path} holds no examples: an empty test split cannot be scored; give task.test rows")
    return examples


def _recorded(folder: Path, examples: Sequence[TaskExample]) -> list[Answer]:
    """What the teacher wrote for each test item."""
    from data.store import check_complete, read_records  # Arrow: not for a process that only serves

    records = read_records(folder, "test")
    check_complete(records, [example.id for example in examples], folder)
    return [Answer(record.text, record.label) for record in records]


def _write_answers(folder: Path, lines: Sequence[dict[str, str | bool | None]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{ANSWERS}"
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(folder / ANSWERS)


def main(arguments: Sequence[str]) -> int:
    """Evaluates the request named on the command line; the exit status. What a user can mend is told in one line."""
    if len(arguments) not in (1, 2):
        print("usage: python -m train.evaluate REQUEST.json [SERVING.json]", file=sys.stderr)
        return 2
    paths = [Path(argument) for argument in arguments]
    if len(paths) == 2:
        return status_of(lambda: write_json(paths[1], asdict(timed(EvalRequest.read(paths[0])))))
    return status_of(lambda: run(EvalRequest.read(paths[0])))


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
