"""What each rank runs: the stages named, one after another, in one start of torch and DeepSpeed.

torchrun --standalone --nproc-per-node 1 -m launch.worker RUN_FOLDER STAGE [STAGE ...]
torchrun --standalone --nproc-per-node 1 -m launch.worker RUN_FOLDER teach:0/4        the first of four parts of the records
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from data.store import Part
from data.tasks import Task, read_task
from launch.architecture import Architecture, architecture_of, assumed_architecture
from launch.config import RESOLVED, Config, load_config
from launch.hardware import detect, memory_bytes
from launch.lineage import hand_over
from launch.parameters import is_known
from launch.pipeline import PRUNE, RECOVER, TASK, TEACH, TUNE, Stage, parted, shipped, stages, task_stage
from launch.plan import cpu_teacher_plan, hosts_hold, teacher_plan
from launch.rundir import locked, run_folder, writing
from launch.workload import inference_of
from train.artifacts import Artifact, Checkpoint, TaskFiles
from train.background import Background
from train.config import Arm
from train.deploy.targets import TARGETS, check_possible, module_of
from train.signals import STOPPED, Stopped, die_with_parent
from train.tracking import Tracker

if TYPE_CHECKING:
    from data.records import TeacherRecord
    from train.student.stage import StudentInputs
    from train.teacher.live import Layout
    from train.teacher.stage import TeacherInputs
    from train.world import World


def run_stages(config: Config, names: Sequence[str], world: World) -> None:
    """Runs stages that are not done; each marks its folder when it is."""
    from train.peaks import measuring

    table = stages(config, TaskFiles.read(task_stage(config).folder))
    task = read_task(table[TASK].folder)
    for name, part in map(parted, names):
        stage = table[name]
        stage.folder.mkdir(parents=True, exist_ok=True)
        if part is not None and not _is_written(part, stage, config, table, task, world):
            continue
        # Two runs that share a teacher: the second waits, and finds the work done.
        with locked(stage.folder, patience_seconds=1e9) if world.is_main else nullcontext():
            world.barrier()
            if world.sees(stage.is_done):
                continue
            with _tracking(stage, config, table, world) as open_tracker:
                with measuring(stage.folder, world):
                    artifact = _run(stage, config, table, task, world, open_tracker)
                world.barrier()
                if world.is_main:
                    artifact.write(stage.folder)
            world.barrier()


def _is_written(part: Part, stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World) -> bool:
    """Writes a part of the records; whether those of all parts are there, so that the stage can be marked as done."""
    from train.teacher import stage as teach

    rows = teach.rows_of(task)
    if world.sees(part.missing(stage.folder, rows)):
        # The parts work side by side; one that writes the whole store waits for them.
        with locked(stage.folder, patience_seconds=1e9, shared=True) if world.is_main else nullcontext():
            world.barrier()
            _teach_part(part, stage, config, table, task, world)
            world.barrier()
    return not world.sees(Part(0, 1).missing(stage.folder, rows))


def _run(
    stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World, open_tracker: Callable[[int], Tracker]
) -> Artifact:
    if stage.kind == TUNE:
        from train.teacher import tune

        solved = config.task.rationale is not None or config.uses_rationales
        return tune.run(config.teacher, task, stage.folder, world, seed=config.seed, open_tracker=open_tracker, solved=solved)
    if stage.kind == TEACH:
        return _teach(stage, config, table, task, world, open_tracker)
    if stage.kind == "train":
        return _train(stage, config, table, task, world, open_tracker)
    if stage.kind == RECOVER:
        return _recover(stage, config, table, task, world, open_tracker)
    assert stage.kind == PRUNE, stage.name
    return _prune(stage, config, table, task, world, open_tracker)


def _layout(config: Config, tuned: Path | None, world: World) -> Layout:
    """How the teacher lies on the devices, `auto` resolved against those that are here."""
    from train.teacher.live import Layout

    teacher = config.teacher
    if teacher.source != "deepspeed" or teacher.sharding != "auto":
        return Layout("replica" if teacher.sharding == "auto" else teacher.sharding)
    model = _teacher_shape(config, tuned)
    gpus = detect() if world.device.type == "cuda" else []
    if not gpus:
        plan = cpu_teacher_plan(model.parameters, memory_bytes(), world.size)
    else:
        node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        plan = teacher_plan(model, min(gpu.memory_bytes for gpu in gpus), node, world.size // node, inference_of(teacher))
        if not plan.fits and hosts_hold(model.parameters, world.size // node, memory_bytes()):
            return Layout("zero3", offload=True)
    if not plan.fits:
        raise ValueError(f"teacher.model does not fit: {plan.why}")
    return Layout(plan.sharding, plan.tensor_degree if plan.sharding == "tensor" else None)


def _teacher_shape(config: Config, tuned: Path | None) -> Architecture:
    """The teacher's shape; of an architecture that the plan does not know, that which a model of its size has."""
    from train.models import num_parameters, skeleton

    assert isinstance(config.teacher.model, str) or tuned is not None
    model = skeleton(str(tuned / "model") if tuned is not None else str(config.teacher.model), "teacher.model")
    saved = model.config.to_dict()
    return architecture_of(saved) if is_known(saved) else assumed_architecture(num_parameters(model))


