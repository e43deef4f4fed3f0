from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import agent, cli, local, worker
from launch.agent import Relay, has_stopped
from launch.local import Stopped as RunStopped
from launch.local import supervise
from train import engine
from train.signals import SIGNALS, STOPPED, STOPPED_FILE, Stopped, catching, handling, tell_stopped

ROOT = Path(__file__).resolve().parents[2]
SAID = "stopped by a signal; what is done is kept: the same command goes on from there"


# ----- in a process -----


def test_what_stopped_leaves_a_mark_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STOPPED_FILE, raising=False)
    assert tell_stopped() == STOPPED
    monkeypatch.setenv(STOPPED_FILE, str(tmp_path / "stopped"))
    assert tell_stopped() == STOPPED
    assert (tmp_path / "stopped").is_file()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_does_not_end_the_process(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with catching() as request:
        assert request.asked is None
        os.kill(os.getpid(), number)
        other = next(n for n in SIGNALS if n != number)
        assert request.asked == number.name
        os.kill(os.getpid(), other)
        assert request.asked == number.name
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_handlers_are_given_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), catching():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[Any] = []

    def look() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with catching() as request:
            found.extend([signal.getsignal(signal.SIGTERM) is before, request.asked])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True, None]


def test_a_training_that_stopped_is_a_runtime_error() -> None:
    assert issubclass(Stopped, RuntimeError)
    assert os.EX_TEMPFAIL == STOPPED


# ----- the agent -----


@pytest.mark.parametrize(
    ("statuses", "asked", "expected"),
    [
        ({75}, False, True),
        ({75, -15}, True, True),
        ({-15}, True, True),
        ({-10, -9}, True, True),
        ({-15}, False, False),
        ({1}, True, False),
        ({-9}, True, False),
        ({1}, False, False),
    ],
)
def test_how_workers_that_stopped_are_told_from_those_that_failed(statuses: set[int], asked: bool, expected: bool) -> None:
    assert has_stopped(statuses, asked) is expected


def test_the_agent_passes_signals_on_and_knows_a_second_sigterm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    now = [100.0]
    children = tmp_path / "children"
    children.write_text("11 12 ")
    monkeypatch.setattr(agent, "_CHILDREN", children)
    monkeypatch.setattr(agent.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(agent.time, "monotonic", lambda: now[0])
    relay, term, user = Relay(), int(signal.SIGTERM), int(signal.SIGUSR1)
    with handling(lambda *_: None):
        assert relay.install() == ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
        relay.take(user, None)
        now[0] += 50.0
        relay.take(user, None)
        relay.take(term, None)
        now[0] += 1.0
        relay.take(term, None)
        assert sent == [(11, user), (12, user)] * 2 + [(11, term), (12, term)] * 2
        assert relay.asked
        now[0] += 1.5
        relay.take(term, None)
        assert sent[8:] == [(os.getpid(), term), (11, term), (12, term)]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_agent_without_workers_ends_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent: list[tuple[int, int]] = []
    children = tmp_path / "children"
    children.write_text("")
    monkeypatch.setattr(agent, "_CHILDREN", children)
    monkeypatch.setattr(agent.os, "kill", lambda pid, number: sent.append((pid, number)))
    with handling(lambda *_: None):
        Relay().take(signal.SIGUSR1, None)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert sent == [(os.getpid(), signal.SIGUSR1)]


def test_where_workers_cannot_be_listed_torchrun_handles_signals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(agent, "_CHILDREN", tmp_path / "nothing")
    assert Relay().install() == []
    assert signal.getsignal(signal.SIGTERM) is before


# ----- a worker -----


def test_a_worker_whose_training_stopped_says_so_and_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def stopping(*_: Any) -> None:
        raise Stopped("train step_by_step: stopped by SIGTERM after step 3; the state is saved")

    @contextmanager
    def writing(_: Path) -> Any:
        yield

    world = SimpleNamespace(is_main=True, counter=lambda: None, barrier=lambda: done.append("barrier"))
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "load_config", lambda _: SimpleNamespace(launch=SimpleNamespace(device="cpu")))
    monkeypatch.setattr(worker, "writing", writing)
    monkeypatch.setattr(worker, "run_stages", stopping)
    monkeypatch.setattr(engine, "start", lambda _: world)
    monkeypatch.setattr(engine, "stop", lambda: done.append("stop"))
    assert worker.main([str(tmp_path), "train.step_by_step"]) == 75
    assert capsys.readouterr().err == "train step_by_step: stopped by SIGTERM after step 3; the state is saved\n"
    assert done == ["barrier", "stop"]
    world.is_main = False
    assert worker.main([str(tmp_path), "train.step_by_step"]) == 75
    assert capsys.readouterr().err == ""


# ----- the command -----


def run_python(code: str) -> int:
    return supervise([sys.executable, "-S", "-c", code], {**os.environ})


def test_a_command_that_nobody_stops_gives_its_status() -> None:
    assert run_python("") == 0
    assert run_python("raise SystemExit(3)") == 3
    assert run_python("import os; os.kill(os.getpid(), 9)") == -9
    assert run_python("import os; os.kill(os.getpid(), 15)") == -15


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "code",
    [
        "import signal, sys, time; signal.signal({0}, lambda *_: sys.exit(75)); open(sys.argv[1], 'w').close(); time.sleep(60)",
        "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)",
    ],
    ids=["saves", "ends"],
)
def test_a_signal_is_passed_on_and_the_run_has_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, code: str
) -> None:
    ready = tmp_path / "ready"

    def ask() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    before = signal.getsignal(number)
    with pytest.raises(RunStopped, match=rf"\A{SAID}\Z") as caught:
        supervise([sys.executable, "-S", "-c", code.format(int(number)), str(ready)], {**os.environ})
    asking.join()
    assert caught.value.exit_code == 75
    assert capsys.readouterr().err == f"{SAID}\n"
    assert signal.getsignal(number) is before


def test_a_command_that_was_asked_and_came_to_its_end_has_not_stopped(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); open(sys.argv[1], 'w').close(); time.sleep(60)"
    script = "import os, sys; from launch.local import supervise; sys.exit(supervise(sys.argv[1:], {**os.environ}))"
    command = [sys.executable, "-c", script, sys.executable, "-S", "-c", code, str(ready)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=20) == 0


def test_the_command_line_exits_with_75(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopping(*_: Any, **__: Any) -> None:
        raise RunStopped

    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setattr("launch.config.load_config", lambda *_: None)
    monkeypatch.setattr(local, "run_pipeline", stopping)
    assert CliRunner().invoke(cli.app, ["train", str(tmp_path / "config.yaml")]).exit_code == 75
