"""The texts that models read and write: the student's two tasks, a tuned teacher's one, and the parser of a solution. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from data.examples import TaskExample

Part = Literal["predict", "explain", "solve"]
"""What a model is asked for: the label, the rationale, or the rationale and then the label (a tuned teacher, a single-task student)."""

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

FORMAT_FILE = "stepdown.json"
ANSWER_MARK = "Answer:"
_CUES: dict[Part, str] = {"predict": ANSWER_MARK, "explain": "Rationale:", "solve": "Solution:"}
NEXT_EXAMPLE = "Question:"
SOLUTION_CUE = _CUES["solve"]
_MARK_TOKENS = len(f" {ANSWER_MARK}")
"""Most tokens of the mark in a solution: one a character."""
_RETIRED = ("few_shot",)
"""Keys that older `stepdown.json` files carry; nothing reads them any more."""


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
    part: Part = "predict"
    """How the model is asked for a label; a folder that does not say is one of a model that only predicts."""

    @property
    def max_answer_tokens(self) -> int:
        """Most tokens of an answer to `part`, the end-of-sequence token among them."""
        return self.max_label_tokens + (self.max_rationale_tokens + _MARK_TOKENS if self.part == "solve" else 0)

    def prompt(self, part: Part, text: str) -> str:
        """The text a model reads for `part`."""
        if self.family == "encoder_decoder":
            return f"{part}: {text}"
        return f"{part}: {text}\n{_CUES[part]}"

    def target(self, text: str) -> str:
        """The text a model writes; a decoder-only model goes on after its cue with a space."""
        return text if self.family == "encoder_decoder" else f" {text}"

    def prompt_ids(self, part: Part, text: str, encode: Encode) -> tuple[list[int], bool]:
        """Token ids of the prompt, and whether it was cut.

        A prompt longer than `max_input_tokens` loses tokens just after its task word: what tells the tasks apart, the end of the
        input and the cue stay.
        """
        ids = encode(self.prompt(part, text))
        end = [self.eos_id] if self.family == "encoder_decoder" else []
        excess = len(self.prefix_ids) + len(ids) + len(end) - self.max_input_tokens
        if excess > 0:
            head = min(len(encode(f"{part}:")), len(ids) - excess)
            ids = ids[:head] + ids[head + excess :]
        return [*self.prefix_ids, *ids, *end], excess > 0

    def label_ids(self, label: str, encode: Encode) -> tuple[list[int], bool]:
        """Token ids of a label with its end-of-sequence token, and whether it was cut to `max_label_tokens`."""
        return _ended(encode(self.target(label)), self.eos_id, self.max_label_tokens)

    def rationale_ids(self, rationale: str, encode: Encode) -> tuple[list[int], bool]:
        """Token ids of a rationale with its end-of-sequence token, and whether it was cut to `max_rationale_tokens`."""
        return _ended(encode(self.target(rationale)), self.eos_id, self.max_rationale_tokens)

    def solution_ids(self, rationale: str, label: str, encode: Encode) -> tuple[list[int], list[int], list[int]]:
        """The target of `solve` in three segments: the rationale, `Answer:`, and the label with the end-of-sequence token.

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
        values = {key: value for key, value in json.loads(path.read_text()).items() if key not in _RETIRED}
        return cls(**{**values, "prefix_ids": tuple(values["prefix_ids"])})


def label_of(text: str, part: Part) -> str | None:
    """The label in what a model wrote for `part`; None where a solution holds none."""
    return parse_solution(text)[1] if part == "solve" else text


def _ended(ids: list[int], eos_id: int, limit: int) -> tuple[list[int], bool]:
    return [*ids[: limit - 1], eos_id], len(ids) > limit - 1


def vocabulary_texts(examples: Iterable[TaskExample]) -> Iterator[str]:
    """What models of either family read and write of these examples, task words and cues too: texts to train a tokenizer on."""
    for example in examples:
        for part, cue in _CUES.items():
            yield f"{part}: {example.input}\n{cue}"
        yield f"{example.rationale or ''} {ANSWER_MARK} {example.label}"
        yield example.label


# Degenerate outputs repeat one character thousands of times: every repetition below is bounded, so that none costs quadratic time.
_NEXT = re.compile(rf"\n[ \t*#]{{0,8}}{NEXT_EXAMPLE}")
_BOLD = re.compile(r"(?<![\w)])(\*{2,3})(?=\S)(.{1,300}?)(?<=\S)\1(?![\w(])")
_MARK = re.compile(r"(?:#{1,6}[ \t]?)?(?:(?i:\b(?:the )?(?:final|correct) answer)|Answer|ANSWER) ?:")
_LEAD_IN = r"(?i:(?:\b(?:so|thus|therefore|hence),? )?\bthe (?:(?:final|correct|best) )?answer is)(?::\s{0,4}|\s)"
# The full stop of an abbreviation (Washington D.C.) ends no sentence, and neither does a decimal point.
_SENTENCE = re.compile(rf"{_LEAD_IN}(\S[^\n]{{0,500}}?)(?:(?<![A-Za-z]\.[A-Za-z])\.(?=\s|$)|\n|$)")
_BOXED = re.compile(r"\\boxed ?\{((?:[^{}\n]|\{[^{}\n]{0,200}\}){1,200})\}")
_TEX_WORD = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_WRAPPED = re.compile(r"(?:\$([^$]+)\$|\\\((.+)\\\)|`([^`]+)`|\*([^*]+)\*)\.?")


def parse_solution(text: str) -> tuple[str, str | None]:
    r"""A teacher's output cut into rationale and label; the label is None where there is none. Never raises.

    What a reasoning model thinks before `</think>` is left out, and so is a next example of the teacher's own making (a line that opens
    with `Question:`). The label is the first line after the first `Answer:` (also `Final answer:`, a heading, bold); without one, what
    the last "The answer is X." says; without that, the last `\boxed{X}`. Emphasis and the marks around a formula are taken off. A full
    stop after `Answer: X` stays: it can belong to the label, and `data.answers` reads over it.
    """
    text = _BOLD.sub(r"\2", _NEXT.split(text.rpartition("</think>")[2].strip())[0]).strip()
    if mark := _MARK.search(text):
        return text[: mark.start()].strip(), _bare(text[mark.end() :])
    if sentences := list(_SENTENCE.finditer(text)):
        return text[: sentences[-1].start()].strip(), _bare(sentences[-1][1])
    if boxes := list(_BOXED.finditer(text)):
        return _before_box(text, boxes[-1]), _bare(boxes[-1][0])
    return text, None


def _bare(label: str) -> str | None:
    """The first line of what was written as the label, without the marks around it; None where nothing is left."""
    label = label.strip().split("\n")[0].split(f" {NEXT_EXAMPLE}")[0].strip()
    if sentence := _SENTENCE.match(label):
        label = sentence[1]
    if box := _BOXED.search(label):
        label = _TEX_WORD.sub(r"\1", box[1])
    if wrapped := _WRAPPED.fullmatch(label):
        label = next(group for group in wrapped.groups() if group is not None)
    return label.strip() or None


def _before_box(text: str, box: re.Match[str]) -> str:
    """The rationale of a solution that ends in a box: what stands before it, and its content where it ends a sentence."""
    before, _, line = text[: box.start()].rpartition("\n")
    if not line.strip(" $*[(\\"):
        return before.strip()
    line = line.removesuffix("$").removesuffix("$").removesuffix("\\(")
    return f"{before}\n{line}{box[1]}".strip()
