"""The only module that imports wandb. Numbers go to JSON lines always, and to Weights & Biases where it is wanted. Imports no torch."""

from __future__ import annotations

import json
import logging
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from train.config import TrackingConfig

LOG_FILE = "log.jsonl"


class Tracker:
    """The numbers of one stage: `log.jsonl` in its folder, and one W&B run in the pipeline's group.

    Only the main process opens a real one (`enabled`); elsewhere every call does nothing. W&B never stops a stage: what it raises
    is noted once and tracking goes on in the JSON lines.
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
    ) -> None:
        """Opens the log; lines of steps after `from_step` that an interrupted attempt left are dropped, as they will come again."""
        self.path = folder / LOG_FILE
        self._file = None
        self._run: Any = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line["step"] <= from_step]
        temporary = self.path.with_name(f".{LOG_FILE}")  # a process killed here leaves the earlier lines as they were
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a", buffering=1)
        self._run = _start_wandb(folder, config, group, job_type, settings)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Writes the numbers of one step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._wandb(lambda: self._run.log(dict(values), step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes what the stage ended with into W&B's summary; the artifact file holds the same."""
        self._wandb(lambda: self._run.summary.update(dict(values)))

    def _wandb(self, call: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # W&B raises many kinds, and none is a reason to lose a training
            self._run = None
            logging.getLogger("stepdown").warning("Weights & Biases stopped taking numbers (%s); %s has them all", error, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        self._wandb(lambda: self._run.finish(exit_code=0 if kind is None else 1))


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


def wandb_mode(config: TrackingConfig) -> Literal["online", "offline", "disabled"]:
    """How W&B is used: `auto` is online where an API key is at hand, else offline; WANDB_MODE decides where the configuration says auto."""
    if config.wandb != "auto":
        return config.wandb
    wished = os.environ.get("WANDB_MODE")
    if wished in ("online", "offline", "disabled"):
        return wished  # type: ignore[return-value]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(folder: Path, config: TrackingConfig, group: str, job_type: str, settings: Mapping[str, Any]) -> Any:
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    try:
        import wandb

        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=group,
            job_type=job_type,
            name=f"{group}/{job_type}",
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            # Without a bound a run's end waits for a lost network for ever; what is left stays on disk for `wandb sync`.
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, finish_timeout=300),
        )
    except Exception as error:  # no network, no disk, an expired key: tracking is not worth a run
        logging.getLogger("stepdown").warning(
            "Weights & Biases is off for %s (%s); the numbers are in %s", job_type, error, folder / LOG_FILE
        )
        return None
