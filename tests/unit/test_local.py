from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data.prompts import TextFormat
from launch import local
from launch.config import Config, validate
from launch.hardware import DetectedGpu
from launch.local import check_all_made, eval_request, made, num_processes, run_pipeline, worker_command, worker_environment
from launch.pipeline import Stage, stages
from launch.rundir import locked, run_folder
from train.artifacts import Checkpoint, DeployedModel, EvalResult, Records, TaskFiles
from train.deploy import targets
from train.deploy.request import DeployRequest
from train.evaluate import EvalRequest
from train.signals import PARENT

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
CONFIG: dict[str, Any] = {
    "name": "mine",
    "task": {"train": "builtin:arithmetic", "validation": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"},
    "teacher": {"source": "deepspeed", "model": SMALL, "tune": {}, "rationales": {"max_new_tokens": 24}},
    "student": {"model": SMALL, "baselines": ["labels_only"], "max_label_tokens": 6},
    "evaluate": {"batch_size": 16, "timed_examples": 9},
    "launch": {"device": "cpu"},
    "tracking": {"wandb": "disabled"},
}
ARITHMETIC = {"train_rows": 6, "validation_rows": 2, "test_rows": 2}
RECORDED = {"source": "recorded", "label": "{label}", "rationale": "{rationale}"}


def config(**sections: Any) -> Config:
    return validate({**copy.deepcopy(CONFIG), **sections}, "file")


# ----- commands -----


def test_the_workers_command_is_torchrun_under_the_agent() -> None:
    assert worker_command(Path("runs/mine"), 2, ["tune", "teach"]) == [
        sys.executable,
        *["-m", "launch.agent", "--standalone", "--nproc-per-node", "2", "-m", "launch.worker", "runs/mine", "tune", "teach"],
    ]


def test_the_workers_environment_is_the_users_and_what_our_processes_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MINE", "kept")
    ours = {"TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1", "MINE": "kept", PARENT: str(os.getpid())}
    assert worker_environment(2, 9) == {**ours, "OMP_NUM_THREADS": "4"}
    assert worker_environment(4, 2)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    assert worker_environment(2, 9) == {**ours, "OMP_NUM_THREADS": "7"}


@pytest.mark.parametrize(
    ("gpus", "launch", "expected"),
    [
        (0, {}, 1),
        (0, {"cpu_processes": 3}, 3),
        (4, {}, 4),
        (4, {"gpus_per_node": 2}, 2),
        (4, {"device": "cuda"}, 4),
        (4, {"device": "cpu", "cpu_processes": 2}, 2),
        (0, {"device": "cuda"}, "launch.device is cuda, but no GPU was found: check nvidia-smi and CUDA_VISIBLE_DEVICES, or set it to cpu"),
        (2, {"gpus_per_node": 4}, "launch.gpus_per_node is 4, but this machine has 2: lower it, or set it to auto"),
        (
            2,
            {"cpu_processes": 2},
            "launch.cpu_processes has no effect on a machine with GPUs: remove it, or set launch.device to cpu",
        ),
    ],
)
def test_one_process_a_gpu_else_as_many_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, gpus: int, launch: dict[str, Any], expected: int | str
) -> None:
    monkeypatch.setattr(local, "detect", lambda: [DetectedGpu("NVIDIA L4", 24 * 10**9)] * gpus)
    if isinstance(expected, int):
        assert num_processes(config(launch=launch)) == expected
    else:
        with pytest.raises(ValueError, match=rf"\A{re.escape(expected)}\Z"):
            num_processes(config(launch=launch))


# ----- what is measured -----


FORM = TextFormat("encoder_decoder", eos_id=1, pad_id=0, max_input_tokens=9, max_label_tokens=6, max_rationale_tokens=20)


