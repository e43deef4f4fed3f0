from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from data.prompts import TextFormat
from launch import cli, predict
from launch.rundir import write_stages
from train.artifacts import Checkpoint, DeployedModel, EvalResult, Records, TaskFiles

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {
        "train": "builtin:arithmetic",
        "test": "builtin:arithmetic",
        "metric": "number",
        "arithmetic": {"train_rows": 9, "test_rows": 2},
    },
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}},
    "student": {"model": SMALL},
    "launch": {"device": "cpu"},
}
FORM = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=8, max_label_tokens=8, max_rationale_tokens=16)
COMMANDS = (
    "init",
    "run",
    "task",
    "tune",
    "teach",
    "train",
    "deploy",
    "evaluate",
    "plan",
    "submit",
    "status",
    "cancel",
    "logs",
    "sweep",
    "report",
    "compare",
    "predict",
    "bench",
    "prune",
    "quantize",
    "doctor",
    "schema",
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("mine.yaml").write_text(yaml.safe_dump(CONFIG))


def stepdown(*arguments: str, standard_input: str | None = None) -> tuple[int, str, str]:
    """Exit status, output and errors of a command, run in this process."""
    result = CliRunner().invoke(cli.app, list(arguments), input=standard_input, prog_name="stepdown")
    return result.exit_code, result.stdout, result.stderr


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "launch.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True, check=False, env=environment)


def evaluation(folder: Path, rung: str, right: str) -> None:
    """A finished evaluation of one item for each mark; 1 is right."""
    folder.mkdir(parents=True)
    lines = [{"id": f"i{i}", "answer": "1", "correct": mark == "1", "agrees": None} for i, mark in enumerate(right)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    EvalResult(rung, "transformers", len(right), right.count("1"), 0, None, 22, 88, 99, {"1": 3.0, "32": 9.0}, None, "cpu", 0.1).write(
        folder
    )


def finished_run(name: str, student: str = "soft_labels", right: str = "1100") -> Path:
    """A run's folder as the stages leave it, made by hand."""
    folder = Path("runs") / name
    rungs = {"teacher": "1111", "labels_only": "1000", student: right, "ctranslate2-int8": "1000"}
    stages = {
        stage: folder / f"{stage}-0" for stage in ("task", "teach", "train.labels_only", f"train.{student}", "deploy.ctranslate2-int8")
    }
    for rung, marks in rungs.items():
        stages[f"evaluate.{rung}"] = folder / f"evaluate.{rung}-0"
        evaluation(stages[f"evaluate.{rung}"], rung, marks)
    TaskFiles("d", {"train": 9, "test": 4}, {"train": 0, "test": 0}).write(stages["task"])
    examples = [{"id": f"i{i}", "input": f"How many {i}?", "label": "1", "choices": [], "rationale": None, "fields": {}} for i in range(4)]
    (stages["task"] / "test.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    Records({"train": 9}, {"train": 9}, {"train": 8}).write(stages["teach"])
    for arm in ("labels_only", student):
        Checkpoint("encoder_decoder", 22, 88, 5, 5, {"exact_match": 0.5}, {}, 8, 8, 8).write(stages[f"train.{arm}"])
    DeployedModel("ctranslate2-int8", "ctranslate2", "encoder_decoder", 25, 30, 88, 22, 8, 8).write(stages["deploy.ctranslate2-int8"])
    (stages["deploy.ctranslate2-int8"] / "model").mkdir()
    FORM.save(stages["deploy.ctranslate2-int8"] / "model")
    write_stages(folder, stages)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "name": name}))
    (folder / "provenance.json").write_text(json.dumps({"command": "stepdown run mine.yaml"}))
    return folder


# ----- help -----


def test_help_is_quick_because_it_loads_nothing_heavy() -> None:
    heavy = "torch transformers deepspeed datasets matplotlib ctranslate2 wandb peft pyarrow numpy pydantic"
    code = (
        "import sys\nfrom launch.cli import app\ntry:\n    app(sys.argv[1:])\n"
        f"finally:\n    print('loaded', sorted(set('{heavy}'.split()) & set(sys.modules)))"
    )
    done = process("--help", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    status, output, _ = stepdown(command, "--help")
    assert status == 0
    assert f"Usage: stepdown {command}" in output
    assert stepdown(command, "-h")[1] == output


def test_every_command_is_known_here() -> None:
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback} == set(COMMANDS)


