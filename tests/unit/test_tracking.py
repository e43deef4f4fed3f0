from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.background import Background, answers
from train.config import TrackingConfig
from train.progress import StageProgress, clock
from train.tracking import (
    LOG_FILE,
    TRACKING_FILE,
    Product,
    Samples,
    Tracker,
    _is_reachable,
    by_step,
    is_shown,
    read_log,
    read_run,
    wandb_mode,
)

ROOT = Path(__file__).resolve().parents[2]

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
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == [LOG_FILE, TRACKING_FILE]


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


# Weights & Biases: what its files hold


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("*run-*/run-*.wandb"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all files, in the order in which they are sent; W&B's own columns left out."""
    found = [line["history"]["item"] for path in files_of(folder) for line in read_run(path) if line["type"] == "history"]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in found]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "stepdown"]


def test_an_offline_run_holds_each_step_once_the_samples_and_what_was_read_and_made(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="offline", project="a-project")
    (tmp_path / "artifact.json").write_text("{}")
    (tmp_path / "weights.bin").write_bytes(b"123")
    made = Product("svamp-train", "model", "abc", [tmp_path / "artifact.json"], [tmp_path / "weights.bin"], {"steps": 2})
    with open_tracker(tmp_path, config) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(1, {"validation_loss": 0.75})
        tracker.log(2, {"loss": 0.25})
        tracker.summary({"best_step": 1})
        tracker.samples(lambda: Samples("records", ["gold", "teacher"], [["7", "7"], ["8", ""]]))
        tracker.reads(lambda: replace(made, name="svamp-task", kind="task"))
        tracker.makes(lambda: made)
    Background.drain()
    rows = rows_of(tmp_path)
    assert rows[:2] == [{"step": 1, "loss": 0.5, "validation_loss": 0.75}, {"step": 2, "loss": 0.25}]
    assert rows[2]["records.nrows"] == 2 and "step" not in rows[2]
    [path] = files_of(tmp_path)
    lines = read_run(path)
    run = next(line["run"] for line in lines if line["type"] == "run")
    assert [run[name] for name in ("project", "run_group", "job_type", "display_name")] == ["a-project", "svamp", "train", "svamp/train"]
    assert run["run_id"] == tracker.id
    assert run["config"]["update"]["learning_rate"] == 0.25
    assert [line["metric"].get("glob_name", line["metric"].get("name")) for line in lines if line["type"] == "metric"] == ["step", "*"]
    artifacts = {line["artifact"]["name"]: line["artifact"] for line in lines if line["type"] == "artifact"}
    assert {name: found["type"] for name, found in artifacts.items() if name.startswith("svamp")} == {
        "svamp-task": "task",
        "svamp-train": "model",
    }
    assert artifacts["svamp-task"]["use_after_commit"] and not artifacts["svamp-train"].get("use_after_commit")
    entries = {entry["path"]: entry for entry in artifacts["svamp-train"]["manifest"]["contents"]}
    assert entries["weights.bin"]["ref"] == (tmp_path / "weights.bin").as_uri()
    assert "ref" not in entries["artifact.json"]
    assert '"steps":2' in artifacts["svamp-train"]["metadata"] and "abc" in artifacts["svamp-train"]["aliases"]
    assert any(line["type"] == "stats" for line in lines)
    assert len(read_log(tmp_path / LOG_FILE)) == 3


KILLED = """
import os, signal, sys, time
from pathlib import Path
from train.background import Background
from train.config import TrackingConfig
from train.tracking import Tracker

folder, start, end, last = Path(sys.argv[1]), *map(int, sys.argv[2:])
config = TrackingConfig(wandb="offline")
tracker = Tracker(folder, config, group="g", job_type="train", settings={}, enabled=True, from_step=start, key="k")
for step in range(start + 1, end + 1):
    tracker.log(step, {"loss": 1 / step})
    tracker.log(step, {"validation_loss": 2 / step})
    time.sleep(0.05)
if end < last:
    time.sleep(3)  # so that some of it reaches the disk
    tracker.log(end + 1, {"loss": 1 / (end + 1)})
    os.kill(os.getpid(), signal.SIGKILL)
with tracker:
    pass
Background.drain()
"""


