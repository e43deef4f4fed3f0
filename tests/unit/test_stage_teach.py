from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from data.config import Metric, RationalesConfig, SoftLabelsConfig
from data.examples import TaskExample
from data.prompts import TextFormat
from data.records import TeacherRecord
from data.soft_labels import AnswerDistribution, SoftLabels, TopK
from data.store import CHUNK, MANIFEST, STORE, Part, missing_chunks, read_records, shard_path
from data.tasks import Task
from launch import worker
from launch.architecture import Architecture, assumed_architecture
from launch.config import Config
from launch.pipeline import Stage
from train.config import TeacherConfig, TrackingConfig
from train.engine import InferenceModel
from train.progress import StageProgress
from train.student import stage as student
from train.teacher import claims, stage, tally
from train.teacher.answers import Answering, Attach, reject_reason
from train.teacher.claims import Chunk, claimed, missing
from train.teacher.draws import record_key
from train.teacher.labelling import Labelling, over_choices
from train.teacher.live import Layout, Live
from train.teacher.opening import Recorded, open_prompts, tokenizer_hash
from train.teacher.recorded import record_of
from train.teacher.rounds import in_step, streamed
from train.teacher.score import Solution
from train.teacher.stage import TeacherInputs
from train.teacher.tally import Tally
from train.teacher.writing import Request, Written
from train.tokenization import train_tokenizer
from train.tracking import Tracker, read_log
from train.world import World

WORLD = World(0, 1, torch.device("cpu"))
SAMPLED = RationalesConfig(samples=3)


@dataclass
class Scripted:
    """A writer that says what it is told to: a text a sample, by the example's id and whether there is a hint."""

    says: dict[tuple[str, bool], list[str]]
    room: int = 1
    """Chunks that it takes before it answers the first."""
    asked: list[tuple[str, str | None, int]] = field(default_factory=list)
    calls: list[list[int]] = field(default_factory=list)
    """The numbers of requests of each chunk, call by call."""

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        self.asked.append((example.id, hint, key))
        return Request(key, text=f"{example.id} {'hint' if hint is not None else ''}")

    def write(self, work: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Written]]]:
        self.calls.append([])
        source, held = iter(work), list[tuple[int, Sequence[Request]]]()
        while True:
            while len(held) < self.room and (taken := next(source, None)) is not None:
                held.append(taken)
            if not held:
                return
            number, requests = held.pop()  # the last taken comes back first
            self.calls[-1].append(len(requests))
            yield number, self._answers(requests)

    def _answers(self, requests: Sequence[Request]) -> list[Written]:
        counts: dict[str, int] = {}
        found = []
        for request in requests:
            name, _, hint = request.text.partition(" ")
            texts = self.says[name, bool(hint)]
            found.append(Written(texts[counts.get(request.text, 0) % len(texts)], 10))
            counts[request.text] = counts.get(request.text, 0) + 1
        return found


def example(name: str, label: str = "4", choices: tuple[str, ...] = ()) -> TaskExample:
    return TaskExample(name, f"input of {name}", label, choices)


def answering(
    says: dict[tuple[str, bool], list[str]],
    config: RationalesConfig = SAMPLED,
    metric: Metric = "number",
    *,
    distributions: bool = False,
    attach: Attach | None = None,
    room: int = 1,
) -> tuple[Answering, Scripted]:
    writer = Scripted(says, room)
    return Answering(config, metric, writer, 7, distributions, attach), writer


def one(says: list[str], given: TaskExample, metric: Metric = "number", split: str = "train", **options: Any) -> TeacherRecord:
    config = RationalesConfig(samples=len(says)) if len(says) > 1 else RationalesConfig()
    maker, _ = answering({(given.id, False): says}, config, metric, **options)
    ((_, (record,)),) = streamed(maker, iter([Chunk(split, 0, [given])]))
    return record


# ----- what the samples say -----


