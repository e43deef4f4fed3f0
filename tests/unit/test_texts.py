from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from data.texts import read_texts


def test_paragraphs_and_json_lines_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One\nline.\n\n \nTwo.\n\n\n\nThree.\n")
    assert read_texts(tmp_path / "a.txt", 9) == ["One\nline.", "Two.", "Three."]
    assert read_texts(tmp_path / "a.txt", 2) == ["One\nline.", "Two."]
    lines = '{"text": "One\\nline."}\n\n{"text": " Two. ", "more": 1}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.xz"):
        assert read_texts(tmp_path / name, 9) == ["One\nline.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"words": "y"}\n', r'a\.jsonl, line 2: not of the form \{"text": "\.\.\."\}'),
        ("a.jsonl", b'["text"]\n', "line 1: not of the form"),
        ("a.jsonl", b"{\n", "line 1: not of the form"),
        ("a.txt", b" \n\n ", "a.txt holds no text"),
        ("a.txt", b"\xff\xfe", "a.txt cannot be read as text"),
        ("a.jsonl.xz", b"no archive", "cannot be read as text"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name, 9)
    with pytest.raises(ValueError, match=r"none\.txt does not exist"):
        read_texts(tmp_path / "none.txt", 9)
