from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.config import RationalesConfig
from data.examples import TaskExample
from data.records import TeacherRecord
from data.soft_labels import AnswerDistribution, Sampled, SoftLabels, TopK
from data.tasks import Task
from train import artifacts, models, trainer
from train.artifacts import Checkpoint
from train.config import LossConfig, RecoverConfig, ScratchModel, StudentConfig, TeacherConfig, TrainingConfig
from train.grids import Grid, matrices
from train.keepers import ModelFolders
from train.student import pruning, recovering, stage
from train.teacher import tune
from train.tokenization import train_tokenizer
from train.tracking import Tracker
from train.trainer import TrainingRun
from train.world import World

if TYPE_CHECKING:
    from train.learner import LiveTeacher

EXAMPLES = [TaskExample(f"e{n}", f"{n} + {n}?", str(2 * n)) for n in range(6)]
TASK = Task(EXAMPLES, EXAMPLES[:2], [])
SMALL = {"d_model": 16, "layers": 1, "heads": 2, "vocabulary": 300}
TOKENIZER = train_tokenizer(["0 + 1? 2345", "another text altogether"], 300)
ONE = np.ones(1, np.int32)
TOP_K = TopK(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
DRAWN = Sampled(ONE, ONE, ONE, np.zeros(1, np.float32), draws=1, temperature=1.0)
RECORDS = [TeacherRecord(e.id, "train", "", "why", e.label, parseable=True, agrees=True) for e in EXAMPLES]
ANSWERED = [replace(r, answers=AnswerDistribution((str(n), "0"), (0.75, 0.25))) for n, r in enumerate(RECORDS)]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a T5 and of a Llama with one tokenizer, which is not that of a student from scratch."""
    folders = {}
    for family in ("t5", "llama"):
        model = models.load_model(ScratchModel(from_scratch=family, **SMALL), TOKENIZER, seed=0, dtype=torch.float32)
        form = models.text_format(TOKENIZER, models.family_of(model), max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)
        folders[family] = str(tmp_path_factory.mktemp(family) / "model")
        models.save_model(model, TOKENIZER, form, Path(folders[family]))
    return folders


@dataclass(frozen=True)
class Handed:
    """What the stage hands to the training loop."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    run: TrainingRun
    counts: dict[str, int]
    live: LiveTeacher | None


def train(monkeypatch: pytest.MonkeyPatch, config: StudentConfig, inputs: stage.StudentInputs, records: list[TeacherRecord]) -> Handed:
    handed: list[Handed] = []

    def loop(
        model: Any, tokenizer: Any, run: TrainingRun, world: World, tracker: Any, counts: dict[str, int], live: LiveTeacher | None
    ) -> None:
        handed.append(Handed(tokenizer, model, run, counts, live))

    monkeypatch.setattr(stage, "read_records", lambda folder, split: records)
    monkeypatch.setattr(stage, "train_checkpoint", loop)

    def tracker(step: int) -> Tracker:
        raise AssertionError("nothing is trained here")

    world = World(0, 1, torch.device("cpu"))
    stage.run(config, config.loss, inputs, Path(), world, seed=0, title="train", open_tracker=tracker)
    return handed[0]


def learn(
    monkeypatch: pytest.MonkeyPatch,
    records: list[TeacherRecord],
    student: dict[str, Any] | str,
    teacher: str,
    served: str | None = None,
    source: Literal["records", "live"] = "records",
) -> TrainingRun:
    """A student that learns soft labels."""
    config = StudentConfig.model_validate({"model": student, "loss": {"soft": 0.5, "teacher": source}})
    return train(monkeypatch, config, stage.StudentInputs(TASK, Path(), RationalesConfig(), teacher, served), records).run


def on_tokens(soft: SoftLabels) -> list[TeacherRecord]:
    return [replace(record, label_soft=soft) for record in RECORDS]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_student_of_any_family_and_vocabulary_learns_answers(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    # The teacher is a name that only its server knows: nothing of it is opened.
    run = learn(monkeypatch, ANSWERED, {"from_scratch": family, **SMALL}, "some-large-model")
    assert [[s.weight for s in row.sequences] for row in run.rows] == [[None, None, 0.75, 0.25]] * 6


@pytest.mark.parametrize("soft", [TOP_K, DRAWN], ids=["top_k", "sampled"])
def test_distributions_over_tokens_need_the_teachers_vocabulary(
    monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str], soft: SoftLabels
) -> None:
    with pytest.raises(ValueError, match=r"^student\.loss\.soft needs one vocabulary, but \d+ tokens differ"):
        learn(monkeypatch, on_tokens(soft), {"from_scratch": "t5", **SMALL}, teachers["t5"])
    run = learn(monkeypatch, on_tokens(soft), teachers["t5"], teachers["t5"])
    assert [row.sequences[0].soft is not None for row in run.rows] == [True] * 6


@pytest.mark.parametrize("soft", [TOP_K, DRAWN], ids=["top_k", "sampled"])
def test_distributions_over_tokens_need_the_teachers_family(
    monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str], soft: SoftLabels
) -> None:
    with pytest.raises(ValueError, match="but the teacher is decoder_only and the student encoder_decoder") as raised:
        learn(monkeypatch, on_tokens(soft), teachers["t5"], teachers["llama"])
    assert "set teacher.soft_labels.format to choices or answers" in str(raised.value)