def test_the_majority_label_is_kept_with_its_first_rationale_and_text() -> None:
    found = one(["a Answer: 3", "b Answer: 4", "c", "d Answer: 4.0"], example("e"))
    assert (found.text, found.rationale, found.label, found.votes, found.generated_tokens) == ("b Answer: 4", "b", "4", 2, 40)
    assert (found.parseable, found.agrees, found.rationalized) == (True, True, False)


def test_samples_without_an_answer_make_a_record_without_a_label() -> None:
    found = one(["on and on", "and on"], example("e"))
    assert (found.text, found.rationale, found.label, found.votes, found.parseable) == ("on and on", "on and on", None, 2, False)


def test_a_choice_is_counted_however_it_is_named() -> None:
    given = example("e", "red", ("blue", "red"))
    found = one(["a Answer: blue", "b Answer: (b)", "c Answer: red"], given, "choice", distributions=True)
    assert (found.label, found.votes, found.agrees) == ("(b)", 2, True)
    assert found.answers is not None
    assert dict(zip(found.answers.answers, found.answers.probabilities, strict=True)) == pytest.approx({"blue": 1 / 3, "red": 2 / 3})


def test_distributions_are_of_training_records_where_they_are_wanted() -> None:
    says = ["a Answer: 3", "b Answer: 4", "c Answer: 4", "d"]
    found = one(says, example("e"), distributions=True)
    assert found.answers is not None
    assert dict(zip(found.answers.answers, found.answers.probabilities, strict=True)) == pytest.approx({"3": 1 / 3, "4": 2 / 3})
    assert one(says, example("e")).answers is None
    assert one(says, example("e"), split="test", distributions=True).answers is None


def test_what_came_with_the_kept_text_is_attached_to_training_records_only() -> None:
    def attach(given: TaskExample, record: TeacherRecord, written: Written) -> TeacherRecord:
        return replace(record, answers=AnswerDistribution((given.id, written.text), (0.5, 0.5)))

    says = ["a Answer: 3", "b Answer: 4", "c Answer: 4"]
    assert one(says, example("e"), attach=attach).answers == AnswerDistribution(("e", "b Answer: 4"), (0.5, 0.5))
    assert one(says, example("e"), attach=attach, split="test").answers is None


@pytest.mark.parametrize(
    ("metric", "label", "choices", "reason"),
    [
        ("number", None, (), "no answer"),
        ("number", "four", (), "not a number"),
        ("expression", "8 /", (), "does not evaluate"),
        ("choice", "six", ("four", "five"), "not a choice"),
        ("text", " . ", (), "empty"),
        ("number", "5", (), None),
    ],
)
def test_a_reject_has_a_reason(metric: Metric, label: str | None, choices: tuple[str, ...], reason: str | None) -> None:
    record = record_of(example("e", "five" if choices else "4", choices), "train", metric, text="", rationale="", label=label)
    assert reject_reason(record, metric) == reason


# ----- asked again -----

RATIONALIZED = RationalesConfig(rationalize=True)
RIGHT, WRONG, MISSING, STUBBORN = (example(name) for name in ("right", "wrong", "missing", "stubborn"))
SAYS = {
    ("right", False): ["r Answer: 4"],
    ("wrong", False): ["w Answer: 5"],
    ("missing", False): ["m"],
    ("stubborn", False): ["s Answer: 5"],
    ("wrong", True): ["because Answer: 4"],
    ("missing", True): ["since Answer: 4"],
    ("stubborn", True): ["no Answer: 5"],
}


def test_a_hint_is_given_where_the_label_was_wrong_or_missing() -> None:
    maker, writer = answering(SAYS, RATIONALIZED)
    chunk = Chunk("train", 0, [RIGHT, WRONG, MISSING, STUBBORN])
    ((_, found),) = streamed(maker, iter([chunk]))
    assert [(r.rationale, r.label, r.agrees, r.rationalized, r.generated_tokens) for r in found] == [
        ("r", "4", True, False, 10),
        ("because", "4", True, True, 20),
        ("since", "4", True, True, 20),
        ("s", "5", False, False, 20),
    ]
    assert writer.asked[4:] == [(e.id, "4", record_key(7, "train", e.id, "hint")) for e in (WRONG, MISSING, STUBBORN)]
    assert writer.asked[0] == ("right", None, record_key(7, "train", "right", "sample", 0))


