"""What the README shows is what there is."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import RationalesConfig, SoftLabelsConfig
from launch.config import Config, _StrictLoader, validate
from train.config import EndpointConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SLURM_README = (ROOT / "slurm" / "README.md").read_text()


def fences(language: str, text: str = README) -> list[str]:
    """The bodies of a document's code fences in a language; "" for those that name none."""
    return [body for named, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if named == language]


def merged(whole: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration with the sections that a snippet shows: in place of its own, or, where a model is not named, added to them."""
    added = {key: section if key != "student" or "model" in section else {**whole[key], **section} for key, section in shown.items()}
    return {**whole, **added}


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
    sections += [yaml.load(text, _StrictLoader) for text in fences("yaml", SLURM_README)]
    configs = [validate(merged(whole, section), "README.md") for section in sections]
    assert {config.teacher.source for config in configs} == {"deepspeed", "vllm", "endpoint", "recorded"}
    assert {key for section in sections for key in section} == {"launch", "teacher", "student", "deploy"}


@pytest.mark.parametrize("text", [README, SLURM_README, (ROOT / "CONTRIBUTING.md").read_text()], ids=["README", "slurm", "CONTRIBUTING"])
def test_a_part_of_a_configuration_is_marked_as_yaml(text: str) -> None:
    sections = "|".join(Config.model_fields)
    assert [body for body in fences("", text) if re.match(rf"(?:{sections}):", body)] == []


def test_every_python_snippet_compiles_and_what_it_imports_is_there_and_called_as_it_can_be() -> None:
    snippets = [ast.parse(text) for text in fences("python")]
    assert snippets
    for snippet in snippets:
        named: dict[str, Any] = {}
        for found in ast.walk(snippet):
            if isinstance(found, ast.ImportFrom):
                named |= {name.asname or name.name: getattr(importlib.import_module(found.module or ""), name.name) for name in found.names}
            elif isinstance(found, ast.Import):
                named |= {name.asname or name.name: importlib.import_module(name.name) for name in found.names}
        for call in (found for found in ast.walk(snippet) if isinstance(found, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in named:
                inspect.signature(named[call.func.id]).bind(*call.args, **{word.arg or "": word.value for word in call.keywords})


def test_every_key_of_the_teacher_shown_inline_is_one() -> None:
    keys = set(re.findall(r"`(?:teacher\.)?(?:rationales|endpoint|soft_labels)\.([a-z_]+)", README))
    known = {*RationalesConfig.model_fields, *EndpointConfig.model_fields, *SoftLabelsConfig.model_fields}
    assert keys
    assert keys <= known


def test_every_example_configuration_is_linked() -> None:
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if f"(configs/{path.name})" not in README] == []


def test_every_file_and_heading_linked_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^#+ ([A-Za-z ]+)$", README, re.MULTILINE)}
    assert links
    assert [link for link in links if link not in headings and not (ROOT / link).exists()] == []
