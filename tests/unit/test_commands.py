"""What the documents and the examples tell to type: commands that the command line takes, targets and files that are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from launch.cli import app
from launch.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ROOMS = sorted(page for room in ("data", "launch", "slurm", "tests", "train") for page in (ROOT / room).rglob("README.md"))
DOCUMENTS = [ROOT / "README.md", *ROOMS, ROOT / "CONTRIBUTING.md"]
_PROGRAM = re.compile(r"(?:^|[\s;&])(?:\.venv/bin/)?stepdown(?=\s+(?:--?[a-z]|[a-z]))")


def commands(path: Path) -> list[str]:
    """What stands after `stepdown` in each command of a document's fences and code spans, or of a configuration's first comment."""
    text = path.read_text()
    if path.suffix == ".md":
        fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        shown = "\n".join(body for language, body in fences if language in ("", "bash")).replace("\\\n", " ").splitlines()
        spans = re.findall(r"`([^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        shown += [" ".join(span.split()) for span in spans]
    else:
        shown = [line.removeprefix("#") for line in header(path).replace("\\\n#", " ").splitlines() if line.startswith("#   ")]
    return [line[found.end() :].strip() for line in shown for found in [_PROGRAM.search(line)] if found]


def header(path: Path) -> str:
    """The comment that a configuration opens with."""
    return path.read_text().partition("\nname:")[0]


def parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The name of a command and its parameters as the command line reads them; a name alone, as in running text, has none."""
    words = shlex.split(command, comments=True)
    found: Any = typer.main.get_command(app)
    name = ""
    while hasattr(found, "commands"):
        options = {option for parameter in found.params for option in parameter.opts}
        while words and words[0].startswith("-"):
            assert words[0] in options, f"stepdown {command}: {words[0]} is no option of stepdown {name}".rstrip()
            del words[0]
        assert words[0] in found.commands, f"stepdown {command}: stepdown {name} has no command {words[0]}"
        found = found.commands[words[0]]
        name = f"{name} {words.pop(0)}".lstrip()
    return name, dict(found.make_context(name, words).params) if words else {}


ALL = sorted({(path.relative_to(ROOT).as_posix(), command) for path in [*DOCUMENTS, *CONFIGS] for command in commands(path)})


@pytest.mark.parametrize(("document", "command"), ALL)
def test_a_command_shown_is_one_and_its_overrides_fit_the_configuration_it_names(document: str, command: str) -> None:
    _, parameters = parsed(command)
    config = ROOT / str(parameters.get("config"))
    if config in CONFIGS:
        load_config(config, [override.replace("=...", "=ROWS.jsonl") for override in parameters["overrides"] or ()])
    else:
        is_placeholder = config.parent != ROOT / "configs" or config.stem.isupper()
        assert is_placeholder, f"{document} names {config}, which is not there"


def test_the_commands_are_found_wherever_they_stand() -> None:
    found = {document for document, _ in ALL}
    assert {"README.md", "launch/README.md", "slurm/README.md", "train/student/README.md", "configs/cqa.yaml"} <= found
    assert ("README.md", "--traceback run ...") in ALL
    assert any(command.startswith("sweep reviews.yaml --arms") and "--fractions 1:4" in command for _, command in ALL)  # over two lines


def test_the_reference_has_every_command() -> None:
    spans = re.findall(
        r"`([^`]*)`", re.search(r"^## Commands\n(.*?)^## ", (ROOT / "launch" / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    )
    known: Any = typer.main.get_command(app)
    assert set(known.commands) <= {span.split()[0] for span in spans}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("fly CONFIG", "stepdown  has no command fly"),
        ("--loud run CONFIG", "--loud is no option"),
        ("records mend CONFIG", "stepdown records has no command mend"),
        ("run CONFIG --fast", "No such option"),
        ("plan --gpus none", "valid integer"),
        ("quantize MODEL", "Missing"),
    ],
)
def test_what_is_no_command_is_told(command: str, told: str) -> None:
    with pytest.raises(Exception, match=told):  # AssertionError of this file, or click's UsageError, which typer may bring along itself
        parsed(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_make_is_told_to_do_and_every_file_named_is_there(document: Path) -> None:
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {word for line in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE) for word in line.split()}
    assert asked or document in ROOMS
    assert asked <= targets
    named = set(re.findall(r"(?<![\w/])(?:configs|data|launch|slurm|tests|train)/[\w./-]*\w", text))
    assert [path for path in named if not (ROOT / path).exists() and not Path(path).stem.isupper()] == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_opens_with_the_commands_that_run_it(config: Path) -> None:
    opening = header(config)
    assert opening.startswith("# ")
    assert f"configs/{config.name}" in opening or re.search(r"make [a-z]+", opening)
    own = [parameters for _, parameters in map(parsed, commands(config)) if parameters.get("config")]
    assert all(ROOT / str(parameters["config"]) == config for parameters in own)
