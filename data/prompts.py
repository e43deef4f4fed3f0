"""The texts that models read and write: the student's two tasks, the teacher's prompt and its parser. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

import yaml

from data.examples import TaskExample

Part = Literal["predict", "explain", "solve"]
"""What a model is asked for: the label, the rationale, or (a teacher) the rationale and then the label."""

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

FORMAT_FILE = "stepdown.json"
ANSWER_MARK = "Answer:"
_CUES: dict[Part, str] = {"predict": ANSWER_MARK, "explain": "Rationale:", "solve": "Solution:"}
_NEXT_EXAMPLE = "Question:"


@dataclass(frozen=True, slots=True)
class TextFormat:
    """How a model of this project is called; kept as `stepdown.json` beside its weights, so that any runtime can call it."""

    family: Literal["encoder_decoder", "decoder_only"]
    eos_id: int
    pad_id: int
    max_input_tokens: int
    max_label_tokens: int
    max_rationale_tokens: int
    prefix_ids: tuple[int, ...] = ()
    """What opens every sequence (a beginning-of-sequence token where the tokenizer adds one)."""
    few_shot: str = ""
    """Worked examples that open a `solve` prompt of a teacher that was not tuned."""

    def prompt(self, part: Part, text: str) -> str:
        """The text a model reads for `part`."""
        if part == "solve" and self.few_shot:
            return f"{self.few_shot}{_NEXT_EXAMPLE} {text}\n{_CUES['solve']}"
        if self.family == "encoder_decoder":
            return f"{part}: {text}"
        return f"{part}: {text}\n{_CUES[part]}"

    def target(self, text: str) -> str:
        """The text a model writes; a decoder-only model goes on after its cue with a space."""
        return text if self.family == "encoder_decoder" else f" {text}"

    def prompt_ids(self, part: Part, text: str, encode: Encode) -> tuple[list[int], bool]:
        """Token ids of the prompt, and whether it was cut.

        A prompt longer than `max_input_tokens` loses tokens just after its task word: what tells the tasks apart, the end of the
        input and the cue stay. A few-shot prompt loses its earliest examples.
        """
        ids = encode(self.prompt(part, text))
        end = [self.eos_id] if self.family == "encoder_decoder" else []
        excess = len(self.prefix_ids) + len(ids) + len(end) - self.max_input_tokens
        if excess > 0:
            head = 0 if self.few_shot and part == "solve" else min(len(encode(f"{part}:")), len(ids) - excess)
            ids = ids[:head] + ids[head + excess :]
        return [*self.prefix_ids, *ids, *end], excess > 0

    def label_ids(self, label: str, encode: Encode) -> tuple[list[int], bool]:
        """Token ids of a label with its end-of-sequence token, and whether it was cut to `max_label_tokens`."""
        return _ended(encode(self.target(label)), self.eos_id, self.max_label_tokens)

    def rationale_ids(self, rationale: str, encode: Encode) -> tuple[list[int], bool]:
        """Token ids of a rationale with its end-of-sequence token, and whether it was cut to `max_rationale_tokens`."""
        return _ended(encode(self.target(rationale)), self.eos_id, self.max_rationale_tokens)

    def solution_ids(self, rationale: str, label: str, encode: Encode) -> tuple[list[int], list[int], list[int]]:
        """A teacher's target in three segments: the rationale, `Answer:`, and the label with the end-of-sequence token.

        They are tokenized apart, so that the tokens of rationale and label are those that the student learns and a soft label
        stored for one of them belongs to the same token of the student.
        """
        # A decoder-only target of no text would still be its leading space, a token that no student learns.
        head = encode(self.target(rationale))[: self.max_rationale_tokens - 1] if rationale else []
        return head, encode(f" {ANSWER_MARK}"), self.label_ids(label, encode)[0]

    def save(self, folder: Path) -> None:
        """Writes `stepdown.json` into a model's folder."""
        (folder / FORMAT_FILE).write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads `stepdown.json` from a model's folder.

        Raises:
            ValueError: if the folder has none.
        """
        path = folder / FORMAT_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {FORMAT_FILE}: it is not a model folder that stepdown made")
        values = json.loads(path.read_text())
        return cls(**{**values, "prefix_ids": tuple(values["prefix_ids"])})


def _ended(ids: list[int], eos_id: int, limit: int) -> tuple[list[int], bool]:
    return [*ids[: limit - 1], eos_id], len(ids) > limit - 1


def vocabulary_texts(examples: Iterable[TaskExample]) -> Iterator[str]:
    """What models of either family read and write of these examples, task words and cues too: texts to train a tokenizer on."""
    for example in examples:
        for part, cue in _CUES.items():
            yield f"{part}: {example.input}\n{cue}"
        yield f"{example.rationale or ''} {ANSWER_MARK} {example.label}"
        yield example.label


def parse_solution(text: str) -> tuple[str, str | None]:
    """A teacher's output cut into rationale and label; the label is None where there is no `Answer:`.

    The output of a few-shot teacher runs on into a next example of its own making: it is cut there.
    """
    text = text.split(_NEXT_EXAMPLE)[0]
    rationale, mark, label = text.partition(ANSWER_MARK)
    label = label.strip().split("\n")[0].strip()
    return rationale.strip(), label if mark and label else None


def _worked_example(example: dict[str, str]) -> str:
    question, rationale, label = (example[name].strip() for name in ("input", "rationale", "label"))
    if not (question and rationale and label):
        raise ValueError("a value is empty")
    return f"{_NEXT_EXAMPLE} {question}\n{_CUES['solve']} {rationale} {ANSWER_MARK} {label}\n\n"


def few_shot_text(path: Path, shots: int) -> str:
    """The worked examples of a YAML file as the opening of a prompt.

    Args:
        path: a list of mappings with `input`, `rationale` and `label`.
        shots: how many to use, from the first.

    Raises:
        ValueError: if the file is missing or not of that form, or has fewer examples than `shots`.
    """
    if not path.is_file():
        raise ValueError(f"teacher.rationales.examples: {path} does not exist; give a YAML file of few-shot examples")
    try:
        # The base loader reads every scalar as text: the label `yes` stays yes, and 1.10 keeps its zero.
        examples = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        texts = [_worked_example(example) for example in examples]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"teacher.rationales.examples: {path} is not a list of mappings with input, rationale and label "
            f"({type(error).__name__}: {error}); write each as text"
        ) from error
    if len(texts) < shots:
        raise ValueError(f"teacher.rationales.shots is {shots}, but {path} holds {len(texts)} examples: lower shots or add examples")
    return "".join(texts[:shots])