def test_the_tokens_of_a_server_are_those_of_the_tokenizer_named_for_it(monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str]) -> None:
    run = learn(monkeypatch, on_tokens(TOP_K), teachers["llama"], "some-large-model", teachers["llama"])
    assert len(run.rows) == 6
    with pytest.raises(ValueError, match="but the teacher is decoder_only and the student encoder_decoder"):
        learn(monkeypatch, on_tokens(TOP_K), teachers["t5"], "some-large-model", teachers["llama"])
    with pytest.raises(ValueError, match=r"^student\.loss\.soft needs one vocabulary"):
        learn(monkeypatch, on_tokens(TOP_K), {"from_scratch": "llama", **SMALL}, "some-large-model", teachers["llama"])
    with pytest.raises(ValueError, match=r"^teacher\.endpoint\.tokenizer is 'nowhere/'"):
        learn(monkeypatch, on_tokens(TOP_K), teachers["llama"], "some-large-model", "nowhere/")


def test_no_soft_label_at_all_is_told(monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str]) -> None:
    records = [*RECORDS[:4], *(replace(record, parseable=False) for record in RECORDS[4:])]
    with pytest.raises(ValueError, match=r"no row has soft labels; 4 of 6 records hold a usable answer\. .* set teacher\.soft_labels\.on"):
        learn(monkeypatch, records, teachers["t5"], teachers["t5"])


# ----- a live teacher -----


def test_a_live_teacher_is_handed_on_and_stored_soft_labels_stay_where_they_are(
    monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str]
) -> None:
    config = StudentConfig(model=teachers["t5"], loss=LossConfig(soft=0.5, teacher="live"))
    inputs = stage.StudentInputs(TASK, Path(), RationalesConfig(), teachers["t5"])
    handed = train(monkeypatch, config, inputs, on_tokens(TOP_K))
    assert handed.live is not None
    theirs, ours = handed.live.model.state_dict(), handed.model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert handed.live.model is not handed.model
    assert not handed.live.model.training
    assert not any(parameter.requires_grad for parameter in handed.live.model.parameters())
    assert all(sequence.soft is None for row in handed.run.rows for sequence in row.sequences)
    # Answers are no targets either: the teacher itself says how likely each token is.
    answered = train(monkeypatch, config, inputs, ANSWERED).run
    assert [[s.weight for s in row.sequences] for row in answered.rows] == [[None, None]] * 6
    assert train(monkeypatch, StudentConfig(model=teachers["t5"]), inputs, RECORDS).live is None