def finished(made_config: Config, sharding: str = "replica") -> dict[str, Stage]:
    """The table of a run whose stages before the evaluation are done."""
    table = stages(made_config, TaskFiles("digest", {}, {}))
    solving = {f"train.{arm}" for arm in made_config.student.arms if arm == "single_task"}
    solving |= {name for name in table if name.startswith("deploy.")} if solving else set()
    for stage in table.values():
        if stage.kind in ("train", "deploy"):
            (stage.folder / "model").mkdir(parents=True)
            replace(FORM, part="solve" if stage.name in solving else "predict").save(stage.folder / "model")
        if stage.kind in ("tune", "train"):
            Checkpoint("encoder_decoder", 111 if stage.kind == "tune" else 22, 88, 1, 1, {}, {}, 1, 1, 1).write(stage.folder)
        elif stage.kind == "teach":
            Records({}, {}, {}, sharding=sharding).write(stage.folder)
        elif stage.kind == "deploy":
            DeployedModel(stage.detail, "ctranslate2", "encoder_decoder", 1, 1, 4, 22, 1, 1).write(stage.folder)
    return table


def test_what_is_asked_of_each_rung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = config()
    table = finished(mine)
    teach, train = table["teach"].folder, table["train.step_by_step"].folder
    common: dict[str, Any] = {
        "task_folder": str(table["task"].folder),
        "metric": "number",
        "batch_size": 16,
        "timed_examples": 9,
        "device": "cpu",
    }
    student = {"records_folder": None, "part": "predict", "max_new_tokens": 6, "teacher_records_folder": str(teach), "num_parameters": 22}
    rungs = {name: stage for name, stage in table.items() if stage.kind == "evaluate"}
    asked = {stage.detail: eval_request(stage, mine, table) for stage in rungs.values()}
    expected = {
        "teacher": EvalRequest(
            rung="teacher",
            runtime="records",
            model_folder=str(table["tune"].folder / "model"),
            records_folder=str(teach),
            part="solve",
            max_new_tokens=24,
            num_parameters=111,
            out_folder=str(table["evaluate.teacher"].folder),
            **common,
        ),
        "step_by_step": EvalRequest(
            rung="step_by_step",
            runtime="transformers",
            model_folder=str(train / "model"),
            out_folder=str(table["evaluate.step_by_step"].folder),
            **student,
            **common,
        ),
        "ctranslate2-int8": EvalRequest(
            rung="ctranslate2-int8",
            runtime="ctranslate2",
            model_folder=str(table["deploy.ctranslate2-int8"].folder / "model"),
            out_folder=str(table["evaluate.ctranslate2-int8"].folder),
            **student,
            **common,
        ),
    }
    assert asked.keys() == {*expected, "labels_only"}
    assert {name: asked[name] for name in expected} == expected
    assert asked["labels_only"].model_folder == str(table["train.labels_only"].folder / "model")


def test_a_single_task_student_solves_on_every_rung_and_its_baselines_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = config(student={"model": SMALL, "single_task": True, "loss": {"label": 1, "rationale": 0}, "baselines": ["labels_only"]})
    table = finished(mine)
    asked = {s.detail: eval_request(s, mine, table) for s in table.values() if s.kind == "evaluate"}
    # A rationale of 20, `Answer:` of at most 8, a label of 6.
    assert {rung: (found.part, found.max_new_tokens) for rung, found in asked.items()} == {
        "teacher": ("solve", 24),
        "labels_only": ("predict", 6),
        "single_task": ("solve", 34),
        "ctranslate2-int8": ("solve", 34),
    }


def test_a_teacher_that_does_not_fit_one_device_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sharded, recorded = config(), config(teacher=RECORDED)
    for mine, table in ((sharded, finished(sharded, "zero3")), (recorded, finished(recorded))):
        asked = eval_request(table["evaluate.teacher"], mine, table)
        assert (asked.runtime, asked.model_folder, asked.num_parameters) == ("records", None, None)


@pytest.mark.parametrize(
    ("artifact", "said"),
    [
        (TaskFiles("d", {"train": 4000, "test": 500}, {"train": 7, "test": 1}), "4,000 train, 500 test rows; 8 rejected"),
        (Records({"train": 8, "test": 2}, {}, {"train": 6}), "10 records, 75.0% of the training labels agree with gold"),
        (
            Checkpoint("decoder_only", 12_345, 1, 60, 50, {"exact_match": 0.5}, {}, 1, 1, 1),
            "12,345 parameters, validation 50.0% at step 50 of 60",
        ),
        (DeployedModel("t", "ctranslate2", "decoder_only", 2500, 1, 10_000, 1, 1, 1), "2,500 bytes, 25.0% of the fp32 file"),
        (EvalResult("r", "t", 8, 6, 0, None, None, None, None, None, None, "cpu", None), "6 of 8 right (75.0%)"),
    ],
)
def test_what_a_stage_made_in_words(artifact: Any, said: str) -> None:
    assert made(artifact) == said


