"""The command line.

stepdown init reviews.csv
stepdown run configs/quickstart.yaml
stepdown run configs/quickstart.yaml student.epochs=2 name=short
stepdown predict runs/quickstart "Tom has 3 apples. He buys 4 more. How many apples does Tom have now?"
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

app = typer.Typer(
    name="stepdown",
    help="Steps a large language model down to a small deployable one: one YAML file in, a ladder of measured models out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of its keys.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or name.")]
Output = Annotated[str, typer.Option(help="Folder of all runs, for runs given by name.")]
_show_traceback = False


@app.callback()
def _root(show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False) -> None:
    global _show_traceback
    _show_traceback = show_traceback


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can mend into one message and exit status 1."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (BrokenPipeError, typer.Exit):  # an exit status is a RuntimeError to typer
            raise
        except (ValueError, RuntimeError, OSError) as error:
            if _show_traceback:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("stopped; what is done is kept: the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None

    return run


@app.command()
@_told
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the whole pipeline: task, teacher, students, deployed files, ladder, report."""
    from rich.console import Console

    from launch.config import load_config
    from launch.lineage import track
    from launch.local import check_all_made, run_pipeline
    from launch.rundir import run_folder
    from launch.summary import report

    console = Console()
    loaded = load_config(config, overrides or ())
    finished = run_pipeline(loaded, console)
    folder = run_folder(loaded)
    report(folder, console, frozenset(f.stage.name for f in finished if f.skipped))
    track(loaded, {f.stage.name: f.stage for f in finished}, reported=True)
    check_all_made(finished)
    deployed = [f.stage for f in finished if f.stage.kind == "deploy"][-1]
    console.print(f"to ship: {deployed.folder / 'model'}", soft_wrap=True, highlight=False, markup=False)
    console.print(f'try it:  stepdown predict {folder} "..."', soft_wrap=True, highlight=False, markup=False)


def _until(kind: str, does: str) -> None:
    def stage(config: ConfigPath, overrides: Overrides = None) -> None:
        from rich.console import Console

        from launch.config import load_config
        from launch.lineage import track
        from launch.local import check_all_made, run_pipeline

        loaded = load_config(config, overrides or ())
        finished = run_pipeline(loaded, Console(), until=kind)
        track(loaded, {f.stage.name: f.stage for f in finished}, reported=False)
        check_all_made(finished)

    stage.__doc__ = does
    app.command(name=kind)(_told(stage))


_until("task", "Read and check the task's rows.")
_until("tune", "Tune the teacher on gold solutions, after `task`.")
_until("teach", "Have the teacher write its records, after all that it needs.")
_until("train", "Train the student and its baselines, after all that they need.")
_until("deploy", "Make the files to ship, after all that they need.")
_until("evaluate", "Measure every rung on the test split, after all that it needs.")


@app.command()
@_told
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows: .csv, .tsv, .jsonl (.gz, .xz) or .parquet.")],
    out: Annotated[Path | None, typer.Option(help="Where the configuration goes; FILE's name with .yaml where left out.")] = None,
) -> None:
    """Write a commented configuration for a file of rows, its columns guessed."""
    from rich.console import Console

    from launch.init import write_config

    write_config(file, out, Console())