def test_test_records_never_see_the_gold_label() -> None:
    maker, writer = answering(SAYS, RATIONALIZED)
    ((_, found),) = streamed(maker, iter([Chunk("test", 0, [WRONG])]))
    assert (found[0].label, found[0].rationalized, len(writer.asked)) == ("5", False, 1)


def test_a_hinted_answer_without_a_rationale_replaces_nothing() -> None:
    maker, _ = answering({**SAYS, ("wrong", True): ["Answer: 4"]}, RATIONALIZED)
    ((_, (found,)),) = streamed(maker, iter([Chunk("train", 0, [WRONG])]))
    assert (found.label, found.rationalized, found.generated_tokens) == ("5", False, 20)


def test_a_rationalized_record_says_how_many_samples_gave_its_label_without_a_hint() -> None:
    config = RationalesConfig(rationalize=True, samples=3)
    says = {("wrong", False): ["a Answer: 5", "b Answer: 4", "c Answer: 5"], ("wrong", True): ["why Answer: 4"]}
    maker, _ = answering(says, config, distributions=True)
    ((_, (found,)),) = streamed(maker, iter([Chunk("train", 0, [WRONG])]))
    assert (found.rationale, found.votes, found.rationalized) == ("why", 1, True)
    assert found.answers is not None
    assert found.answers.answers[0] == "5"  # the distribution is that of the samples


def test_chunks_stream_and_hints_go_before_new_chunks() -> None:
    chunks = [Chunk("train", n, [e]) for n, e in enumerate((WRONG, RIGHT, MISSING, RIGHT))]
    for room in (1, 2, 9):
        maker, writer = answering(SAYS, RATIONALIZED, room=room)
        found = {chunk.number: records for chunk, records in streamed(maker, iter(chunks))}
        assert {n: (r.label, r.rationalized) for n, (r,) in found.items()} == {
            0: ("4", True),
            1: ("4", False),
            2: ("4", True),
            3: ("4", False),
        }
        assert sum(map(len, writer.calls)) == 6
    maker, writer = answering(SAYS, RATIONALIZED)
    assert [chunk.number for chunk, _ in streamed(maker, iter(chunks))] == [0, 1, 2, 3]
    assert len(writer.calls) == 1  # with room for one, no hint was left when the chunks ran out


def test_a_chunk_is_claimed_only_when_the_writer_has_room() -> None:
    taken = []

    def source() -> Iterator[Chunk]:
        for n in range(5):
            taken.append(n)
            yield Chunk("train", n, [RIGHT])

    maker, _ = answering(SAYS, RATIONALIZED, room=2)
    stream = streamed(maker, source())
    next(stream)
    assert taken == [0, 1]


@dataclass
class Stepping:
    """What `in_step` needs of a teacher: how many hints any process has."""

    elsewhere: int
    in_step: bool = True

    def most(self, number: int) -> int:
        return max(number, self.elsewhere)


@pytest.mark.parametrize(("given", "elsewhere", "calls"), [(WRONG, 0, [1, 1]), (WRONG, 5, [1, 1]), (RIGHT, 5, [1, 1]), (RIGHT, 0, [1])])
def test_in_step_a_process_without_hints_asks_something_again(given: TaskExample, elsewhere: int, calls: list[int]) -> None:
    maker, writer = answering(SAYS, RATIONALIZED)
    ((_, (found,)),) = in_step(maker, iter([Chunk("train", 0, [given])]), cast(InferenceModel, Stepping(elsewhere)))
    assert [call for group in writer.calls for call in group] == calls
    assert (found.label, found.rationalized) == ("4", given is WRONG)


# ----- which chunks -----

