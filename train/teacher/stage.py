"""The teacher's stage: every training and test example becomes one record in the store."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.config import Metric
from data.examples import TaskExample
from data.records import TeacherRecord
from data.store import CHUNK, MANIFEST, SPLITS, STORE, Part, check_complete, manifest, read_records, shard_path, sweep, write_shard
from data.store_check import Origin, check_store, refuse_bad
from data.tasks import Task
from train.artifacts import Records, write_json
from train.config import TeacherConfig
from train.progress import StageProgress
from train.teacher.answers import reject_reason
from train.teacher.claims import Chunk, missing
from train.teacher.live import Layout, Live, open_live
from train.teacher.opening import Recorded, open_prompts
from train.teacher.recorded import records
from train.teacher.tally import Tally
from train.tracking import Tracker
from train.world import World


@dataclass(frozen=True, slots=True)
class TeacherInputs:
    """What the teacher answers, and how answers are judged."""

    task: Task
    metric: Metric
    choices_field: str | None
    tuned: Path | None
    """Folder of the tuned checkpoint (`model/` inside), or None."""
    layout: Layout = field(default_factory=Layout)
    config_file: Path | None = None
    """The run's configuration, by which a damaged store can be written anew."""


def run(config: TeacherConfig, inputs: TeacherInputs, folder: Path, world: World, *, seed: int, tracker: Tracker) -> Records:
    """Writes the records that are missing, then the manifest.

    Killed and called again, also with another number of processes, it writes only the chunks that are not there.

    Args:
        config: the teacher.
        inputs: the task, and where the tuned teacher lies.
        folder: of the record store.
        world: the processes.
        seed: of the draws.
        tracker: takes counts and rates as the teacher writes.

    Raises:
        RuntimeError: if a shard that is there is damaged, or another teacher's.
    """
    how = _write(config, inputs, folder, world, None, seed=seed, tracker=tracker)
    return _finish(_splits(inputs.task), inputs.metric, folder, world, how)


def run_part(config: TeacherConfig, inputs: TeacherInputs, folder: Path, world: World, part: Part, *, seed: int, tracker: Tracker) -> None:
    """Writes the missing records of a part, beside other processes that write the other parts; `run` finishes the store.

    Args:
        config: the teacher.
        inputs: the task, and where the tuned teacher lies.
        folder: of the record store.
        world: the processes of this part.
        part: which chunks.
        seed: of the draws.
        tracker: takes counts and rates of this part.

    Raises:
        RuntimeError: if a shard that is there is damaged, or another teacher's.
    """
    _write(config, inputs, folder, world, part, seed=seed, tracker=tracker)


def rows_of(task: Task) -> dict[str, int]:
    """Rows of each split that gets records."""
    return {split: len(examples) for split, examples in _splits(task).items()}


def _splits(task: Task) -> dict[str, Sequence[TaskExample]]:
    return {split: getattr(task, split) for split in SPLITS}


def _write(
    config: TeacherConfig, inputs: TeacherInputs, folder: Path, world: World, part: Part | None, *, seed: int, tracker: Tracker
) -> _Run:
    clock, splits = _Clock(folder, inputs.config_file), _splits(inputs.task)
    prompts = open_prompts(config, inputs.tuned)
    _open_store(folder, splits, prompts.origin, clock, world, alone=part is None)
    absent = {split: missing(folder, split, examples, world) for split, examples in splits.items()}
    if part is not None:
        own = part.chunks(rows_of(inputs.task))
        absent = {split: [chunk for chunk in chunks if chunk.number in own[split]] for split, chunks in absent.items()}
    sharding, degree = config.source if config.source != "deepspeed" else inputs.layout.sharding, inputs.layout.tensor_degree or 1
    if isinstance(prompts, Recorded):
        if world.is_main:
            _write_recorded(config, inputs, absent, folder, prompts.origin)
    elif any(absent.values()):
        live = open_live(config, prompts, inputs.layout, inputs.metric, inputs.tuned, world, seed=seed)
        if live.teacher is not None:
            sharding, degree = live.teacher.sharding, live.teacher.degree
        # A part counts its own records only.
        before = 0 if part is not None else sum(map(len, splits.values())) - sum(len(c.examples) for cs in absent.values() for c in cs)
        _write_live(live, absent, inputs, folder, prompts.origin, world, tracker, clock, before)
    world.barrier()
    return _Run(sharding, degree, world.size, clock.seconds)


def most_written(folder: Path) -> int:
    """The records that the shards of a store hold, or a few more; 0 where there is none."""
    return CHUNK * sum(1 for _ in folder.glob("*.parquet"))