def test_a_run_that_was_killed_and_resumed_has_each_step_once(tmp_path: Path) -> None:
    for start, end in ((0, 30), (20, 40)):  # killed after step 30, its last state is of step 20
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(start), str(end), "40"]
        subprocess.run(command, check=False, cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"})
    first, second = files_of(tmp_path)
    assert first.parent.name.rpartition("k-")[2] == second.parent.name.rpartition("k-")[2], "one id for all starts"
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows == [{"step": step, **values} for step, values in by_step(read_log(tmp_path / LOG_FILE)).items()]
    assert next(row["history"]["item"]["step"] for row in read_run(second) if row["type"] == "history") > 20, "what was sent stays sent"


def test_what_was_logged_while_wandb_was_off_comes_later(tmp_path: Path) -> None:
    with open_tracker(tmp_path) as off:
        off.log(1, {"loss": 0.5})
        off.log(2, {"loss": 0.25})
    with open_tracker(tmp_path, TrackingConfig(wandb="offline"), from_step=2) as tracker:
        tracker.log(3, {"loss": 0.125})
    Background.drain()
    assert tracker.id == off.id
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_another_stage_in_the_same_folder_is_another_run(tmp_path: Path) -> None:
    ids = []
    for key in ("a", "a", "b"):
        with Tracker(tmp_path, OFF, group="g", job_type="t", settings={}, enabled=True, key=key) as tracker:
            ids.append(tracker.id)
    assert ids[0] == ids[1] != ids[2]
    assert [run_id[:2] for run_id in ids] == ["a-", "a-", "b-"]


def test_a_further_node_has_a_run_for_what_its_machine_does(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="offline")
    with Tracker(tmp_path, config, group="g", job_type="train", settings={}, enabled=False, key="k", node=1) as tracker:
        tracker.log(1, {"loss": 0.5})
        time.sleep(1)  # W&B measures for the first time a moment after the start
    Background.drain()
    [path] = files_of(tmp_path)
    lines = read_run(path)
    run = next(line["run"] for line in lines if line["type"] == "run")
    assert (run["job_type"], run["display_name"], run["run_group"]) == ("system", "g/train/node1", "g")
    assert any(line["type"] == "stats" for line in lines) and not any(line["type"] == "history" for line in lines)
    assert not (tmp_path / LOG_FILE).exists()


def test_the_time_of_tracking_is_noted_over_all_starts(tmp_path: Path) -> None:
    for seconds in (2.0, 3.0):
        with open_tracker(tmp_path) as tracker:
            tracker.seconds = seconds
    noted = json.loads((tmp_path / TRACKING_FILE).read_text())
    assert noted["mode"] == "disabled" and 5.0 <= noted["seconds"] < 6.0


# Weights & Biases that does not answer


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["silent", "refusing"])
def test_a_run_is_written_offline_where_wandb_does_not_answer(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = request.getfixturevalue(kind)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, TrackingConfig(wandb="online")) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.25})
    Background.drain()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    assert [path.parent.name.partition("-run-")[0] for path in files_of(tmp_path)] == ["offline"]
    assert json.loads((tmp_path / TRACKING_FILE).read_text())["mode"] == "offline"
    assert told(caplog) == [
        f"Weights & Biases: {address} does not answer within 2 s; train is written offline, as is what follows while this lasts: "
        f"`wandb sync {tmp_path}/wandb/offline-run-*` brings it in later"
    ]


def test_a_server_is_asked_for_two_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr("train.tracking.answers", lambda url, seconds: asked.append(seconds))
    for _ in range(2):
        _is_reachable("http://127.0.0.1:9")
    assert asked == [2.0], "once a process"


class Refuses(BaseHTTPRequestHandler):
    """Answers, but not with what was asked for."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


NOT_LOGGED_IN = """
import sys
from pathlib import Path
from train.background import Background
from train.config import TrackingConfig
from train.tracking import Tracker
with Tracker(Path(sys.argv[1]), TrackingConfig(wandb="online"), group="svamp", job_type="train", settings={}, enabled=True) as tracker:
    tracker.log(1, {"loss": 0.5})
Background.drain()
"""


class Accepts(Refuses):
    """Takes what the client tells of itself."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send_response(200)
        self.end_headers()


