"""Runs a pipeline on this machine: builds the command lines, and the few lines that run them. Imports no torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from data.prompts import TextFormat
from data.tasks import prepare
from launch.changes import Earlier, told_changes
from launch.config import Config
from launch.hardware import cpu_count, detect
from launch.parameters import family_of
from launch.pipeline import ARTIFACT_OF, KINDS, TASK, TEACH, TEACHER, TUNE, Stage, deployed_from, made_by, stages, task_stage
from launch.preflight import check_fits, check_models, check_recorded
from launch.rundir import command_line, locked, open_run, run_folder, write_stages, writing
from launch.sizes import shape_here
from launch.torchrun import Rendezvous, torchrun
from launch.widths import check_widths
from train.artifacts import Checkpoint, DeployedModel, EvalResult, Records, TaskFiles
from train.deploy.request import DeployRequest
from train.deploy.request import command as deploy_command
from train.deploy.targets import check_installed, check_possible, target_of
from train.evaluate import REQUEST, EvalRequest, command
from train.runtimes import device_for
from train.signals import PARENT, SIGNALS, STOPPED, handling
from train.tracking import COMMAND_VARIABLES

_PORT = 29500
"""Of the rendezvous over several nodes: torchrun's own."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage with what it made, and whether it was done before this command."""

    stage: Stage
    artifact: Any
    """None where it made nothing: a target that cannot be deployed, which leaves the others unharmed."""
    skipped: bool


def run_pipeline(config: Config, console: Console, until: str = "evaluate") -> list[Finished]:
    """Runs every stage up to the kind `until` that is not done with the same inputs.

    Args:
        config: of the run.
        console: where progress is told.
        until: one of `KINDS`.

    Returns:
        The stages in their order, without those that had nothing to measure; `check_all_made` tells of those that made nothing.

    Raises:
        ValueError: for what the user wrote.
        RuntimeError: for what the world refused, or a worker that failed (its message stands above).
    """
    folder = run_folder(config)
    finished: list[Finished] = []
    with locked(folder), writing(folder):
        earlier = Earlier.read(folder)
        # Not before the lock: the workers of a run that is going on read the configuration from there.
        open_run(config, command_line())
        finished.append(prepare_task(config))
        _tell(finished[-1], console)
        table = stages(config, finished[0].artifact)
        write_stages(folder, {name: stage.folder for name, stage in table.items()})
        if not any(stage.kind == until for stage in table.values()):
            raise ValueError(f"there is no stage {until} in this configuration: teacher.tune is missing; add it, or run another stage")
        wanted = [s for s in table.values() if s.kind in KINDS[1 : KINDS.index(until) + 1]]
        kept = [s for s in wanted if s.is_done]
        if line := told_changes(earlier, config, [table[TASK], *wanted], [table[TASK], *kept] if finished[0].skipped else kept):
            console.print(escape(line), highlight=False, soft_wrap=True)
        kinds = {s.kind for s in wanted if s.place == "worker" and not s.is_done}
        check_models(config, kinds)
        check_recorded(config, kinds, table[TASK].folder)
        check_targets(config, wanted)
        check_fits(config, kinds)
        # One worker start serves all its stages: an import of torch, DeepSpeed and transformers takes longer than a small stage.
        missing = [s for s in wanted if s.place == "worker" and not s.is_done]
        before = {s.name for s in kept}
        if missing and config.launch.nodes > 1:
            _tell_nodes(folder, config, [s.name for s in missing], console)
        if missing:
            _run_worker(folder, config, [s.name for s in missing])
        for stage in (s for s in wanted if s.place == "worker"):
            finished.append(read_finished(stage, stage.name in before))
            _tell(finished[-1], console)
        for stage in (s for s in wanted if s.place == "process" and made_from(s, config, table).is_done):
            made_it = stage.is_done or (make_file if stage.kind == "deploy" else measure_rung)(stage, config, table)
            finished.append(read_finished(stage, stage.name in before) if made_it else Finished(stage, None, skipped=False))
            if made_it:
                _tell(finished[-1], console)
    return finished


