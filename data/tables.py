"""Rows of CSV and TSV files: text, a header of names, quotes as RFC 4180 has them. Imports no torch."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_CHARACTERS = 65536
_DELIMITERS = ",;\t|"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row: its cells by the header's names, or why there are none."""

    line: int
    raw: str
    values: dict[str, str] | None
    problem: str = ""


def table_rows(key: str, path: Path) -> Iterator[TableRow]:
    """The rows below the header, each with the line of the file on which it ends; lines without any cell are left out.

    Args:
        key: of the configuration, for messages.
        path: `.tsv` is cut at tabs; in `.csv` the header's most frequent of comma, semicolon, tab and bar is taken.

    Raises:
        ValueError: if the header is missing, has an empty name or one that stands twice, or the file is no UTF-8 text.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else _delimiter(path), strict=True)
            names = _header(key, path, next(reader, []))
            for cells in reader:
                if cells:
                    yield _row(reader.line_num, cells, names)
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x}"
        raise ValueError(f"{key}: {path} is not UTF-8 text ({found}): save it as UTF-8 (in a spreadsheet: CSV UTF-8)") from error
    except csv.Error as error:
        raise ValueError(f"{key}: {path}, line {reader.line_num}: {error}: mend the quotes there, or save the file again as CSV") from error


def _delimiter(path: Path) -> str:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.read(_SAMPLE_CHARACTERS).partition("\n")[0]
    found = Counter(character for character in header if character in _DELIMITERS)
    return found.most_common(1)[0][0] if found else ","


def _header(key: str, path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not any(names):
        raise ValueError(f"{key}: {path} has no header: its first line must name the columns")
    for number, name in enumerate(names, start=1):
        if not name:
            raise ValueError(f"{key}: {path}: column {number} has no name in the header: name it, or delete the column")
        if names.count(name) > 1:
            raise ValueError(f"{key}: {path}: the header names {name!r} {names.count(name)} times: give each column a name of its own")
    return names


def _row(line: int, cells: list[str], names: list[str]) -> TableRow:
    raw = ",".join(cells)
    if len(cells) != len(names):
        return TableRow(line, raw, None, f"has {len(cells)} cells, the header {len(names)}")
    return TableRow(line, raw, dict(zip(names, cells, strict=True)))