def _teach(
    stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World, open_tracker: Callable[[int], Tracker]
) -> Artifact:
    from train.teacher import stage as teach

    inputs = _teacher_inputs(config, table, task, world)
    with open_tracker(teach.most_written(stage.folder)) as tracker:
        made = teach.run(config.teacher, inputs, stage.folder, world, seed=config.seed, tracker=tracker)
        rows = sum(made.rows.values())
        tracker.log(rows, {"records": rows, "generated_tokens": made.generated_tokens, "seconds": made.seconds})
    return made


def _teach_part(part: Part, stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World) -> None:
    from train.peaks import measuring
    from train.teacher import stage as teach

    inputs = _teacher_inputs(config, table, task, world)
    own = replace(stage, folder=stage.folder / f"part-{part.index}-of-{part.of}")  # a log of its own
    with _tracking(own, config, table, world, shows=False) as open_tracker, open_tracker(0) as tracker, measuring(own.folder, world):
        teach.run_part(config.teacher, inputs, stage.folder, world, part, seed=config.seed, tracker=tracker)


def _teacher_inputs(config: Config, table: Mapping[str, Stage], task: Task, world: World) -> TeacherInputs:
    from train.teacher.stage import TeacherInputs

    tuned = table[TUNE].folder if TUNE in table else None
    layout = _layout(config, tuned, world)
    return TeacherInputs(task, config.task.metric, config.task.choices_field, tuned, layout, run_folder(config) / RESOLVED)


def _train(
    stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World, open_tracker: Callable[[int], Tracker]
) -> Artifact:
    from train.student import stage as student

    arm = cast(Arm, stage.detail)
    inputs = student_inputs(config, table, task)
    return student.run(
        config.student.of_arm(arm),
        config.student.arms[arm],
        inputs,
        stage.folder,
        world,
        seed=config.seed,
        title=f"train {stage.detail}",
        open_tracker=open_tracker,
    )


def _prune(
    stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World, open_tracker: Callable[[int], Tracker]
) -> Artifact:
    from train.student import pruning

    arm, prune = config.student.arm, config.student.prune
    trained = table[f"train.{arm}"].folder
    return pruning.run(
        config.student.of_arm(arm).model_copy(update={"prune": prune}),
        config.student.loss,
        student_inputs(config, table, task),
        Checkpoint.read(trained),
        trained,
        stage.folder,
        world,
        seed=config.seed,
        open_tracker=open_tracker,
    )


