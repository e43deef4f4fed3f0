"""What a teacher is asked: the prompt written out by hand, the file's form, and the sets that ship."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.answers import expression_value, gold_choice, match_choice, number_value
from data.config import RationalesConfig
from data.prompts import parse_solution
from data.teacher_prompts import DEFAULT_INSTRUCTION, TeacherPrompt, WorkedExample, hinted, read_prompt_set, teacher_prompt

SETS = sorted((Path(__file__).resolve().parents[2] / "configs" / "prompts").glob("*.yaml"))
PROMPT = TeacherPrompt("Add.", (WorkedExample("1 + 1?", "One more than one.", "2"), WorkedExample("2 + 1?", "One more.", "3")))
HINT = (
    "\nThe correct answer is 7. Write the reasoning that leads to it, as if it had not been given, "
    'and close with "Answer: 7".'
)  # fmt: skip


def test_a_prompt_as_text() -> None:
    assert PROMPT.text("3 + 4?") == (
        "Add.\n\n"
        "Question: 1 + 1?\nSolution: One more than one. Answer: 2\n\n"
        "Question: 2 + 1?\nSolution: One more. Answer: 3\n\n"
        "Question: 3 + 4?\nSolution:"
    )
    assert PROMPT.text("3 + 4?", "7") == PROMPT.text("3 + 4?").removesuffix("\nSolution:") + HINT + "\nSolution:"
    assert PROMPT.shared_prefix == PROMPT.text("3 + 4?").removesuffix("3 + 4?\nSolution:")
    assert TeacherPrompt("", PROMPT.examples[:1]).text("x").startswith("Question: 1 + 1?")


def test_a_prompt_as_messages() -> None:
    system, *turns, last = PROMPT.messages("3 + 4?")
    assert system == {"role": "system", "content": "Add."}
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "1 + 1?"),
        ("assistant", "One more than one. Answer: 2"),
        ("user", "2 + 1?"),
        ("assistant", "One more. Answer: 3"),
    ]
    assert last == {"role": "user", "content": "3 + 4?"}
    assert PROMPT.messages("3 + 4?", "7") == [system, *turns, {"role": "user", "content": "3 + 4?" + HINT}]
    assert TeacherPrompt("").messages("x") == [{"role": "user", "content": "x"}]


def test_a_prompt_loses_its_earliest_examples_first() -> None:
    assert [len(PROMPT.last(shots).examples) for shots in (0, 1, 2)] == [0, 1, 2]
    assert PROMPT.last(1) == TeacherPrompt("Add.", PROMPT.examples[1:])


def test_a_next_example_is_where_the_answer_stops_and_where_the_parser_cuts() -> None:
    written = "Seven. Answer: 7\n\n" + PROMPT.text("more?").removeprefix("Add.\n\n")
    assert written.split(PROMPT.stop[0])[0].strip() == "Seven. Answer: 7"
    assert parse_solution(written) == ("Seven.", "7")


def test_a_tuned_teacher_reads_the_hint_in_its_input() -> None:
    assert hinted("3 + 4?", "7") == "3 + 4?\nHint: the answer is 7"


@pytest.mark.parametrize("hint", [None, "7"])
def test_a_teacher_without_examples_is_told_how_to_close(hint: str | None) -> None:
    prompt = teacher_prompt(RationalesConfig())
    assert prompt == TeacherPrompt(DEFAULT_INSTRUCTION, ())
    assert 'close with "Answer:"' in prompt.text("3 + 4?", hint)
    assert prompt.text("3 + 4?").endswith("Question: 3 + 4?\nSolution:")


WORDS = st.text("abc XYZ019.,()+-/\n'é", min_size=1, max_size=40).map(str.strip).filter(bool)


@given(WORDS, WORDS.map(lambda text: text.split("\n")[0].strip()).filter(bool))
def test_what_an_example_shows_is_what_the_parser_reads(rationale: str, label: str) -> None:
    assert parse_solution(WorkedExample("x", rationale, label).solution) == (rationale, label)


# ----- files -----

LIST = """
- {input: "is 2 even?", rationale: "It is 2 x 1.", label: yes}
- input: What costs 1.10?
  rationale: |
    Only tea
    costs 1.10.
  label: 1.10