# ----- what goes wrong -----


def test_a_fault_is_one_line_and_status_1() -> None:
    done = process("run", "missing.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: configuration missing.yaml does not exist; there are mine.yaml\n"


def test_a_traceback_is_shown_to_who_asks_for_it() -> None:
    done = process("--traceback", "run", "missing.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("error: configuration missing.yaml does not exist; there are mine.yaml\n")


@pytest.mark.parametrize("command", ["run", "task", "tune", "teach", "train", "deploy", "evaluate", "plan"])
def test_every_stage_reads_configuration_and_overrides(command: str) -> None:
    assert stepdown(command, "mine.yaml", "seeds=3") == (1, "", "error: mine.yaml:\n  seeds: unknown key; did you mean seed?\n")


def test_what_the_system_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", "mine.yaml")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert stepdown("plan", "mine.yaml") == (1, "", "error: [Errno 13] Permission denied: 'mine.yaml'\n")


def test_ctrl_c_says_that_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.local.run_pipeline", interrupted)
    assert stepdown("task", "mine.yaml") == (130, "", "stopped; what is done is kept: the same command goes on from there\n")


# ----- commands that need no torch -----


def test_schema_prints_json() -> None:
    status, output, _ = stepdown("schema")
    assert status == 0
    assert json.loads(output)["title"] == "Stepdown configuration"


def test_a_reader_that_stops_reading_is_no_fault() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    piped = subprocess.run(
        ["bash", "-c", '"$0" -m launch.cli schema | head -1', sys.executable], env=environment, capture_output=True, text=True, check=False
    )
    assert (piped.stdout, piped.stderr) == ("{\n", "")


def test_task_alone() -> None:
    status, output, errors = stepdown("task", "mine.yaml", "name=other")
    assert (status, errors) == (0, "")
    assert output.startswith("task: 8 train, 1 validation, 2 test rows; 0 rejected")
    assert Path("runs/other/config.yaml").is_file()


def test_plan_counts_one_model_by_a_public_rule() -> None:
    status, output, _ = stepdown("plan", "--params", "175B", "--rule", "simple", "--gpu", "A100-80", "--json")
    rows = {row["what"]: row for row in json.loads(output)["estimates"]}
    assert status == 0
    assert rows["inference, bf16"] == {"what": "inference, bf16", "bytes": 350 * 10**9, "gpus": {"A100-80GB": 5}}
    for arguments, message in (
        (("--params", "1B", "--rule", "simple", "--gpus", "8"), "--gpus, --nodes and --rows have no effect: remove them, or --rule"),
        (("m", "student.epochs=2", "--rule", "simple"), "on which overrides, --gpus, --nodes and --rows have no effect"),
        (("m", "student.epochs=2"), "one model is planned by itself, on which overrides and --rows have no effect"),
        (("--params", "1B", "--rows", "5"), "one model is planned by itself, on which overrides and --rows have no effect"),
        ((), "give a configuration, a model (its folder, config.json or hub id), or --params, such as --params 70B"),
        (("--params", "1B", "--rule", "mine"), "--rule is mine: give simple, accelerate or deepspeed"),
    ):
        status, _, error = stepdown("plan", *arguments)
        assert status == 1
        assert message in error


def test_plan_as_a_table_and_as_json() -> None:
    options = ("--gpu", "A100-80", "--gpus", "8", "--params", "70B")
    status, output, _ = stepdown("plan", "mine.yaml", "student.zero_stage=2", *options)
    assert status == 0
    assert output.splitlines()[0] == "8 x A100-80GB, 80.0 GB each, 73.8 GB of them usable"
    assert "ZeRO-2" in output
    made = json.loads(stepdown("plan", "mine.yaml", *options, "--json")[1])
    assert (made["teacher"]["plan"]["sharding"], made["teacher"]["plan"]["tensor_degree"]) == ("tensor", 4)
    assert made["sentence"].startswith("On 8 x A100-80GB the teacher fits split over 4 ")


def test_plan_of_one_model() -> None:
    status, output, _ = stepdown("plan", "--params", "175B", "--gpus", "8", "--nodes", "4")
    assert status == 0
    assert output.startswith("4 nodes of 8 x A100-80GB")
    assert json.loads(stepdown("plan", "--params", "8B", "--gpu", "mine=48GB", "--json")[1])["devices"]["name"] == "mine"


def test_plan_refuses_a_gpu_that_is_not_there() -> None:
    assert stepdown("plan", "mine.yaml", "--gpu", "V100")[2].startswith(
        "error: --gpu is V100, which the table does not have; it has: A100-40GB"
    )


def test_report_writes_and_prints_the_ladder_of_a_run() -> None:
    folder = finished_run("mine")
    status, output, errors = stepdown("report", "mine")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert [line.split()[0] for line in lines[3:7]] == ["teacher", "labels_only", "soft_labels", "ctranslate2-int8"]
    head = " ".join(lines[:3])
    assert all(title in head for title in ("Params", "Weights", "Items/s"))
    assert "soft_labels against labels_only: +25.0 points, 1 gained, 0 lost, exact McNemar p = 1.000: not significant at 5 %." in lines
    assert lines[-1] == "report: runs/mine/report.html (also report.md and report.json)"
    assert all((folder / name).stat().st_size for name in ("report.html", "report.md", "report.json"))
    assert (folder / "report.md").read_text().startswith("# mine: the ladder\n")


def test_the_report_of_the_folder_that_one_is_in_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run("mine"))
    assert stepdown("report", ".")[0] == 0
    assert Path("report.md").read_text().startswith("# mine: the ladder\n")


def test_report_of_a_run_without_evaluation() -> None:
    folder = Path("runs/new")
    folder.mkdir(parents=True)
    write_stages(folder, {"task": folder / "task-0", "evaluate.teacher": folder / "evaluate.teacher-0"})
    expected = "error: runs/new has no finished evaluation to report: run `stepdown run` with its configuration first\n"
    assert stepdown("report", "new") == (1, "", expected)
    assert stepdown("report", "old")[2] == ("error: old is not a run: neither old nor runs/old holds stages.json; runs in runs/: new\n")


def test_compare_takes_each_runs_student_or_a_named_rung() -> None:
    finished_run("one")
    finished_run("two", right="1111")
    status, output, _ = stepdown("compare", "one", "two")
    assert status == 0
    assert output.splitlines()[2] == "b against a: +50.0 points, 2 gained, 0 lost, exact McNemar p = 0.500: not significant at 5 %"
    assert "soft_labels in runs/one/evaluate.soft_labels-0" in output
    assert "b against a: -75.0 points, 0 gained, 3 lost" in stepdown("compare", "two:teacher", "one:labels_only")[1]
    assert stepdown("compare", "one:gguf", "two")[2].startswith("error: one has no measured rung gguf; it has: teacher, labels_only")
    evaluation(Path("runs/one/evaluate.odd-0"), "odd", "11")
    stages = json.loads(Path("runs/one/stages.json").read_text())
    Path("runs/one/stages.json").write_text(json.dumps({**stages, "evaluate.odd": "evaluate.odd-0"}))
    told = stepdown("compare", "one:odd", "two")[2]
    assert "were scored on different items: they share 2 of 2 and 4; compare evaluations of one test split" in told


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the runtime was asked; it answers with the upper case."""
    calls: list[Any] = []

    def opened(kind: str, folder: Path, **options: Any) -> SimpleNamespace:
        calls.append((kind, folder))
        return SimpleNamespace(format=TextFormat.load(folder))

    def answered(runtime: SimpleNamespace, inputs: list[str], part: str, **options: Any) -> list[str]:
        calls.append((inputs, part, options))
        return [text.upper() for text in inputs]

    monkeypatch.setattr(predict, "open_runtime", opened)
    monkeypatch.setattr(predict, "answers", answered)
    return calls


def test_predict_answers_one_line_an_input(asked: list[Any]) -> None:
    finished_run("mine")
    assert stepdown("predict", "mine", "one", "two") == (0, "ONE\nTWO\n", "")
    assert asked == [
        ("ctranslate2", Path("runs/mine/deploy.ctranslate2-int8-0/model")),
        (["one", "two"], "predict", {"batch_size": 32, "max_new_tokens": 8}),
    ]


def test_predict_asks_a_single_task_student_to_solve_and_gives_its_label(asked: list[Any]) -> None:
    replace(FORM, part="solve").save(finished_run("mine") / "deploy.ctranslate2-int8-0" / "model")
    # What the model writes is the upper case of its input.
    assert stepdown("predict", "mine", "It is two. Answer: 2", "it ends") == (0, "2\nIT ENDS\n", "")
    assert asked[1][1:] == ("solve", {"batch_size": 32, "max_new_tokens": 8 + 16 + 8})


def test_predict_reads_standard_input(asked: list[Any]) -> None:
    finished_run("mine")
    assert stepdown("predict", "mine", "-", "--target", "ctranslate2-int8", standard_input="a\nb\n") == (0, "A\nB\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("mine", "--target", "gguf", "x"), "error: --target is gguf, but runs/mine has ctranslate2-int8\n"),
        (("mine", " "), "error: an input is empty: give the text to answer, or `-` to read one a line from standard input\n"),
        (("mine", "-"), "error: an input is empty: give the text to answer, or `-` to read one a line from standard input\n"),
        (("none", "x"), "error: none is not a run: neither none nor runs/none holds stages.json; runs in runs/: bare, mine\n"),
        (("bare", "x"), "error: runs/bare has no deployed model yet: run `stepdown run` with its configuration first\n"),
    ],
)
def test_predict_tells_what_is_missing(asked: list[Any], arguments: tuple[str, ...], expected: str) -> None:
    finished_run("mine")
    bare = Path("runs/bare")
    bare.mkdir()
    write_stages(bare, {"deploy.ctranslate2-int8": bare / "deploy.ctranslate2-int8-0"})
    for standard_input in ("a\n\n", ""):
        assert stepdown("predict", *arguments, standard_input=standard_input) == (1, "", expected)
    assert asked == []


def test_doctor_fails_where_something_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.doctor.render", lambda console: False)
    assert stepdown("doctor")[0] == 1
    monkeypatch.setattr("launch.doctor.render", lambda console: True)
    assert stepdown("doctor")[0] == 0


def test_run_prints_the_ladder_and_what_to_do_next(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run("mine")
    from launch.local import Finished
    from launch.pipeline import Stage

    made = Stage("deploy.ctranslate2-int8", "0", folder / "deploy.ctranslate2-int8-0", "process")
    lost = Stage("deploy.gguf-tq2_0", "0", folder / "deploy.gguf-tq2_0-0", "process")
    finished = [Finished(made, DeployedModel.read(made.folder), True)]
    monkeypatch.setattr("launch.local.run_pipeline", lambda config, console: finished)
    monkeypatch.setattr("launch.lineage.track", lambda config, table, reported: None)
    status, output, errors = stepdown("run", "mine.yaml")
    assert (status, errors) == (0, "")
    assert output.splitlines()[-2:] == [
        "to ship: runs/mine/deploy.ctranslate2-int8-0/model",
        'try it:  stepdown predict runs/mine "..."',
    ]
    stages = {stage["name"]: stage["skipped"] for stage in json.loads((folder / "report.json").read_text())["stages"]}
    assert stages["deploy.ctranslate2-int8"] is True
    assert stages["train.soft_labels"] is False
    finished.append(Finished(lost, None, False))
    status, output, errors = stepdown("run", "mine.yaml")
    assert status == 1
    assert "report: runs/mine/report.html" in output
    assert errors == "error: not made: gguf-tq2_0 (the reason stands above); all else is done, and the same command tries again\n"


def test_main_is_the_console_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stepdown", "schema"])
    monkeypatch.setattr(sys, "stdout", output := io.StringIO())
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert output.getvalue().startswith("{")