EXAMPLES = [example(str(n)) for n in range(11)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.store.CHUNK", 4)
    monkeypatch.setattr(claims, "CHUNK", 4)


def test_missing_chunks_have_their_examples(tmp_path: Path) -> None:
    shard_path(tmp_path, "train", 1).touch()
    found = missing(tmp_path, "train", EXAMPLES, WORLD)
    assert [(c.number, [e.id for e in c.examples]) for c in found] == [(0, ["0", "1", "2", "3"]), (2, ["8", "9", "10"])]
    assert missing(tmp_path, "test", [], WORLD) == []


def placed(rank: int, size: int, sharding: str) -> InferenceModel:
    return cast(InferenceModel, SimpleNamespace(in_step=sharding == "zero3", group_rank=rank, num_groups=size, group=None, is_writer=True))


CHUNKS = [Chunk("train", n, [example(str(n))]) for n in range(5)]


def test_in_step_each_takes_its_turn_and_one_without_a_chunk_repeats_one() -> None:
    turns = [[(c.number, c.kept) for c in claimed(CHUNKS, WORLD, placed(rank, 3, "zero3"))] for rank in range(3)]
    assert turns == [[(0, True), (3, True)], [(1, True), (4, True)], [(2, True), (3, False)]]


def test_alone_a_process_takes_every_chunk_once() -> None:
    assert list(claimed(CHUNKS, WORLD, placed(0, 1, "replica"))) == CHUNKS


def test_processes_share_one_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = WORLD.counter()
    monkeypatch.setattr(World, "counter", lambda _: counter)
    first, second = (claimed(CHUNKS, WORLD, placed(rank, 2, "replica")) for rank in range(2))
    order = [next(first).number, next(second).number, next(second).number, next(first).number, next(second).number]
    assert order == [0, 1, 2, 3, 4]
    assert next(first, None) is next(second, None) is None


def test_a_server_is_asked_by_the_main_process_alone() -> None:
    assert list(claimed(CHUNKS, WORLD, None)) == CHUNKS
    assert list(claimed(CHUNKS, World(1, 2, torch.device("cpu")), None)) == []


def test_a_counter_of_one_process_adds_up() -> None:
    first, second = WORLD.counter(), WORLD.counter()
    assert [first(2), first(0), second(5), first(3)] == [2, 2, 5, 5]


# ----- how it goes -----


def test_the_tally_tells_rates_time_left_and_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(tally, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None))
    notes: list[tuple[int, str]] = []
    monkeypatch.setattr(StageProgress, "advance", lambda self, amount, note: notes.append((amount, note)))
    config = TrackingConfig(wandb="disabled")
    with Tracker(tmp_path, config, group="g", job_type="teach", settings={}, enabled=True) as tracker:
        counted = Tally(WORLD, "number", 12, StageProgress("teach", 12, "records"), tracker, before=30)
        good = record_of(example("e"), "train", "number", text="", rationale="", label="4", generated_tokens=50)
        records = [good, good, replace(good, label=None, parseable=False), replace(good, label="x", parseable=False)]
        clock[0] += 2.0
        counted.add(records)
        clock[0] += 6.0
        counted.add(records)
        counted.add(records)
        counted.wait()
    assert notes[0] == (4, "2 records/s, 100 tokens/s; 1 no answer; 1 not a number")
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [38, 42]  # at most every few seconds, and at the end
    assert lines[0] == {
        "step": 38,
        "records": 38,
        "generated_tokens": 400,
        "records_per_second": 1.0,
        "tokens_per_second": 50.0,
        "seconds_left": 4.0,
        "unparseable": 4,
        "unparseable/no_answer": 2,
        "unparseable/not_a_number": 2,
    }


# ----- soft labels -----


