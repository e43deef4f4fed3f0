from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from data.prompts import Part, TextFormat, few_shot_text, parse_solution

EOS, PAD = 1, 0
T5 = TextFormat("encoder_decoder", EOS, PAD, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=16)
LLAMA = dataclasses.replace(T5, family="decoder_only", prefix_ids=(2,))
BOTH = pytest.mark.parametrize("form", [T5, LLAMA], ids=["t5", "llama"])


def encode(text: str) -> list[int]:
    """One token a character, so that what is cut can be read."""
    return [ord(c) + 10 for c in text]


def read(ids: list[int]) -> str:
    return "".join({PAD: "<p>", EOS: "<e>", 2: "<b>"}.get(n) or chr(n - 10) for n in ids)


@pytest.mark.parametrize(
    ("part", "t5", "llama"),
    [
        ("predict", "predict: 1 + 1?", "predict: 1 + 1?\nAnswer:"),
        ("explain", "explain: 1 + 1?", "explain: 1 + 1?\nRationale:"),
        ("solve", "solve: 1 + 1?", "solve: 1 + 1?\nSolution:"),
    ],
)
def test_a_prompt_is_its_task_word_and_for_a_decoder_only_model_a_cue(part: Part, t5: str, llama: str) -> None:
    assert T5.prompt(part, "1 + 1?") == t5
    assert LLAMA.prompt(part, "1 + 1?") == llama
    assert read(T5.prompt_ids(part, "1 + 1?", encode)[0]) == f"{t5}<e>"
    assert read(LLAMA.prompt_ids(part, "1 + 1?", encode)[0]) == f"<b>{llama}"


def test_a_decoder_only_model_goes_on_with_a_space() -> None:
    assert (T5.target("2"), LLAMA.target("2")) == ("2", " 2")
    assert read(LLAMA.label_ids("2", encode)[0]) == " 2<e>"
    assert read(T5.rationale_ids("It is.", encode)[0]) == "It is.<e>"


def test_a_few_shot_prompt_opens_solve_only() -> None:
    form = dataclasses.replace(LLAMA, few_shot="Question: a\nSolution: b Answer: c\n\n")
    assert form.prompt("solve", "1 + 1?") == "Question: a\nSolution: b Answer: c\n\nQuestion: 1 + 1?\nSolution:"
    assert form.prompt("predict", "1 + 1?") == "predict: 1 + 1?\nAnswer:"


def test_a_long_prompt_keeps_task_word_cue_and_the_end_of_the_input() -> None:
    text = "abcdefghij" * 10
    t5, cut = dataclasses.replace(T5, max_input_tokens=20).prompt_ids("predict", text, encode)
    assert (read(t5), len(t5), cut) == ("predict:" + "jabcdefghij" + "<e>", 20, True)
    llama, cut = dataclasses.replace(LLAMA, max_input_tokens=30).prompt_ids("explain", text, encode)
    assert (read(llama), len(llama), cut) == ("<b>explain:" + "abcdefghij" + "\nRationale:", 30, True)


@BOTH
@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_prompt_is_cut_only_where_it_is_longer_than_the_bound(form: TextFormat, spare: int) -> None:
    whole, _ = form.prompt_ids("predict", "x" * 30, encode)
    ids, cut = dataclasses.replace(form, max_input_tokens=len(whole) + spare).prompt_ids("predict", "x" * 30, encode)
    assert cut == (spare < 0)
    assert len(ids) == len(whole) + min(spare, 0)


@BOTH
def test_a_bound_smaller_than_task_word_and_cue_is_kept_all_the_same(form: TextFormat) -> None:
    ids, cut = dataclasses.replace(form, max_input_tokens=8).prompt_ids("explain", "why?", encode)
    assert (len(ids), cut) == (8, True)


def test_a_long_few_shot_prompt_loses_its_earliest_examples() -> None:
    form = dataclasses.replace(
        LLAMA, few_shot="Question: old\nSolution: o Answer: 1\n\nQuestion: new\nSolution: n Answer: 2\n\n", max_input_tokens=70
    )
    ids, cut = form.prompt_ids("solve", "now?", encode)
    text = read(ids)
    assert (cut, len(ids)) == (True, 70)
    assert "Question: new\nSolution: n Answer: 2\n\nQuestion: now?\nSolution:" in text
    assert text.startswith("<b>")
    assert "old" not in text


def test_labels_and_rationales_are_cut_with_room_for_the_end() -> None:
    assert (read(T5.label_ids("1234567", encode)[0]), T5.label_ids("1234567", encode)[1]) == ("1234567<e>", False)
    assert (read(T5.label_ids("12345678", encode)[0]), T5.label_ids("12345678", encode)[1]) == ("1234567<e>", True)
    ids, cut = LLAMA.rationale_ids("r" * 40, encode)
    assert (read(ids), cut) == (" " + "r" * 14 + "<e>", True)


