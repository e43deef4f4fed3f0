"""Plain texts from a file: what a model is measured on where there is no task. Imports no torch."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path


def read_texts(path: Path, most: int) -> list[str]:
    """The first texts of a file: of JSON lines (.jsonl, .jsonl.xz) the field `text`, of any other the paragraphs between empty lines.

    Raises:
        ValueError: if the file is missing, is no text, or holds none; a line that is no JSON or has no such field is named.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a file of texts")
    try:
        content = (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode()
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as text ({error}): give JSON lines or plain text in UTF-8") from error
    if ".jsonl" in path.suffixes:
        lines = [line for line in content.splitlines() if line.strip()]
        texts = [_text(line, number, path) for number, line in enumerate(lines[:most], start=1)]
    else:
        texts = re.split(r"\n\s*\n", content)
    found = [text.strip() for text in texts if text.strip()][:most]
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def _text(line: str, number: int, path: Path) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{path}, line {number}: not of the form {{"text": "..."}}')
    return text
