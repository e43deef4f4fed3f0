"""What the README and the pages that it leads to show is what there is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from data.config import RationalesConfig, SoftLabelsConfig
from launch.config import Config, _StrictLoader, validate
from train.config import EndpointConfig
from train.deploy.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ROOMS = sorted(page for room in ("data", "launch", "slurm", "tests", "train") for page in (ROOT / room).rglob("README.md"))
"""The pages of the rooms: all that the README leaves out."""
PAGES = [ROOT / "README.md", *ROOMS, ROOT / "CONTRIBUTING.md"]
OURS = ("data", "launch", "train")

READING_SPEED = 240
"""Words a minute, of somebody who reads technical prose to use it."""
MINUTES = 10
MOST_WORDS = 2750
"""Tables and code are looked at rather than read. They count here, by what holds a letter or a digit."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(language: str, text: str = README) -> list[str]:
    """The bodies of a document's code fences in a language; "" for those that name none."""
    return [body for named, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if named == language]


def running(text: str) -> str:
    """A document without its code fences."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> list[str]:
    """The words that are read one after the other: neither code fences nor rows of tables."""
    return " ".join(line for line in running(text).splitlines() if not line.startswith("|")).split()


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    titles = re.findall(r"^#+ (.+)$", running(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page, as it is or would be, that lead to no file or heading of the repository."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", running(text)):
        place, _, heading = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if "://" in link:
            continue
        is_there = target.exists() and target.is_relative_to(ROOT)
        if is_there and heading:
            is_there = heading in headings(text if target == page else target.read_text())
        broken += [] if is_there else [link]
    return broken


def merged(whole: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration with the sections that a snippet shows: in place of its own, or, where a model is not named, added to them."""
    added = {key: section if key != "student" or "model" in section else {**whole[key], **section} for key, section in shown.items()}
    return {**whole, **added}


def imported(module: str) -> ModuleType | None:
    """A module that a snippet imports; None for one of others that is not installed here."""
    library = module.partition(".")[0]
    return importlib.import_module(module) if library in OURS or importlib.util.find_spec(library) else None


def test_the_first_code_fence_is_make_quickstart_before_line_25() -> None:
    lines = README.splitlines()
    first = next(n for n, line in enumerate(lines, start=1) if line.startswith("```"))
    assert first < 25
    assert lines[first] == "make quickstart"
    assert re.search(r"^quickstart:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(prose(README)) <= READING_SPEED * MINUTES
    assert sum(re.search(r"\w", word) is not None for word in README.split()) <= MOST_WORDS


def test_words_of_code_and_tables_are_not_prose() -> None:
    text = "# One\n\ntwo `three`\n\n```bash\nno\n```\n\n| no | no |\n| :--- | ---: |\n\n- four\n"
    assert " ".join(prose(text)) == "# One two `three` - four"


@pytest.mark.parametrize("page", ROOMS, ids=name)
def test_a_page_opens_with_what_it_is_and_for_whom_and_the_readme_leads_to_it(page: Path) -> None:
    title, sentence = page.read_text().split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert "for whoever" in " ".join(sentence.split())
    assert f"]({name(page)})" in README


def test_the_configuration_shown_first_is_a_whole_one() -> None:
    config = validate(yaml.load(fences("yaml")[0], _StrictLoader), "README.md")
    assert config.student.arms.keys() == {"labels_only", "step_by_step"}


def test_every_section_shown_alone_fits_into_the_configuration_shown_first() -> None:
    whole = yaml.load(fences("yaml")[0], _StrictLoader)  # a YAML 1.1 reader takes the key `on` for true
    shown = [(name(page), yaml.load(text, _StrictLoader)) for page in PAGES for text in fences("yaml", page.read_text())][1:]
    configs = [validate(merged(whole, section), page) for page, section in shown]
    assert {config.teacher.source for config in configs} == {"deepspeed", "vllm", "endpoint", "recorded"}
    assert {key for _, section in shown for key in section} == {"launch", "teacher", "student", "deploy"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_part_of_a_configuration_is_marked_as_yaml(page: Path) -> None:
    sections = "|".join(Config.model_fields)
    assert [body for body in fences("", page.read_text()) if re.match(rf"(?:{sections}):", body)] == []


def test_every_python_snippet_compiles_and_what_it_imports_is_there_and_called_as_it_can_be() -> None:
    snippets = [ast.parse(text) for page in PAGES for text in fences("python", page.read_text())]
    assert snippets
    for snippet in snippets:
        named: dict[str, Any] = {}
        for found in ast.walk(snippet):
            if isinstance(found, ast.ImportFrom) and (module := imported(found.module or "")):
                named |= {name.asname or name.name: getattr(module, name.name) for name in found.names}
            elif isinstance(found, ast.Import):
                named |= {name.asname or name.name: imported(name.name) for name in found.names}
        for call in (found for found in ast.walk(snippet) if isinstance(found, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in named:
                inspect.signature(named[call.func.id]).bind(*call.args, **{word.arg or "": word.value for word in call.keywords})


def test_every_key_of_the_teacher_shown_inline_is_one() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    keys = set(re.findall(r"`(?:teacher\.)?(?:rationales|endpoint|soft_labels)\.([a-z_]+)", text))
    known = {*RationalesConfig.model_fields, *EndpointConfig.model_fields, *SoftLabelsConfig.model_fields}
    assert keys
    assert keys <= known


def test_every_example_configuration_is_linked() -> None:
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if f"(configs/{path.name})" not in README] == []


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "bench").glob("*.py")), ids=lambda script: script.stem)
def test_a_measurement_is_started_as_its_imports_ask(script: Path) -> None:
    """By its path a script does not see the others: one that imports them is started as a module."""
    text = script.read_text()
    if re.search(r"^from tests\.", text, re.MULTILINE):
        started = re.compile(rf"(python|--nproc-per-node \w+) {re.escape(name(script))}")
        assert f"-m tests.bench.{script.stem}" in text
        assert not [page for page in (script, *PAGES) if started.search(page.read_text())]


def test_every_target_has_its_row_in_the_matrix() -> None:
    rows = re.findall(r"^\| \w+ \| `([\w-]+)`", README, re.MULTILINE)
    assert [target for target in TARGETS if target not in rows] == []
    assert [row for row in rows if row.removesuffix("-recovered") not in TARGETS] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_and_heading_linked_is_there(page: Path) -> None:
    text = page.read_text()
    assert broken_links(page, text) == []
    assert headings(text)


def test_a_link_that_leads_nowhere_is_found() -> None:
    page = ROOT / "launch" / "README.md"
    there = "[a](../README.md#memory) [b](#one--two) [c](templates) [d](https://example.org/x#y)\n\n# One & two\n"
    gone = "[e](README.md#nothing) [f](configs/cqa.yaml) [g](#one) [h](../../outside.md)\n```\n# one\n```\n"
    assert broken_links(page, there + gone) == ["README.md#nothing", "configs/cqa.yaml", "#one", "../../outside.md"]
