from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from train.config import TrackingConfig
from train.progress import StageProgress
from train.tracking import LOG_FILE, Tracker, read_log, wandb_mode

OFF = TrackingConfig(wandb="disabled")


def open_tracker(folder: Path, config: TrackingConfig = OFF, *, enabled: bool = True, from_step: int = 0) -> Tracker:
    return Tracker(folder, config, group="svamp", job_type="train", settings={"learning_rate": 0.25}, enabled=enabled, from_step=from_step)


@pytest.fixture
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


# JSON lines


def test_numbers_go_to_json_lines_at_once(tmp_path: Path) -> None:
    with open_tracker(tmp_path / "stage") as tracker:
        tracker.log(1, {"loss": 0.5, "learning_rate": 1e-4})
        assert (tmp_path / "stage" / LOG_FILE).read_text() == '{"step": 1, "loss": 0.5, "learning_rate": 0.0001}\n'
        tracker.log(1, {"validation_loss": 2})
        tracker.summary({"best_step": 1})
    assert read_log(tmp_path / "stage" / LOG_FILE) == [
        {"step": 1, "loss": 0.5, "learning_rate": 1e-4},
        {"step": 1, "validation_loss": 2},
    ]
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [LOG_FILE]


def test_a_tracker_that_is_not_enabled_writes_nothing(tmp_path: Path) -> None:
    with open_tracker(tmp_path / "stage", TrackingConfig(wandb="offline"), enabled=False) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.summary({"best_step": 1})
    assert list(tmp_path.iterdir()) == []


def write_steps(folder: Path, steps: range) -> None:
    with open_tracker(folder, from_step=steps.start) as tracker:
        for step in steps:
            tracker.log(step + 1, {"loss": 1 / (step + 1)})


def test_a_resumed_log_drops_the_lines_of_later_steps(tmp_path: Path) -> None:
    write_steps(tmp_path, range(5))
    write_steps(tmp_path, range(3, 6))
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_starts_anew_is_empty(tmp_path: Path) -> None:
    write_steps(tmp_path, range(5))
    write_steps(tmp_path, range(1))
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1]


@pytest.mark.parametrize("rest", ['{"step": 4, "lo', '{"step": 4', "{", "\0\0\0"])
def test_a_half_written_last_line_is_dropped(rest: str, tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write(rest)
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3]
    write_steps(tmp_path, range(3, 4))
    assert [json.loads(text)["step"] for text in (tmp_path / LOG_FILE).read_text().splitlines()] == [1, 2, 3, 4]


def test_a_log_survives_a_process_killed_while_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, range(3))

    def killed(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            open_tracker(tmp_path, from_step=3)
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path / "gone.jsonl") == []


# Weights & Biases: how it is used