@BOTH
@pytest.mark.parametrize("label", ["12", "1234567890"])
@pytest.mark.parametrize("rationale", ["3 + 9 is 12", "long " * 20])
def test_a_solution_holds_the_tokens_that_a_student_learns(form: TextFormat, rationale: str, label: str) -> None:
    head, mark, tail = form.solution_ids(rationale, label, encode)
    assert tail == form.label_ids(label, encode)[0]
    assert [*head, EOS] == form.rationale_ids(rationale, encode)[0]
    assert read(mark) == " Answer:"


def test_a_whole_solution_reads_as_the_parser_expects() -> None:
    head, mark, tail = LLAMA.solution_ids("3 + 9 is 12.", "12", encode)
    text = read([*head, *mark, *tail])
    assert text == " 3 + 9 is 12. Answer: 12<e>"
    assert parse_solution(text.removesuffix("<e>")) == ("3 + 9 is 12.", "12")


@BOTH
def test_a_solution_without_a_rationale_has_no_token_for_it(form: TextFormat) -> None:
    assert form.solution_ids("", "12", encode)[0] == []


@pytest.mark.parametrize(
    ("text", "rationale", "label"),
    [
        (" Two and two. Answer: 4", "Two and two.", "4"),
        ("Two and two. Answer: 4\n\nQuestion: what next?\nSolution: no Answer: 5", "Two and two.", "4"),
        ("Two and two.\n\nQuestion: what next?\nSolution: no Answer: 5", "Two and two.", None),
        ("Answer:4", "", "4"),
        ("Answer: 4\nbecause", "", "4"),
        ("One Answer: 4 Answer: 5", "One", "4 Answer: 5"),
        ("Two and two. Answer:  \n ", "Two and two.", None),
        ("It runs on", "It runs on", None),
        ("", "", None),
    ],
)
def test_a_solution_is_parsed_into_rationale_and_label(text: str, rationale: str, label: str | None) -> None:
    assert parse_solution(text) == (rationale, label)


@BOTH
def test_a_format_comes_back_from_its_file(form: TextFormat, tmp_path: Path) -> None:
    form = dataclasses.replace(form, few_shot="Question: wie groß?\n")
    form.save(tmp_path)
    assert TextFormat.load(tmp_path) == form


def test_a_folder_without_a_format_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no stepdown\.json: it is not a model folder that stepdown made") as raised:
        TextFormat.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


EXAMPLES = """
- {input: "is 2 even?", rationale: "It is 2 x 1.", label: yes}
- input: What costs 1.10?
  rationale: |
    Only tea
    costs 1.10.
  label: 1.10
- {input: c, rationale: d, label: 3}
"""


def test_examples_are_read_as_they_are_written(tmp_path: Path) -> None:
    # YAML would make a boolean of `yes` and 1.1 of 1.10.
    path = tmp_path / "examples.yaml"
    path.write_text(EXAMPLES)
    assert few_shot_text(path, 2) == (
        "Question: is 2 even?\nSolution: It is 2 x 1. Answer: yes\n\n"
        "Question: What costs 1.10?\nSolution: Only tea\ncosts 1.10. Answer: 1.10\n\n"
    )
    assert few_shot_text(path, 3).endswith("Question: c\nSolution: d Answer: 3\n\n")


def test_an_example_of_a_file_is_parsed_as_the_teacher_is_meant_to_write_it(tmp_path: Path) -> None:
    path = tmp_path / "examples.yaml"
    path.write_text(EXAMPLES)
    solution = few_shot_text(path, 1).split("Solution:")[1]
    assert parse_solution(solution) == ("It is 2 x 1.", "yes")


def test_a_missing_file_of_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.rationales\.examples: .*gone\.yaml does not exist; give a YAML file of few-shot"):
        few_shot_text(tmp_path / "gone.yaml", 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- {input: a, rationale: b}", "KeyError: 'label'"),
        ("input: a", "TypeError"),
        ("just text", "TypeError"),
        ("", "TypeError"),
        ("- [a, b, c]", "TypeError"),
        ("- {input: [a], rationale: b, label: c}", "AttributeError"),
        ("- {input: a, rationale: '', label: c}", "ValueError: a value is empty"),
        ("- {input: a, rationale: , label: c}", "ValueError: a value is empty"),
        ("- {input: a", "ParserError"),
        (b"- {input: \xff, rationale: b, label: c}", "UnicodeDecodeError"),
    ],
)
def test_a_malformed_file_of_examples(text: str | bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        ValueError, match=r"(?s)not a list of mappings with input, rationale and label \(.*\); write each as text"
    ) as raised:
        few_shot_text(path, 1)
    assert reason in str(raised.value)
    assert str(raised.value).startswith(f"teacher.rationales.examples: {path}")


def test_too_few_examples(tmp_path: Path) -> None:
    path = tmp_path / "examples.yaml"
    path.write_text(EXAMPLES)
    with pytest.raises(ValueError, match=r"teacher\.rationales\.shots is 4, but .* holds 3 examples: lower shots or add examples"):
        few_shot_text(path, 4)
