from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from train.pruning.masks import cubic, keep_globally, keep_in_matrix, keep_in_rows, keep_n_of_m
from train.pruning.scores import magnitude, neuron_norm, neuron_taylor, wanda

FRACTIONS = st.floats(0.0, 0.99)


def matrices(rows: int = 7, columns: int = 12) -> st.SearchStrategy[Tensor]:
    """Scores with many ties, zeros among them."""
    values = st.lists(st.integers(0, 6), min_size=rows * columns, max_size=rows * columns)
    return values.map(lambda found: torch.tensor(found, dtype=torch.float32).view(rows, columns) / 4)


def by_sorting(scores: Tensor, kept: int) -> set[int]:
    """Places that stay, by plain Python: the largest, of equal ones the first."""
    values = scores.flatten().tolist()
    return set(sorted(range(len(values)), key=lambda place: (-values[place], place))[:kept])


def places(mask: Tensor) -> set[int]:
    return set(mask.flatten().nonzero()[:, 0].tolist())


# Scores


def test_a_weight_is_scored_by_its_size_and_by_that_of_its_input() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -4.0]], dtype=torch.bfloat16)
    inputs = torch.tensor([[3.0, 0.0, 1.0], [4.0, 2.0, -1.0]])
    assert magnitude(weight).tolist() == [[1.0, 2.0, 0.5], [0.0, 3.0, 4.0]]
    expected = [[abs(float(weight[o, i])) * math.sqrt(sum(float(x[i]) ** 2 for x in inputs) / 2) for i in range(3)] for o in range(2)]
    torch.testing.assert_close(wanda(weight, inputs.square().mean(dim=0)), torch.tensor(expected))


@pytest.mark.parametrize("gated", [True, False])
def test_a_neuron_is_scored_by_all_weights_that_lead_in_and_out(gated: bool) -> None:
    torch.manual_seed(0)
    inner = [torch.randn(5, 3) for _ in range(1 + gated)]
    outer = torch.randn(3, 5)
    squares = [sum(float(w) ** 2 for matrix in inner for w in matrix[n]) + sum(float(w) ** 2 for w in outer[:, n]) for n in range(5)]
    torch.testing.assert_close(neuron_norm(inner, outer), torch.tensor(squares).sqrt())


def test_taylor_scores_are_gradient_times_weight_and_tell_what_the_loss_does() -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(3, 5, bias=False).double(), nn.Linear(5, 2, bias=False).double()
    inputs, wanted = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)

    def loss() -> Tensor:
        return (down(torch.tanh(up(inputs))) - wanted).square().mean()

    loss().backward()
    assert up.weight.grad is not None
    assert down.weight.grad is not None
    pairs = [(layer.weight.detach(), layer.weight.grad) for layer in (up, down)]
    changes = [(weight * gradient).tolist() for weight, gradient in pairs]
    by_hand = [sum(abs(changes[0][n][i]) for i in range(3)) + sum(abs(changes[1][o][n]) for o in range(2)) for n in range(5)]
    torch.testing.assert_close(neuron_taylor([pairs[0]], pairs[1]), torch.tensor(by_hand))
    # To first order a weight made a little smaller changes the loss by so much.
    with torch.no_grad():
        before, shrunk = float(loss()), 1e-6
        expected = changes[1][0][2]
        down.weight[0, 2] *= 1 - shrunk
        assert (before - float(loss())) / shrunk == pytest.approx(expected, rel=1e-3)


# How many


@given(matrices(), FRACTIONS)
def test_a_matrix_keeps_its_largest_to_one_weight(scores: Tensor, fraction: float) -> None:
    kept = max(1, scores.numel() - round(fraction * scores.numel()))
    assert places(keep_in_matrix(scores, fraction)) == by_sorting(scores, kept)


@given(matrices(), FRACTIONS)
def test_rows_lose_as_many_each_and_the_matrix_as_many_as_it_should(scores: Tensor, fraction: float) -> None:
    mask = keep_in_rows(scores, fraction)
    counts = mask.sum(dim=1)
    assert int(mask.sum()) == max(1, scores.numel() - round(fraction * scores.numel()))
    assert int(counts.max() - counts.min()) <= 1
    for row, kept, count in zip(scores, mask, counts.tolist(), strict=True):
        assert places(kept) == by_sorting(row, count)