@app.command()
@_told
def plan(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="The YAML file of a run; or one model: its folder, config.json or hub id.")
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Plan for this GPU in place of what is here: A100-80, H100, L4, ...; one of your own: 48GB, MINE=48GB."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many of them on a node (of one model: 8).")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many nodes.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Size of the teacher where the configuration does not tell, or of one model: 70B, 175B, ...")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows, for hours and disk, where only reading them would tell.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="Count one model (or --params) as a public estimator does: simple, accelerate or deepspeed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much memory teacher and student need, on how many GPUs, how they would be sharded, and for how long they run."""
    from rich.console import Console

    from launch.config import load_config
    from launch.plan_tables import render
    from launch.planning import plan_model, plan_run
    from launch.rules import render_estimates, rule_of
    from launch.sizes import shape_of, size_of

    if rule is not None:
        if overrides or gpus is not None or nodes is not None or rows is not None:
            raise ValueError(
                "--rule counts one model by itself, on which overrides, --gpus, --nodes and --rows have no effect: remove them, or --rule"
            )
        render_estimates(*size_of(config, params), rule_of(rule), Console(), gpu=gpu, as_json=as_json)
        return
    is_run = config is not None and (
        Path(config).suffix in (".yaml", ".yml") or (Path(config).is_file() and Path(config).suffix != ".json")
    )
    if config is not None and is_run:
        loaded = load_config(Path(config), overrides or ())
        made = plan_run(loaded, gpu=gpu, gpus=gpus, nodes=nodes, params=params, rows=rows)
    elif overrides or rows is not None:
        raise ValueError("one model is planned by itself, on which overrides and --rows have no effect: give the YAML file of a run")
    else:
        made = plan_model(shape_of(config, params)[1], gpu=gpu, gpus=gpus, nodes=nodes)
    render(made, Console(), as_json=as_json)


@app.command()
@_told
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the scripts and print the chain; queue nothing.")] = False,
    site: Annotated[Path | None, typer.Option(metavar="FILE", help="What the cluster asks of every job; else slurm/site.yaml.")] = None,
) -> None:
    """Submit what is missing of a run to Slurm, as a chain of jobs."""
    from rich.console import Console

    from launch.config import load_config
    from launch.submit import submit as submit_run

    submit_run(load_config(config, overrides or ()), Console(), site=site, dry_run=dry_run)


@app.command()
@_told
def status(run: Run, output: Output = "runs") -> None:
    """Show the stages of a submitted run, their jobs, how far they are, and what stopped them."""
    from rich.console import Console

    from launch.rundir import find_run
    from launch.status import status as read_status
    from launch.status_table import show

    show(read_status(find_run(run, output)), Console())


@app.command()
@_told
def cancel(run: Run, output: Output = "runs") -> None:
    """Cancel the jobs of a submitted run; what is done is kept."""
    from launch.rundir import find_run
    from launch.status import cancel as cancel_run

    cancelled = cancel_run(find_run(run, output))
    print(f"cancelled: {', '.join(cancelled)}" if cancelled else "no job of this run is in the queue")


@app.command()
@_told
def logs(
    run: Run,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="As `stepdown status` names it: teach, train.step_by_step, report, ...")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as more is written, until Ctrl-C.")] = False,
    output: Output = "runs",
) -> None:
    """Print what the jobs of a stage wrote."""
    from launch.rundir import find_run
    from launch.status import logs as find_logs

    paths = [str(path) for path in find_logs(find_run(run, output), stage)]
    if follow:
        os.execvp("tail", ["tail", "-n", "+1", "-F", *paths])
    for path in paths:
        if len(paths) > 1:
            print(f"==> {path} <==")
        print(Path(path).read_text(errors="replace"), end="")


@app.command()
@_told
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    arms: Annotated[
        str,
        typer.Option(
            help="Arms, with commas between: labels_only, step_by_step, soft_labels, step_by_step_soft, single_task, task_distillation, or "
            "student (the configuration's own); NAME@gold or NAME@teacher says whose labels it learns."
        ),
    ] = "labels_only,step_by_step",
    seeds: Annotated[int, typer.Option(help="Seeds of each cell of the table.")] = 4,
    grid: Annotated[
        list[str] | None, typer.Option(help="student.KEY=VALUE,VALUE: values that each arm tries once; may be given several times.")
    ] = None,
    fractions: Annotated[str, typer.Option(help="Shares of the training rows, each SHARE or SHARE:SEEDS.")] = "1",
    only: Annotated[int | None, typer.Option(help="Run so many trials at most now.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no trial when so many minutes have passed.")] = None,
) -> None:
    """Train arms of the student on the same records, tuned alike on validation, and compare them on the test split over several seeds."""
    from rich.console import Console

    from launch.rundir import command_line
    from launch.sweep import Limits, run_sweep
    from launch.sweep_report import write_report
    from launch.sweep_request import read_request

    console = Console()
    limits = Limits.of(only, minutes)
    asked = read_request(config, overrides or (), arms=arms, seeds=seeds, grid=grid or (), fractions=fractions)
    write_report(run_sweep(asked, console, limits, shlex.join(command_line())), console)


@app.command()
@_told
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or name; RUN/sweep for its sweep.")], output: Output = "runs"
) -> None:
    """Write the report of a run or of a sweep again and print its table."""
    from rich.console import Console

    from launch.rundir import find_run
    from launch.summary import report as write_report
    from launch.sweep import find_sweep
    from launch.sweep_report import write_report as write_sweep

    if (folder := find_sweep(run, output)) is not None:
        write_sweep(folder, Console())
    else:
        write_report(find_run(run, output), Console())


@app.command()
@_told
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or name, with :RUNG for a rung other than its student.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The run to compare with it.")],
    output: Output = "runs",
) -> None:
    """Compare two runs on the same test items: exact McNemar."""
    from launch.ladder import compare as paired
    from launch.rundir import find_rung

    print(paired(find_rung(first, output), find_rung(second, output)))


@app.command()
@_told
def predict(
    run: Run,
    text: Annotated[
        list[str], typer.Argument(help="Inputs as the task's template renders them; `-` reads one a line from standard input.")
    ],
    target: Annotated[str | None, typer.Option(help="Which deployed file answers; the last of deploy.targets where left out.")] = None,
    output: Output = "runs",
) -> None:
    """Answer with a run's deployed model, one answer a line."""
    from launch.predict import predict as answer
    from launch.rundir import find_run

    inputs = [line.rstrip("\n") for line in sys.stdin] if text == ["-"] else text
    for line in answer(find_run(run, output), inputs, target):
        print(line)


