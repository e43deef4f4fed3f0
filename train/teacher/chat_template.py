"""A tokenizer's chat template: from messages to token ids, without a way for what they say to become a special token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from train.tokenization import encoder

_TODAY = datetime(2025, 1, 1)
"""Llama 3's templates write the date; records of one run must not differ by the day on which it was resumed."""
_PLACE = re.compile(r"stepdown-content-(\d+)-place")
"""Stands for the content of a message while the template is rendered."""


class ChatTemplate:
    """Messages (role, content) to the token ids of a chat, up to the opening of the assistant's answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tries the template.

        Args:
            tokenizer: one with a chat template.

        Raises:
            ValueError: if the template drops or refuses a message of user or assistant.
        """
        self._tokenizer, self._plain = tokenizer, encoder(tokenizer)
        self._special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        self._frames: dict[tuple[str, ...], list[str]] = {}
        self.takes_system = self._keeps(("system", "user"))
        """Whether the template has a place for a system message."""
        if not self._keeps(("user", "assistant", "user")):
            raise ValueError(
                "teacher.model has a chat template that drops or refuses messages of user and assistant: "
                "set teacher.rationales.chat to never"
            )

    @property
    def source(self) -> Any:
        """The template itself."""
        return self._tokenizer.chat_template

    @property
    def end_of_turn(self) -> int | None:
        """The special token that follows what the assistant says; None where none does."""
        tail = self._tokenized(self._render(("user", "assistant"), asks=False)[-1].lstrip())
        return tail[0] if tail and tail[0] in self._special else None

    def ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of the messages and of the opening of the assistant's answer.

        The whole text is tokenized at once, as the model learnt to read it. Where a content spells a special token, that would make one
        of it: then the contents are tokenized apart from the frame around them, as ordinary text.
        """
        messages = messages if self.takes_system else _without_system(messages)
        frame = self._frame(tuple(message["role"] for message in messages))
        # Every other piece is the number of a message.
        pieces = [messages[int(piece)]["content"] if n % 2 else piece for n, piece in enumerate(frame)]
        whole = self._tokenized("".join(pieces))
        around = [self._tokenized(piece) for piece in frame[::2]]
        if self._only_special(whole) == [token for part in around for token in self._only_special(part)]:
            return whole
        apart = [self._plain(piece) if n % 2 else around[n // 2] for n, piece in enumerate(pieces)]
        return [token for part in apart for token in part]

    def _keeps(self, roles: tuple[str, ...]) -> bool:
        try:
            places = self._frame(roles)[1::2]
        except jinja2.TemplateError:  # how a template refuses: Gemma's has no system role
            return False
        return sorted(places) == [str(n) for n in range(len(roles))]

    def _frame(self, roles: tuple[str, ...]) -> list[str]:
        if roles not in self._frames:
            self._frames[roles] = self._render(roles, asks=True)
        return self._frames[roles]

    def _render(self, roles: tuple[str, ...], *, asks: bool) -> list[str]:
        """The rendered template, split: text, number of a message, text, number... text."""
        rendered = self._tokenizer.apply_chat_template(
            [{"role": role, "content": f"stepdown-content-{n}-place"} for n, role in enumerate(roles)],
            add_generation_prompt=asks,
            tokenize=False,
            # Templates that know these take them; the second: a short rationale is wanted, not long thinking before it (Qwen 3).
            strftime_now=_TODAY.strftime,
            enable_thinking=False,
        )
        assert isinstance(rendered, str)
        return _PLACE.split(rendered)

    def _tokenized(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _only_special(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._special]


def _without_system(messages: Sequence[dict[str, str]]) -> Sequence[dict[str, str]]:
    """For templates without a system role: the instruction opens the user's first turn."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