# ----- a run on this machine, as far as it goes without a worker -----


def tiny(**sections: Any) -> Config:
    return config(task={**CONFIG["task"], "arithmetic": ARITHMETIC}, teacher=RECORDED, **sections)


def told(mine: Config, until: str) -> str:
    console = Console(width=60, quiet=False)
    with console.capture() as capture:
        run_pipeline(mine, console, until=until)
    return capture.get()


def test_a_stage_that_is_done_is_told_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tiny(output="a[b]c")
    first, second = told(mine, "task"), told(mine, "task")
    assert first.startswith("task: 6 train, 2 validation, 2 test rows; 0 rejected (")
    assert "(done before)" not in first
    assert "(done before) a[b]c/mine/task-" in second
    assert len(second.splitlines()) == 1
    assert {"config.yaml", "stages.json", "provenance.json"} <= {path.name for path in run_folder(mine).iterdir()}


def test_a_run_that_is_going_on_keeps_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told(tiny(), "task")
    before = {path.name: path.read_bytes() for path in Path("runs/mine").glob("*.*")}
    monkeypatch.setattr(local, "locked", lambda folder: locked(folder, patience_seconds=0.0))
    with locked(Path("runs/mine")), pytest.raises(RuntimeError, match=r"runs/mine is in use by another stepdown process"):
        told(tiny(seed=5), "task")
    assert {path.name: path.read_bytes() for path in Path("runs/mine").glob("*.*")} == before


def test_a_stage_that_the_configuration_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"\Athere is no stage tune in this configuration: teacher.tune is missing; add it, or run another"
    ):
        told(tiny(), "tune")


