from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from data.prompts import Part, TextFormat
from train.deploy import stage


class Probed:
    """A deployed model that notes what it is asked; tokens are characters."""

    asked: ClassVar[list[tuple[str, str]]]

    def __init__(self, folder: Path, **options: Any) -> None:
        self.format = TextFormat.load(folder)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        self.asked.append(("".join(map(chr, prompt[:-1])), "".join(map(chr, target[:-1]))))
        return [-1.0] * len(target)

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        return [[] for _ in prompts]


@pytest.mark.parametrize(
    ("part", "asked"),
    [("predict", ("predict: What is 1 + 1?", "2")), ("solve", ("solve: What is 1 + 1?", "One more is 2. Answer:2"))],
)
def test_a_deployed_model_is_tried_on_what_it_has_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Part, asked: tuple[str, str]
) -> None:
    TextFormat("encoder_decoder", 0, 0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32, part=part).save(tmp_path)
    (tmp_path / stage.WEIGHTS).write_bytes(b"small")
    monkeypatch.setattr(stage, "Ctranslate2Runtime", Probed)
    Probed.asked = []
    stage.check("ctranslate2-int8", tmp_path, source_bytes=100)
    assert Probed.asked == [asked]