@app.command()
@_told
def bench(
    run: Run,
    rung: Annotated[
        list[str] | None, typer.Option(help="Only these, as the ladder names them; all that a model serves where left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, in turn; the table has medians.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all that this process may use.")] = 0,
    device: Annotated[str, typer.Option(help="auto: a GPU where there is one and the runtime takes it; cpu; cuda.")] = "auto",
    output: Output = "runs",
) -> None:
    """Measure what serving a run's models takes here: load, latency, rates and memory, each in a fresh process."""
    from rich.console import Console

    from launch.bench import bench as measure
    from launch.rundir import find_run

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {device}: give auto, cpu or cuda")
    where = cast(Literal["auto", "cpu", "cuda"], device)
    measure(find_run(run, output), rung or [], rounds=rounds, threads=threads, device=where, console=Console())


@app.command()
@_told
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file or package:NAME/FILE.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the result.")],
    method: Annotated[
        str, typer.Option(help="magnitude, wanda, neuron, neuron_taylor, neuron_activity, head or layer (see student.prune.method).")
    ] = "neuron",
    fraction: Annotated[float | None, typer.Option(help="Share to take out, from 0 up to 1.")] = None,
    pattern: Annotated[str | None, typer.Option(help="n:m, such as 2:4, in place of --fraction (magnitude and wanda).")] = None,
    scope: Annotated[str | None, typer.Option(help="matrix or global (magnitude).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Matrices to leave alone, by name with *; may be given several times.")] = None,
    round_to: Annotated[int | None, typer.Option(help="Keep a multiple of so many neurons.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts to measure on: JSON lines with a field text, or paragraphs.")] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Do not prune; show the loss against the share, by kind of matrix.")] = False,
) -> None:
    """Prune any model by itself, or scan what it can do without."""
    from rich.console import Console

    from launch.pruning import prune as prune_model

    given = {"fraction": fraction, "pattern": pattern, "scope": scope, "exclude": exclude or None, "round_to": round_to}
    settings = {"method": method, **{key: value for key, value in given.items() if value is not None}}
    prune_model(model, out, settings, texts, Console(), scan=scan)


@app.command()
@_told
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file or package:NAME/FILE.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the results, one folder a target.")],
    target: Annotated[list[str], typer.Option(help="What to make (see deploy.targets); may be given several times.")],
    texts: Annotated[Path, typer.Option(help="Texts to calibrate and verify on: JSON lines with a field text, or paragraphs.")],
) -> None:
    """Make files to ship of any model by itself."""
    from rich.console import Console

    from launch.quantizing import quantize as quantize_model

    quantize_model(model, out, target, texts, Console())


records = typer.Typer(name="records", help="Look over the teacher's records, or have damaged ones written anew.", no_args_is_help=True)
app.add_typer(records)


@records.command("check")
@_told
def check_records(config: ConfigPath, overrides: Overrides = None) -> None:
    """Verify every shard of the records; exit status 1 if one is bad or missing."""
    from rich.console import Console

    from launch.config import load_config
    from launch.records import check

    if not check(load_config(config, overrides or ()), Console()):
        print(f"`{_command('records repair', config, overrides)}` deletes what is bad and keeps the rest")
        raise typer.Exit(1)


@records.command("repair")
@_told
def repair_records(config: ConfigPath, overrides: Overrides = None) -> None:
    """Delete the bad shards only, so that the next run writes those and no others."""
    from rich.console import Console

    from launch.config import load_config
    from launch.records import repair

    if repair(load_config(config, overrides or ()), Console()):
        print(f"now `{_command('run', config, overrides)}` writes what is missing")


def _command(name: str, config: Path, overrides: list[str] | None) -> str:
    return shlex.join(["stepdown", *name.split(), str(config), *(overrides or ())])


@app.command()
@_told
def doctor() -> None:
    """Check versions, devices, and what each extra needs."""
    from rich.console import Console

    from launch.doctor import render

    if not render(Console()):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from launch.config import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