def test_a_live_teacher_needs_a_student_of_its_vocabulary_and_family(monkeypatch: pytest.MonkeyPatch, teachers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^student\.loss\.soft needs one vocabulary, but \d+ tokens differ"):
        learn(monkeypatch, RECORDS, {"from_scratch": "t5", **SMALL}, teachers["t5"], source="live")
    with pytest.raises(ValueError, match="but the teacher is decoder_only and the student encoder_decoder") as raised:
        learn(monkeypatch, RECORDS, teachers["t5"], teachers["llama"], source="live")
    assert "set student.loss.teacher to records and teacher.soft_labels.format to choices or answers" in str(raised.value)


# ----- one task -----

ONE_TASK: dict[str, Any] = {"model": {"from_scratch": "t5", **SMALL}, "single_task": True, "loss": LossConfig(label=1, rationale=0)}


def recorded(**knobs: Any) -> stage.StudentInputs:
    return stage.StudentInputs(TASK, Path(), RationalesConfig.model_validate(knobs), None)


def written(label: str, *, agrees: bool = True) -> TeacherRecord:
    return TeacherRecord(EXAMPLES[0].id, "validation", "", "why", label, parseable=True, agrees=agrees)


@pytest.mark.parametrize(
    ("targets", "record", "expected"),
    [
        ("gold", written("0 + 0"), "gold"),
        ("teacher", written("0 + 0"), "teacher"),
        ("teacher", written("0 + 0", agrees=False), "gold"),
        ("teacher", None, "gold"),
    ],
)
def test_who_learns_the_teachers_labels_is_tried_by_its_words(
    targets: str, record: TeacherRecord | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = replace(recorded(), validation_records={} if record is None else {EXAMPLES[0].id: record})
    two_tasks = {**ONE_TASK, "single_task": False, "loss": LossConfig(), "targets": targets}
    handed = train(monkeypatch, StudentConfig(**two_tasks), inputs, RECORDS)
    found = [handed.tokenizer.decode(row.sequences[0].target_ids, skip_special_tokens=True).strip() for row in handed.run.validation]
    assert found == [{"gold": EXAMPLES[0].label, "teacher": "0 + 0"}[expected], EXAMPLES[1].label]


def test_a_single_task_student_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = replace(recorded(), validation_records={EXAMPLES[0].id: written(EXAMPLES[0].label)})
    handed = train(monkeypatch, StudentConfig(**ONE_TASK), inputs, RECORDS)
    assert handed.run.text_format.part == "solve"
    assert [(len(row.sequences), row.sequences[0].given) for row in handed.run.rows] == [(1, 0)] * 6
    assert (handed.counts["rows"], handed.counts["rationale_rows"]) == (6, 6)
    first, second = (row.sequences[0] for row in handed.run.validation)
    # The first has a rationale; of the second the mark alone is given. What is asked is a digit and the end.
    assert first.given > second.given > 0
    assert first.target_ids[: first.given][-second.given :] == second.target_ids[: second.given]
    assert [len(s.target_ids) - s.given for s in (first, second)] == [2, 2]
    two_tasks = train(monkeypatch, StudentConfig(**{**ONE_TASK, "single_task": False}), recorded(), RECORDS)
    assert two_tasks.run.text_format.part == "predict"


def test_a_single_task_student_without_a_rationale_to_learn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    disagreeing = [replace(record, agrees=False) for record in RECORDS]
    told = "but no record has a rationale that teacher.rationales.keep lets pass; loosen keep"
    with pytest.raises(ValueError, match=f"^student.single_task is true, {told}$"):
        train(monkeypatch, StudentConfig(**ONE_TASK), recorded(keep="agreeing"), disagreeing)
    with pytest.raises(ValueError, match=f"^student.loss.rationale has a weight, {told}$"):
        train(monkeypatch, StudentConfig(model=ONE_TASK["model"]), recorded(keep="agreeing"), disagreeing)
    with pytest.raises(ValueError, match=r"^the student has no row to learn: teacher\.rationales\.keep with drop_rows"):
        train(monkeypatch, StudentConfig(**ONE_TASK), recorded(keep="agreeing", drop_rows=True), disagreeing)


# ----- a share of the rows, a seed of one's own -----


def test_all_arms_learn_the_same_share_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [ONE_TASK, {**ONE_TASK, "single_task": False}, {"model": ONE_TASK["model"]}]
    knobs = [{**arm, "seed": seed} for arm in arms for seed in (None, 9)]
    shares = [
        [train(monkeypatch, StudentConfig(**arm, data_fraction=fraction), recorded(), RECORDS) for arm in knobs] for fraction in (0.34, 1.0)
    ]
    ids = [[[row.id for row in handed.run.rows] for handed in share] for share in shares]
    assert all(found == ids[0][0] and len(found) == 2 for found in ids[0])
    assert all(found == [example.id for example in EXAMPLES] for found in ids[1])
    assert {(handed.counts["rows"], handed.counts["rows_available"]) for handed in shares[0]} == {(2, 6)}


def test_the_students_seed_is_of_its_weights_and_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out, same, other = (train(monkeypatch, StudentConfig(**ONE_TASK, seed=seed), recorded(), RECORDS) for seed in (None, 0, 9))
    assert [handed.run.seed for handed in (left_out, same, other)] == [0, 0, 9]
    weights = [handed.model.get_input_embeddings().weight for handed in (left_out, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# ----- what it costs -----


class Clock:
    """In place of the module `time`."""

    now = 5000.0

    def monotonic(self) -> float:
        return self.now


def student(prune: dict[str, Any] | None = None) -> StudentConfig:
    return StudentConfig.model_validate({"model": {"from_scratch": "llama", **SMALL}, "learning_rate": 1e-3, "prune": prune})


def checkpoint(seconds: float) -> Checkpoint:
    return Checkpoint("decoder_only", 1, 1, 1, 1, {}, {}, 64, 8, 32, seconds=seconds)


@pytest.mark.parametrize(
    ("name", "prune", "expected"),
    [
        ("tune", None, 1010.0),
        ("train", None, 1010.0),
        ("recover", None, 2010.0),
        ("prune", {"method": "magnitude", "fraction": 0.5, "epochs": 0}, 1000.0),
        ("prune", {"method": "magnitude", "fraction": 0.5, "epochs": 1}, 1010.0),
        ("prune", {"method": "neuron", "fraction": 0.5, "epochs": 1, "schedule": "cubic"}, 2010.0),
    ],
    ids=["tune", "train", "recover", "one-shot", "zeros", "neurons little by little"],
)
def test_seconds_are_those_from_the_first_load_to_what_is_left_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teachers: dict[str, str], name: str, prune: dict[str, Any] | None, expected: float
) -> None:
    """A load takes 1,000 seconds here, a training 10."""
    clock = Clock()

    def trains(model: Any, tokenizer: Any, run: TrainingRun, *others: Any, **named: Any) -> Checkpoint:
        assert run.began == 5000
        clock.now += 10
        models.save_model(model, tokenizer, run.text_format, run.folder / "model")
        return checkpoint(clock.now - run.began)

    def slow(load: Any) -> Any:
        def loads(*arguments: Any, **named: Any) -> Any:
            clock.now += 1000
            return load(*arguments, **named)

        return loads

    monkeypatch.setattr(stage, "read_records", lambda folder, split: RECORDS)
    for module, loader in ((tune, "load_model"), (stage, "load_student"), (recovering, "load_folder"), (pruning, "load_folder")):
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module, "train_checkpoint", trains)
        monkeypatch.setattr(module, loader, slow(getattr(module, loader)))
    monkeypatch.setattr(artifacts, "time", clock)
    config, world = student(prune), World(0, 1, torch.device("cpu"))
    inputs, source = stage.StudentInputs(TASK, Path(), RationalesConfig(), teachers["llama"]), Path(teachers["llama"]).parent
    common: dict[str, Any] = {"seed": 0, "open_tracker": None}

    def grids(model: PreTrainedModel) -> dict[str, Grid]:
        return {name: Grid("signed", 4, 16) for name in matrices(model)}

    if name == "tune":
        teacher = TeacherConfig.model_validate({"source": "deepspeed", "model": {"from_scratch": "llama", **SMALL}, "tune": {}})
        made = tune.run(teacher, TASK, tmp_path, world, solved=False, **common)
    elif name == "train":
        made = stage.run(config, config.loss, inputs, tmp_path, world, title="", **common)
    elif name == "recover":
        settings = RecoverConfig(epochs=1, loss=LossConfig())
        made = recovering.run(config, settings, inputs, source, tmp_path, world, grids_of=grids, title="", **common)
    else:
        made = pruning.run(config, config.loss, inputs, checkpoint(77.0), source, tmp_path, world, **common)
    assert made.seconds == expected


def test_seconds_hold_the_writing_of_the_best_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teachers: dict[str, str]) -> None:
    clock = Clock()

    def finishes(keeper: ModelFolders, step: int) -> None:
        clock.now += 100
        (keeper.folder / "model").mkdir()

    monkeypatch.setattr(trainer, "train", lambda *others, **named: trainer.Trained(1, trainer.Best(), 7.0))
    monkeypatch.setattr(ModelFolders, "finish", finishes)
    for module in (trainer, artifacts):
        monkeypatch.setattr(module, "time", clock)
    model, tokenizer, form = models.load_folder(Path(teachers["llama"]), dtype=torch.float32)
    run = TrainingRun([], [], form, TrainingConfig(epochs=1, batch_size=8, learning_rate=1e-3), LossConfig(), 0, tmp_path, "train")
    made = trainer.train_checkpoint(model, tokenizer, run, World(0, 1, torch.device("cpu")), lambda step: None, {})  # type: ignore[arg-type, return-value]
    assert made.seconds == 107
