"""The figures of a report: every rung of the ladder, what it cost and what it gained, from the files that the stages left.

`stepdown compare RUN RUN` sets two evaluations against each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.examples import read_examples
from launch import report_html as words
from launch.samples import Written, first_of_each
from train.artifacts import Checkpoint, DeployedModel, EvalResult, Records, TaskFiles
from train.deploy.targets import TARGETS, target_of
from train.significance import mcnemar, wilson

TEACHER = "teacher"
LEVEL = 0.05
"""A paired test below this p-value is called significant."""
SAMPLES = 4
"""How many right and how many wrong sample answers are shown."""
_UNPARSEABLE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage of the run took, or took when it ran, where its result was used again."""

    name: str
    seconds: float
    processes: int
    skipped: bool
    made: str


@dataclass(frozen=True, slots=True)
class StagePeak:
    """The most memory of one process, as planned and as measured."""

    stage: str
    device: str
    processes: int
    layout: str
    planned_bytes: int | None
    """None on a CPU, as plans count a GPU's memory, and where the plan does not know the work."""
    measured_bytes: int
    ratio: float | None
    """Measured over planned."""


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """The files and facts that a report is built from."""

    name: str
    run_folder: Path
    student: str
    """The rung of the student itself; those between the teacher and it are its baselines."""
    rungs: list[Path]
    """Folders of finished evaluations in the order of the ladder; each holds artifact.json and answers.jsonl."""
    stages: list[StageCost]
    task: TaskFiles
    records: Records | None
    checkpoints: dict[str, Path]
    """Stage folder of each trained model: artifact.json and log.jsonl."""
    deployed: dict[str, Path]
    """Stage folder of each deployed model."""
    config: dict[str, Any]
    provenance: dict[str, Any]
    test_file: Path | None = None
    """The canonical test examples; the sample answers show their inputs and labels."""
    written: list[Written] = field(default_factory=list)
    """Samples of what the teacher wrote."""
    memory: list[StagePeak] = field(default_factory=list)
    """What stages were planned to hold and held."""


