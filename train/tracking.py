"""The only module that imports wandb. Numbers go to JSON lines always, and to Weights & Biases where it is wanted. Imports no torch.

STAGE/log.jsonl         every number, by step: the truth
STAGE/tracking.json     the W&B run's id, its mode, and the seconds that the stage spent on tracking
STAGE/wandb/            W&B's own files, one folder for each start
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from train.artifacts import write_json
from train.background import Background, answers
from train.config import TrackingConfig

LOG_FILE, TRACKING_FILE = "log.jsonl", "tracking.json"
COMMAND_VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SERVICE")
"""Those of W&B that speak of the process that was started with them, and not of those that it starts: which run of a sweep it is to be,
and W&B's process beside it."""
Mode = Literal["online", "offline", "disabled"]
_PROBE_SECONDS = 2.0
_INIT_SECONDS = 30.0
_TOLD: set[str] = set()
_FLUSH_SECONDS = 2.0
_FINISH_SECONDS = 20.0
"""Once a process, where a network was lost on the way: what is left then stays on disk."""


@dataclass(frozen=True, slots=True)
class Product:
    """What a stage reads or makes, as an artifact of W&B: small files by content, large ones by where they lie."""

    name: str
    kind: str
    """task, records, model, deployed or report."""
    key: str
    """Of the stage that made it; the alias of this version."""
    files: Sequence[Path]
    references: Sequence[Path]
    """Named with their place and size, not copied and not read: weights and records may be hundreds of gigabytes."""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Samples:
    """A table."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Tracker:
    """The numbers of one stage: `log.jsonl` in its folder, and one W&B run in the pipeline's group.

    Only the main process opens a real one (`enabled`); elsewhere every call does nothing, but that the first process of each further
    node (`node`) opens a W&B run for what its machine does. W&B never stops a stage nor keeps it waiting: it is started and called in a
    thread, what it raises is noted once, and tracking goes on in the JSON lines.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        group: str,
        job_type: str,
        settings: Mapping[str, Any],
        enabled: bool,
        from_step: int = 0,
        key: str = "",
        node: int = 0,
        held: bool = False,
    ) -> None:
        """Opens the log; lines of steps after `from_step` that an interrupted attempt left are dropped, as they will come again.

        Args:
            folder: of the stage.
            config: where numbers go.
            group: the pipeline.
            job_type: the stage.
            settings: the W&B run's configuration.
            enabled: on the main process.
            from_step: the stage goes on after it.
            key: of the stage; the W&B run's id begins with it.
            node: on the first process of a node other than the main process's, its number.
            held: leave the W&B run open until `finish`, for what is known only when the stage is over.
        """
        self.path, self.seconds, self._held = folder / LOG_FILE, 0.0, held
        self._file: TextIO | None = None
        self._lock = Lock()
        self._remote: Background | None = None
        self._pending: tuple[int, dict[str, Any]] | None = None
        if not enabled and not node:
            return
        with self._clocked():
            folder.mkdir(parents=True, exist_ok=True)
            self._about = folder / (TRACKING_FILE if not node else f"tracking-node{node}.json")
            kept = self._kept(from_step) if enabled else []
            mode = wandb_mode(config)
            self._identify(key, mode)
            if mode != "disabled":
                who = _Identity(folder, config, mode, self.id, group, job_type, node, self._fell_back)
                self._remote = Background(lambda: _Run.start(who, settings, kept), self._lost)

    def _kept(self, from_step: int) -> list[dict[str, Any]]:
        kept = [line for line in read_log(self.path) if line["step"] <= from_step]
        temporary = self.path.with_name(f".{LOG_FILE}")  # a process killed here leaves the earlier lines as they were
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a", buffering=1)
        return kept

    def _identify(self, key: str, mode: Mode) -> None:
        """The id stays the same over all starts of a stage in its folder; one that begins anew elsewhere must not go on in its curves."""
        self._noted = json.loads(self._about.read_text()) if self._about.is_file() else {}
        if not self._noted.get("id", "").startswith(key):
            self._noted = {}
        self.id: str = self._noted.get("id") or "-".join(part for part in (key, secrets.token_hex(4)) if part)
        self._note(id=self.id, mode=mode, seconds=self._noted.get("seconds", 0.0))

    def _note(self, **values: Any) -> None:
        with self._lock:  # W&B's thread notes, too
            self._noted |= values
            write_json(self._about, self._noted)

    def _fell_back(self, run_id: str) -> None:
        self.id = run_id
        self._note(id=run_id, mode="offline")

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began

    def _lost(self, error: Exception) -> None:
        logging.getLogger("stepdown").warning("Weights & Biases stopped taking numbers (%s); %s has them all", error, self.path)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes the numbers of one step; W&B gets a step when the next one begins, so that each is one row there."""
        if self._file is None:
            return
        with self._clocked():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            if self._pending is not None and self._pending[0] != step:
                self._send()
            self._pending = (step, {**(self._pending[1] if self._pending else {}), **values})

    def _send(self) -> None:
        if self._pending is not None and self._remote is not None:
            step, values = self._pending
            self._remote.put(lambda run: run.log(step, values))
        self._pending = None

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes what the stage ended with into W&B's summary; the artifact file holds the same."""
        self._call(lambda run: run.summary(dict(values)))

    def samples(self, table: Callable[[], Samples]) -> None:
        """Shows a table in W&B; it is made in W&B's thread."""
        self._call(lambda run: run.samples(table()))

    def reads(self, product: Callable[[], Product]) -> None:
        """Notes in W&B what the stage was made from."""
        self._call(lambda run: run.hand(product(), is_input=True))

    def makes(self, product: Callable[[], Product]) -> None:
        """Notes in W&B what the stage made."""
        self._call(lambda run: run.hand(product(), is_input=False))

    def _call(self, call: Callable[[_Run], object]) -> None:
        with self._clocked():
            if self._remote is not None:
                self._send()
                self._remote.put(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if kind is not None:
            self._pending = None  # it may lack numbers of its step; the lines have it, and the next start sends it
        if kind is not None or not self._held:
            self.finish(0 if kind is None else 1)

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run, once, and notes the time that tracking took."""
        if self._file is None and self._remote is None:
            return
        with self._clocked():
            self._send()
            if (remote := self._remote) is not None:
                remote.close(lambda run: run.finish(exit_code, complete=exit_code == 0 and not remote.has_failed))
        self._remote = self._file = None
        self._note(seconds=round(self._noted["seconds"] + self.seconds, 3))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line that a killed process left half-written is dropped."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def is_shown(folder: Path) -> bool:
    """Whether W&B has all of a stage that is done, or shall have nothing: a process may be killed between the two ends."""
    noted = json.loads((folder / TRACKING_FILE).read_text()) if (folder / TRACKING_FILE).is_file() else {}
    return noted.get("mode") == "disabled" or ("id" in noted and _mark(folder, noted["id"]).is_file())


def _mark(folder: Path, run_id: str) -> Path:
    return folder / "wandb" / f"{run_id}.complete"


def by_step(lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The numbers of each step, those of several lines together."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        found.setdefault(line["step"], {}).update({name: value for name, value in line.items() if name != "step"})
    return found


def wandb_mode(config: TrackingConfig) -> Mode:
    """How W&B is used: `auto` is online where an API key is at hand, else offline; WANDB_MODE decides where the configuration says auto."""
    if config.wandb != "auto":
        return config.wandb
    wished = os.environ.get("WANDB_MODE")
    if wished in ("online", "offline", "disabled"):
        return wished  # type: ignore[return-value]
    return "online" if _has_key() else "offline"


def _address() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(_address().split("//")[-1].split("/")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@lru_cache(maxsize=4)
def _is_reachable(address: str) -> bool:
    """Asked once a process: its stages follow one another."""
    return answers(address, _PROBE_SECONDS)


# ---------------------------------------------------------------- in the thread


@dataclass(frozen=True, slots=True)
class _Identity:
    """Which W&B run."""

    folder: Path
    config: TrackingConfig
    mode: Mode
    id: str
    group: str
    job_type: str
    node: int
    fell_back: Callable[[str], None]
    """Hears that a run that should be online is not, and the id that it has offline."""
    refused: bool = False
    """By W&B's server."""

    def renamed(self) -> _Identity:
        """The same with another id: W&B's process keeps that of a run which its server refused (wandb 0.31), so that it is in use."""
        return replace(self, refused=True, id="-".join(part for part in (self.id.rpartition("-")[0], secrets.token_hex(4)) if part))


class _Run:
    """A W&B run that gets each step, table and artifact once, over all starts of its stage."""

    def __init__(self, run: Any, earlier: _Earlier, mark: Path) -> None:
        self._run, self._earlier, self._mark = run, earlier, mark
        run.define_metric("step")
        run.define_metric("*", step_metric="step", step_sync=False)  # each row says its step; a table is no second row of the last one

    @classmethod
    def start(cls, who: _Identity, settings: Mapping[str, Any], kept: Sequence[Mapping[str, Any]]) -> Self:
        """Opens the run and sends what its earlier starts logged and did not bring there."""
        earlier = _Earlier.read(who.folder, who.id)
        opened, now = _open(who, settings)
        if now.refused:  # what earlier starts of the refused run wrote is not in this one
            earlier = _Earlier(frozenset(), frozenset(), frozenset())
        run = cls(opened, earlier, _mark(now.folder, now.id))
        for step, values in by_step(kept).items():
            run.log(step, values)
        return run

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        # Of a run that goes on online the server knows the last step; what an earlier start left in files only may be missing there.
        sent = step < self._run.starting_step if self._run.resumed else step in self._earlier.steps
        if not sent:
            self._run.log({"step": step, **values}, step=step, commit=True)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(values)

    def samples(self, table: Samples) -> None:
        import wandb

        if table.name not in self._earlier.tables:
            self._run.log(
                {table.name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows], allow_mixed_types=True)}
            )

    def hand(self, product: Product, *, is_input: bool) -> None:
        import wandb

        if (product.name, is_input) in self._earlier.products:
            return
        sizes = {str(path): path.stat().st_size for path in product.references}
        artifact = wandb.Artifact(product.name, product.kind, metadata={**product.facts, "bytes": sizes})
        for path in product.files:
            artifact.add_file(str(path), name=path.name)
        for path in product.references:
            artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
        # `use_artifact` refuses offline runs (wandb 0.31) and waits for the server in others; this is what it calls, without the wait.
        # To be replaced when it takes an artifact offline.
        self._run._log_artifact(artifact, aliases=["latest", product.key], is_user_created=True, use_after_commit=is_input)

    def finish(self, exit_code: int, *, complete: bool) -> None:
        self._run.finish(exit_code=exit_code)
        if complete:
            self._mark.parent.mkdir(exist_ok=True)
            self._mark.touch()