class Asked:
    """A prompter of two tokens, and a scorer that notes what it is given."""

    def __init__(self, sums: Sequence[list[float]] = (), soft: SoftLabels | None = None) -> None:
        self.sums, self.soft, self.given = list(sums), soft, list[Any]()

    def prompt_ids(self, input: str, hint: str | None = None) -> tuple[int, ...]:
        assert hint is None
        return (1, len(input))

    def tokens(self, solutions: Sequence[Solution], keys: Sequence[int]) -> list[tuple[SoftLabels | None, SoftLabels | None]]:
        self.given.append((list(solutions), list(keys)))
        return [(self.soft, self.soft)] * len(solutions)

    def choices(self, contexts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        self.given.append((list(contexts), [list(c) for c in choices]))
        return self.sums


def form(family: Any) -> TextFormat:
    return TextFormat(family, eos_id=0, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=8)


def labelling(asked: Asked, config: SoftLabelsConfig, family: str = "decoder_only") -> Labelling:
    return Labelling(asked, cast(Any, asked), form(family), lambda text: [ord(c) for c in text.strip()], config, 7)


CHOICE = example("e", "b", ("b", "cc"))
SAID = record_of(CHOICE, "train", "choice", text="x", rationale="ra", label="b")
MARK = [ord(c) for c in "Answer:"]


def test_tokens_are_scored_at_the_gold_label_after_the_teachers_rationale() -> None:
    asked = Asked()
    labelling(asked, SoftLabelsConfig(format="sampled")).added(Chunk("train", 0, [CHOICE]), [SAID])
    assert asked.given == [([Solution([1, 10], [114, 97], MARK, [98, 0])], [record_key(7, "train", "e", "soft")])]


def test_choices_follow_prompt_rationale_and_mark() -> None:
    asked = Asked([[math.log(0.2), math.log(0.05)]])
    config = SoftLabelsConfig(format="choices")
    (found,) = labelling(asked, config).added(Chunk("train", 0, [CHOICE]), [SAID])
    assert asked.given == [([[1, 10, 114, 97, *MARK]], [[[98, 0], [99, 99, 0]]])]
    assert found.answers is not None
    assert found.answers.answers == ("b", "cc")
    assert list(found.answers.probabilities) == pytest.approx([0.8, 0.2])


def test_an_encoder_decoder_scores_what_precedes_a_choice_once_and_subtracts_it() -> None:
    asked = Asked([[-3.0, -3.0 + math.log(0.2), -3.0 + math.log(0.05)]])
    config = SoftLabelsConfig(format="choices")
    (found,) = labelling(asked, config, "encoder_decoder").added(Chunk("train", 0, [CHOICE]), [SAID])
    head = [114, 97, *MARK]
    assert asked.given == [([[1, 10]], [[head, [*head, 98, 0], [*head, 99, 99, 0]]])]
    assert found.answers is not None
    assert found.answers.answers == ("b", "cc")
    assert list(found.answers.probabilities) == pytest.approx([0.8, 0.2])


def test_what_follows_a_rationale_written_with_a_hint_gets_no_soft_label() -> None:
    hinted = replace(SAID, rationalized=True)
    chunk = Chunk("train", 0, [CHOICE, CHOICE])
    soft = TopK(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
    found = labelling(Asked(soft=soft), SoftLabelsConfig(on="both")).added(chunk, [SAID, hinted])
    assert [(r.rationale_soft, r.label_soft) for r in found] == [(soft, soft), (soft, None)]
    drawn = AnswerDistribution(("cc",), (1.0,))
    records = [SAID, replace(hinted, answers=drawn)]
    found = labelling(Asked([[-1.0, -1.0]] * 2), SoftLabelsConfig(format="choices")).added(chunk, records)
    assert [r.answers for r in found] == [AnswerDistribution(("b", "cc"), (0.5, 0.5)), drawn]


def test_the_softmax_over_choices_is_of_sums_or_means() -> None:
    assert over_choices(["a", "b"], [-2.0, -6.0], [1, 3], mean=True).probabilities == (0.5, 0.5)
    summed = over_choices(["a", "b"], [-2.0, -6.0], [1, 3], mean=False).probabilities
    assert list(summed) == pytest.approx([1 / (1 + math.exp(-4)), 1 / (1 + math.exp(4))])
    assert over_choices(["a", "b"], [-2000.0, -2000.0], [1, 1], mean=False).probabilities == (0.5, 0.5)


# ----- the stage, with a recorded teacher -----


def recorded(label: str = "{said}") -> TeacherConfig:
    return TeacherConfig(source="recorded", label=label, rationale="{why}")


def task() -> Task:
    rows = [TaskExample(str(n), f"{n}?", "4", fields={"said": "4" if n % 2 else "x", "why": f"w{n}"}) for n in range(11)]
    return Task(rows, [], rows[:3])


def run(folder: Path, config: TeacherConfig, out: Path) -> Any:
    inputs = TeacherInputs(task(), "number", None, None, config_file=out / "runs" / "r" / "config.yaml")
    with Tracker(out / "log", TrackingConfig(wandb="disabled"), group="g", job_type="t", settings={}, enabled=True) as tracker:
        return stage.run(config, inputs, folder, WORLD, seed=7, tracker=tracker)


def test_recorded_rows_become_a_store_that_knows_its_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "shared" / "teach-1"
    made = run(folder, recorded(), tmp_path)
    assert (made.rows, made.parseable, made.agreeing) == ({"train": 11, "test": 3}, {"train": 5, "test": 1}, {"train": 5, "test": 1})
    assert (made.unparseable, made.rationalized, made.mean_votes) == ({"not a number": 8}, {"train": 0, "test": 0}, 1.0)
    assert (made.sharding, made.tensor_degree, made.processes) == ("recorded", 1, 1)
    assert '"../../r/config.yaml"' in (folder / STORE).read_text()
    assert [r.rationale for r in read_records(folder, "train")] == [f"w{n}" for n in range(11)]


def test_a_second_run_writes_only_what_is_missing(tmp_path: Path) -> None:
    run(tmp_path / "s", recorded(), tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "s").glob("*.parquet")}
    shard_path(tmp_path / "s", "train", 1).unlink()
    (tmp_path / "s" / ".train-000001.parquet.123").write_bytes(b"half")
    assert missing_chunks(tmp_path / "s", "train", 11) == [1]
    run(tmp_path / "s", recorded(), tmp_path)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "s").iterdir() if p.suffix not in (".json",)}
    assert {name: content for name, (content, _) in after.items()} == {name: content for name, (content, _) in before.items()}
    assert [name for name, (_, time) in after.items() if before[name][1] != time] == ["train-000001.parquet"]


