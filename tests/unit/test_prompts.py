from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import Metric
from data.prompts import FORMAT_FILE, Part, TextFormat, label_of, parse_solution
from train.scoring import parse_answer

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
        # the next example
        ("Two. Answer: 2\nQuestion: no Answer: 3", "Two.", "2"),
        ("Two. Answer: 2 Question: what next?", "Two.", "2"),
        ("Two.\n\n  **Question:** no Answer: 3", "Two.", None),
        ("Question: how many? Two. Answer: 2", "Question: how many? Two.", "2"),
        # the closing form as chat models write it
        ("It is an herb.\n\n**Answer:** (b) thyme.", "It is an herb.", "(b) thyme."),
        ("It is an herb.\n\n**Answer**: (b) thyme", "It is an herb.", "(b) thyme"),
        ("It is **an** herb.\n**Answer: thyme**", "It is an herb.", "thyme"),
        ("Six.\n\n### Final Answer:\n\n**6**", "Six.", "6"),
        ("Six.\nFinal answer: `6`.", "Six.", "6"),
        ("Six.\nThe correct answer: $6$", "Six.", "6"),
        (r"Six. Answer: \(6\)", "Six.", "6"),
        (r"Six. Answer: $\boxed{6}$.", "Six.", "6"),
        ("Six. ANSWER : 6", "Six.", "6"),
        ("Six. Answer: The answer is 6.", "Six.", "6"),
        ("<think>\nAnswer: 5? No.\n</think>\n\nSix. Answer: 6", "Six.", "6"),
        # a sentence
        ("Six times seven is 42. So the answer is 42.", "Six times seven is 42.", "42"),
        ("It grows. The final answer is: **(b) thyme**.", "It grows.", "(b) thyme"),
        ("The answer is 4. No, wait. Therefore, the correct answer is 5. It is odd.", "The answer is 4. No, wait.", "5"),
        ("He lives there. The answer is Washington D.C.", "He lives there.", "Washington D.C."),
        ("A tenth more. The answer is 1.10.", "A tenth more.", "1.10"),
        ("Think. The answer is:\n\n$18", "Think.", "$18"),
        ("The answer is", "The answer is", None),
        # a box
        (r"So 6 * 7 = $\boxed{42}$.", "So 6 * 7 = 42", "42"),
        (r"Six sevens.\n\n\[ \boxed{42} \]".replace(r"\n", "\n"), "Six sevens.", "42"),
        (r"\boxed{1} is wrong. It is \boxed{\text{(b) thyme}}", r"\boxed{1} is wrong. It is \text{(b) thyme}", "(b) thyme"),
        (r"\boxed{4", r"\boxed{4", None),
        # what only looks like markup
        ("2 ** 3 is 8 and 2**3**1 too. Answer: ( 2 * 3 ) * 4", "2 ** 3 is 8 and 2**3**1 too.", "( 2 * 3 ) * 4"),
        ("It costs $5 or $6. Answer: $5", "It costs $5 or $6.", "$5"),
        ("Answer Choices are three. Answer: (a)", "Answer Choices are three.", "(a)"),
    ],
)
def test_a_solution_is_parsed_into_rationale_and_label(text: str, rationale: str, label: str | None) -> None:
    assert parse_solution(text) == (rationale, label)


@pytest.mark.parametrize(
    ("text", "metric", "answer"),
    [
        ("An herb. **Answer:** (b) thyme.", "choice", "thyme"),
        ("An herb. Answer: (b).", "choice", "thyme"),
        ("An herb. Answer: thyme.", "choice", "thyme"),
        ("The capital. Answer: Washington D.C.", "choice", "Washington D.C."),
        ("The capital. Answer: (c) Washington D.C..", "choice", "Washington D.C."),
        ("The capital. The answer is (c) Washington D.C.", "choice", "Washington D.C."),
        ("An herb. Answer: rock.", "choice", None),
        ("Seven each. The answer is 42.", "number", "42"),
        (r"\[\boxed{42}\]", "number", "42"),
        ("Answer: **(84 / 2)**.", "expression", "42"),
        ("Answer: (84 / 2).", "expression", "42"),
        ("Answer: 84 / 2 .", "expression", "42"),
        ("Answer: .", "expression", None),
    ],
)
def test_what_is_parsed_can_be_judged(text: str, metric: Metric, answer: str | None) -> None:
    label = parse_solution(text)[1]
    assert label is not None
    assert parse_answer(label, metric, ("rock.txt", "thyme", "Washington D.C.") if metric == "choice" else ()) == answer


def test_a_model_folder_says_how_its_model_is_asked(tmp_path: Path) -> None:
    solving = dataclasses.replace(LLAMA, part="solve")
    solving.save(tmp_path)
    assert TextFormat.load(tmp_path) == solving
    # A folder of before that was said.
    values = json.loads((tmp_path / FORMAT_FILE).read_text())
    del values["part"]
    (tmp_path / FORMAT_FILE).write_text(json.dumps(values))
    assert TextFormat.load(tmp_path) == LLAMA


@BOTH
def test_the_longest_answer_holds_any_that_is_learnt(form: TextFormat) -> None:
    longest = [token for segment in form.solution_ids("r" * 99, "l" * 99, encode) for token in segment]
    assert dataclasses.replace(form, part="solve").max_answer_tokens == 16 + 8 + 8
    assert len(longest) == 15 + 8 + 8  # a rationale in a solution has no end of its own
    assert form.max_answer_tokens == len(form.label_ids("l" * 99, encode)[0]) == 8


def test_the_label_of_an_answer_is_parsed_from_a_solution_only() -> None:
    assert label_of("Two. Answer: 2", "solve") == "2"
    assert label_of("Two, I think", "solve") is None
    assert label_of("Two. Answer: 2", "predict") == "Two. Answer: 2"


PIECES = [
    "Answer:",
    "**",
    "*",
    "The answer is ",
    r"\boxed{",
    "}",
    "Question:",
    "\n",
    " ",
    "$",
    "`",
    "#",
    ".",
    "</think>",
    "4",
    "x",
    "\u2028",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join))
def test_the_parser_takes_any_text(text: str) -> None:
    rationale, label = parse_solution(text)
    assert rationale == rationale.strip()
    assert label is None or (label == label.strip() and label and "\n" not in label)


REPEATED = ["#", "*", "\n", " ", "**a", r"\boxed{", "the answer is ", "$", "Answer", "D.C", "\n ", "* ", r"\boxed{a{b", "`a "]


@pytest.mark.timeout(20)  # quadratic time in the length would be minutes
@pytest.mark.parametrize("opening", ["", "Answer: ", r"\boxed{"])
@pytest.mark.parametrize("piece", REPEATED)
def test_the_parser_takes_degenerate_repetition(opening: str, piece: str) -> None:
    text = opening + piece * (200_000 // len(piece))
    rationale, label = parse_solution(text)
    assert len(rationale) + len(label or "") <= len(text)
