"""Self-consistency: what several answers to one question say together. Pure functions; imports no torch.

Source:
    Wang et al. 2023, Self-Consistency Improves Chain of Thought Reasoning, arXiv 2203.11171.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data.soft_labels import AnswerDistribution

Same = Callable[[str, str], bool]
"""Whether two answers are one, as the task's metric compares: 4 and 4.0 are one number."""


def majority(answers: Sequence[str | None], same: Same) -> tuple[int, int]:
    """The majority answer.

    Of two answers given equally often, the one given first wins. Samples without an answer win only where there is no other.

    Args:
        answers: of n >= 1 samples, in the order they were drawn; None where a sample had no usable one.
        same: whether two answers are one.

    Returns:
        The position of the first sample that gave the majority answer, and how many gave it (where none answered: 0 and n).
    """
    assert answers, "no samples"
    groups = _groups(answers, same)
    if not groups:
        return 0, len(answers)
    _, positions = max(groups, key=lambda group: len(group[1]))  # the first of equals
    return positions[0], len(positions)


def answer_distribution(answers: Sequence[str | None], same: Same) -> AnswerDistribution | None:
    """How often each distinct answer was given, as shares that add up to 1; None where no sample had a usable answer.

    Args:
        answers: of the samples, in the order they were drawn; those that are None are left out.
        same: whether two answers are one; it is written as the first sample wrote it.
    """
    groups = _groups(answers, same)
    if not groups:
        return None
    total = sum(len(positions) for _, positions in groups)
    return AnswerDistribution(tuple(first for first, _ in groups), tuple(len(positions) / total for _, positions in groups))


def _groups(answers: Sequence[str | None], same: Same) -> list[tuple[str, list[int]]]:
    """Each distinct answer with the positions that gave it, in the order of first appearance.

    An answer joins the first group whose first answer it equals: equality within a tolerance is not transitive, and one
    representative a group keeps the outcome plain.
    """
    groups: list[tuple[str, list[int]]] = []
    for position, answer in enumerate(answers):
        if answer is None:
            continue
        for first, positions in groups:
            if same(first, answer):
                positions.append(position)
                break
        else:
            groups.append((answer, [position]))
    return groups
