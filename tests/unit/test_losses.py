from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from train.config import DivergenceKind
from train.losses import (
    LEAST_LOG_PROB,
    PARTS,
    Codec,
    Divergence,
    Targets,
    check_divergence,
    cross_entropy_sums,
    divergences,
    live_divergence_sum,
    loss_sums,
    sampled_forward_kl_sum,
    top_k_divergence_sum,
)

M, V = 15, 11
KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)
FORWARD = Divergence("forward_kl")
ALL = [*(Divergence(kind) for kind in KINDS), Divergence("jsd", beta=0.2), Divergence("skew_forward_kl", skew=0.4)]
by_name = pytest.mark.parametrize("divergence", ALL, ids=lambda d: f"{d.kind}-{d.beta}-{d.skew}")


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def agree(loss: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """In value and gradient, against a reference in float64: to 1e-6 in fp32, and to 1e-12 in float64."""
    wanted, wanted_gradient = value_and_gradient(reference, logits.double())
    value, gradient = value_and_gradient(loss, logits.double())
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=1e-12)
    value, gradient = value_and_gradient(loss, logits)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=0, atol=1e-6)


# Cross-entropy of labels, rationales and the teacher's answers


def test_cross_entropies_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    ids, part = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 1, 2])
    # ln 2 for the even ones, ln(1 + e) for a wrong one, ln(1 + 1/e) for a right one.
    sums = cross_entropy_sums(logits, ids, part, torch.tensor([1.0, 1.0, 0.5, 0.25]))
    assert sums.tolist() == pytest.approx([0.693147 + 1.313262, 0.346574, 0.078315], abs=1e-6)
    sums = cross_entropy_sums(logits, ids, part, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert sums.tolist() == pytest.approx([0.693147, 0, 0], abs=1e-6)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_cross_entropies_are_those_of_torch_in_float64(seed: int, part: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids, parts = torch.randint(V, (M,), generator=generator), torch.randint(3, (M,), generator=generator)
    weights = (torch.rand(M, generator=generator) * (torch.rand(M, generator=generator) < 0.8)).double()

    def reference(logits: Tensor) -> Tensor:
        chosen = parts == part
        return (F.cross_entropy(logits[chosen], ids[chosen], reduction="none") * weights[chosen]).sum()

    agree(lambda x: cross_entropy_sums(x, ids, parts, weights)[part], reference, random_logits(seed, M, V))


def test_no_target_is_zero_with_a_gradient() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    value, gradient = value_and_gradient(lambda x: cross_entropy_sums(x, empty, empty, torch.zeros(0)).sum(), torch.zeros(0, V))
    assert float(value) == 0.0
    assert gradient.shape == (0, V)


def test_tokens_that_only_fill_the_batch_count_nothing() -> None:
    ids, part = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 2])
    value, gradient = value_and_gradient(lambda x: cross_entropy_sums(x, ids, part, torch.zeros(4)).sum(), random_logits(0, 4, V))
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros(4, V))


def test_a_student_with_its_teachers_distribution_over_answers_has_nothing_to_learn() -> None:
    # A model of texts of two tokens out of three: one table of logits for the first token, one for the second after each first.
    tables = random_logits(3, 4, 3)
    texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
    probabilities = (tables[0].log_softmax(-1)[texts[:, 0]] + tables[1:].log_softmax(-1)[texts[:, 0], texts[:, 1]]).exp()
    assert float(probabilities.sum()) == pytest.approx(1)

    def loss(tables: Tensor, weights: Tensor) -> Tensor:
        logits = torch.stack([tables[0].expand(9, 3), tables[1:][texts[:, 0]]], dim=1).flatten(0, 1)
        return cross_entropy_sums(logits, texts.flatten(), torch.full((18,), 2), weights.repeat_interleave(2))[2]

    value, gradient = value_and_gradient(lambda x: loss(x, probabilities), tables)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    assert float(value) == pytest.approx(float(-torch.xlogy(probabilities, probabilities).sum()), rel=1e-5)
    _, other = value_and_gradient(lambda x: loss(x, probabilities.flip(0)), tables)
    assert other.abs().max() > 0.01