def check_targets(config: Config, wanted: Sequence[Stage]) -> None:
    """Before a student is trained for hours, that its files can be made: of its family and sizes, as far as they are known, and here."""
    shape, prune = shape_here(config.student.model, config.teacher.model), config.student.prune
    family = shape.family if shape is not None else family_of(config.student.model, config.teacher.model)
    keeps_sizes = prune is None or prune.makes_zeros
    for stage in wanted:
        target = target_of(stage.detail) if stage.kind == "deploy" and not stage.is_done else None
        if target is None:
            continue
        if family is None:
            check_installed(target)
        else:
            check_possible(target, family)
        if shape is not None and keeps_sizes:
            check_widths(target, shape)


def check_all_made(finished: Sequence[Finished]) -> None:
    """That every target was made.

    Raises:
        RuntimeError: if one was not; its own message has been told.
    """
    lost = [f.stage.detail for f in finished if f.artifact is None]
    if lost:
        raise RuntimeError(f"not made: {', '.join(lost)} (the reason stands above); all else is done, and the same command tries again")


def made_from(stage: Stage, config: Config, table: Mapping[str, Stage]) -> Stage:
    """The stage whose model a stage deploys or measures."""
    return deployed_from(config, table, stage) if stage.kind == "deploy" else made_by(config, table, stage.detail)


def worker_command(folder: Path, processes: int, names: Sequence[str], rendezvous: Rendezvous | None = None) -> list[str]:
    """The command line that runs stages under torchrun, on one node or where several meet."""
    return [sys.executable, "-m", "launch.agent", *torchrun(processes, rendezvous), "-m", "launch.worker", str(folder), *names]