- {input: c, rationale: d, label: 3}
"""


def read(folder: Path, text: str | bytes, **knobs: int) -> TeacherPrompt:
    path = folder / "examples.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return teacher_prompt(RationalesConfig(examples=str(path), **knobs))


def test_examples_are_read_as_they_are_written(tmp_path: Path) -> None:
    # YAML would make a boolean of `yes` and 1.1 of 1.10.
    assert read(tmp_path, LIST, shots=2) == TeacherPrompt(
        "", (WorkedExample("is 2 even?", "It is 2 x 1.", "yes"), WorkedExample("What costs 1.10?", "Only tea\ncosts 1.10.", "1.10"))
    )
    assert read(tmp_path, LIST, shots=3).text("x") == (
        "Question: is 2 even?\nSolution: It is 2 x 1. Answer: yes\n\n"
        "Question: What costs 1.10?\nSolution: Only tea\ncosts 1.10. Answer: 1.10\n\n"
        "Question: c\nSolution: d Answer: 3\n\n"
        "Question: x\nSolution:"
    )


def test_a_file_may_hold_an_instruction_too(tmp_path: Path) -> None:
    mapping = f"instruction: |\n  Add.\n  Close.\nexamples: {LIST.replace(chr(10), chr(10) + '  ')}"
    prompt = read(tmp_path, mapping, shots=1)
    assert prompt == TeacherPrompt("Add.\nClose.", (WorkedExample("is 2 even?", "It is 2 x 1.", "yes"),))
    assert read(tmp_path, "instruction: Add.") == TeacherPrompt("Add.", ())


def test_a_missing_file_of_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.rationales\.examples: .*gone\.yaml does not exist; give a YAML file of few-shot"):
        read_prompt_set(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- {input: a, rationale: b}", "an example's label is missing, empty or not a text"),
        ("- {input: [a], rationale: b, label: c}", "an example's input is missing, empty or not a text"),
        ("- {input: a, rationale: '', label: c}", "an example's rationale is missing"),
        ("- {input: a, rationale: , label: c}", "an example's rationale is missing"),
        ("- [a, b, c]", "an example is list"),
        ("input: a", "unknown key 'input'"),
        ("{examples: []}", "instruction is missing or empty"),
        ("{instruction: ' '}", "instruction is missing or empty"),
        ("{instruction: a, examples: b}", "examples is not a list"),
        ("just text", "the file holds str"),
        ("", "the file is empty"),
        ("[]", "the list is empty"),
        ("- {input: a", "ParserError"),
        (b"- {input: \xff, rationale: b, label: c}", "UnicodeDecodeError"),
    ],
)
def test_a_malformed_file_of_examples(text: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)is not a list of mappings .* or \{instruction: TEXT, .*\); write each as text") as raised:
        read(tmp_path, text)
    assert reason in str(raised.value)
    assert str(raised.value).startswith(f"teacher.rationales.examples: {tmp_path / 'examples.yaml'} is not")


@pytest.mark.parametrize(
    ("rationale", "label", "back"),
    [
        ("Two. Answer: 2.", "3", "rationale 'Two.' and label '2. Answer: 3'"),
        ("Two.\nQuestion: no", "3", "rationale 'Two.' and label None"),
        ("Two.", "**3**", "rationale 'Two.' and label '3'"),
        ("Two.", "3\n4", "rationale 'Two.' and label '3'"),
    ],
)
def test_an_example_that_the_parser_does_not_give_back(rationale: str, label: str, back: str, tmp_path: Path) -> None:
    text = "- {input: a, rationale: b, label: c}\n- " + json.dumps({"input": "a", "rationale": rationale, "label": label})
    with pytest.raises(ValueError, match=r"example 2 of .* would be read back as rationale") as raised:
        read(tmp_path, text)
    assert back in str(raised.value)
    assert "write the label on one line, and no 'Answer:', 'Question:' or markup in either" in str(raised.value)


def test_too_few_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.rationales\.shots is 4, but .* holds 3 examples: lower shots or add examples"):
        read(tmp_path, LIST, shots=4)


# ----- the sets that ship -----


def test_the_sets_that_ship() -> None:
    assert {path.stem for path in SETS} == {"nli", "multiple_choice", "arithmetic", "arithmetic_expression", "extraction", "generic"}


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_set_is_whole(path: Path) -> None:
    prompt = teacher_prompt(RationalesConfig(examples=str(path)))
    assert len(prompt.examples) == 8
    assert 'close with "Answer:"' in prompt.instruction
    for example in read_prompt_set(path).examples:
        assert parse_solution(example.solution) == (example.rationale, example.label)
        assert 8 <= len(example.rationale.split()) <= 60
        assert "Answer:" not in example.input
        assert "Question:" not in example.input
    inputs = [example.input for example in read_prompt_set(path).examples]
    assert len(set(inputs)) == len(inputs)


EQUATION = re.compile(r"([(\d][-+*/(). \d]*[\d)]) = (\d+(?:\.\d+)?)")


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic_expression"])
def test_the_arithmetic_of_the_rationales_is_right_and_ends_in_the_label(name: str) -> None:
    (path,) = (path for path in SETS if path.stem == name)
    for example in read_prompt_set(path).examples:
        equations = EQUATION.findall(example.rationale)
        assert equations, example
        for expression, value in equations:
            assert expression_value(expression) == Fraction(value), example
        assert str(example.rationale).count("=") == len(equations), example
        assert expression_value(example.label) == Fraction(equations[-1][1]), example
        if name == "arithmetic":
            assert number_value(example.label) is not None
        else:
            numbers = re.findall(r"\d+", example.input)
            assert set(re.findall(r"\d+", example.label)) <= set(numbers), example


def test_the_labels_of_the_choices_are_among_them() -> None:
    (path,) = (path for path in SETS if path.stem == "multiple_choice")
    for example in read_prompt_set(path).examples:
        question, _, listed = example.input.partition("\nAnswer Choices:\n")
        letters, choices = zip(*(re.fullmatch(r"\((.)\) (.+)", line).groups() for line in listed.split("\n")), strict=True)  # type: ignore[union-attr]
        assert question
        assert letters == tuple("abcde")
        assert len(set(choices)) == 5
        assert example.label == match_choice(example.label, choices) == gold_choice(example.label, choices)


def test_the_labels_of_inference_are_its_three() -> None:
    (path,) = (path for path in SETS if path.stem == "nli")
    labels = [example.label for example in read_prompt_set(path).examples[:8]]
    assert {label: labels.count(label) for label in labels} == {"entailment": 3, "contradiction": 3, "neutral": 2}


def test_an_extracted_label_stands_in_its_text() -> None:
    (path,) = (path for path in SETS if path.stem == "extraction")
    found = [example.label in example.input.split("\nFind: ")[0] for example in read_prompt_set(path).examples]
    labels = [example.label for example in read_prompt_set(path).examples]
    assert found == [label != "none" for label in labels]
