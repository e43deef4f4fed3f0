"""A task's examples from files, hub data sets or the built-in generator. Imports no torch.

Sources, as `task.train`, `task.validation` and `task.test` name them:

    rows.jsonl, rows.jsonl.gz, rows.jsonl.xz, rows.parquet    a file; a relative path starts at the current directory
    rows.csv, rows.tsv                                        a table with a header; every cell is text
    hub:OWNER/NAME[:CONFIG][@SPLIT]                           a data set of the hub; SPLIT is train, validation or test after the key;
                                                              several are joined by +; a class that it numbers is read by its name
    builtin:arithmetic                                        data/arithmetic.py

Templates are text with `{field}` for a field of the row, and `{{`, `}}` for braces; nothing else is read between braces.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from data.answers import expression_value, gold_choice, number_value
from data.arithmetic import generate
from data.config import CHOICES_FIELD, MAX_CHOICES, ArithmeticConfig, TaskConfig
from data.examples import TaskExample, read_examples, write_examples
from data.tables import table_rows

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ARITHMETIC = "builtin:arithmetic"
REJECTED = "rejected.jsonl"

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet", ".csv", ".tsv")
_HUB = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"[^\W\d](?:[\w -]*[\w-])?")
_RAW_CHARACTERS = 500
_JSON_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}


class RowError(ValueError):
    """A row that does not fit the task; the message is the reason that `rejected.jsonl` gives."""


@dataclass(frozen=True, slots=True)
class Task:
    """The usable examples of a task; validation shares no input with train where it was set aside from it."""

    train: list[TaskExample]
    validation: list[TaskExample]
    test: list[TaskExample]


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """What `prepare` wrote."""

    digest: str
    """sha256 over the three canonical files: the same rows give the same digest wherever they came from."""
    rows: dict[str, int]
    """Usable rows of each split."""
    rejected: dict[str, int]
    """Rejected rows of each source; validation has none of its own where it was set aside from train."""
    leaked: int
    """Training rows whose input is also a test row's; they stay in."""


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    raw: str | None
    """The line as it stands in the file; None for sources that have no lines."""
    values: Mapping[str, Any] | None
    problem: str = ""
    """Why there are no values."""


@dataclass(frozen=True, slots=True)
class _Rejection:
    split: Split
    source: str
    line: int
    reason: str
    row: str


# --- templates


def render(template: str, row: Mapping[str, Any], *, choices_field: str | None = None) -> str:
    """The template with each `{field}` replaced by the row's value.

    Args:
        template: text with `{field}`; `{{` and `}}` stand for braces.
        row: the row's fields. Lists and numbers are written as `str` does.
        choices_field: the field whose list is written as lettered lines, `(a) first` and so on.

    Raises:
        RowError: if the row lacks a field of the template, or holds null there.
        ValueError: if the template is malformed.
    """
    return "".join(_field_text(row, text, choices_field) if is_field else text for is_field, text in _pieces(template, "template"))


def check_template(template: str, key: str) -> None:
    """Raises a ValueError that names `key` where a template is malformed; reads no data."""
    _pieces(template, key)


def field_problem(name: str) -> str | None:
    """Why a field of this name cannot stand in a template; None where it can."""
    return (
        None if _FIELD.fullmatch(name) else "a field's name has letters, digits, spaces, dashes and underscores, and begins with a letter"
    )


@lru_cache(maxsize=64)
def _pieces(template: str, key: str) -> tuple[tuple[bool, str], ...]:
    pieces = []
    for match in _PIECE.finditer(template):
        text, name = match[0], match[1]
        if text in ("{", "}"):
            raise ValueError(f"{key}: {template!r} has a single {text!r} at character {match.start() + 1}; write {text * 2!r} for a brace")
        if name is not None and not _FIELD.fullmatch(name):
            raise ValueError(
                f"{key}: {template!r} holds {text!r}, but only {{field}} with a plain field name is read: no dots, indices or formats"
            )
        pieces.append((name is not None, name if name is not None else text[0] if text in ("{{", "}}") else text))
    return tuple(pieces)


def _field_text(row: Mapping[str, Any], name: str, choices_field: str | None) -> str:
    value = _field(row, name)
    if name == choices_field:
        return "\n".join(f"({chr(ord('a') + i)}) {choice}" for i, choice in enumerate(_choices(row, name)))
    return str(value)


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise RowError(f"no field {name!r} (has: {', '.join(row)})")
    if row[name] is None:
        raise RowError(f"field {name!r} is null")
    return row[name]


