"""Processes of our own: what is told where one fails."""

from __future__ import annotations

import sys

import pytest

from train.told import run_told


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_what_a_process_told_last_is_its_reason() -> None:
    run_told(python("pass"), "it")
    with pytest.raises(RuntimeError, match=r"^the disk is full$"):
        run_told(python("import sys; print('working', file=sys.stderr); sys.exit('error: the disk is full')"), "it")
    with pytest.raises(RuntimeError, match=r"^it ended with status 3$"):
        run_told(python("import sys; sys.exit(3)"), "it")


def test_a_process_that_was_ended_is_no_reason_of_its_own() -> None:
    with pytest.raises(RuntimeError, match=r"^it was ended by signal 9; often the memory is used up$"):
        run_told(python("import os, sys; print('50 of 100', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"), "it")


def test_its_environment_is_the_one_given() -> None:
    with pytest.raises(RuntimeError, match=r"^mine$"):
        run_told(python("import os, sys; sys.exit(os.environ['WORD'])"), "it", {"WORD": "mine"})