def _recover(
    stage: Stage, config: Config, table: Mapping[str, Stage], task: Task, world: World, open_tracker: Callable[[int], Tracker]
) -> Artifact:
    from train.student import recovering

    target, settings, arm = TARGETS[stage.detail], config.deploy.recover, config.student.arm
    assert settings is not None
    check_possible(target, Checkpoint.read(shipped(config, table).folder).family)
    format_module = module_of(target)
    return recovering.run(
        config.student.of_arm(arm),
        settings,
        student_inputs(config, table, task),
        shipped(config, table).folder,
        stage.folder,
        world,
        grids_of=lambda model: format_module.grids(model, target),
        seed=config.seed,
        title=f"recover {target.name}",
        open_tracker=open_tracker,
    )


def student_inputs(config: Config, table: Mapping[str, Stage], task: Task) -> StudentInputs:
    """What every arm of a run learns from."""
    from train.student.stage import StudentInputs
    from train.teacher.recorded import records

    teacher = str(table[TUNE].folder / "model") if TUNE in table else config.teacher.model
    assert teacher is None or isinstance(teacher, str)
    server = config.teacher.endpoint
    served = server.tokenizer if server is not None else None
    written: dict[str, TeacherRecord] = {}
    if config.teacher.source == "recorded":
        # The store holds records of training and test rows. Validation rows can hold what the teacher wrote about them, but need not.
        with suppress(ValueError):
            recorded = records(config.teacher, task.validation, "validation", config.task.metric, config.task.choices_field)
            written = {record.id: record for record in recorded}
    return StudentInputs(task, table[TEACH].folder, config.teacher.rationales, teacher, served, written)


@contextmanager
def _tracking(
    stage: Stage, config: Config, table: Mapping[str, Stage], world: World, *, shows: bool = True
) -> Iterator[Callable[[int], Tracker]]:
    """Gives what opens the stage's tracker; when the stage is marked as done, it `shows` what was read and made."""
    opened: list[Tracker] = []
    is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0" and not world.is_main

    def open_tracker(step: int) -> Tracker:
        tracker = Tracker(
            stage.folder,
            config.tracking,
            group=config.name,
            job_type=stage.name,
            settings={"config": config.model_dump(mode="json"), "key": stage.key, "processes": world.size},
            enabled=world.is_main,
            from_step=step,
            key=stage.key,
            node=int(os.environ.get("GROUP_RANK", "0")) if is_first_of_node else 0,
            held=True,
        )
        opened.append(tracker)
        return tracker

    code = 1
    try:
        yield open_tracker
        if world.is_main and shows:
            for tracker in opened:
                hand_over(tracker, stage, config, table)
        code = 0
    finally:
        for tracker in opened:
            tracker.finish(code)


def has_device(device: Literal["auto", "cpu", "cuda"]) -> bool:
    """Whether torch can use the devices that the configuration means; where not, the first process of the node says why."""
    from train.engine import uses_cuda

    try:
        uses_cuda(device, 0 if device == "cpu" else len(detect()))
    except RuntimeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process meets it, before they can speak with one another
            print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    return True


def main(arguments: Sequence[str]) -> int:
    """Runs the stages of the command line; a fault that a user can mend is told in one line, by the first process that met it."""
    die_with_parent()  # before the imports of torch and DeepSpeed, which take seconds
    from train.engine import start, stop

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder, *names = arguments
    config = load_config(Path(folder) / RESOLVED)
    if not has_device(config.launch.device):
        return 1
    world = start(config.launch.device)
    tell = world.counter()
    try:
        with writing(Path(folder)):
            run_stages(config, names, world)
    except Stopped as stopped:
        if world.is_main:
            print(stopped, file=sys.stderr, flush=True)
        # torchrun ends the others as soon as one has gone.
        world.barrier()
        stop()
        return STOPPED
    except (ValueError, RuntimeError) as error:
        # Often all processes meet the same one: they read the same files.
        if not str(error).startswith("stopped because") and tell(1) == 1:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        Background.drain()
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