# Divergences between whole distributions


@pytest.mark.parametrize(
    ("divergence", "wanted"),
    [
        # Teacher (1/2, 1/2), student (1/4, 3/4).
        (Divergence("forward_kl"), 0.143841),  # ln(2) / 2 + ln(2/3) / 2
        (Divergence("reverse_kl"), 0.130812),  # ln(1/2) / 4 + 3 ln(3/2) / 4
        (Divergence("jsd"), 0.033822),  # m = (3/8, 5/8)
        (Divergence("jsd", beta=0.25), 0.026048),  # m = (5/16, 11/16): 0.075775 / 4 + 3 x 0.009472 / 4
        (Divergence("skew_forward_kl"), 0.113137),  # m = (0.275, 0.725)
        (Divergence("skew_reverse_kl"), 0.107043),  # m = (0.475, 0.525)
        (Divergence("skew_forward_kl", skew=0.5), 0.032269),  # m = (3/8, 5/8), the first half of the jsd twice
        (Divergence("skew_reverse_kl", skew=0.5), 0.035375),  # the other half
    ],
)
def test_divergences_by_hand(divergence: Divergence, wanted: float) -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert float(divergences(p.log(), q.log(), divergence)) == pytest.approx(wanted, abs=1e-6)
    # Logits of any offset are the same distributions; three tokens of which one is impossible, too.
    assert float(live_divergence_sum(q.log() + 7, p.log() - 3, divergence)) == pytest.approx(wanted, abs=1e-5)


def reference(divergence: Divergence, p: Tensor, q: Tensor) -> Tensor:
    """From the definitions, by torch's divergence of [S, E] probabilities."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a.log(), log_target=True, reduction="sum")

    beta, skew = divergence.beta, divergence.skew
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "skew_forward_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, skew * q + (1 - skew) * p),
    }[divergence.kind]()


@by_name
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_live_teachers_divergence_is_that_of_torch_in_float64(divergence: Divergence, temperature: float) -> None:
    teacher = random_logits(1, M, V).double()
    tempered = replace(divergence, temperature=temperature)
    p = (teacher / temperature).softmax(-1)
    agree(
        lambda x: live_divergence_sum(x, teacher, tempered),
        lambda x: temperature**2 * reference(divergence, p, (x / temperature).softmax(-1)),
        random_logits(0, M, V, scale=1.0),
    )


@by_name
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(divergence: Divergence, temperature: float) -> None:
    logits = random_logits(0, M, V)
    value, gradient = value_and_gradient(lambda x: live_divergence_sum(x, logits + 2, replace(divergence, temperature=temperature)), logits)
    assert float(value) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("nearly", "limit", "factor"),
    [
        # Agarwal et al., section 2: divided by beta, the divergence goes to forward KL; divided by 1 - beta, to reverse KL.
        (Divergence("jsd", beta=1e-6), "forward_kl", 1e6),
        (Divergence("jsd", beta=1 - 1e-6), "reverse_kl", 1e6),
        (Divergence("skew_forward_kl", skew=1e-9), "forward_kl", 1.0),
        (Divergence("skew_reverse_kl", skew=1e-9), "reverse_kl", 1.0),
    ],
)
def test_divergences_have_the_kls_as_limits(nearly: Divergence, limit: DivergenceKind, factor: float) -> None:
    teacher, student = random_logits(0, M, V, scale=1.0).double(), random_logits(1, M, V, scale=1.0).double()
    value, gradient = value_and_gradient(lambda x: factor * live_divergence_sum(x, teacher, nearly), student)
    wanted, wanted_gradient = value_and_gradient(lambda x: live_divergence_sum(x, teacher, Divergence(limit)), student)
    torch.testing.assert_close(value, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4)


def test_jsd_of_equal_shares_knows_no_teacher() -> None:
    a, b = random_logits(0, M, V), random_logits(1, M, V)
    half, other = Divergence("jsd"), Divergence("jsd", beta=0.2)
    torch.testing.assert_close(live_divergence_sum(a, b, half), live_divergence_sum(b, a, half))
    assert abs(float(live_divergence_sum(a, b, other) - live_divergence_sum(b, a, other))) > 0.05


@by_name
def test_temperature_leaves_the_gradient_as_large(divergence: Divergence) -> None:
    # Of a student near its teacher and hot distributions the gradient no longer depends on the temperature (Hinton et al., section 2).
    teacher = random_logits(0, M, V, scale=0.1).double()
    student = teacher + random_logits(1, M, V, scale=0.1)
    _, hot = value_and_gradient(lambda x: live_divergence_sum(x, teacher, replace(divergence, temperature=10.0)), student)
    _, hotter = value_and_gradient(lambda x: live_divergence_sum(x, teacher, replace(divergence, temperature=40.0)), student)
    torch.testing.assert_close(hot, hotter, rtol=0.05, atol=2e-4)
    assert hot.abs().max() > 1e-3


# Top-k soft labels: the reference puts the other ids of the whole distributions together


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [S, k] of the most probable tokens."""
    values, ids = logits.log_softmax(-1).topk(k, dim=-1)
    return ids, values