@pytest.mark.usefixtures("_no_key")
def test_who_is_not_logged_in_gets_an_offline_run_and_the_way_to_log_in(tmp_path: Path) -> None:
    # In a process of its own: W&B remembers a key that an earlier run of the same process had.
    with ThreadingHTTPServer(("127.0.0.1", 0), Accepts) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
        command = [sys.executable, "-c", NOT_LOGGED_IN, str(tmp_path / "run")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
        server.shutdown()
    assert [path.parent.name.partition("-run-")[0] for path in files_of(tmp_path / "run")] == ["offline"]
    assert done.stdout + done.stderr == (
        "Weights & Biases: No API key configured. Use `wandb login` to log in; train is written offline, as is what follows while this "
        f"lasts: `wandb sync {tmp_path}/run/wandb/offline-run-*` brings it in later\n"
    )


class RefusesTheKey(Accepts):
    """Knows W&B's way of asking, and nobody's key; or takes the key, and shows it no project."""

    status: int
    answer: dict[str, Any]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = json.dumps(self.answer).encode()
        self.send_response(self.status if self.path == "/graphql" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (401, {"errors": [{"message": "user is not logged in"}]}, r"returned error 401: .*user is not logged in"),
        (403, {"errors": [{"message": "permission denied"}]}, r"returned error 403: .*permission denied"),
        (200, {"data": None, "errors": [{"message": "permission denied", "path": ["model"]}]}, r"input: model permission denied"),
    ],
)
@pytest.mark.usefixtures("_no_key")
def test_a_key_that_the_server_refuses_leaves_the_stage_whole_in_an_offline_run(
    status: int, answer: dict[str, Any], why: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with open_tracker(run, TrackingConfig(wandb="disabled")) as earlier:
        earlier.log(0, {"loss": 1.0})
    handler = type("Handler", (RefusesTheKey,), {"status": status, "answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "k" * 40}
        command = [sys.executable, "-c", NOT_LOGGED_IN, str(run)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True, timeout=120
        )
        server.shutdown()
    [told] = [line for line in done.stderr.splitlines() if line.startswith("Weights & Biases")]
    offline = f"train is written offline, as is what follows while this lasts: `wandb sync {run}/wandb/offline-run-*` brings it in later"
    assert re.fullmatch(rf"Weights & Biases: .*{why}.*; {re.escape(offline)}", told), told
    noted = json.loads((run / TRACKING_FILE).read_text())
    [file] = run.glob("wandb/offline-run-*/*.wandb")
    assert (noted["mode"], file.name) == ("offline", f"run-{noted['id']}.wandb") and noted["id"] != earlier.id
    rows = [line["history"]["item"] for line in read_run(file) if line["type"] == "history"]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (1, 0.5)], "what was logged before it, too"
    assert is_shown(run), "all of it is there to be brought in"


def test_any_answer_counts(silent: str, refusing: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert answers(f"http://127.0.0.1:{server.server_port}", 10)
        server.shutdown()
        thread.join()
    assert not answers(silent, 0.2)
    assert not answers(refusing, 10)
    assert not answers("no address", 10)


# Weights & Biases that fails


class FailingRun:
    """A W&B run that takes one step, and then nothing."""

    resumed, starting_step = False, 0

    def __init__(self, most: int = 1) -> None:
        self.calls: list[Any] = []
        self.most = most

    def define_metric(self, *_: object, **__: object) -> None:
        """Takes it."""

    def log(self, values: dict[str, float], step: int, commit: bool) -> None:
        assert commit
        self.calls.append((step, values))
        if len(self.calls) > self.most:
            raise RuntimeError("disk quota exceeded")

    def finish(self, exit_code: int) -> None:
        self.calls.append(exit_code)


def test_wandb_that_does_not_start_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(**_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("wandb.init", broken)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, TrackingConfig(wandb="offline")) as tracker:
        tracker.log(1, {"loss": 0.5})
        tracker.summary({"best_step": 1})
    Background.drain()
    assert read_log(tmp_path / LOG_FILE) == [{"step": 1, "loss": 0.5}]
    assert told(caplog) == [f"Weights & Biases stopped taking numbers (no space left); {tmp_path / LOG_FILE} has them all"]


def test_a_run_that_wandb_refuses_is_written_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes, run = [], FailingRun(most=9)

    def init(*, mode: str, **_: object) -> FailingRun:
        modes.append(mode)
        if mode == "online":
            raise ValueError("api_key not configured (no-tty)\nmore of it")
        return run

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("train.tracking._is_reachable", lambda _: True)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, TrackingConfig(wandb="online")) as tracker:
        tracker.log(1, {"loss": 0.5})
    Background.drain()
    assert modes == ["online", "offline"]
    assert run.calls == [(1, {"step": 1, "loss": 0.5}), 0]
    assert "api_key not configured (no-tty); train is written offline" in told(caplog)[0]


def test_wandb_that_fails_later_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = FailingRun()
    monkeypatch.setattr("wandb.init", lambda **_: run)
    with caplog.at_level(logging.WARNING), open_tracker(tmp_path, TrackingConfig(wandb="offline")) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"loss": 0.5})
        tracker.summary({"best_step": 1})
    Background.drain()
    assert [line["step"] for line in read_log(tmp_path / LOG_FILE)] == [1, 2, 3]
    assert run.calls == [(1, {"step": 1, "loss": 0.5}), (2, {"step": 2, "loss": 0.5}), 0]
    assert told(caplog) == [f"Weights & Biases stopped taking numbers (disk quota exceeded); {tmp_path / LOG_FILE} has them all"]