@pytest.mark.usefixtures("_no_key")
@pytest.mark.parametrize("wished", ["online", "offline", "disabled"])
def test_the_environment_decides_where_the_configuration_says_auto(wished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", wished)
    assert wandb_mode(TrackingConfig()) == wished
    assert wandb_mode(TrackingConfig(wandb="offline")) == "offline"
    assert wandb_mode(OFF) == "disabled"


@pytest.mark.usefixtures("_no_key")
def test_auto_is_online_where_a_key_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode(TrackingConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_mode(TrackingConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    assert wandb_mode(TrackingConfig()) == "online"


@pytest.mark.usefixtures("_no_key")
def test_auto_finds_the_key_that_wandb_login_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".netrc"
    path.write_text("machine api.wandb.ai login user password abc\n")
    path.chmod(0o600)
    assert wandb_mode(TrackingConfig()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert wandb_mode(TrackingConfig()) == "offline"
    path.write_text("machine wandb.example.org login user password abc\n")
    assert wandb_mode(TrackingConfig()) == "online"
    path.write_text("machine")
    assert wandb_mode(TrackingConfig()) == "offline"


def test_an_offline_run_can_be_read_back_from_disk(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="offline", project="a-project")
    with open_tracker(tmp_path, config) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(1, {"validation_loss": 0.75})
        tracker.summary({"best_step": 1})
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    wanted = (b"validation_loss", b"0.75", b"best_step", b"learning_rate", b"svamp/train", b"a-project")
    # W&B's own process writes the file, on a busy machine a moment after the run has ended.
    for _ in range(300):
        if all(text in run.read_bytes() for text in wanted):
            break
        time.sleep(0.1)
    content = run.read_bytes()
    for text in wanted:
        assert text in content
    assert len(read_log(tmp_path / LOG_FILE)) == 2


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_that_does_not_start_stops_nothing(
    mode: Literal["online", "offline"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("wandb.init", broken)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, TrackingConfig(wandb=mode)) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.summary({"best_step": 1})
    assert read_log(tmp_path / LOG_FILE) == [{"step": 1, "loss": 0.5}]
    assert [r.getMessage() for r in caplog.records] == [
        f"Weights & Biases is off for train (no route to host); the numbers are in {tmp_path / LOG_FILE}"
    ]


class FailingRun:
    """A W&B run that takes one step, and then nothing."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))
        if len(self.calls) > 1:
            raise RuntimeError("disk quota exceeded")

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)


def test_wandb_that_fails_later_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = FailingRun()
    monkeypatch.setattr("wandb.init", lambda **_: run)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, TrackingConfig(wandb="offline")) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 0.5})
        tracker.summary({"best_step": 1})
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3]
    assert run.calls == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert [r.getMessage() for r in caplog.records] == [
        f"Weights & Biases stopped taking numbers (disk quota exceeded); {tmp_path / LOG_FILE} has them all"
    ]


@pytest.mark.parametrize(("error", "code"), [(None, 0), (ValueError("stop"), 1)])
def test_wandb_hears_how_the_stage_ended(error: Exception | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = FailingRun(), dict[str, Any]()

    def init(**arguments: object) -> FailingRun:
        given.update(arguments)
        return run

    monkeypatch.setattr("wandb.init", init)
    tracker = open_tracker(tmp_path, TrackingConfig(wandb="offline", entity="a-team"))
    if error is None:
        with tracker:
            pass
    else:
        with pytest.raises(ValueError, match="stop"), tracker:
            raise error
    assert run.calls == [code]
    assert 0 < given["settings"].finish_timeout <= 600  # a lost network must not hold the stage for ever
    names = ("project", "entity", "group", "job_type", "name", "mode", "config", "dir")
    assert [given[name] for name in names] == [
        "stepdown",
        "a-team",
        "svamp",
        "train",
        "svamp/train",
        "offline",
        {"learning_rate": 0.25},
        str(tmp_path),
    ]


# Progress away from a terminal


@pytest.fixture
def no_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.progress._QUIET_SECONDS", -1.0)


def test_progress_of_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("train", 40, "steps") as progress:
        progress.advance(40)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_quiet")
def test_progress_is_a_line_at_each_tenth_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("train", 40, "steps") as progress:
        for _ in range(40):
            progress.advance(1, "loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" steps")[0] for line in lines] == [f"train: {n}/40" for n in range(4, 41, 4)]
    assert all(line.endswith(" s  loss 0.5") for line in lines)


@pytest.mark.usefixtures("no_quiet")
def test_progress_may_come_in_leaps_or_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("teach", 3, "chunks") as progress:
        progress.advance(0)
        progress.advance(2)
        progress.advance(1)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["teach: 2/3 chunks", "teach: 3/3 chunks"]


def test_progress_is_silent_where_not_enabled_or_where_there_is_no_work(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("train", 2, "steps", enabled=False) as progress:
        progress.advance(2)
    with StageProgress("train", 0, "steps") as nothing:
        nothing.advance(0)
    assert capsys.readouterr().err == ""
    assert progress.done == 2


def test_progress_on_a_terminal_is_one_live_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with StageProgress("train", 4, "steps") as progress:
        progress.advance(4, "loss 0.5")
    text = capsys.readouterr().err
    assert "train (steps)" in text
    assert "4/4" in text
    assert "loss 0.5" in text