@given(matrices(), matrices(3, 5), FRACTIONS)
def test_matrices_together_keep_their_largest_and_each_its_best(first: Tensor, second: Tensor, fraction: float) -> None:
    masks = keep_globally({"a": first, "b": second}, fraction)
    total = first.numel() + second.numel()
    assert int(masks["a"].sum() + masks["b"].sum()) == max(2, total - round(fraction * total))
    for name, scores in (("a", first), ("b", second)):
        assert bool(masks[name].flatten()[scores.argmax()])
    out = torch.cat([first[~masks["a"]], second[~masks["b"]]])
    # What is kept scores at least as much as what is out, but for the best of each matrix.
    inside = [scores.flatten().sort(descending=True).values[: int(masks[name].sum())][1:] for name, scores in (("a", first), ("b", second))]
    if len(out) and len(joined := torch.cat(inside)):
        assert float(joined.min()) >= float(out.max())


@given(matrices(7, 16), st.sampled_from([(2, 4), (4, 8), (1, 4), (1, 16)]))
def test_of_every_m_weights_n_stay_the_largest(scores: Tensor, pattern: tuple[int, int]) -> None:
    n, m = pattern
    mask = keep_n_of_m(scores, n, m)
    for row, kept in zip(scores, mask, strict=True):
        for start in range(0, 16, m):
            assert places(kept[start : start + m]) == by_sorting(row[start : start + m], n)


# Step by step


@given(matrices(), matrices(), FRACTIONS, FRACTIONS)
def test_what_is_out_stays_out_whatever_it_scores_later(early: Tensor, late: Tensor, one: float, other: float) -> None:
    less, more = sorted((one, other))
    for keep in (keep_in_matrix, keep_in_rows):
        first = keep(early, less)
        second = keep(late, more, first)
        assert not (second & ~first).any()
        assert int(second.sum()) == max(1, late.numel() - round(more * late.numel()))
        assert torch.equal(keep(late, more, second), second)
    before = keep_globally({"a": early, "b": late}, less)
    after = keep_globally({"a": late, "b": early}, more, before)
    assert not any((after[name] & ~before[name]).any() for name in after)
    assert all(torch.equal(after[name], again) for name, again in keep_globally({"a": late, "b": early}, more, after).items())


def test_a_row_never_gets_a_weight_back_as_more_is_taken_out_of_the_matrix() -> None:
    lost = torch.stack([(~keep_in_rows(torch.ones(7, 12), total / 84)).sum(dim=1) for total in range(84)])
    assert lost.sum(dim=1).tolist() == list(range(84))
    assert (lost.diff(dim=0) >= 0).all()
    assert int((lost.amax(dim=1) - lost.amin(dim=1)).max()) == 1


def test_the_cubic_schedule_is_that_of_the_paper() -> None:
    found = [cubic(step, begin=10, end=30, fraction=0.8) for step in (0, 9, 10, 15, 20, 30, 31)]
    assert found == pytest.approx([0, 0, 0, 0.8 * (1 - 0.75**3), 0.8 * (1 - 0.5**3), 0.8, 0.8])
    assert cubic(5, begin=5, end=5, fraction=0.5) == 0.5


@given(st.integers(0, 50), st.integers(0, 50), FRACTIONS)
def test_the_schedule_never_goes_back(begin: int, length: int, fraction: float) -> None:
    values = [cubic(step, begin=begin, end=begin + length, fraction=fraction) for step in range(110)]
    assert values == sorted(values)
    assert values[-1] == fraction


def test_a_mask_goes_with_bf16_scores_and_one_weight_always_stays() -> None:
    assert int(keep_in_matrix(torch.rand(3, 3).to(torch.bfloat16), 0.99).sum()) == 1
    assert keep_in_matrix(torch.rand(2, 2), 0.0).all()
