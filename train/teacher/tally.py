"""How the writing goes, over all processes: on the terminal and in the tracker."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from data.config import Metric
from data.records import TeacherRecord
from train.progress import StageProgress
from train.teacher.answers import NO_ANSWER, UNUSABLE, reject_reason
from train.tracking import Tracker
from train.world import World

_LOG_SECONDS = 5.0
_LOOK_SECONDS = 0.1


class Tally:
    """Counts of what all processes have written of one split in this run."""

    def __init__(self, world: World, metric: Metric, total: int, progress: StageProgress, tracker: Tracker, *, before: int) -> None:
        """Opens the counters; every process must do so.

        Args:
            world: the processes.
            metric: how labels are judged.
            total: records to write.
            progress: the line of the main process.
            tracker: of the main process.
            before: records that are there already, of all splits.
        """
        self.world, self.total, self.progress, self.tracker, self.before = world, total, progress, tracker, before
        self.metric: Metric = metric
        self.counters = {name: world.counter() for name in ("records", "generated_tokens", NO_ANSWER, UNUSABLE[metric])}
        self.started = self.logged = time.monotonic()

    def add(self, records: Sequence[TeacherRecord]) -> None:
        """Counts the records of a shard that is on disk."""
        reasons = Counter(reject_reason(record, self.metric) for record in records)
        for name in (NO_ANSWER, UNUSABLE[self.metric]):
            self.counters[name](reasons[name])
        self.counters["generated_tokens"](sum(record.generated_tokens for record in records))
        self.counters["records"](len(records))
        self.show()

    def wait(self) -> None:
        """Returns when every process has written its records.

        A collective would time out where the last chunk of another process takes long.
        """
        while self.counters["records"](0) < self.total:
            time.sleep(_LOOK_SECONDS)
            self.show()
        self.show(last=True)

    def show(self, *, last: bool = False) -> None:
        """Tells the main process's user; the tracker every few seconds, and at the end."""
        if not self.world.is_main:
            return
        counts = {name: counter(0) for name, counter in self.counters.items()}
        now = time.monotonic()
        rates = {name: counts[name] / max(now - self.started, 1e-9) for name in ("records", "generated_tokens")}
        if counts["records"] > self.progress.done:
            self.progress.advance(counts["records"] - self.progress.done, self._note(counts, rates))
        if counts["records"] and (last or now - self.logged > _LOG_SECONDS):
            self.logged = now
            self.tracker.log(
                self.before + counts["records"],
                {
                    "records": self.before + counts["records"],
                    "generated_tokens": counts["generated_tokens"],
                    "records_per_second": rates["records"],
                    "tokens_per_second": rates["generated_tokens"],
                    "seconds_left": (self.total - counts["records"]) / rates["records"],
                    "unparseable": counts[NO_ANSWER] + counts[UNUSABLE[self.metric]],
                    **{f"unparseable/{name.replace(' ', '_')}": counts[name] for name in (NO_ANSWER, UNUSABLE[self.metric])},
                },
            )

    def _note(self, counts: dict[str, int], rates: dict[str, float]) -> str:
        rejects = [f"{counts[name]:,} {name}" for name in (NO_ANSWER, UNUSABLE[self.metric]) if counts[name]]
        speed = f"{rates['records']:.3g} records/s, {rates['generated_tokens']:,.0f} tokens/s"
        return "; ".join([speed, *rejects])
