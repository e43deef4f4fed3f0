"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from data.config import RationalesConfig, SoftLabelsConfig
from launch.config import _StrictLoader, validate
from train.config import EndpointConfig

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


def test_the_configuration_shown_first_is_a_whole_one() -> None:
    config = validate(yaml.load(fences("yaml")[0], _StrictLoader), "README.md")
    assert config.student.arms.keys() == {"labels_only", "step_by_step"}


def test_every_section_shown_alone_fits_into_the_configuration_shown_first() -> None:
    whole, *sections = (yaml.load(text, _StrictLoader) for text in fences("yaml"))  # a YAML 1.1 reader takes the key `on` for true
    configs = [validate({**whole, **section}, "README.md") for section in sections]
    assert {config.teacher.source for config in configs} == {"deepspeed", "vllm", "endpoint", "recorded"}


def test_every_key_of_the_teacher_shown_inline_is_one() -> None:
    keys = set(re.findall(r"`(?:teacher\.)?(?:rationales|endpoint|soft_labels)\.([a-z_]+)", README))
    known = {*RationalesConfig.model_fields, *EndpointConfig.model_fields, *SoftLabelsConfig.model_fields}
    assert keys
    assert keys <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_is_one(command: str) -> None:
    from launch.cli import app

    named = {found.name or getattr(found.callback, "__name__", "") for found in app.registered_commands}
    groups = {group.typer_instance.info.name for group in app.registered_groups if group.typer_instance is not None}
    assert command in named | groups


def test_every_file_and_heading_linked_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^#+ ([A-Za-z ]+)$", README, re.MULTILINE)}
    assert links
    assert [link for link in links if link not in headings and not (ROOT / link).exists()] == []