def _choices(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _field(row, name)
    if isinstance(values, str):
        values = _listed(values)
    if isinstance(values, dict) and isinstance(values.get("text"), list):  # with a list of their letters, as CommonsenseQA's on the hub
        values = values["text"]
    if not isinstance(values, list | tuple):
        raise RowError(f"field {name!r} is not a list of choices: {_short(str(values))}")
    if any(value is None or isinstance(value, list | dict) or not str(value).strip() for value in values):
        raise RowError(f"field {name!r} holds a choice that is empty or no text: {_short(str(values))}")
    choices = tuple(str(value) for value in values)
    if len(set(choices)) < 2:
        raise RowError(f"field {name!r} holds fewer than 2 different choices: {_short(str(values))}")
    if len(choices) > MAX_CHOICES:
        raise RowError(f"field {name!r} holds {len(choices)} choices; at most {MAX_CHOICES} can be lettered")
    return choices


def _listed(cell: str) -> Any:
    """The list that a cell of a table holds: `["yes", "no"]` as JSON, or `yes | no`; else the cell."""
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return [choice.strip() for choice in cell.split("|")] if "|" in cell else cell


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- sources


def _sources(config: TaskConfig) -> dict[Split, str]:
    """The sources that are named, after a check of everything that can be checked before a row is read."""
    for key, template in (("input", config.input), ("label", config.label), ("rationale", config.rationale)):
        check_template(template or "", f"task.{key}")
    named: dict[Split, str | None] = {"train": config.train, "validation": config.validation, "test": config.test}
    sources: dict[Split, str] = {split: source for split, source in named.items() if source is not None}
    for split, source in sources.items():
        _check_source(f"task.{split}", source)
    return sources


def _check_source(key: str, source: str) -> None:
    if source.startswith("builtin:"):
        if source != ARITHMETIC:
            raise ValueError(f"{key}: {source} is not known; the built-in task is {ARITHMETIC}")
    elif source.startswith("hub:"):
        if not _HUB.fullmatch(source):
            raise ValueError(f"{key}: {source} is not a hub data set; write hub:OWNER/NAME[:CONFIG][@SPLIT]")
    elif not source.endswith(_SUFFIXES):
        accepted = ", ".join(_SUFFIXES)
        raise ValueError(
            f"{key}: {source} is not a kind that is read; give a file ({accepted}), hub:OWNER/NAME[:CONFIG][@SPLIT] or {ARITHMETIC}"
        )
    elif not (path := _path(source)).is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"{key}: {path} {state}; give the path of a file, absolute or from the current directory")


def _path(source: str) -> Path:
    return Path(source).expanduser().absolute()


def _is_file(source: str) -> bool:
    return not source.startswith(("builtin:", "hub:"))


def _read_rows(key: str, source: str, split: Split, config: TaskConfig, seed: int) -> Iterator[_Row]:
    """The rows of a source, numbered from 1, those that cannot be read among them."""
    if source == ARITHMETIC:
        return _numbered(generate(config.arithmetic or ArithmeticConfig.model_validate({}), seed, split))
    if source.startswith("hub:"):
        return _numbered(_hub_rows(key, source, split))
    if source.endswith(".parquet"):
        return _numbered(_parquet_rows(key, _path(source)))
    if source.endswith((".csv", ".tsv")):
        return (_Row(row.line, row.raw, row.values, row.problem) for row in table_rows(key, _path(source)))
    return _jsonl_rows(key, _path(source))


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[_Row]:
    return (_Row(line, None, values) for line, values in enumerate(rows, start=1))