def test_parts_written_side_by_side_make_the_same_store(tmp_path: Path) -> None:
    run(tmp_path / "whole", recorded(), tmp_path)
    folder, rows = tmp_path / "parts", {"train": 11, "test": 3}
    inputs = TeacherInputs(task(), "number", None, None)
    tracker = Tracker(tmp_path / "log", TrackingConfig(wandb="disabled"), group="g", job_type="t", settings={}, enabled=False)
    for index, written in ((1, ["train-000001.parquet"]), (0, ["test-000000.parquet", "train-000000.parquet", "train-000001.parquet"])):
        folder.mkdir(exist_ok=True)
        (folder / ".train-000002.parquet.node9.7").write_bytes(b"another part's")
        stage.run_part(recorded(), inputs, folder, WORLD, Part(index, 3), seed=7, tracker=tracker)
        assert sorted(path.name for path in folder.glob("*.parquet")) == written
        assert (folder / ".train-000002.parquet.node9.7").exists()
        assert not Part(index, 3).missing(folder, rows)
    assert Part(2, 3).missing(folder, rows)
    assert Part(0, 1).missing(folder, rows)
    assert not (folder / MANIFEST).exists()
    made = run(folder, recorded(), tmp_path)
    assert made.rows == rows
    assert not list(folder.glob(".*.parquet.*"))
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_chunk_belongs_to_one_part(of: int) -> None:
    rows = {"train": 11, "test": 3}
    found = [(split, chunk) for n in range(of) for split, chunks in Part(n, of).chunks(rows).items() for chunk in chunks]
    assert sorted(found) == [("test", 0), ("train", 0), ("train", 1), ("train", 2)]


def test_the_time_counts_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "s", recorded(), tmp_path)
    (tmp_path / "s" / STORE).write_text('{"seconds": 1000.0}')
    shard_path(tmp_path / "s", "train", 1).unlink()
    assert 1000 < run(tmp_path / "s", recorded(), tmp_path).seconds < 2000
    assert 1000 < json.loads((tmp_path / "s" / STORE).read_text())["seconds"] < 2000
    assert stage.most_written(tmp_path / "s") == 4 * CHUNK
    assert stage.most_written(tmp_path / "nothing") == 0