@dataclass(frozen=True, slots=True)
class _Earlier:
    """What the files of earlier starts hold: a killed process may have logged more than reached the disk."""

    steps: frozenset[int]
    tables: frozenset[str]
    products: frozenset[tuple[str, bool]]

    @classmethod
    def read(cls, folder: Path, run_id: str) -> _Earlier:
        paths = sorted((folder / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"))
        for path in paths:  # W&B's process outlives the one that was killed by a flush
            time.sleep(max(0.0, 1.5 * _FLUSH_SECONDS - max(0.0, time.time() - path.stat().st_mtime)))
        lines = [line for path in paths for line in read_run(path)]
        rows = [line["history"] for line in lines if line["type"] == "history"]
        artifacts = [line["artifact"] for line in lines if line["type"] == "artifact"]
        return cls(
            frozenset(row["item"]["step"] for row in rows if "step" in row["item"]),
            frozenset(name.removesuffix("._type") for row in rows for name in row["item"] if name.endswith("._type")),
            frozenset((found["name"], bool(found.get("use_after_commit"))) for found in artifacts),
        )


def read_run(path: Path) -> list[dict[str, Any]]:
    """The records of a `.wandb` file, as far as it was written, each with its `type`."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _open(who: _Identity, settings: Mapping[str, Any]) -> tuple[Any, _Identity]:
    """An online run where W&B answers and takes it, else one in files; and which it is."""
    if who.mode == "online":
        if not _is_reachable(_address()):
            _fall_back(who, f"{_address()} does not answer within {_PROBE_SECONDS:g} s")
        else:
            try:
                return _init(who, settings, "online"), who
            except Exception as error:  # not logged in, a key that is refused, a project that is not yours
                who = who.renamed()
                _fall_back(who, str(error).partition("\n")[0].rstrip("."))
    return _init(who, settings, "offline"), who


def _fall_back(who: _Identity, why: str) -> None:
    who.fell_back(who.id)
    if why in _TOLD:  # once a process: its stages follow one another
        return
    _TOLD.add(why)
    logging.getLogger("stepdown").warning(
        "Weights & Biases: %s; %s is written offline, as is what follows while this lasts: `wandb sync %s/offline-run-*` brings it in "
        "later",
        why,
        who.job_type,
        who.folder / "wandb",
    )


def _init(who: _Identity, settings: Mapping[str, Any], mode: Mode) -> Any:
    import wandb

    # An agent's sweep judges a pipeline by its last stage; the others are runs beside it.
    in_sweep = who.job_type == "evaluate" and not who.refused and os.environ.get("WANDB_SWEEP_ID")
    sweep = {} if in_sweep else {"sweep_id": None, "sweep_param_path": None}
    return wandb.init(
        project=who.config.project,
        entity=who.config.entity,
        group=who.group,
        job_type=who.job_type if not who.node else "system",
        name=f"{who.group}/{who.job_type}" + (f"/node{who.node}" if who.node else ""),
        id=os.environ.get("WANDB_RUN_ID") if in_sweep else who.id if not who.node else f"{who.id}-node{who.node}",
        resume="allow",
        reinit="create_new",  # a run that is still ending belongs to the stage before
        dir=str(who.folder),
        mode=mode,
        config=dict(settings),
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
            **sweep,
        ),
    )
