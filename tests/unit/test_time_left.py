"""tests/bench/time_left.py reads what a terminal shows, and judges it by hand-computed figures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from train.progress import clock

PATH = Path(__file__).resolve().parents[1] / "bench" / "time_left.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("time_left", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["time_left"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seconds", [0, 5, 89, 600, 10_020])
def test_what_the_display_says_is_read_back(bench: Any, seconds: int) -> None:
    assert bench.seconds_of(f"{clock(seconds)} left") == seconds


def test_the_lines_of_a_real_terminal_are_read(bench: Any) -> None:
    work = (
        "import time\nfrom train.progress import StageProgress\n"
        "with StageProgress('train step_by_step', 4, 'steps') as progress:\n"
        "    for n in range(4):\n        time.sleep(0.3)\n        progress.advance(1, f'loss {n}')\n"
    )
    shown = bench.read(bench.watched([sys.executable, "-c", work]))
    assert {(display.title, display.total) for display in shown} == {("train step_by_step", 4)}
    assert [n for n in range(5) if any(display.done == n for display in shown)] == [0, 1, 2, 3, 4]
    left = [display.left for display in shown if display.done == 2]
    assert left[0] == 1.0 and set(left) <= {1.0, 0.0}, "two steps of 0.3 s, counted down"
    assert {display.left for display in shown if display.done in (0, 4)} == {None}


def test_displays_are_judged_by_when_the_work_was_over(bench: Any) -> None:
    left = {0: None, 5: 50.0, 10: 90.0, 20: 103.0, 30: 50.0, 40: 43.0, 50: None, 96: 40.0, 98: 90.0, 100: None}
    shown = [bench.Shown(float(at), "a", at, 100, value) for at, value in left.items()]
    shown += [bench.Shown(0.0, "short", 0, 1, None), bench.Shown(9.0, "short", 1, 1, None)]
    # Counted from 10 on, and until 97: right; 103 for 80 is 29 % more; 50 for 70, 43 for 60 as much less; nothing; 40 for 4.
    assert bench.judge(shown) == [bench.Judged("a", 100.0, 6, 4 / 6, pytest.approx(1 / 6), 10.0)]


def test_a_command_that_fails_says_so(bench: Any) -> None:
    with pytest.raises(RuntimeError, match=r"ended with status 3:\n(.|\n)*what it said"):
        bench.watched([sys.executable, "-c", "print('what it said'); raise SystemExit(3)"])