def test_a_manifest_from_before_does_not_outlive_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "s", recorded(), tmp_path)
    assert (tmp_path / "s" / MANIFEST).is_file()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s", recorded(), tmp_path)
    assert not (tmp_path / "s" / MANIFEST).exists()
    run(tmp_path / "s", recorded(), tmp_path)
    assert (tmp_path / "s" / MANIFEST).is_file()


def test_a_store_of_another_teacher_gets_nothing_added(tmp_path: Path) -> None:
    run(tmp_path / "s", recorded(), tmp_path)
    shard_path(tmp_path / "s", "train", 1).unlink()
    with pytest.raises(RuntimeError, match=r"3 of 4 shards cannot be used: train-000000\.parquet was written with another prompt template"):
        run(tmp_path / "s", recorded("{said}!"), tmp_path)
    assert not shard_path(tmp_path / "s", "train", 1).exists()


# ----- by what a store knows its teacher -----


def test_a_tokenizer_is_known_by_what_it_does() -> None:
    texts = ["one two three", "four five six", "seven eight nine"]
    first, again = train_tokenizer(texts, 300), train_tokenizer(texts, 300)
    again.backend_tokenizer.enable_truncation(5)  # passing settings of the last call
    assert tokenizer_hash(first) == tokenizer_hash(again)
    other = train_tokenizer([*texts, "a a a aa aa"], 300)
    assert tokenizer_hash(other) != tokenizer_hash(first)
    again.eos_token = "<pad>"
    assert tokenizer_hash(again) != tokenizer_hash(first)


def test_a_server_is_known_by_model_address_and_prompt() -> None:
    def opened(**changes: Any) -> Any:
        values: dict[str, Any] = {"source": "endpoint", "model": "m", "endpoint": {"url": "http://localhost:1/v1"}, **changes}
        return open_prompts(TeacherConfig.model_validate(values), None).origin

    plain = opened()
    assert (plain.teacher, plain.tokenizer) == ("m at http://localhost:1/v1", "")
    assert opened(model="n").teacher == "n at http://localhost:1/v1"
    completions = opened(endpoint={"url": "http://localhost:1/v1", "api": "completions"})
    assert (completions.teacher, completions.template == plain.template) == (plain.teacher, False)
    assert isinstance(open_prompts(recorded(), None), Recorded)


# ----- how it lies on the devices -----

GB = 10**9


@pytest.mark.parametrize(("rank", "told"), [("0", 1), ("1", 0)])
def test_gpus_that_torch_cannot_use_are_told_once_a_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, told: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(worker, "detect", lambda: [SimpleNamespace(memory_bytes=24 * GB)] * 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not worker.has_device("auto")
    assert worker.has_device("cpu")
    errors = capsys.readouterr().err
    assert (
        errors.count("error: torch ") == errors.count("cannot use the 2 GPU(s) that nvidia-smi lists: ") == len(errors.splitlines()) == told
    )


@pytest.mark.parametrize(
    ("parameters", "local", "size", "host", "layout"),
    [
        (8 * GB, 8, 16, 0, Layout("replica")),
        (70 * GB, 8, 16, 0, Layout("tensor", 4)),
        (600 * GB, 8, 32, 0, Layout("zero3")),
        (405 * GB, 1, 1, 2000 * GB, Layout("zero3", offload=True)),
        (2000 * GB, 8, 32, 1300 * GB, Layout("zero3", offload=True)),
    ],
)
def test_auto_takes_the_cheapest_layout_that_fits(
    parameters: int, local: int, size: int, host: int, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "detect", lambda: [SimpleNamespace(memory_bytes=80 * GB)])
    monkeypatch.setattr(worker, "memory_bytes", lambda: host)
    monkeypatch.setattr(worker, "_teacher_shape", lambda *_: assumed_architecture(parameters))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    config = cast(Config, SimpleNamespace(teacher=TeacherConfig(source="deepspeed", model="a/b")))
    assert worker._layout(config, None, World(0, size, torch.device("cuda"))) == layout


def test_a_teacher_that_nothing_holds_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "detect", lambda: [SimpleNamespace(memory_bytes=80 * GB)])
    monkeypatch.setattr(worker, "memory_bytes", lambda: 500 * GB)
    monkeypatch.setattr(worker, "_teacher_shape", lambda *_: assumed_architecture(405 * GB))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    config = cast(Config, SimpleNamespace(teacher=TeacherConfig(source="deepspeed", model="a/b")))
    with pytest.raises(ValueError, match=r"^teacher\.model does not fit: 405,000,000,000 parameters in bf16 take .*: use at least 16 such"):
        worker._layout(config, None, World(0, 1, torch.device("cuda")))