class _Clock:
    """The time that a store took, over all starts; noted as its shards are written, as a killed teacher cannot say."""

    def __init__(self, folder: Path, config_file: Path | None) -> None:
        self.folder, self.config_file = folder, config_file
        self.earlier, self.started = 0.0, time.monotonic()
        if (folder / STORE).is_file():
            self.earlier = float(json.loads((folder / STORE).read_text()).get("seconds", 0.0))

    @property
    def seconds(self) -> float:
        """So far."""
        return self.earlier + time.monotonic() - self.started

    def note(self) -> None:
        """Writes the time beside the configuration by which damaged shards can be written anew."""
        config = {} if self.config_file is None else {"config": os.path.relpath(self.config_file, self.folder)}
        write_json(self.folder / STORE, {**config, "seconds": self.seconds})


def _open_store(
    folder: Path, splits: Mapping[str, Sequence[TaskExample]], origin: Origin, clock: _Clock, world: World, *, alone: bool
) -> None:
    """Nothing is added to a store with bad shards: whoever reads it later would learn from two teachers."""
    error: Exception | None = None
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        clock.note()
        if alone:
            sweep(folder)
        try:
            refuse_bad(folder, check_store(folder, splits, origin))
            # It spoke of a store that was whole; what is written from here on need not be the same on other hardware.
            (folder / MANIFEST).unlink(missing_ok=True)
        except RuntimeError as caught:
            error = caught
    world.agree(error)


def _write_recorded(
    config: TeacherConfig, inputs: TeacherInputs, absent: Mapping[str, Sequence[Chunk]], folder: Path, origin: Origin
) -> None:
    for chunk in itertools.chain(*absent.values()):
        made = records(config, chunk.examples, chunk.split, inputs.metric, inputs.choices_field)
        write_shard(shard_path(folder, chunk.split, chunk.number), made, origin.label(chunk.examples))


def _write_live(
    live: Live,
    absent: Mapping[str, Sequence[Chunk]],
    inputs: TeacherInputs,
    folder: Path,
    origin: Origin,
    world: World,
    tracker: Tracker,
    clock: _Clock,
    before: int,
) -> None:
    """Answers, scores and writes chunk by chunk; each process takes the next one when it has room."""
    for split, chunks in absent.items():
        total = sum(len(chunk.examples) for chunk in chunks)
        with StageProgress(f"teach ({split})", total, "records", enabled=world.is_main) as progress:
            tally = Tally(world, inputs.metric, total, progress, tracker, before=before)
            for chunk, answered in live.answers(chunks, world):
                made = live.labelling.added(chunk, answered) if live.labelling is not None and split == "train" else answered
                if chunk.kept and live.keeps:
                    write_shard(shard_path(folder, split, chunk.number), made, origin.label(chunk.examples))
                    tally.add(made)
                    if world.is_main:
                        clock.note()
            tally.wait()
        before += total
    live.close()


@dataclass(frozen=True, slots=True)
class _Run:
    """How the records came about, beside what they hold."""

    sharding: str
    tensor_degree: int
    processes: int
    seconds: float


def _finish(splits: Mapping[str, Sequence[TaskExample]], metric: Metric, folder: Path, world: World, run: _Run) -> Records:
    found = {split: read_records(folder, split) for split in splits}
    for split, records_ in found.items():
        check_complete(records_, [example.id for example in splits[split]], folder)
    if world.is_main:
        write_json(folder / MANIFEST, manifest(folder))
    every = [record for records_ in found.values() for record in records_]
    return Records(
        rows=_count(found, lambda record: True),
        parseable=_count(found, lambda record: record.parseable),
        agreeing=_count(found, lambda record: record.agrees and not record.rationalized),
        generated_tokens=sum(record.generated_tokens for record in every),
        record_bytes=sum(path.stat().st_size for path in folder.glob("*.parquet")),
        soft_label_tokens=sum(len(soft) for record in every for soft in (record.label_soft, record.rationale_soft) if soft is not None),
        rationalized=_count(found, lambda record: record.rationalized),
        unparseable=dict(Counter(reason for record in every if (reason := reject_reason(record, metric)) is not None)),
        mean_votes=statistics.fmean([record.votes for record in every if record.parseable] or [0.0]),
        **asdict(run),
    )


def _count(found: Mapping[str, Sequence[TeacherRecord]], counts: Callable[[TeacherRecord], bool]) -> dict[str, int]:
    """How many records of each split count."""
    return {split: sum(map(counts, records_)) for split, records_ in found.items()}