def events(probabilities: Tensor, ids: Tensor) -> Tensor:
    """[S, k + 1] (k where that is all): the probabilities at the ids, and the sum of all others."""
    kept = torch.stack([row[chosen] for row, chosen in zip(probabilities, ids, strict=True)])
    if ids.shape[1] == probabilities.shape[1]:
        return kept
    rest = [row[[n for n in range(len(row)) if n not in chosen]].sum() for row, chosen in zip(probabilities, ids.tolist(), strict=True)]
    return torch.cat([kept, torch.stack(rest)[:, None]], dim=1)


@by_name
@pytest.mark.parametrize("k", [1, 2, 5, V - 1, V])
def test_a_top_k_divergence_is_that_of_the_whole_distributions(divergence: Divergence, k: int) -> None:
    # Scale 1: what the teacher's fp32 log-probabilities lack of 1 is well above their rounding.
    teacher = random_logits(1, M, V, scale=1.0).double()
    ids, log_probs = top_k(teacher, k)
    agree(
        lambda x: top_k_divergence_sum(x, ids, log_probs, divergence),
        lambda x: reference(divergence, events(teacher.softmax(-1), ids), events(x.softmax(-1), ids)),
        random_logits(0, M, V, scale=1.0),
    )


@by_name
def test_the_top_k_of_the_whole_vocabulary_are_the_whole_divergence(divergence: Divergence) -> None:
    teacher, student = random_logits(1, M, V), random_logits(0, M, V)
    value, gradient = value_and_gradient(lambda x: top_k_divergence_sum(x, *top_k(teacher, V), divergence), student)
    wanted, wanted_gradient = value_and_gradient(lambda x: live_divergence_sum(x, teacher, divergence), student)
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, V - 1), st.sampled_from(ALL))
def test_a_bucket_hides_some_of_the_divergence_and_never_adds(seed: int, k: int, divergence: Divergence) -> None:
    teacher, student = random_logits(seed + 1, 5, V).double(), random_logits(seed, 5, V).double()
    fewer, more = (float(top_k_divergence_sum(student, *top_k(teacher, n), divergence)) for n in (k, k + 1))
    assert -1e-9 <= fewer <= more + 1e-9
    assert fewer <= float(live_divergence_sum(student, teacher, divergence)) + 1e-9