def test_a_stage_waits_for_no_call_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()

    class Stuck(FailingRun):
        def log(self, values: dict[str, float], step: int, commit: bool) -> None:
            assert lost.wait(60)

    monkeypatch.setattr("wandb.init", lambda **_: Stuck())
    monkeypatch.setattr(Background, "_waited", 1e9)  # this process has waited long enough for others
    with open_tracker(tmp_path, TrackingConfig(wandb="offline")) as tracker:
        for step in range(1000):
            tracker.log(step, {"loss": 0.5})
    assert not lost.is_set(), "the stage is over, and its first call is not"
    assert len(read_log(tmp_path / LOG_FILE)) == 1000
    lost.set()


def test_an_online_run_goes_on_after_the_step_that_the_server_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, range(5))
    run = FailingRun(most=9)
    run.resumed, run.starting_step = True, 4
    monkeypatch.setattr("wandb.init", lambda **_: run)
    with open_tracker(tmp_path, TrackingConfig(wandb="offline"), from_step=5) as tracker:
        tracker.log(6, {"loss": 0.5})
    Background.drain()
    assert [call[0] for call in run.calls[:-1]] == [4, 5, 6]


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
    Background.drain()
    assert run.calls == [code]
    assert 0 < given["settings"].finish_timeout <= 60  # a lost network must not hold the command for long
    names = ("project", "entity", "group", "job_type", "name", "id", "mode", "config", "dir", "resume")
    assert [given[name] for name in names] == [
        "stepdown",
        "a-team",
        "svamp",
        "train",
        "svamp/train",
        tracker.id,
        "offline",
        {"learning_rate": 0.25},
        str(tmp_path),
        "allow",
    ]


@pytest.mark.parametrize(("job_type", "expected"), [("evaluate", "agent-run"), ("deploy.x", None)])
def test_the_last_stage_is_the_run_that_a_sweep_of_wandb_asked_for(
    job_type: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict[str, Any]()
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "agent-run")
    monkeypatch.setattr("wandb.init", lambda **arguments: given.update(arguments) or FailingRun())
    config = TrackingConfig(wandb="offline")
    with Tracker(tmp_path, config, group="g", job_type=job_type, settings={}, enabled=True) as tracker:
        pass
    Background.drain()
    assert given["id"] == (expected or tracker.id)
    assert ("sweep_id" in given["settings"].model_fields_set) == (expected is None)


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
    assert all(line.endswith(" left  loss 0.5") for line in lines[:-1])
    assert lines[-1].endswith(" s  loss 0.5")


@pytest.mark.usefixtures("no_quiet")
@pytest.mark.parametrize("before", [0, 100])
def test_the_time_left_does_not_count_what_was_slow_at_first_or_done_before(
    before: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with StageProgress("train", before + 200, "steps") as progress:
        progress.advance(before)
        for step in range(200):
            now[0] += 60 if step == 0 and not before else 2  # the first compiles
            progress.advance(1)
    lines = capsys.readouterr().err.splitlines()
    left = [int(line.split(", ")[-1].split()[0]) for line in lines if line.endswith(" s left")]
    assert left == sorted(left, reverse=True) and left[-1] <= 60
    tenth = next(line for line in lines if f" {before + 20}/" in line or f" {before + 30}/" in line)
    assert tenth.endswith("6 min left")


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


def test_the_time_left_counts_down_between_two_units_of_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    now = [0.0]
    monkeypatch.setattr("train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with StageProgress("teach", 4, "shards") as progress:
        for now[0] in (10.0, 20.0):
            progress.advance(1)
        assert progress._bar is not None
        for now[0] in (20.0, 25.0, 45.0):  # two more of 10 s; the last one takes longer
            progress._bar.refresh()
    text = capsys.readouterr().err
    assert text.index("20 s left") < text.index("15 s left") < text.rindex(" 0 s left")


@pytest.mark.usefixtures("no_quiet")
def test_work_that_ends_by_the_clock_has_no_more_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("train.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with StageProgress("teacher: timing", 10, "items", most_seconds=20) as progress:
        for now[0] in (3.0, 6.0, 9.0):
            progress.advance(1)
    told = [line.split(", ")[-1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["3 s", "14 s left", "11 s left"], "3 s an item would be 24 and 21"


@pytest.mark.parametrize(
    ("seconds", "told"), [(5, "5 s"), (89, "89 s"), (119, "119 s"), (120, "2 min"), (600, "10 min"), (10_000, "2 h 47 min")]
)
def test_time_left_in_words(seconds: float, told: str) -> None:
    assert clock(seconds) == told


@given(st.floats(2, 10**6))
def test_the_words_are_within_a_quarter_of_the_time(seconds: float) -> None:
    words = clock(seconds).split()
    told = sum(float(number) * {"s": 1, "min": 60, "h": 3600}[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(told - seconds) <= 0.25 * seconds