def worker_environment(processes: int, cpus: int, device: Literal["auto", "cpu", "cuda"] = "auto") -> dict[str, str]:
    """The environment of workers: the user's own, and what our processes need."""
    # Libraries look for GPUs by themselves: where the CPU is wanted, they must not find one.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {
        "OMP_NUM_THREADS": str(max(1, cpus // processes)),
        "TOKENIZERS_PARALLELISM": "false",
        **{name: value for name, value in os.environ.items() if name not in COMMAND_VARIABLES},
        "PYTHONSAFEPATH": "1",
        PARENT: str(os.getpid()),
        **hidden,
    }


def num_processes(config: Config) -> int:
    """One process a GPU, or `launch.cpu_processes`.

    Raises:
        ValueError: if more GPUs are asked for than there are, or a knob of the other device is set.
    """
    launch = config.launch
    gpus = len(detect()) if launch.device != "cpu" else 0
    if launch.device == "cuda" and not gpus:
        raise ValueError("launch.device is cuda, but no GPU was found: check nvidia-smi and CUDA_VISIBLE_DEVICES, or set it to cpu")
    if launch.gpus_per_node != "auto" and launch.gpus_per_node > gpus:
        raise ValueError(f"launch.gpus_per_node is {launch.gpus_per_node}, but this machine has {gpus}: lower it, or set it to auto")
    if not gpus:
        return launch.cpu_processes
    if "cpu_processes" in launch.model_fields_set:
        raise ValueError("launch.cpu_processes has no effect on a machine with GPUs: remove it, or set launch.device to cpu")
    return gpus if launch.gpus_per_node == "auto" else launch.gpus_per_node


def eval_request(stage: Stage, config: Config, table: dict[str, Stage]) -> EvalRequest:
    """What a process must know to measure a rung."""
    teach = table[TEACH].folder
    common: dict[str, Any] = {
        "rung": stage.detail,
        "task_folder": str(table[TASK].folder),
        "metric": config.task.metric,
        "batch_size": config.evaluate.batch_size,
        "timed_examples": config.evaluate.timed_examples,
        "device": config.launch.device,
        "out_folder": str(stage.folder),
    }
    if stage.detail == TEACHER:
        # Only a teacher that fits one device can be timed by itself.
        timed = TUNE in table and Records.read(teach).sharding == "replica"
        tuned = Checkpoint.read(table[TUNE].folder) if timed else None
        return EvalRequest(
            **common,
            runtime="records",
            records_folder=str(teach),
            model_folder=str(table[TUNE].folder / "model") if tuned else None,
            part="solve",
            max_new_tokens=config.teacher.rationales.max_new_tokens,
            num_parameters=tuned.num_parameters if tuned else None,
        )
    deployed = f"deploy.{stage.detail}" in table
    made = made_by(config, table, stage.detail).folder
    form = TextFormat.load(made / "model")
    parameters = (DeployedModel.read(made) if deployed else Checkpoint.read(made)).num_parameters
    target = target_of(stage.detail) if deployed else None
    runtime = target.runtime if target else "transformers"
    return EvalRequest(
        **{**common, "device": device_for(runtime, config.launch.device)},
        runtime=runtime,
        records_folder=None,
        model_folder=str(made / "model"),
        part=form.part,
        max_new_tokens=form.max_answer_tokens,
        teacher_records_folder=str(teach),
        num_parameters=parameters,
    )


def prepare_task(config: Config) -> Finished:
    """Reads the task's rows, where that is not done."""
    stage = task_stage(config)
    skipped = stage.is_done
    if not skipped:
        started = time.monotonic()
        stage.folder.mkdir(parents=True, exist_ok=True)
        made = prepare(config.task, seed=config.seed, folder=stage.folder)
        TaskFiles(made.digest, made.rows, made.rejected, made.leaked, time.monotonic() - started).write(stage.folder)
    return read_finished(stage, skipped)


def read_finished(stage: Stage, skipped: bool) -> Finished:
    """A stage that is done, with what it made."""
    return Finished(stage, ARTIFACT_OF[stage.kind].read(stage.folder), skipped)


class Stopped(typer.Exit):
    """A run that a signal ended, with what is done kept: the command tells so and exits with `STOPPED`, which asks to be started again.

    The command line knows it by its base class, which is a RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__(STOPPED)
        self.args = ("stopped by a signal; what is done is kept: the same command goes on from there",)


class Failed(typer.Exit):
    """Work that a process gave up after it had said why: the command adds that nothing is lost, and exits with 1."""

    def __init__(self, kept: str) -> None:
        super().__init__(1)
        self.args = (f"{kept} kept: the same command goes on from there",)


def end_of(what: str, status: int, kept: str = "what is done is") -> RuntimeError:
    """What to raise for a process that ended with `status`; what follows a message of its own is told here.

    Args:
        what: ended.
        status: of its exit; 1 after it said why.
        kept: the subject and verb of what is not lost.
    """
    if status == 1:
        failed = Failed(kept)
        print(failed, file=sys.stderr, flush=True)
        return failed
    return RuntimeError(f"{what} ended with status {status}; {kept} kept: the same command goes on from there")


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end, passes SIGTERM and SIGUSR1 on to it, and gives its exit status.

    Raises:
        Stopped: if it was asked to stop and did; the message is told here.
    """
    asked: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    with handling(pass_on), subprocess.Popen(command, env=environment) as process:
        started.append(process)
        for number in asked:  # before there was anybody to pass it on to
            process.send_signal(number)
        try:
            status = process.wait()
        except BaseException:  # Ctrl-C too, as subprocess.run does
            process.kill()
            raise
    if status == STOPPED or (asked and status in [-number for number in SIGNALS]):
        stopped = Stopped()
        print(stopped, file=sys.stderr, flush=True)
        raise stopped
    return status


def _tell_nodes(folder: Path, config: Config, names: Sequence[str], console: Console) -> NoReturn:
    """Says what to start where: without Slurm nobody starts processes on other nodes."""
    nodes, processes = config.launch.nodes, num_processes(config)
    for node in range(nodes):
        meeting = Rendezvous(nodes, "FIRST_NODE", _PORT, config.name, is_host=node == 0)
        words = shlex.join(worker_command(folder, processes, names, meeting))
        line = f"node {node}: cd {shlex.quote(str(Path.cwd()))} && PYTHONSAFEPATH=1 {words}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    raise RuntimeError(
        f"launch.nodes is {nodes}, and `stepdown run` starts processes on this machine only: start the lines above together, each on its "
        "node, with the name of the first in place of FIRST_NODE; the same command then goes on from there. On a Slurm cluster "
        "`stepdown submit` does all this"
    )


