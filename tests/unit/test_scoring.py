"""Answers parsed and compared: hand-computed cases, Python's Fraction as the reference, and what must not crash."""

from __future__ import annotations

from fractions import Fraction
from operator import add, mul, sub, truediv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.answers import MAX_CHARACTERS, MAX_NESTING, expression_value, gold_choice, match_choice, number_value
from data.config import Metric
from train.scoring import equal, parse_answer

CHOICES = ("bank", "library", "ice cream ", "bank")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("library", "library"),
        (" library\n", "library"),
        ("ice cream ", "ice cream "),
        ("(b)", "library"),
        ("b)", "library"),
        ("(B) library", "library"),
        ("(c) ice cream", "ice cream "),
        ("(d)", "bank"),
        ("Library", None),
        ("library or", None),
        ("(b) bank", None),
        ("(e)", None),
        ("b", None),
        ("", None),
        (" ", None),
    ],
)
def test_a_choice_is_found_by_its_text_or_its_letter(text: str, choice: str | None) -> None:
    assert match_choice(text, CHOICES) == choice
    assert parse_answer(text, "choice", CHOICES) == choice


def test_a_choice_that_looks_like_a_letter_comes_before_the_letter() -> None:
    assert match_choice("(a)", ("x", "(a)")) == "(a)"


def test_gold_labels_are_forgiven_case_and_spacing_where_one_choice_is_meant() -> None:
    assert gold_choice(" LIBRARY", CHOICES) == "library"
    assert gold_choice("ice  cream", CHOICES) == "ice cream "
    assert gold_choice("PARK", ("Park", "park")) is None
    assert gold_choice("zoo", CHOICES) is None


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("5", "5"),
        ("5.0", "5"),
        ("5.", "5"),
        ("+05.50.", "5.5"),
        ("-$1,234,567.250", "-1234567.25"),
        ("$ 18", "18"),
        ("50%", "50"),
        ("50 %.", "50"),
        (".5", "0.5"),
        ("-0.0", "0"),
        ("1e-05", "0.00001"),
        ("1e+22", "1" + "0" * 22),
        ("1,00", None),
        ("12,3456", None),
        ("5 apples", None),
        ("1 2", None),
        ("5..", None),
        ("1/2", None),
        ("1e100", None),
        ("nan", None),
        ("inf", None),
        ("٣", None),
        ("", None),
        ("1" * (MAX_CHARACTERS + 1), None),
    ],
)
def test_a_number_is_the_whole_text(text: str, canonical: str | None) -> None:
    assert parse_answer(text, "number", ()) == canonical


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("( 8.0 - 3.0 )", "5"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("8 - 3 - 2", "3"),
        ("8 / 4 / 2", "1"),
        ("(9 - (-3))", "12"),
        ("--3", "3"),
        ("+3", "3"),
        ("2*-3", "-6"),
        ("1/3", "1/3"),
        (".5+1.", "3/2"),
        ("007", "7"),
        ("5 / 0", None),
        ("1 / (2 - 2)", None),
        ("2 ** 3", None),
        ("7 // 2", None),
        ("1e5", None),
        ("(34 + 40) and (62 - 17)", None),
        ("(175, 5)", None),
        ("11,210 / 84", None),
        ("7x = 14", None),
        ("(1 + 2", None),
        ("1 + 2)", None),
        ("1 +", None),
        ("2 (3)", None),
        ("()", None),
        ("", None),
        (" ", None),
        ("__import__('os')", None),
        ("9**9**9**9", None),
    ],
)
def test_an_expression_has_its_exact_value(text: str, canonical: str | None) -> None:
    assert parse_answer(text, "expression", ()) == canonical


@pytest.mark.parametrize("opening", ["(", "-", "(-", "1+(", "9*"])
def test_endless_texts_are_unusable_and_do_not_crash(opening: str) -> None:
    assert parse_answer(opening * 100_000, "expression", ()) is None
    assert parse_answer(opening * 100_000, "number", ()) is None
    assert parse_answer(opening * 100_000, "choice", CHOICES) is None