@dataclass(frozen=True, slots=True)
class Paired:
    """One rung against another on the same items."""

    against: str
    difference: float
    """Accuracy less the other's, as a share."""
    gained: int
    lost: int
    p_value: float

    @property
    def reading(self) -> str:
        """Whether the difference is more than chance would give."""
        return "significant" if self.p_value < LEVEL else "not significant"

    @property
    def verdict(self) -> str:
        """The test in words."""
        counts = f"{words.points(self.difference)} points, {self.gained} gained, {self.lost} lost"
        return f"{counts}, exact McNemar {words.p_equals(self.p_value)}: {self.reading} at {100 * LEVEL:g} %"


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of the ladder: what was measured (None where it was not) and what follows from it."""

    measured: EvalResult
    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95 % interval of the accuracy."""
    agreement: float | None
    """Share of the items with an answer of the teacher on which the rung agrees with it."""
    fp32_ratio: float | None
    """Bytes of its weights over those of the student's fp32 checkpoint."""
    before: Paired | None
    """Against the rung before."""
    baselines: list[Paired]
    """The student: against each of its baselines."""
    student: Paired | None
    """A rung after the student: against the student."""
    same_engine: Paired | None
    """A quantized rung: against the unquantized rung of the same engine."""
    changed: float | None = None
    """A file to ship: share of the items that it answers otherwise than the student before it was rounded."""

    @property
    def name(self) -> str:
        """The rung's name on the ladder."""
        return self.measured.rung

    @property
    def tests(self) -> list[Paired]:
        """Its paired tests, each pair once."""
        return list({test.against: test for test in (self.before, *self.baselines, self.student, self.same_engine) if test}.values())


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of one split of the task, and what the teacher wrote for them."""

    name: str
    rows: int | None
    rejected: int | None
    teacher_rows: int | None
    parseable: int | None
    agreeing: int | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One test item and what every rung answered."""

    id: str
    input: str | None
    label: str | None
    answers: dict[str, str | None]
    correct: dict[str, bool]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the report says, as figures."""

    name: str
    run_folder: str
    summary: list[str]
    warnings: list[str]
    rungs: list[Rung]
    stages: list[StageCost]
    seconds: float
    """Of the stages that ran, not of those whose result was used again."""
    splits: list[Split]
    records: Records | None
    trained: dict[str, Checkpoint]
    logs: dict[str, list[dict[str, float]]]
    """Lines of each trained model's log, in the order of their steps."""
    deployed: dict[str, DeployedModel]
    samples: list[Sample]
    written: list[Written]
    memory: list[StagePeak]
    config: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations of the same items."""

    a: str
    b: str
    num_items: int
    num_correct_a: int
    num_correct_b: int
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    paired: Paired
    """b against a."""

    def __str__(self) -> str:
        """Two lines of accuracies and one of the test."""
        return "\n".join(
            [
                f"a: {_accuracy_words(self.num_correct_a, self.num_items, self.interval_a)}: {self.a}",
                f"b: {_accuracy_words(self.num_correct_b, self.num_items, self.interval_b)}: {self.b}",
                f"b against a: {self.paired.verdict}",
            ]
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    answer: str | None
    correct: bool
    agrees: bool | None


@dataclass(frozen=True, slots=True)
class _Evaluation:
    folder: Path
    result: EvalResult
    answers: dict[str, _Answer]


# ---------------------------------------------------------------- figures


def build(inputs: ReportInputs) -> Report:
    """Reads the files of a run and works out the figures.

    Raises:
        RuntimeError: if a rung is missing, contradicts itself, stands twice on the ladder or was scored on other items than the rest.
    """
    evaluations = [_read_evaluation(folder) for folder in inputs.rungs]
    _check_ladder(evaluations)
    deployed = {name: DeployedModel.read(folder) for name, folder in inputs.deployed.items()}
    fp32_bytes = _fp32_bytes(evaluations, deployed, inputs.student)
    rungs = [_rung(i, evaluations, inputs.student, fp32_bytes, inputs.deployed) for i in range(len(evaluations))]
    trained = {name: Checkpoint.read(folder) for name, folder in inputs.checkpoints.items()}
    return Report(
        name=inputs.name,
        run_folder=str(inputs.run_folder),
        summary=_summary(rungs, inputs.student),
        warnings=_warnings(inputs, rungs, trained),
        rungs=rungs,
        stages=list(inputs.stages),
        seconds=sum(stage.seconds for stage in inputs.stages if not stage.skipped),
        splits=_splits(inputs.task, inputs.records),
        records=inputs.records,
        trained=trained,
        logs={name: _read_log(folder / "log.jsonl") for name, folder in inputs.checkpoints.items()},
        deployed=deployed,
        samples=_samples(evaluations, inputs.test_file),
        written=list(inputs.written),
        memory=list(inputs.memory),
        config=_plain(inputs.config),
        provenance=_plain(inputs.provenance),
    )


def compare(a: Path, b: Path) -> Comparison:
    """The paired test of two evaluation folders on the same items.

    Raises:
        ValueError: if they were scored on different items; it says how many they share.
        RuntimeError: if one of them is not a finished evaluation.
    """
    first, second = _read_evaluation(a), _read_evaluation(b)
    if first.answers.keys() != second.answers.keys():
        shared = len(first.answers.keys() & second.answers.keys())
        raise ValueError(
            f"{a} and {b} were scored on different items: they share {shared} of {len(first.answers)} and {len(second.answers)}; "
            "compare evaluations of one test split"
        )
    num_items, correct_a, correct_b = first.result.num_items, first.result.num_correct, second.result.num_correct
    return Comparison(
        a=f"{first.result.rung} in {a}",
        b=f"{second.result.rung} in {b}",
        num_items=num_items,
        num_correct_a=correct_a,
        num_correct_b=correct_b,
        interval_a=wilson(correct_a, num_items),
        interval_b=wilson(correct_b, num_items),
        paired=_paired(second, first),
    )


def _read_evaluation(folder: Path) -> _Evaluation:
    result = EvalResult.read(folder)
    path = folder / "answers.jsonl"
    if not path.is_file():
        raise RuntimeError(f"{folder} has no answers.jsonl: run the evaluation again")
    answers: dict[str, _Answer] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            item, answer = values["id"], _Answer(values["answer"], values["correct"], values["agrees"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise RuntimeError(f"{path}, line {number} is not an answer ({error!r}): run the evaluation again") from error
        if item in answers:
            raise RuntimeError(f"{path}, line {number}: item {item} stands twice: run the evaluation again")
        answers[item] = answer
    correct = sum(answer.correct for answer in answers.values())
    if not answers or (len(answers), correct) != (result.num_items, result.num_correct):
        raise RuntimeError(
            f"{folder}: artifact.json says {result.num_correct} of {result.num_items} right, answers.jsonl {correct} of {len(answers)}: "
            "run the evaluation again"
        )
    return _Evaluation(folder, result, answers)


def _check_ladder(evaluations: Sequence[_Evaluation]) -> None:
    if not evaluations:
        raise RuntimeError("no rung was evaluated: run the evaluation first")
    names = [e.result.rung for e in evaluations]
    for name in names:
        if names.count(name) > 1:
            raise RuntimeError(f"rung {name} stands {names.count(name)} times on the ladder: give each rung once")
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.answers.keys() != first.answers.keys():
            shared = len(first.answers.keys() & other.answers.keys())
            raise RuntimeError(
                f"rungs {first.result.rung} and {other.result.rung} were scored on different items: they share {shared} of "
                f"{len(first.answers)} and {len(other.answers)}; run the evaluation again ({other.folder})"
            )


def _fp32_bytes(evaluations: Sequence[_Evaluation], deployed: dict[str, DeployedModel], student: str) -> int | None:
    """Bytes of the student's fp32 weights: what the deployed models were made from, else the student's rung."""
    for model in deployed.values():
        return model.source_weight_bytes
    return next((e.result.weight_bytes for e in evaluations if e.result.rung == student), None)


def _changed(this: _Evaluation, evaluations: Sequence[_Evaluation], deployed: Collection[str]) -> float | None:
    source = next((other for other in reversed(evaluations) if other.result.rung not in (TEACHER, *deployed)), None)
    if source is None or this.result.rung not in deployed:
        return None
    return sum(answer.answer != source.answers[item].answer for item, answer in this.answers.items()) / len(this.answers)


def _rung(i: int, evaluations: Sequence[_Evaluation], student_name: str, fp32_bytes: int | None, deployed: Collection[str]) -> Rung:
    this = evaluations[i]
    result = this.result
    by_name = {e.result.rung: (position, e) for position, e in enumerate(evaluations)}
    student_at, student = by_name.get(student_name, (i, this))
    baselines = [e for e in evaluations[:i] if e.result.rung != TEACHER] if result.rung == student_name else []
    unquantized = _unquantized(result.rung, list(by_name))
    with_teacher = [answer.agrees for answer in this.answers.values() if answer.agrees is not None]
    return Rung(
        measured=result,
        accuracy=result.num_correct / result.num_items,
        interval=wilson(result.num_correct, result.num_items),
        agreement=sum(with_teacher) / len(with_teacher) if with_teacher else None,
        fp32_ratio=result.weight_bytes / fp32_bytes if result.weight_bytes and fp32_bytes else None,
        before=_paired(this, evaluations[i - 1]) if i else None,
        baselines=[_paired(this, baseline) for baseline in baselines],
        student=_paired(this, student) if i > student_at else None,
        same_engine=_paired(this, by_name[unquantized][1]) if unquantized else None,
        changed=_changed(this, evaluations, deployed),
    )


def _unquantized(name: str, names: Sequence[str]) -> str | None:
    """The rung of the same engine whose weights are not quantized, where `name` is a quantized one."""
    target = target_of(name)
    if target is None or not target.quantizes:
        return None
    of_engine = (other for other in TARGETS.values() if other.format == target.format and not other.quantizes)
    return next((other.name for other in of_engine if other.name in names), None)


def _paired(this: _Evaluation, other: _Evaluation) -> Paired:
    test = mcnemar([other.answers[item].correct for item in this.answers], [answer.correct for answer in this.answers.values()])
    return Paired(other.result.rung, (test.gained - test.lost) / len(this.answers), test.gained, test.lost, test.p_value)


def _splits(task: TaskFiles, records: Records | None) -> list[Split]:
    wrote = (records.rows, records.parseable, records.agreeing) if records else ({}, {}, {})
    names = list(dict.fromkeys([*task.rows, *task.rejected, *wrote[0]]))
    return [Split(name, task.rows.get(name), task.rejected.get(name), *(counts.get(name) for counts in wrote)) for name in names]


def _read_log(path: Path) -> list[dict[str, float]]:
    """Finite numbers of a training log by step; of a step logged twice (before and after a restart) the later values."""
    merged: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed while it wrote leaves half a line; the restart logs that step again
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
        if "step" in numbers:
            merged.setdefault(int(numbers["step"]), {}).update(numbers)
    return [merged[step] for step in sorted(merged)]


def _samples(evaluations: Sequence[_Evaluation], test_file: Path | None) -> list[Sample]:
    """The first items that the last rung gets right and the first that it gets wrong."""
    examples = {example.id: example for example in read_examples(test_file)} if test_file else {}
    last = evaluations[-1].answers
    chosen = first_of_each(((answer.correct, item) for item, answer in last.items()), SAMPLES)
    return [
        Sample(
            id=item,
            input=examples[item].input if item in examples else None,
            label=examples[item].label if item in examples else None,
            answers={e.result.rung: e.answers[item].answer for e in evaluations},
            correct={e.result.rung: e.answers[item].correct for e in evaluations},
        )
        for item in chosen
    ]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


# ---------------------------------------------------------------- sentences


def _accuracy_words(correct: int, num_items: int, interval: tuple[float, float]) -> str:
    return f"{correct:,} of {num_items:,} right ({words.percent(correct / num_items)}, 95 % interval {words.percent_range(interval)})"


def _summary(rungs: Sequence[Rung], student_name: str) -> list[str]:
    by_name = {rung.name: rung for rung in rungs}
    last, teacher = rungs[-1], by_name.get(TEACHER)
    text = f"{last.name}: {_accuracy_words(last.measured.num_correct, last.measured.num_items, last.interval)}"
    if teacher and teacher is not last and teacher.accuracy > 0:
        text += f", {words.percent(last.accuracy / teacher.accuracy)} of the teacher's accuracy"
    if last.measured.weight_bytes is not None:
        text += f", in {words.num_bytes(last.measured.weight_bytes)}"
        text += f" ({words.percent(last.fp32_ratio)} of the fp32 file)" if last.fp32_ratio is not None else ""
    sentences = [f"{text}."]
    baselines = by_name[student_name].baselines if student_name in by_name else []
    sentences += [f"{student_name} against {test.against}: {test.verdict}." for test in baselines]
    sentences += [f"{last.name} against {test.against}: {test.verdict}." for test in (last.student, last.same_engine) if test]
    return list(dict.fromkeys(sentences))


def _warnings(inputs: ReportInputs, rungs: Sequence[Rung], trained: dict[str, Checkpoint]) -> list[str]:
    texts = []
    if leaked := inputs.task.leaked:
        share = words.percent(leaked / inputs.task.rows["train"])
        texts.append(f"{leaked:,} training rows ({share}) have the input of a test row: trained rungs may remember its answer.")
    for split, num_rejected in inputs.task.rejected.items():
        if num_rejected:
            texts.append(f"{num_rejected:,} rows of {split} did not fit the task and were left out; rejected.jsonl says why.")
    for rung in rungs:
        unparseable = rung.measured.num_unparseable / rung.measured.num_items
        if unparseable >= _UNPARSEABLE_SHARE:
            texts.append(f"{rung.name}: {words.percent(unparseable)} of its answers could not be read and count as wrong.")
    for name, checkpoint in trained.items():
        cut = {key: value for key, value in checkpoint.counts.items() if "cut" in key and value}
        texts += [f"{name}: {value:,} {key.replace('_', ' ')} in training." for key, value in cut.items()]
    return texts