def _run_worker(folder: Path, config: Config, names: Sequence[str]) -> None:
    processes = num_processes(config)
    status = supervise(worker_command(folder, processes, names), worker_environment(processes, cpu_count(), config.launch.device))
    if status:
        raise end_of("the worker", status)


def make_file(stage: Stage, config: Config, table: dict[str, Stage]) -> bool:
    """Whether the file was made; where not, its process has said why."""
    request = stage.folder / "request.json"
    target = target_of(stage.detail)
    assert target is not None, stage.name
    source, task, teach = deployed_from(config, table, stage).folder, table[TASK].folder, table[TEACH].folder
    DeployRequest(target.name, str(source), str(task), str(teach), str(stage.folder), config.deploy.vocabulary).write(request)
    status = supervise(deploy_command(request), worker_environment(1, cpu_count(), config.launch.device))
    if status < 0:
        print(f"error: {stage.name} was ended by signal {-status}: often the memory is used up", file=sys.stderr, flush=True)
    return status == 0


def measure_rung(stage: Stage, config: Config, table: dict[str, Stage]) -> bool:
    """Measures a rung of the ladder in a process of its own.

    Raises:
        RuntimeError: if it fails; the message of its process stands above.
    """
    request = stage.folder / REQUEST
    eval_request(stage, config, table).write(request)
    status = supervise(command(request), worker_environment(1, cpu_count(), config.launch.device))
    if status:
        raise end_of(stage.name, status)
    return True


def _tell(found: Finished, console: Console) -> None:
    how = "done before" if found.skipped else f"{found.artifact.seconds:.1f} s"
    console.print(
        f"[bold]{found.stage.name}[/bold]: {made(found.artifact)} ({how}) [dim]{escape(str(found.stage.folder))}[/dim]",
        highlight=False,
        soft_wrap=True,
    )


def made(artifact: Any) -> str:
    """What a stage made, in a few words."""
    if isinstance(artifact, TaskFiles):
        rows = ", ".join(f"{count:,} {split}" for split, count in artifact.rows.items())
        rejected = sum(artifact.rejected.values())
        return f"{rows} rows; {rejected:,} rejected"
    if isinstance(artifact, Records):
        agreeing = artifact.agreeing["train"] / max(1, artifact.rows["train"])
        return f"{sum(artifact.rows.values()):,} records, {agreeing:.1%} of the training labels agree with gold"
    if isinstance(artifact, Checkpoint):
        found = artifact.validation
        reached = f"{found['exact_match']:.1%}" if "exact_match" in found else f"loss {found['loss']:.3f}" if found else ""
        how = f", validation {reached} at step {artifact.best_step} of {artifact.steps}" if found else ", not trained"
        return f"{artifact.num_parameters:,} parameters{how}"
    if isinstance(artifact, DeployedModel):
        return f"{artifact.weight_bytes:,} bytes, {artifact.weight_bytes / artifact.source_weight_bytes:.1%} of the fp32 file"
    assert isinstance(artifact, EvalResult)
    return f"{artifact.num_correct} of {artifact.num_items} right ({artifact.num_correct / artifact.num_items:.1%})"
