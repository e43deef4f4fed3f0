"""From an example to the request that a teacher answers: token ids for a model that runs here, text or messages for a server."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Literal

from transformers import PreTrainedTokenizerBase

from data.examples import TaskExample
from data.prompts import TextFormat
from data.teacher_prompts import TeacherPrompt, hinted
from train.teacher.chat_template import ChatTemplate
from train.teacher.writing import Request
from train.tokenization import encoder

_GAP = " ... "
"""Stands for what an input lost."""


class Prompter:
    """Builds the requests of a teacher that runs here.

    A tuned teacher reads its learnt form. Any other reads the prompt through its tokenizer's chat template where it has one, or as
    plain text. What an example says can never become a special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: TextFormat,
        prompt: TeacherPrompt | None,
        *,
        chat: Literal["auto", "never"] = "auto",
        max_input_tokens: int | None = None,
    ) -> None:
        """Settles how the teacher is asked.

        Args:
            tokenizer: the teacher's.
            form: how its text is framed.
            prompt: what it is asked; None for a tuned teacher.
            chat: auto uses the chat template where there is one, never does not.
            max_input_tokens: most tokens of a prompt; the form's where left out.

        Raises:
            ValueError: if the chat template drops a message, or instruction and cue alone are longer than `max_input_tokens`.
        """
        self._form, self._prompt, self._encode = form, prompt, encoder(tokenizer)
        self._limit = form.max_input_tokens if max_input_tokens is None else max_input_tokens
        self._chat = ChatTemplate(tokenizer) if prompt is not None and chat == "auto" and tokenizer.chat_template else None
        self._last: tuple[tuple[str, str | None], tuple[int, ...]] | None = None
        self.cut: Counter[str] = Counter(prompts_cut=0, inputs_cut=0)
        """Prompts that lost examples, and prompts that lost the middle of their input."""
        if prompt is not None:
            self._check_room(prompt.last(0))

    @property
    def uses_chat(self) -> bool:
        """The teacher is asked through its chat template."""
        return self._chat is not None

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings before which an answer ends."""
        return self._prompt.stop if self._prompt is not None else ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: end of sequence, and the end of a turn where the chat template has another (Gemma's has)."""
        turn = self._chat.end_of_turn if self._chat is not None else None
        return (self._form.eos_id,) if turn is None or turn == self._form.eos_id else (self._form.eos_id, turn)

    @property
    def fingerprint(self) -> str:
        """A hash (hex) of all that shapes a prompt, apart from its example and the tokenizer's vocabulary."""
        form, probe = self._form, ("{input}", "{hint}")
        text = form.prompt("solve", hinted(*probe)) if self._prompt is None else self._prompt.text(*probe)
        chat = None if self._chat is None else self._chat.source
        shapes = [text, chat, self._limit, form.family, form.eos_id, form.prefix_ids]
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example; `hint` is the gold label where the teacher is asked to explain it (STaR)."""
        return Request(key, ids=self.prompt_ids(example.input, hint))

    def prompt_ids(self, input: str, hint: str | None = None) -> tuple[int, ...]:
        """Token ids of the prompt, at most `max_input_tokens`.

        A longer one loses its earliest examples, each whole; one that is too long without any loses the middle of its input. The
        prompt asked for last is remembered: samples of one example ask for the same again.
        """
        if self._last is None or self._last[0] != (input, hint):
            self._last = (input, hint), tuple(self._ids(input, hint))
        return self._last[1]

    def _ids(self, input: str, hint: str | None) -> list[int]:
        if self._prompt is None:
            ids, cut = self._form.prompt_ids("solve", input if hint is None else hinted(input, hint), self._encode)
            self.cut["inputs_cut"] += cut
            return ids
        for shots in range(len(self._prompt.examples), -1, -1):
            ids = self._framed(self._prompt.last(shots), input, hint)
            if len(ids) <= self._limit:
                self.cut["prompts_cut"] += shots < len(self._prompt.examples)
                return ids
        self.cut.update(("prompts_cut", "inputs_cut") if self._prompt.examples else ("inputs_cut",))
        return self._without_middle(self._prompt.last(0), input, hint)

    def _framed(self, prompt: TeacherPrompt, input: str, hint: str | None) -> list[int]:
        if self._chat is not None:
            return self._chat.ids(prompt.messages(input, hint))
        end = [self._form.eos_id] if self._form.family == "encoder_decoder" else []
        return [*self._form.prefix_ids, *self._encode(prompt.text(input, hint)), *end]

    def _without_middle(self, prompt: TeacherPrompt, input: str, hint: str | None) -> list[int]:
        """The prompt with as many characters of its input, from both ends, as there is room for (found by bisection)."""
        found = self._framed(prompt, "", hint)
        low, high = 0, len(input)
        while low < high - 1:
            kept = (low + high) // 2
            ids = self._framed(prompt, input[: kept - kept // 2] + _GAP + input[len(input) - kept // 2 :], hint)
            low, high, found = (kept, high, ids) if len(ids) <= self._limit else (low, kept, found)
        if len(found) > self._limit:
            raise ValueError(self._no_room(len(found)))
        return found

    def _check_room(self, bare: TeacherPrompt) -> None:
        if (length := len(self._framed(bare, "", None))) >= self._limit:
            raise ValueError(self._no_room(length))

    def _no_room(self, length: int) -> str:
        return (
            f"teacher.rationales.max_input_tokens is {self._limit}, but a prompt takes {length} tokens before it holds an example or "
            "any of its input: raise it, or shorten the instruction"
        )


def server_request(prompt: TeacherPrompt, api: Literal["chat", "completions"], example: TaskExample, hint: str | None, key: int) -> Request:
    """The request for a server: messages, or plain text for one without chat."""
    if api == "chat":
        return Request(key, messages=tuple(prompt.messages(example.input, hint)))
    return Request(key, text=prompt.text(example.input, hint))