def test_nesting_has_a_bound() -> None:
    assert expression_value("(" * MAX_NESTING + "7" + ")" * MAX_NESTING) == 7
    assert expression_value("(" * (MAX_NESTING + 1) + "7" + ")" * (MAX_NESTING + 1)) is None
    assert expression_value("-" * MAX_NESTING + "7") == 7
    assert expression_value("-" * (MAX_NESTING + 1) + "7") is None


def test_brackets_side_by_side_are_not_nested() -> None:
    assert expression_value("+".join(["(-1)"] * (MAX_NESTING + 5))) == -(MAX_NESTING + 5)


def test_text_ignores_case_spacing_and_a_full_stop() -> None:
    assert parse_answer("  The  Cat\nsat. ", "text", ()) == "the cat sat"
    assert parse_answer("...", "text", ()) is None
    assert equal("the cat sat", "The cat sat.", "text", ())
    assert not equal("the cat", "The cat sat.", "text", ())


@pytest.mark.parametrize(
    ("metric", "answer", "label", "same"),
    [
        ("expression", "(8 - 3)", "( 8.0 - 3.0 )", True),
        ("expression", "5", "( 8.0 - 3.0 )", True),
        ("expression", "(3 - 8)", "( 8.0 - 3.0 )", False),
        ("expression", "0.333333333", "1/3", True),
        ("expression", "0.333", "1/3", False),
        ("number", "$1,080.00", "1080", True),
        ("number", "10000001", "10000000", False),
        ("number", "0.1000001", "0.1", True),
        ("number", "0.100001", "0.1", False),
        ("number", "-0.5", "0.5", False),
        ("number", "0", "0.0", True),
        ("number", "many", "5", False),
        ("number", "many", "many", False),
        ("choice", "(b)", "library", True),
        ("choice", "bank", "library", False),
        ("choice", "zoo", "zoo", False),
    ],
)
def test_answers_compare_by_what_they_mean(metric: Metric, answer: str, label: str, same: bool) -> None:
    assert equal(answer, label, metric, CHOICES) is same


def test_an_unusable_answer_is_never_the_label() -> None:
    assert not equal(None, "library", "choice", CHOICES)
    assert not equal(None, "", "text", ())


Tree = int | tuple[str, "Tree", "Tree"]
TREES: st.SearchStrategy[Tree] = st.recursive(
    st.integers(-99, 99), lambda inner: st.tuples(st.sampled_from("+-*/"), inner, inner), max_leaves=12
)


def _written(tree: Tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    return f"({_written(tree[1])} {tree[0]} {_written(tree[2])})"


def _value(tree: Tree) -> Fraction | None:
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = _value(tree[1]), _value(tree[2])
    if left is None or right is None or (tree[0] == "/" and right == 0):
        return None
    value: Fraction = {"+": add, "-": sub, "*": mul, "/": truediv}[tree[0]](left, right)
    return value


@settings(deadline=None)
@given(TREES)
def test_expressions_agree_with_fraction_arithmetic(tree: Tree) -> None:
    value = _value(tree)
    assert expression_value(_written(tree)) == value
    assert equal(_written(tree), str(value), "expression", ()) is (value is not None)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 99)), max_size=12), st.integers(0, 99))
def test_precedence_and_order_agree_with_a_second_evaluator(steps: list[tuple[str, int]], first: int) -> None:
    terms = [Fraction(first)]  # a sum of signed products, read from the left
    for sign, number in steps:
        if sign in "+-":
            terms.append(Fraction(number if sign == "+" else -number))
        else:
            terms[-1] = terms[-1] * number if sign == "*" else terms[-1] / number
    assert expression_value(f"{first}" + "".join(f"{sign}{number}" for sign, number in steps)) == sum(terms)


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4))
def test_numbers_read_back_with_thousands_separators(number: object) -> None:
    assert number_value(f"{number:,}") == number


@settings(deadline=None)
@given(
    st.text(alphabet="0123456789.,$%()+-*/ ebB", max_size=20) | st.text(max_size=20),
    st.sampled_from(["choice", "number", "expression", "text"]),
)
def test_parsing_a_canonical_form_gives_it_back(text: str, metric: Metric) -> None:
    parsed = parse_answer(text, metric, CHOICES)
    if parsed is not None:
        assert parse_answer(parsed, metric, CHOICES) == parsed
        assert equal(text, parsed, metric, CHOICES)
        assert equal(parsed, text, metric, CHOICES)
