"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launch.config import validate

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = sorted({match for match in re.findall(r"stepdown (?:--traceback )?([a-z]+)", README) if match not in ("makes", "run.yaml")})


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_first_code_fence_is_make_quickstart_before_line_25() -> None:
    lines = README.splitlines()
    first = next(n for n, line in enumerate(lines, start=1) if line.startswith("```"))
    assert first < 25
    assert lines[first] == "make quickstart"
    assert re.search(r"^quickstart:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_configuration_shown_is_one() -> None:
    shown = fences("yaml")
    assert shown
    for text in shown:
        config = validate(yaml.safe_load(text), "README.md")
        assert config.student.arms.keys() == {"labels_only", "step_by_step"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one(command: str) -> None:
    from launch.cli import app

    named = {found.name or getattr(found.callback, "__name__", "") for found in app.registered_commands}
    assert command in named


def test_every_file_linked_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