@by_name
@pytest.mark.parametrize("k", [1, 4, V])
def test_the_top_k_of_a_student_that_is_its_teacher(divergence: Divergence, k: int) -> None:
    logits = random_logits(1, M, V)
    value, gradient = value_and_gradient(lambda x: top_k_divergence_sum(x, *top_k(logits, k), divergence), logits)
    assert float(value) == pytest.approx(0, abs=2e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_the_right_ratios_with_little_mass_still_cost() -> None:
    # Both give tokens 0 and 1 the same ratio, but the student keeps most of its mass elsewhere.
    student = torch.tensor([[0.05, 0.05, 0.9]]).log()
    value, gradient = value_and_gradient(
        lambda x: top_k_divergence_sum(x, torch.tensor([[0, 1]]), torch.tensor([[0.49, 0.49]]).log(), FORWARD), student
    )
    assert float(value) > 2
    assert (gradient[0, :2] < 0).all()
    assert gradient[0, 2] > 0


@by_name
@pytest.mark.parametrize("excess", [0.0, 1e-7, -1e-7, 5e-4])
def test_a_teacher_without_a_missing_mass_gives_no_nan(divergence: Divergence, excess: float) -> None:
    # Stored log-probabilities are rounded: their sum may exceed 1 by 5e-4.
    log_probs = torch.tensor([[0.75 + excess, 0.25]]).log()
    value, gradient = value_and_gradient(
        lambda x: top_k_divergence_sum(x, torch.tensor([[2, 0]]), log_probs, divergence), random_logits(0, 1, V)
    )
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    if divergence.kind == "forward_kl":
        wanted = (torch.tensor([0.75, 0.25]) * (torch.tensor([0.75, 0.25]).log() - random_logits(0, 1, V)[0].log_softmax(-1)[[2, 0]])).sum()
        assert float(value) == pytest.approx(float(wanted), abs=8e-3)


def test_a_token_that_the_teacher_rules_out_counts_nothing() -> None:
    logits, teacher = torch.tensor([[1.0, 0.5, -0.5, 0.0]]), torch.tensor([[0.6, 0.3, 0.1, 0.0]])
    value, gradient = value_and_gradient(lambda x: top_k_divergence_sum(x, torch.tensor([[0, 1, 2, 3]]), teacher.log(), FORWARD), logits)
    torch.testing.assert_close(value, F.kl_div(logits.log_softmax(-1), teacher, reduction="sum"))
    torch.testing.assert_close(gradient, logits.softmax(-1) - teacher)


def test_reverse_kl_takes_a_probability_of_zero_for_a_small_one() -> None:
    # Student (1/2, 1/2), teacher (1, 0): ln(1/2) / 2 + (ln(1/2) - ln 2^-24) / 2 = 11 ln 2.
    student, ids = torch.zeros(1, 2), torch.tensor([[0, 1]])
    loss = top_k_divergence_sum(student, ids, torch.tensor([[1.0, 0.0]]).log(), Divergence("reverse_kl"))
    assert float(loss) == pytest.approx(7.624619, abs=1e-5)
    # As much where the student's token is among all others.
    loss = top_k_divergence_sum(student, ids[:, :1], torch.tensor([[0.0]]), Divergence("reverse_kl"))
    assert float(loss) == pytest.approx(7.624619, abs=1e-5)
    assert pytest.approx(-16.635532) == LEAST_LOG_PROB


@by_name
@pytest.mark.parametrize("k", [1, 4])
def test_no_soft_label_is_zero_with_a_gradient(divergence: Divergence, k: int) -> None:
    nothing = torch.zeros(0, k, dtype=torch.int64)
    for loss in (
        lambda x: top_k_divergence_sum(x, nothing, torch.zeros(0, k), divergence),
        lambda x: sampled_forward_kl_sum(x, nothing, torch.zeros(0, k), 1.0),
        lambda x: live_divergence_sum(x, torch.zeros(0, V), divergence),
    ):
        value, gradient = value_and_gradient(loss, torch.zeros(0, V))
        assert float(value) == 0.0
        assert gradient.shape == (0, V)


# Soft labels that were drawn


def draws_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [S, V] as ids and log-probabilities, filled up as in a batch."""
    drawn = counts > 0
    width = int(drawn.sum(dim=1).max())
    inside = torch.arange(width) < drawn.sum(dim=1, keepdim=True)
    ids, log_probs = torch.zeros(len(counts), width, dtype=torch.int64), torch.full((len(counts), width), float("-inf")).double()
    ids[inside] = drawn.nonzero()[:, 1]
    log_probs[inside] = (counts / counts.sum(dim=1, keepdim=True, dtype=torch.float64))[drawn].log()
    return ids, log_probs


def test_the_divergence_from_draws_by_hand() -> None:
    # Drawn (3/4, 1/4, 0) against (1/4, 1/4, 1/2): 3/4 ln 3. At temperature 2 logits of twice the logarithms are the same student.
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    ids, log_probs = torch.tensor([[0, 1, 0]]), torch.tensor([[0.75, 0.25, 0.0]]).log()
    assert float(sampled_forward_kl_sum(student, ids, log_probs, 1.0)) == pytest.approx(0.823959, abs=1e-6)
    assert float(sampled_forward_kl_sum(2 * student, ids, log_probs, 2.0)) == pytest.approx(4 * 0.823959, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_from_draws_is_that_of_torch_in_float64(seed: int, temperature: float) -> None:
    teacher = random_logits(seed + 100, M, V)
    draws = torch.multinomial(teacher.softmax(-1), 20, replacement=True, generator=torch.Generator().manual_seed(seed))
    counts = F.one_hot(draws, V).sum(dim=1)
    ids, log_probs = draws_of(counts)
    assert (log_probs == float("-inf")).any()
    agree(
        lambda x: sampled_forward_kl_sum(x, ids, log_probs, temperature),
        lambda x: temperature**2 * F.kl_div((x / temperature).log_softmax(-1), counts.double() / 20, reduction="sum"),
        random_logits(seed, M, V, scale=1.0),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_student_with_the_shares_of_the_draws_has_nothing_to_learn(temperature: float) -> None:
    counts = torch.tensor([[1, 2, 4, 1], [5, 1, 1, 1]])
    logits = temperature * (counts / 8).log() + 3
    value, gradient = value_and_gradient(lambda x: sampled_forward_kl_sum(x, *draws_of(counts), temperature), logits)
    assert float(value) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_give_the_gradient_of_the_whole_distribution_in_expectation(temperature: float) -> None:
    # All 64 outcomes of three draws from four tokens, each with its probability: an expectation without chance.
    student, teacher = random_logits(0, 1, 4, scale=1.0), random_logits(1, 4, scale=1.0)
    p = (teacher / temperature).softmax(-1)
    expected, own = torch.zeros(1, 4), torch.zeros(1, 4)
    for draws in itertools.product(range(4), repeat=3):
        found = draws_of(F.one_hot(torch.tensor(draws), 4).sum(dim=0)[None])
        _, gradient = value_and_gradient(lambda x, found=found: sampled_forward_kl_sum(x, *found, temperature), student)
        _, at_teacher = value_and_gradient(lambda x, found=found: sampled_forward_kl_sum(x, *found, temperature), teacher[None])
        expected += p[list(draws)].prod() * gradient
        own += p[list(draws)].prod() * at_teacher
    _, wanted = value_and_gradient(lambda x: temperature**2 * F.kl_div((x[0] / temperature).log_softmax(-1), p, reduction="sum"), student)
    torch.testing.assert_close(expected, wanted, rtol=0, atol=1e-6)
    # A student that is its teacher stays what it is, though no single set of draws leaves it alone.
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_draws_give_no_nan(scale: float) -> None:
    counts = torch.tensor([[8, 0, 0], [0, 7, 1]])
    logits = scale * torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, -1.0]])
    value, gradient = value_and_gradient(lambda x: sampled_forward_kl_sum(x, *draws_of(counts), 1.0), logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


# All parts together


def targets_with(rows: list[int], ids: Tensor, log_probs: Tensor, temperature: float | None = None) -> Targets:
    """M targets of all parts, and soft labels at some."""
    return Targets(
        ids=torch.arange(M) % V,
        part=torch.arange(M) % 3,
        weights=torch.linspace(0, 1, M),
        soft_rows=torch.tensor(rows),
        soft_ids=ids,
        soft_log_probs=log_probs,
        soft_temperature=temperature,
    )


ROWS = [7, 0, 12]


@pytest.mark.parametrize("vocabulary", [None, V - 2])
@pytest.mark.parametrize("codec", ["top_k", "sampled", "live"])
def test_the_sums_are_those_of_the_parts(codec: str, vocabulary: int | None) -> None:
    logits, teacher = random_logits(0, M, V), random_logits(1, 3, V + 4)
    known = vocabulary or V
    student = logits[ROWS][:, :known]
    ids, log_probs = top_k(teacher[:, :known], 4)
    targets, divergence, live = targets_with(ROWS, ids, log_probs), Divergence("jsd", beta=0.3), None
    if codec == "top_k":
        soft = top_k_divergence_sum(student, ids, log_probs, divergence)
    elif codec == "sampled":
        targets, divergence = replace(targets, soft_temperature=2.0), FORWARD
        soft = sampled_forward_kl_sum(student, ids, log_probs, 2.0)
    else:
        live, divergence = teacher[:, : None if vocabulary else V], replace(divergence, temperature=2.0)
        soft = live_divergence_sum(student, teacher[:, :known], divergence)
    entropies = F.cross_entropy(logits, targets.ids, reduction="none") * targets.weights
    wanted = [entropies[n::3].sum() for n in range(3)]
    found = loss_sums(logits, targets, divergence, vocabulary=vocabulary, teacher_logits=live)
    torch.testing.assert_close(found, torch.stack([wanted[0], wanted[1], wanted[2] + soft]))
    assert len(found) == len(PARTS)


@pytest.mark.parametrize("codec", ["top_k", "sampled", "live"])
def test_soft_labels_that_only_fill_the_batch_count_nothing(codec: str) -> None:
    logits, teacher, live = random_logits(0, M, V), random_logits(1, 3, V), codec == "live"
    ids, log_probs = top_k(teacher, 4)
    targets = targets_with(ROWS, ids, log_probs, temperature=2.0 if codec == "sampled" else None)
    filled = replace(targets, soft_weights=torch.tensor([1.0, 0.0, 1.0]))
    fewer = replace(targets, soft_rows=torch.tensor(ROWS)[::2], soft_ids=ids[::2], soft_log_probs=log_probs[::2])
    found, found_gradient = value_and_gradient(lambda x: loss_sums(x, filled, FORWARD, teacher_logits=teacher if live else None)[2], logits)
    wanted, wanted_gradient = value_and_gradient(
        lambda x: loss_sums(x, fewer, FORWARD, teacher_logits=teacher[::2] if live else None)[2], logits
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found_gradient, wanted_gradient)


@pytest.mark.parametrize("codec", ["top_k", "live"])
def test_ids_beyond_the_tokenizers_get_no_gradient_of_soft_labels(codec: str) -> None:
    teacher = random_logits(1, 3, V)
    targets = replace(targets_with(ROWS, *top_k(teacher[:, :8], 4)), weights=torch.zeros(M))
    live = teacher if codec == "live" else None
    value, gradient = value_and_gradient(
        lambda x: loss_sums(x, targets, FORWARD, vocabulary=8, teacher_logits=live)[2], random_logits(0, M, V)
    )
    assert float(value) > 0.1
    assert torch.equal(gradient[:, 8:], torch.zeros(M, V - 8))
    assert (gradient[ROWS, :8] != 0).any(dim=1).all()
    others = [n for n in range(M) if n not in ROWS]
    assert torch.equal(gradient[others], torch.zeros(len(others), V))


@pytest.mark.parametrize("codec", ["top_k", "sampled", "live"])
def test_losses_of_bf16_logits_are_computed_in_fp32(codec: str) -> None:
    half, teacher = random_logits(0, M, V).bfloat16(), random_logits(1, 3, V).bfloat16()
    targets = targets_with(ROWS, *top_k(teacher.float(), 4), temperature=2.0 if codec == "sampled" else None)
    divergence = FORWARD if codec == "sampled" else Divergence("jsd")
    live = teacher if codec == "live" else None
    value, gradient = value_and_gradient(lambda x: loss_sums(x, targets, divergence, teacher_logits=live).sum(), half)
    assert (value.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(value, loss_sums(half.float(), targets, divergence, teacher_logits=live).sum())


@by_name
@pytest.mark.parametrize("k", [1, 3, V - 1, V])
@pytest.mark.parametrize("teacher_scale", [1.0, 1e4])
@pytest.mark.parametrize("student_scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(student_scale: float, teacher_scale: float, k: int, divergence: Divergence) -> None:
    signs = torch.where(random_logits(5, M, V) > 0, 1.0, -1.0)
    ids, log_probs = top_k(teacher_scale * signs, k)
    targets = targets_with(list(range(M)), ids, log_probs)
    for live in (None, teacher_scale * signs):
        value, gradient = value_and_gradient(
            lambda x, live=live: loss_sums(x, targets, divergence, teacher_logits=live).sum(), -student_scale * signs
        )
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


# What is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", get_args(Codec))
def test_what_can_be_computed_is_let_through(kind: DivergenceKind, codec: Codec) -> None:
    if codec in ("top_k", "live") or kind == "forward_kl":
        check_divergence(kind, None, codec)
        check_divergence(kind, 1.0, codec)
    else:
        with pytest.raises(ValueError, match=f"student.loss.divergence is {kind}, but with teacher.soft_labels.format: {codec} it must be"):
            check_divergence(kind, None, codec)
    if codec == "live":
        check_divergence(kind, 2.0, codec)


@pytest.mark.parametrize(
    ("kind", "temperature", "codec", "message"),
    [
        (
            "reverse_kl",
            None,
            "sampled",
            "student.loss.divergence is reverse_kl, but with teacher.soft_labels.format: sampled it must be forward_kl: only forward KL "
            "has an unbiased gradient from draws, and reverse_kl has none with any number of them. Set it to forward_kl, or set "
            "teacher.soft_labels.format to top_k, or student.loss.teacher to live",
        ),
        (
            "jsd",
            None,
            "answers",
            "student.loss.divergence is jsd, but with teacher.soft_labels.format: answers it must be forward_kl: whole answers with a "
            "probability each are learned by their cross-entropy, which is forward KL up to a constant. Set it to forward_kl, or set "
            "teacher.soft_labels.format to top_k, or student.loss.teacher to live",
        ),
        (
            "jsd",
            2.0,
            "top_k",
            "student.loss.temperature is 2, but the soft labels of teacher.soft_labels.format: top_k are at temperature 1, and another one "
            "would need the probabilities that are not stored. Leave it out, or set student.loss.teacher to live",
        ),
        (
            "forward_kl",
            0.5,
            "sampled",
            "student.loss.temperature is 0.5, but the soft labels of teacher.soft_labels.format: sampled are at the temperature they were "
            "drawn with, teacher.soft_labels.temperature. Leave it out, or set student.loss.teacher to live",
        ),
        (
            "forward_kl",
            2.0,
            "choices",
            "student.loss.temperature is 2, but the soft labels of teacher.soft_labels.format: choices are probabilities of whole answers, "
            "which have no temperature. Leave it out, or set student.loss.teacher to live",
        ),
    ],
)
def test_what_is_not_defined_is_refused(kind: DivergenceKind, temperature: float | None, codec: Codec, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_divergence(kind, temperature, codec)


def test_the_sums_refuse_what_is_not_defined() -> None:
    logits, labels = random_logits(0, M, V), top_k(random_logits(1, 3, V), 4)
    with pytest.raises(ValueError, match=r"divergence is jsd, but with teacher\.soft_labels\.format: sampled"):
        loss_sums(logits, targets_with(ROWS, *labels, temperature=1.0), Divergence("jsd"))
    with pytest.raises(ValueError, match=r"temperature is 2, but the soft labels of teacher\.soft_labels\.format: top_k"):
        loss_sums(logits, targets_with(ROWS, *labels), Divergence("jsd", temperature=2.0))
    # A batch without soft labels says nothing of them.
    none = Targets(torch.arange(M) % V, torch.zeros(M, dtype=torch.int64), torch.ones(M), *(torch.zeros(0, dtype=torch.int64),) * 3, 1.0)
    assert loss_sums(logits, none, Divergence("jsd"))[1:].tolist() == [0, 0]
