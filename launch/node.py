"""What a job runs on one node: files to ship, measured rungs, the report; each file and rung in a process of its own. Imports no torch.

python -m launch.node RUN/jobs STAGE [STAGE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.chain import REPORT
from launch.config import RESOLVED, load_config
from launch.lineage import track
from launch.local import Stopped, make_file, measure_rung
from launch.pipeline import stages, task_stage
from launch.rundir import locked, run_folder, writing
from launch.summary import report
from train.artifacts import TaskFiles
from train.signals import tell_stopped


def run(folder: Path, names: Sequence[str]) -> None:
    """Runs stages that are not done, and writes the report where it is named.

    Args:
        folder: that holds the configuration.
        names: of stages, or `report`.

    Raises:
        RuntimeError: if one failed; its own message has been told.
    """
    config, console = load_config(folder / RESOLVED), Console(soft_wrap=True)
    table = stages(config, TaskFiles.read(task_stage(config).folder))
    for name in names:
        if name == REPORT:
            report(run_folder(config), console)
            track(config, table, reported=True)
            continue
        stage = table[name]
        with locked(stage.folder, patience_seconds=1e9):
            if stage.is_done:
                continue
            if stage.kind == "evaluate":
                measure_rung(stage, config, table)
            elif not make_file(stage, config, table):
                raise RuntimeError(f"{name} was not made (the reason stands above); submit again to try it again")


def main(arguments: Sequence[str]) -> int:
    """Runs the stages of the command line; the exit status."""
    folder, *names = arguments
    try:
        with writing(Path(folder)):
            run(Path(folder), names)
    except Stopped:  # which is a RuntimeError, too
        return tell_stopped()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
