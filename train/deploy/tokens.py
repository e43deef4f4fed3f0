"""What the engines of deployed files have in common: the prompt's form and the tokenizer, read without torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from data.prompts import TextFormat
from train.artifacts import Family
from train.deploy.targets import TOKENIZER


class Tokens:
    """Text to token ids and back, as the student learnt them."""

    def __init__(self, folder: Path) -> None:
        """Reads `stepdown.json` and tokenizer.json.

        Raises:
            ValueError: if the folder has no stepdown.json.
        """
        self.format = TextFormat.load(folder)
        self.family: Family = self.format.family
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that spells a special token gives ordinary tokens, as in training

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and outer white space."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def peak_device_bytes(self) -> None:
        """Nothing: these engines do not tell how much GPU memory they hold."""