@pytest.mark.parametrize("until", ["teach", "evaluate"])
def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str) -> None:
    monkeypatch.chdir(tmp_path)
    failing = [sys.executable, "-S", "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(local, "worker_command", lambda *_: failing)
    monkeypatch.setattr(local, "command", lambda _: failing)
    expected = r"\Athe worker ended with status 3; what is done is kept: the same command goes on from there\Z"
    mine = tiny()
    if until == "evaluate":
        told(mine, "task")
        finished_table = stages(mine, TaskFiles.read(next(Path("runs/mine").glob("task-*"))))
        monkeypatch.setattr(local, "stages", lambda *_: finished_table)
        for stage in finished_table.values():
            if stage.kind == "train":
                Checkpoint("encoder_decoder", 22, 88, 1, 1, {"exact_match": 0.0}, {}, 1, 1, 1).write(stage.folder)
            elif stage.kind == "teach":
                Records({"train": 6}, {}, {"train": 1}).write(stage.folder)
            elif stage.kind == "deploy":
                DeployedModel(stage.detail, "ctranslate2", "encoder_decoder", 1, 1, 4, 22, 1, 1).write(stage.folder)
        expected = r"\Aevaluate.teacher ended with status 3; what is done is kept: the same command goes on from there\Z"
    with pytest.raises(RuntimeError, match=expected):
        told(mine, until)


def test_a_process_that_told_its_own_fault_is_not_told_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    failing = "import sys; print('error: its own words', file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(local, "worker_command", lambda *_: [sys.executable, "-S", "-c", failing])
    with pytest.raises(local.Failed) as raised:
        told(tiny(), "teach")
    assert raised.value.exit_code == 1
    assert capfd.readouterr().err == "error: its own words\nwhat is done is kept: the same command goes on from there\n"


def test_a_target_that_cannot_be_made_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tiny(deploy={"targets": ["onnx-int8", "ctranslate2-int8"], "vocabulary": "task"})
    told(mine, "task")
    table = stages(mine, TaskFiles.read(next(Path("runs/mine").glob("task-*"))))
    monkeypatch.setattr(local, "stages", lambda *_: table)
    for stage in table.values():
        if stage.kind == "train":
            Checkpoint("encoder_decoder", 22, 88, 1, 1, {"exact_match": 0.0}, {}, 1, 1, 1).write(stage.folder)
            (stage.folder / "model").mkdir()
            FORM.save(stage.folder / "model")
        elif stage.kind == "teach":
            Records({"train": 6}, {}, {"train": 1}).write(stage.folder)

    def run(command: list[str], environment: dict[str, str]) -> int:
        folder = Path(command[-1]).parent
        if "evaluate" in folder.name:
            EvalResult(folder.name, "x", 2, 1, 0, None, None, None, None, None, None, "cpu", None).write(folder)
        elif "onnx" in folder.name:
            assert DeployRequest.read(Path(command[-1])).vocabulary == "task"
            return 1
        else:
            DeployedModel("ctranslate2-int8", "ctranslate2", "encoder_decoder", 1, 1, 4, 22, 1, 1).write(folder)
            (folder / "model").mkdir()
            FORM.save(folder / "model")
        return 0

    monkeypatch.setattr(local, "supervise", run)
    finished = run_pipeline(mine, Console(quiet=True))
    made_of = {found.stage.name: found.artifact for found in finished}
    assert made_of["deploy.onnx-int8"] is None
    assert made_of["deploy.ctranslate2-int8"] is not None
    assert "evaluate.onnx-int8" not in made_of, "there is nothing to measure"
    assert "evaluate.ctranslate2-int8" in made_of
    with pytest.raises(RuntimeError, match=r"\Anot made: onnx-int8 \(the reason stands above\); all else is done, and the same command"):
        check_all_made(finished)


def test_a_missing_library_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    monkeypatch.setattr(local, "supervise", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=r"deploy.targets holds onnx-int8, which needs onnx: pip install 'stepdown\[onnx\]', or remove"):
        run_pipeline(tiny(deploy={"targets": ["ctranslate2-int8", "onnx-int8"]}), Console(quiet=True))


def test_a_target_of_another_family_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "supervise", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=r"deploy.targets holds gguf-q8_0, which is for decoder_only models, but the student is encoder_"):
        run_pipeline(tiny(deploy={"targets": ["ctranslate2-int8", "gguf-q8_0"]}), Console(quiet=True))


# ----- processes that end with their parent -----

TREE = """
import subprocess, sys
from pathlib import Path
from train.signals import die_with_parent
generation, folder = int(sys.argv[1]), Path(sys.argv[2])
if generation:
    die_with_parent()
import os, time
if generation < 2:
    child = subprocess.Popen([sys.executable, __file__, str(generation + 1), str(folder)], start_new_session=True)
(folder / f"pid{generation}").write_text(f"{os.getpid()}\\n")
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_tree_of_processes_in_sessions_of_their_own_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    files = [tmp_path / f"pid{generation}" for generation in range(3)]
    parent = subprocess.Popen([sys.executable, str(script), "0", str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert wait_until(lambda: all(file.is_file() and file.read_text().endswith("\n") for file in files), 20.0)
        pids = [int(file.read_text()) for file in files]
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=5)
        assert wait_until(lambda: not any(map(alive, pids)))
    finally:
        parent.kill()
        parent.wait()
        for file in files[1:]:
            if file.is_file() and alive(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    "module", ["train.evaluate", "train.deploy.stage", "train.deploy.verify", "train.deploy.command", "train.pruning.command"]
)
def test_no_process_of_a_stage_outlives_the_command(module: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), PARENT: "1"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", ""), "it would have told its usage"


def test_a_process_whose_parent_is_gone_already_ends() -> None:
    command = [sys.executable, "-c", "from train.signals import die_with_parent; die_with_parent(); print('runs')"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    orphan = subprocess.run(command, env={**environment, PARENT: "1"}, capture_output=True, text=True, check=False)
    child = subprocess.run(command, env={**environment, PARENT: str(os.getpid())}, capture_output=True, text=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (1, "")
    assert (child.returncode, child.stdout) == (0, "runs\n")
