"""Writes a commented configuration for a file that it is given. Imports no torch.

stepdown init reviews.csv
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.console import Console

from data.guessing import Guess, guess
from data.tasks import read_fields
from launch.config import load_config

_ROWS_READ = 20_000
_MOST_ROWS = 20_000
"""Of training on a CPU; more take longer than a first look should."""
_BATCH = 32
_STEPS = 600
_BYTES_A_TOKEN = 2
"""Of the vocabulary of 512 that small models train on the task: fewer than it mostly is, so that little is cut."""
_PARTNERS = (("train", "test"), ("training", "testing"), ("train", "validation"), ("train", "valid"), ("train", "dev"))


@dataclass(frozen=True, slots=True)
class _Sources:
    """The files of a task; `test` is None where a share of `train` is set aside."""

    train: str
    test: str | None = None
    validation: str | None = None


def write_config(file: str, out: Path | None, console: Console) -> Path:
    """Guesses what the columns of a file are for, writes a configuration, and says what to do next.

    Args:
        file: .csv, .tsv, .jsonl (.gz, .xz) or .parquet.
        out: where it goes; the file's name with .yaml in the current folder where None.
        console: where the guess is told.

    Raises:
        ValueError: if the file cannot be used, or the configuration is there already.
        RuntimeError: if the file is damaged.
    """
    path = out or Path(f"{_stem(file)}.yaml")
    if path.exists():
        raise ValueError(f"{path} is there already: give another file with --out, or delete it")
    rows = read_fields(file, _ROWS_READ)
    found = guess(rows, file)
    text = render(_sources(file), found, len(rows), _name(path.stem))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path)
    except ValueError:  # ours to mend, and not the user's: no file that does not load
        path.unlink()
        raise
    _tell(found, path, console)
    return path


def render(sources: _Sources, found: Guess, num_rows: int, name: str) -> str:
    """The configuration's text."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quoted"] = _quoted
    tokens = {
        "input": _tokens(found.input_bytes, least=32, most=512),
        "label": _tokens(found.label_bytes, least=8, most=128),
        "rationale": _tokens(found.rationale_bytes, least=16, most=160),
    }
    text = environment.get_template("config.yaml").render(
        sources=sources,
        found=found,
        name=name,
        tokens=tokens,
        epochs=max(1, min(40, math.ceil(_STEPS * _BATCH / min(num_rows, _MOST_ROWS)))),
        max_rows=_MOST_ROWS if num_rows >= _MOST_ROWS else None,
        new_tokens=tokens["label"] + (tokens["rationale"] if found.rationale else 0) + 8,
        max_rejected=math.ceil(100 * found.unlabelled) / 100 + 0.01 if found.unlabelled > 0 else None,
    )
    # A tab stands before each comment at a line's end; none is in a value, where YAML writes it otherwise.
    return "\n".join("# ".join((left.ljust(38) + " ", comment)) if comment else left for left, _, comment in _cut(text))


def _cut(text: str) -> list[tuple[str, str, str]]:
    return [line.partition("\t# ") for line in text.split("\n")]


def _tokens(num_bytes: int, *, least: int, most: int) -> int:
    """A multiple of 8 that most texts fit."""
    return min(most, max(least, 8 * math.ceil((num_bytes / _BYTES_A_TOKEN + 8) / 8)))


def _sources(file: str) -> _Sources:
    """With a file of test rows beside it, named alike, that one; `train` is in its name then."""
    path = Path(file)
    near: dict[str, str] = {}
    for word, other in _PARTNERS:
        partner = path.with_name(path.name.replace(word, other))
        if word in path.name and partner != path and partner.is_file():
            near.setdefault("test" if other.startswith("test") else "validation", str(partner))
    return _Sources(file, near.get("test"), near.get("validation"))


def _stem(file: str) -> str:
    return re.sub(r"\.(jsonl|csv|tsv|parquet)(\.gz|\.xz)?$", "", Path(file).name)


def _name(stem: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
    return name if name and name != "shared" else "my-task"


def _quoted(value: Any) -> str:
    """A value in YAML, on one line, a text between double quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_quoted, value))}]"
    return yaml.safe_dump(str(value), default_style='"', width=10**9, allow_unicode=True).strip()


def _tell(found: Guess, path: Path, console: Console) -> None:
    lines = [
        f"input:     {', '.join(found.inputs)}",
        f"label:     {found.label}, compared as {found.metric} ({found.why})",
        *([f"rationale: {found.rationale}"] if found.rationale else []),
        *([f"left out:  {', '.join(found.left_out)}"] if found.left_out else []),
        f"wrote {path}: look it over; its comments say what to change for a real teacher and student. Then",
        f"  stepdown plan {path}",
        f"  stepdown run {path}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
