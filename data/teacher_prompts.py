"""What a teacher that was not tuned is asked: an instruction, worked examples and the question, as text or as chat messages.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data.config import RationalesConfig
from data.prompts import ANSWER_MARK, NEXT_EXAMPLE, SOLUTION_CUE, parse_solution

DEFAULT_INSTRUCTION = (
    "Answer the question. First reason step by step, in a few short sentences. "
    f'Then close with "{ANSWER_MARK}" and the answer alone, on one line, and write nothing after it.'
)
"""For a teacher without a file of examples: without it, nothing would tell the form that the parser reads."""
_FIELDS = ("input", "rationale", "label")
_FORM = "a list of mappings with input, rationale and label, or {instruction: TEXT, examples: LIST}"


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A question with the solution that a teacher should have written."""

    input: str
    rationale: str
    label: str

    @property
    def solution(self) -> str:
        """The rationale and the closing form."""
        return f"{self.rationale} {ANSWER_MARK} {self.label}"


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """How a teacher that was not tuned is asked for a rationale and a label."""

    instruction: str = DEFAULT_INSTRUCTION
    """What to do and how to close; empty where the examples alone say it."""
    examples: tuple[WorkedExample, ...] = ()

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings before which an answer ends: a model that goes on writes a next example of its own."""
        return (f"\n{NEXT_EXAMPLE}",)

    @property
    def shared_prefix(self) -> str:
        """What every prompt of `text` opens with, before its input."""
        opening = f"{self.instruction}\n\n" if self.instruction else ""
        examples = (f"{NEXT_EXAMPLE} {example.input}\n{SOLUTION_CUE} {example.solution}\n\n" for example in self.examples)
        return f"{opening}{''.join(examples)}{NEXT_EXAMPLE} "

    def text(self, input: str, hint: str | None = None) -> str:
        """The prompt as plain text; it ends with the cue, without a space.

        Args:
            input: the question.
            hint: the gold label, where its reasoning is asked for.
        """
        return f"{self.shared_prefix}{_question(input, hint)}\n{SOLUTION_CUE}"

    def messages(self, input: str, hint: str | None = None) -> list[dict[str, str]]:
        """The prompt as chat messages: the instruction as system, each example as two turns, the question as the user's last.

        Args:
            input: the question.
            hint: the gold label, where its reasoning is asked for.
        """
        system = [_message("system", self.instruction)] if self.instruction else []
        turns = [turn for example in self.examples for turn in (_message("user", example.input), _message("assistant", example.solution))]
        return [*system, *turns, _message("user", _question(input, hint))]

    def last(self, shots: int) -> TeacherPrompt:
        """The same prompt with its last `shots` examples; the earliest go first, as what stands next to the question counts most."""
        return replace(self, examples=self.examples[len(self.examples) - shots :])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _question(input: str, hint: str | None) -> str:
    """The question, with the correct answer in it where the teacher is to explain that (Zelikman et al. 2022, arXiv 2203.14465)."""
    if hint is None:
        return input
    return (
        f"{input}\nThe correct answer is {hint}. Write the reasoning that leads to it, as if it had not been given, "
        f'and close with "{ANSWER_MARK} {hint}".'
    )


def hinted(input: str, hint: str) -> str:
    """The input of a tuned teacher with the gold label in it: its learnt form has no other room for a hint."""
    return f"{input}\nHint: the answer is {hint}"


def teacher_prompt(config: RationalesConfig) -> TeacherPrompt:
    """The prompt that the configuration describes.

    A file that is a bare list is used as it stands, without an instruction: the prompt of the Distilling Step-by-Step paper.

    Raises:
        ValueError: if the file is missing or not of its form, holds fewer examples than `shots`, or one that the parser does not
            give back.
    """
    if config.examples is None:
        return TeacherPrompt()
    path = Path(config.examples)
    prompt = read_prompt_set(path)
    if len(prompt.examples) < config.shots and prompt.examples:
        raise ValueError(
            f"teacher.rationales.shots is {config.shots}, but {path} holds {len(prompt.examples)} examples: lower shots or add examples"
        )
    return replace(prompt, examples=prompt.examples[: config.shots])


def read_prompt_set(path: Path) -> TeacherPrompt:
    """A YAML file of instruction and examples, all of them.

    Raises:
        ValueError: if the file is missing or not of its form, or holds an example that the parser does not give back.
    """
    if not path.is_file():
        raise ValueError(f"teacher.rationales.examples: {path} does not exist; give a YAML file of few-shot examples")
    try:
        # The base loader reads every scalar as text: the label `yes` stays yes, and 1.10 keeps its zero.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        instruction, rows = _parts(values)
        examples = tuple(_worked_example(row) for row in rows)
    except (yaml.YAMLError, UnicodeDecodeError, _FormError) as error:
        raise ValueError(
            f"teacher.rationales.examples: {path} is not {_FORM} ({type(error).__name__.strip('_')}: {error}); write each as text"
        ) from error
    for number, example in enumerate(examples, 1):
        _check_parsed_back(example, number, path)
    return TeacherPrompt(instruction, examples)


class _FormError(Exception):
    """The file holds something else than it should."""


def _parts(values: Any) -> tuple[str, list[Any]]:
    if isinstance(values, list):
        if not values:
            raise _FormError("the list is empty")
        return "", values
    if not isinstance(values, Mapping):
        raise _FormError("the file is empty" if values in (None, "") else f"the file holds {type(values).__name__}")
    if unknown := sorted(values.keys() - {"instruction", "examples"}):
        raise _FormError(f"unknown key {unknown[0]!r}")
    instruction, rows = values.get("instruction"), values.get("examples", [])
    if not isinstance(instruction, str) or not instruction.strip():
        raise _FormError("instruction is missing or empty")
    if not isinstance(rows, list):
        raise _FormError("examples is not a list")
    return instruction.strip(), rows


def _worked_example(row: Any) -> WorkedExample:
    if not isinstance(row, Mapping):
        raise _FormError(f"an example is {type(row).__name__}")
    for name in _FIELDS:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise _FormError(f"an example's {name} is missing, empty or not a text")
    return WorkedExample(*(row[name].strip() for name in _FIELDS))


def _check_parsed_back(example: WorkedExample, number: int, path: Path) -> None:
    rationale, label = parse_solution(example.solution)
    if (rationale, label) != (example.rationale, example.label):
        raise ValueError(
            f"teacher.rationales.examples: example {number} of {path} would be read back as rationale {rationale!r} and label {label!r}: "
            f"write the label on one line, and no {ANSWER_MARK!r}, {NEXT_EXAMPLE!r} or markup in either"
        )