def test_a_teachers_shape_is_read_from_its_configuration(tmp_path: Path) -> None:
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, saved in {
        "llama": {"model_type": "llama", **llama, "vocab_size": 300},
        "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(saved))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "llama").rename(tmp_path / "tuned" / "model")

    def shape(model: str, tuned: Path | None = None) -> Architecture:
        return worker._teacher_shape(
            cast(Config, SimpleNamespace(teacher=TeacherConfig(source="deepspeed", model=model, tune={} if tuned else None))), tuned
        )

    known = shape("a/b", tmp_path / "tuned")
    assert (known.heads, known.key_value_heads, known.layers, known.assumed) == (4, 2, 2, False)
    assert shape(str(tmp_path / "gpt2")).assumed, "an architecture that the plan does not know has the shape of its size"


def test_what_the_configuration_says_is_taken() -> None:
    chosen = TeacherConfig(source="deepspeed", model="a/b", sharding="tensor")
    assert worker._layout(cast(Config, SimpleNamespace(teacher=chosen)), None, WORLD) == Layout("tensor")
    assert worker._layout(cast(Config, SimpleNamespace(teacher=recorded())), None, WORLD) == Layout("replica")


def test_a_writer_that_holds_memory_gives_it_back() -> None:
    maker, writer = answering({})
    Live(maker, None, None).close()  # one that holds none
    closed: list[str] = []
    holding = replace(maker, writer=cast(Any, SimpleNamespace(request=writer.request, close=lambda: closed.append("closed"))))
    Live(holding, None, None).close()
    Live(None, None, None).close()
    assert closed == ["closed"]


# ----- the worker -----


def test_a_fault_that_every_process_meets_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shared = WORLD.counter()
    faults = iter([RuntimeError("stopped because 1 other process(es) failed"), ValueError("no row"), ValueError("no row")])

    def fail(*_: Any) -> None:
        raise next(faults)

    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "load_config", lambda _: SimpleNamespace(launch=SimpleNamespace(device="cpu")))
    monkeypatch.setattr(worker, "run_stages", fail)
    for rank in range(3):
        process = SimpleNamespace(is_main=not rank, counter=lambda: shared)
        monkeypatch.setattr("train.engine.start", lambda _, process=process: process)
        assert worker.main([str(tmp_path), "teach"]) == 1
    assert capsys.readouterr().err == "error: no row\n"


def test_the_student_is_told_by_whose_ids_a_server_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(student, "run", lambda config, loss, inputs, *rest, **more: handed.append(inputs))
    table = {name: Stage(name, "0", tmp_path, "worker") for name in ("teach", "train.step_by_step")}
    task = {"train": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"}
    teacher = {"source": "endpoint", "model": "m", "endpoint": {"url": "http://h/v1", "tokenizer": "owner/name"}}
    soft = {"soft_labels": {"k": 5}, "rationales": {"examples": "prompts.yaml"}}
    config = Config.model_validate({"name": "n", "task": task, "teacher": {**teacher, **soft}, "student": {"model": "owner/student"}})
    worker._train(table["train.step_by_step"], config, table, cast(Any, None), WORLD, cast(Any, None))
    assert (handed[0].served_tokenizer, handed[0].teacher) == ("owner/name", "m")