def _hub_rows(key: str, source: str, split: Split) -> Iterator[dict[str, Any]]:
    import datasets

    match = _HUB.fullmatch(source)
    assert match is not None, "the source was checked before"
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it would tell each of its retries
    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=match["split"] or split)
    except Exception as error:  # the hub, its cache and each data set's reader raise types of their own
        raise RuntimeError(
            f"{key}: {source} cannot be loaded ({type(error).__name__}: {error}); "
            f"check its name, configuration and split ({match['split'] or split}), and the network"
        ) from error
    finally:
        hub.setLevel(level)
    names = {key: kind.names for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
    for row in rows:
        yield {**row, **{key: _class_name(row[key], known) for key, known in names.items()}}


def _class_name(number: int | None, names: list[str]) -> str | None:
    """The name of a class that a hub data set stores by number; None for a row without one, which is stored as -1 or null."""
    return names[number] if number is not None and 0 <= number < len(names) else None


def _parquet_rows(key: str, path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(key, path, error) from error


def _jsonl_rows(key: str, path: Path) -> Iterator[_Row]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(number, line)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise _damaged(key, path, error) from error


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    return lzma.open(path, "rb") if path.name.endswith(".xz") else path.open("rb")


def _damaged(key: str, path: Path, error: Exception) -> RuntimeError:
    return RuntimeError(f"{key}: {path} is damaged or cut short ({error}); copy or download it again")


def _json_row(number: int, line: bytes) -> _Row:
    try:
        raw = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raw = line.decode("utf-8", errors="replace").rstrip("\r\n")
        return _Row(number, raw, None, f"is not UTF-8: byte {line[error.start]:#04x} at byte {error.start + 1}")
    try:
        values = json.loads(raw)
    except json.JSONDecodeError as error:
        return _Row(number, raw, None, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested by the thousand
        return _Row(number, raw, None, f"is not JSON that can be read: {error}")
    if not isinstance(values, dict):
        return _Row(number, raw, None, f"is {_JSON_KINDS[type(values)]}, not a JSON object")
    return _Row(number, raw, values)


def read_fields(source: str, most: int) -> list[dict[str, Any]]:
    """The fields of a file's first rows, those that cannot be read left out.

    Raises:
        ValueError: if it is no file of a kind that is read.
        RuntimeError: if it is damaged.
    """
    if not _is_file(source):
        raise ValueError(f"FILE is {source}: give a file ({', '.join(_SUFFIXES)})")
    _check_source("FILE", source)
    config = TaskConfig(train=source, test_fraction=0.5, metric="text")
    rows = itertools.islice(_read_rows("FILE", source, "train", config, 0), most)
    return [dict(row.values) for row in rows if row.values is not None]


# --- rows to examples


def _example(values: Mapping[str, Any], config: TaskConfig) -> TaskExample:
    """The example of a row, its id without a suffix for repeats.

    Raises:
        RowError: if the row does not fit.
    """
    fields = _plain(values)
    if isinstance(config.choices, list):
        if CHOICES_FIELD in fields:
            raise RowError(f"has a field {CHOICES_FIELD!r} of its own, but task.choices lists the choices of all rows")
        fields[CHOICES_FIELD] = list(config.choices)
    text = render(config.input, fields, choices_field=config.choices_field)
    label = render(config.label, fields, choices_field=config.choices_field).strip()
    for name, value in (("input", text), ("label", label)):
        if not value.strip():
            raise RowError(f"{name} is empty")
    choices = _choices(fields, config.choices_field) if config.choices_field else ()
    label = _checked_label(label, config, choices)
    key = json.dumps([text, label, choices], ensure_ascii=False)
    return TaskExample(
        id=hashlib.sha256(key.encode()).hexdigest()[:16],
        input=text,
        label=label,
        choices=choices,
        rationale=_rationale(fields, config),
        fields=fields,
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row as its JSON reads, its keys in order: what a file, a Parquet column and a hub row have in common."""
    try:
        text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("holds half a surrogate pair, which is no text") from error
    except (TypeError, ValueError) as error:
        raise RowError(f"cannot be written as JSON: {error}") from error
    plain: dict[str, Any] = json.loads(text)
    return plain


def _checked_label(label: str, config: TaskConfig, choices: tuple[str, ...]) -> str:
    if config.metric == "choice":
        if (choice := gold_choice(label, choices)) is None:
            raise RowError(f"label {_short(label)!r} is not one of the choices: {', '.join(choices)}")
        return choice
    if config.metric == "number" and number_value(label) is None:
        raise RowError(f"label {_short(label)!r} is not a number")
    if config.metric == "expression" and expression_value(label) is None:
        raise RowError(f"label {_short(label)!r} does not evaluate")
    return label


def _rationale(fields: Mapping[str, Any], config: TaskConfig) -> str | None:
    """The human rationale; None where the row's field is null or empty."""
    if config.rationale is None:
        return None
    nothing_as_empty = {name: "" if value is None else value for name, value in fields.items()}
    return render(config.rationale, nothing_as_empty, choices_field=config.choices_field).strip() or None


def _read_split(split: Split, source: str, config: TaskConfig, seed: int) -> tuple[list[TaskExample], list[_Rejection]]:
    examples, rejections, seen = [], [], Counter[str]()
    for row in _read_rows(f"task.{split}", source, split, config, seed):
        try:
            if row.values is None:
                raise RowError(row.problem)
            example = _example(row.values, config)
        except RowError as error:
            raw = row.raw if row.raw is not None else json.dumps(row.values, default=str, skipkeys=True)
            rejections.append(_Rejection(split, source, row.line, str(error), raw[:_RAW_CHARACTERS]))
            continue
        seen[example.id] += 1
        repeats = seen[example.id]
        examples.append(example if repeats == 1 else replace(example, id=f"{example.id}-{repeats}"))
    return examples, rejections


# --- the stage's work


def fingerprint(config: TaskConfig, seed: int) -> str:
    """sha256 (hex) of what decides a task's examples.

    Local files count by content, not by path: a folder that moves keeps its fingerprint. `max_rejected` decides whether the run
    stops, not what it reads, and stays out.

    Raises:
        ValueError: if a template is malformed, or a source is missing or of an unknown kind.
    """
    sources = _sources(config)
    values = config.model_dump(mode="json", exclude={"max_rejected"} | ({"test_fraction"} if config.test_fraction is None else set()))
    values |= {split: _file_hash(source) for split, source in sources.items() if _is_file(source)}
    return hashlib.sha256(json.dumps({"task": values, "seed": seed}, sort_keys=True).encode()).hexdigest()


def _file_hash(source: str) -> str:
    suffix = next(suffix for suffix in _SUFFIXES if source.endswith(suffix))
    with _path(source).open("rb") as file:
        return f"{suffix} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def prepare(config: TaskConfig, *, seed: int, folder: Path) -> TaskSummary:
    """Reads every split and writes train.jsonl, validation.jsonl, test.jsonl and rejected.jsonl into `folder`.

    Ids are unique within a split, and over train and the validation rows set aside from it.

    Args:
        config: the task.
        seed: of the built-in generator, and of the choice of validation rows.
        folder: made where it is missing.

    Raises:
        ValueError: if a template is malformed, a source is missing or of an unknown kind, more than `max_rejected` of a split's
            rows are rejected, or a split holds no usable row.
        RuntimeError: if a file is damaged or a hub data set cannot be loaded.
    """
    sources = _sources(config)
    read = {split: _read_split(split, source, config, seed) for split, source in sources.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_rejected(folder / REJECTED, [rejection for _, rejections in read.values() for rejection in rejections])
    for split, (examples, rejections) in read.items():
        _check_split(split, sources[split], len(examples), rejections, config.max_rejected, folder / REJECTED)
    splits = {split: examples for split, (examples, _) in read.items()}
    if config.test_fraction is not None:
        splits["train"], splits["test"] = _set_aside(splits["train"], config.test_fraction, seed, "test")
    if "validation" not in splits:
        splits["train"], splits["validation"] = _set_aside(splits["train"], config.validation_fraction, seed, "validation")
    splits["train"] = splits["train"][: config.max_rows]
    for split in SPLITS:
        write_examples(folder / f"{split}.jsonl", splits[split])
    test_inputs = {example.input for example in splits["test"]}
    return TaskSummary(
        digest=_digest(folder),
        rows={split: len(splits[split]) for split in SPLITS},
        rejected={split: len(read[split][1]) if split in read else 0 for split in SPLITS},
        leaked=sum(example.input in test_inputs for example in splits["train"]),
    )


def _write_rejected(path: Path, rejections: Iterable[_Rejection]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for r in rejections:
            row = {"split": r.split, "source": r.source, "line": r.line, "reason": r.reason, "row": r.row}
            file.write(json.dumps(row) + "\n")


def _check_split(split: Split, source: str, usable: int, rejections: list[_Rejection], bound: float, path: Path) -> None:
    read, rejected = usable + len(rejections), len(rejections)
    if rejected > bound * read:
        reasons = "; ".join(f"line {r.line}: {r.reason}" for r in rejections[:3])
        raise ValueError(
            f"task.{split}: {rejected} of {read} rows of {source} are rejected ({rejected / read:.2%}), "
            f"more than task.max_rejected ({bound:.2%}): {reasons}. All of them are in {path}: fix the rows or raise task.max_rejected"
        )
    if not usable:
        raise ValueError(f"task.{split}: {source} holds no usable row ({read} read, {rejected} rejected); give a source with rows that fit")


def _set_aside(
    train: list[TaskExample], fraction: float, seed: int, split: Literal["validation", "test"]
) -> tuple[list[TaskExample], list[TaskExample]]:
    """Training rows and those of another split, each in the order of the source.

    Inputs are taken in the order of their hash, so that the choice does not depend on the order of the rows, and all rows of one
    input go together, so that no input that is set aside is trained on.
    """
    counts = Counter(example.input for example in train)
    wanted, chosen, taken = max(1, round(fraction * len(train))), set(), 0
    for text in sorted(counts, key=lambda text: hashlib.sha256(json.dumps([seed, text]).encode()).digest()):
        if taken >= wanted:
            break
        chosen.add(text)
        taken += counts[text]
    if taken == len(train):
        raise ValueError(
            f"task.{split}_fraction is {fraction}: of {len(train)} training rows ({len(counts)} different inputs) none would be left "
            f"to train on; give more rows, a smaller fraction or task.{split}"
        )
    return [e for e in train if e.input not in chosen], [e for e in train if e.input in chosen]


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        content = (folder / f"{split}.jsonl").read_bytes()
        digest.update(f"{split} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def read_task(folder: Path) -> Task:
    """The examples that `prepare` wrote.

    Raises:
        RuntimeError: if the folder holds no prepared task.
    """
    for split in SPLITS:
        if not (folder / f"{split}.jsonl").is_file():
            raise RuntimeError(f"{folder} has no {split}.jsonl: the task is not prepared; run it first")
    train, validation, test = (list(read_examples(folder / f"{split}.jsonl")) for split in SPLITS)
    return Task(train, validation, test)
