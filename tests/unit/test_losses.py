from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from data.batches import collate
from data.prompts import TextFormat
from data.rows import TrainSequence
from train.losses import cross_entropy_sum, exact_matches, sampled_forward_kl_sum, top_k_forward_kl_sum, weighted_cross_entropy_sum

N, L, V = 3, 5, 11


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


# Cross-entropy


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]).log_softmax(-1)
    targets = torch.tensor([[1, 0]])
    # ln 2 for the even one, ln(1 + e) for the other.
    assert float(cross_entropy_sum(logits, targets, torch.tensor([[True, False]]))) == pytest.approx(0.693147, abs=1e-6)
    assert float(cross_entropy_sum(logits, targets, torch.tensor([[True, True]]))) == pytest.approx(0.693147 + 1.313262, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_is_that_of_torch_in_float64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = random_logits(seed, N, L, V)
    targets = torch.randint(V, (N, L), generator=generator)
    mask = torch.rand(N, L, generator=generator) < 0.6
    ignored = targets.masked_fill(~mask, -100)
    value, gradient = value_and_gradient(lambda x: cross_entropy_sum(x, targets, mask), logits)
    wanted, wanted_gradient = value_and_gradient(
        lambda x: F.cross_entropy(x.flatten(0, 1), ignored.flatten(), ignore_index=-100, reduction="sum"), logits.double()
    )
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_no_target_is_zero_with_a_gradient() -> None:
    value, gradient = value_and_gradient(
        lambda x: cross_entropy_sum(x, torch.zeros(N, L, dtype=torch.int64), torch.zeros(N, L, dtype=torch.bool)), random_logits(0, N, L, V)
    )
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros(N, L, V))


# Answers of the teacher: cross-entropy with weights


def test_the_cross_entropy_of_answers_by_hand() -> None:
    # Two answers: one of a token that has 1/2, one of two tokens that have 1/2 and 1/4. 0.75 ln 2 + 0.25 (ln 2 + ln 4).
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]]).log()
    targets = torch.tensor([[0, 0], [1, 2]])
    weights = torch.tensor([[0.75, 0.0], [0.25, 0.25]])
    assert float(weighted_cross_entropy_sum(logits, targets, weights)) == pytest.approx(0.519860 + 0.519860, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_cross_entropy_of_answers_is_that_of_torch_in_float64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = random_logits(seed, N, L, V)
    targets = torch.randint(V, (N, L), generator=generator)
    weights = torch.rand(N, L, generator=generator) * (torch.rand(N, L, generator=generator) < 0.6)
    value, gradient = value_and_gradient(lambda x: weighted_cross_entropy_sum(x, targets, weights), logits)
    wanted, wanted_gradient = value_and_gradient(
        lambda x: (F.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="none") * weights.double().flatten()).sum(),
        logits.double(),
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-5, atol=1e-6)


def test_an_answer_that_is_certain_costs_what_a_label_does() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = random_logits(0, N, L, V), torch.randint(V, (N, L), generator=generator)
    mask = torch.rand(N, L, generator=generator) < 0.5
    torch.testing.assert_close(weighted_cross_entropy_sum(logits, targets, mask.float()), cross_entropy_sum(logits, targets, mask))


def test_no_answer_is_zero_with_a_gradient() -> None:
    value, gradient = value_and_gradient(
        lambda x: weighted_cross_entropy_sum(x, torch.zeros(N, L, dtype=torch.int64), torch.zeros(N, L)), random_logits(0, N, L, V)
    )
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros(N, L, V))


def test_a_student_with_its_teachers_distribution_over_answers_has_nothing_to_learn() -> None:
    # A model of texts of two tokens out of three: one table of logits for the first token, one for the second after each first.
    tables = random_logits(3, 4, 3)
    texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
    probabilities = (tables[0].log_softmax(-1)[texts[:, 0]] + tables[1:].log_softmax(-1)[texts[:, 0], texts[:, 1]]).exp()
    assert float(probabilities.sum()) == pytest.approx(1)

    def loss(tables: Tensor, weights: Tensor) -> Tensor:
        return weighted_cross_entropy_sum(
            torch.stack([tables[0].expand(9, 3), tables[1:][texts[:, 0]]], dim=1), texts, weights[:, None].expand(9, 2)
        )

    value, gradient = value_and_gradient(lambda x: loss(x, probabilities), tables)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    assert float(value) == pytest.approx(float(-torch.xlogy(probabilities, probabilities).sum()), rel=1e-5)
    _, other = value_and_gradient(lambda x: loss(x, probabilities.flip(0)), tables)
    assert other.abs().max() > 0.01


# Soft labels: the reference works on whole distributions in float64


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [M, k] of the most probable tokens."""
    values, ids = logits.log_softmax(-1).topk(k, dim=-1)
    return ids, values


def dense_kl(student: Tensor, teacher: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """KL over k tokens and a bucket of the rest, from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    q_all = student.flatten(0, 1).softmax(-1)
    for p, q, chosen in zip(teacher.double().softmax(-1), q_all[positions], ids, strict=True):
        inside = torch.zeros(len(p), dtype=torch.bool)
        inside[chosen] = True
        parts = [(p[i], q[i]) for i in chosen]
        if not inside.all():
            parts.append((p[~inside].sum(), q[~inside].sum()))
        total = total + sum(a * (a / b).log() for a, b in parts)
    return total


def soft_case(seed: int, k: int, num_positions: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, teacher = random_logits(seed, N, L, V), random_logits(seed + 100, num_positions, V)
    positions = torch.randperm(N * L, generator=torch.Generator().manual_seed(seed))[:num_positions]
    return student, teacher, positions, *top_k(teacher, k)


@pytest.mark.parametrize("k", [1, 2, 5, V - 1, V])
@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_is_that_of_the_whole_distributions(seed: int, k: int) -> None:
    student, teacher, positions, ids, log_probs = soft_case(seed, k)
    value, gradient = value_and_gradient(lambda x: top_k_forward_kl_sum(x, positions, ids, log_probs), student)
    wanted, wanted_gradient = value_and_gradient(lambda x: dense_kl(x, teacher, positions, ids), student.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=0, atol=1e-6)


def test_a_divergence_by_hand() -> None:
    # Teacher (1/2, 1/4, 1/4), k = 1: (1/2, 1/2) against the student's (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
    student = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    half = torch.tensor([[0.5]]).log()
    value = top_k_forward_kl_sum(student, torch.tensor([0]), torch.tensor([[0]]), half)
    assert float(value) == pytest.approx(0.143841, abs=1e-6)


def test_the_divergence_over_the_whole_vocabulary_is_that_of_torch() -> None:
    student, teacher, positions, ids, log_probs = soft_case(0, V)
    wanted = F.kl_div(
        student.flatten(0, 1)[positions].double().log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(top_k_forward_kl_sum(student, positions, ids, log_probs).double(), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, V - 1))
def test_a_bucket_hides_some_of_the_divergence_and_never_adds(seed: int, k: int) -> None:
    student, _, positions, ids, log_probs = soft_case(seed, k)
    *_, all_ids, all_log_probs = soft_case(seed, V)
    bucketed = float(top_k_forward_kl_sum(student, positions, ids, log_probs))
    assert -1e-5 <= bucketed <= float(top_k_forward_kl_sum(student, positions, all_ids, all_log_probs)) + 1e-5


@pytest.mark.parametrize("k", [1, 4, V])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(k: int) -> None:
    logits = random_logits(1, 1, L, V)
    ids, log_probs = top_k(logits[0], k)
    value, gradient = value_and_gradient(lambda x: top_k_forward_kl_sum(x, torch.arange(L), ids, log_probs), logits)
    assert float(value) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_the_right_ratios_with_little_mass_still_cost() -> None:
    # Both give tokens 0 and 1 the same ratio, but the student keeps most of its mass elsewhere.
    student = torch.tensor([[[0.05, 0.05, 0.9]]]).log()
    log_probs = torch.tensor([[0.49, 0.49]]).log()
    value, gradient = value_and_gradient(lambda x: top_k_forward_kl_sum(x, torch.tensor([0]), torch.tensor([[0, 1]]), log_probs), student)
    assert float(value) > 2
    assert (gradient[0, 0, :2] < 0).all()
    assert gradient[0, 0, 2] > 0


@pytest.mark.parametrize("excess", [0.0, 1e-7, -1e-7])
def test_a_teacher_without_a_missing_mass_gives_no_nan(excess: float) -> None:
    log_probs = torch.tensor([[0.75 + excess, 0.25]]).log()
    value, gradient = value_and_gradient(
        lambda x: top_k_forward_kl_sum(x, torch.tensor([1]), torch.tensor([[2, 0]]), log_probs), random_logits(0, 1, 2, V)
    )
    wanted, _ = value_and_gradient(
        lambda x: (torch.tensor([0.75, 0.25]) * (torch.tensor([0.75, 0.25]).log() - x[0, 1].log_softmax(-1)[[2, 0]])).sum(),
        random_logits(0, 1, 2, V),
    )
    assert float(value) == pytest.approx(float(wanted), abs=1e-5)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("k", [1, 4])
def test_no_soft_label_is_zero_with_a_gradient(k: int) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    value, gradient = value_and_gradient(
        lambda x: top_k_forward_kl_sum(x, nothing, torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k)), random_logits(0, N, L, V)
    )
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros(N, L, V))


# Soft labels that were drawn


def draws_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [M, V] as ids and log-probabilities, filled up as in a batch."""
    drawn = counts > 0
    width = int(drawn.sum(dim=1).max())
    inside = torch.arange(width) < drawn.sum(dim=1, keepdim=True)
    ids, log_probs = torch.zeros(len(counts), width, dtype=torch.int64), torch.full((len(counts), width), float("-inf"))
    ids[inside] = drawn.nonzero()[:, 1]
    log_probs[inside] = (counts / counts.sum(dim=1, keepdim=True))[drawn].log()
    return ids, log_probs


def test_the_divergence_from_draws_by_hand() -> None:
    # Drawn (3/4, 1/4, 0) against (1/4, 1/4, 1/2): 3/4 ln 3. At temperature 2 logits of twice the logarithms are the same student.
    student = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    ids, log_probs = torch.tensor([[0, 1, 0]]), torch.tensor([[0.75, 0.25, 0.0]]).log()
    assert float(sampled_forward_kl_sum(student, torch.tensor([0]), ids, log_probs, 1.0)) == pytest.approx(0.823959, abs=1e-6)
    assert float(sampled_forward_kl_sum(2 * student, torch.tensor([0]), ids, log_probs, 2.0)) == pytest.approx(4 * 0.823959, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_from_draws_is_that_of_torch_in_float64(seed: int, temperature: float) -> None:
    student, teacher, positions, *_ = soft_case(seed, V)
    draws = torch.multinomial(teacher.softmax(-1), 20, replacement=True, generator=torch.Generator().manual_seed(seed))
    counts = F.one_hot(draws, V).sum(dim=1)
    ids, log_probs = draws_of(counts)
    assert (log_probs == float("-inf")).any()
    value, gradient = value_and_gradient(lambda x: sampled_forward_kl_sum(x, positions, ids, log_probs, temperature), student)
    wanted, wanted_gradient = value_and_gradient(
        lambda x: (
            temperature**2 * F.kl_div((x.flatten(0, 1)[positions] / temperature).log_softmax(-1), counts.double() / 20, reduction="sum")
        ),
        student.double(),
    )
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=0, atol=3e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_student_with_the_shares_of_the_draws_has_nothing_to_learn(temperature: float) -> None:
    counts = torch.tensor([[1, 2, 4, 1], [5, 1, 1, 1]])
    logits = temperature * (counts / 8).log()[None] + 3
    value, gradient = value_and_gradient(lambda x: sampled_forward_kl_sum(x, torch.arange(2), *draws_of(counts), temperature), logits)
    assert float(value) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_give_the_gradient_of_the_whole_distribution_in_expectation(temperature: float) -> None:
    # All 64 outcomes of three draws from four tokens, each with its probability: an expectation without chance.
    student, teacher = random_logits(0, 1, 1, 4, scale=1.0), random_logits(1, 4, scale=1.0)
    p = (teacher / temperature).softmax(-1)
    expected, own = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    for draws in itertools.product(range(4), repeat=3):
        found = draws_of(F.one_hot(torch.tensor(draws), 4).sum(dim=0)[None])
        _, gradient = value_and_gradient(lambda x, found=found: sampled_forward_kl_sum(x, torch.tensor([0]), *found, temperature), student)
        _, at_teacher = value_and_gradient(
            lambda x, found=found: sampled_forward_kl_sum(x, torch.tensor([0]), *found, temperature), teacher[None, None]
        )
        expected += p[list(draws)].prod() * gradient
        own += p[list(draws)].prod() * at_teacher
    _, wanted = value_and_gradient(
        lambda x: temperature**2 * F.kl_div((x[0, 0] / temperature).log_softmax(-1), p, reduction="sum"), student
    )
    torch.testing.assert_close(expected, wanted, rtol=0, atol=1e-6)
    # A student that is its teacher stays what it is, though no single set of draws leaves it alone.
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_draws_give_no_nan(scale: float) -> None:
    counts = torch.tensor([[8, 0, 0], [0, 7, 1]])
    logits = scale * torch.tensor([[[-1.0, 1.0, 0.0], [1.0, -1.0, -1.0]]])
    value, gradient = value_and_gradient(lambda x: sampled_forward_kl_sum(x, torch.arange(2), *draws_of(counts), 1.0), logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_no_draw_is_zero_with_a_gradient() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    value, gradient = value_and_gradient(
        lambda x: sampled_forward_kl_sum(x, nothing, torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), 1.0),
        random_logits(0, N, L, V),
    )
    assert float(value) == 0.0
    assert torch.equal(gradient, torch.zeros(N, L, V))


def test_losses_of_bf16_logits_are_computed_in_fp32() -> None:
    student, _, positions, ids, log_probs = soft_case(3, 4)
    half = student.bfloat16()
    targets, mask = torch.ones(N, L, dtype=torch.int64), torch.ones(N, L, dtype=torch.bool)
    for loss in (
        lambda x: top_k_forward_kl_sum(x, positions, ids, log_probs),
        lambda x: sampled_forward_kl_sum(x, positions, ids, log_probs, 2.0),
        lambda x: cross_entropy_sum(x, targets, mask),
        lambda x: weighted_cross_entropy_sum(x, targets, 0.5 * mask),
    ):
        value, gradient = value_and_gradient(loss, half)
        assert (value.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(value, loss(half.float()))


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
@pytest.mark.parametrize("teacher_scale", [1.0, 1e4])
@pytest.mark.parametrize("student_scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(student_scale: float, teacher_scale: float, k: int) -> None:
    signs = torch.where(random_logits(5, L, V) > 0, 1.0, -1.0)
    ids, log_probs = top_k(teacher_scale * signs, k)
    student = -student_scale * signs[None]
    targets, mask = torch.arange(L)[None], torch.ones(1, L, dtype=torch.bool)
    for loss in (lambda x: top_k_forward_kl_sum(x, torch.arange(L), ids, log_probs), lambda x: cross_entropy_sum(x, targets, mask)):
        value, gradient = value_and_gradient(loss, student)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


# Exact matches without decoding


def test_exact_matches_by_hand() -> None:
    logits = F.one_hot(torch.tensor([[4, 5, 1], [4, 5, 1], [4, 5, 1]]), V).float()
    targets = torch.tensor([[4, 5, 1], [4, 6, 1], [9, 9, 9]])
    mask = torch.tensor([[True, True, True], [True, True, True], [False, False, False]])
    assert exact_matches(logits, targets, mask).tolist() == [True, False, False]
    mask = torch.tensor([[False, False, True], [True, False, True], [True, False, False]])
    assert exact_matches(logits, targets, mask).tolist() == [True, True, False]


EOS, PAD, START, VOCABULARY = 1, 0, 0, 8
FORMS = {
    "t5": TextFormat("encoder_decoder", EOS, PAD, max_input_tokens=32, max_label_tokens=8, max_rationale_tokens=8),
    "llama": TextFormat("decoder_only", EOS, EOS, max_input_tokens=32, max_label_tokens=8, max_rationale_tokens=8),
}
LONGEST = 8


def tiny(name: str) -> PreTrainedModel:
    """Large random weights over a small vocabulary: greedy answers differ from input to input, and many of them end."""
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": FORMS[name].pad_id, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "t5":
            config = T5Config(
                **sizes, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=START, tie_word_embeddings=False
            )
            model: PreTrainedModel = T5ForConditionalGeneration(config)
        else:
            layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(**sizes, **layers, bos_token_id=None, max_position_embeddings=32))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25 if name == "t5" else 0.7)
        return model.eval()


@torch.no_grad()
def greedy(model: PreTrainedModel, form: TextFormat, prompt: list[int]) -> list[int]:
    """What the model writes, with its end-of-sequence token where it comes to one."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LONGEST,
        do_sample=False,
        num_beams=1,
        pad_token_id=form.pad_id,
        eos_token_id=EOS,
    )[0].tolist()
    written: list[int] = output[1 if form.family == "encoder_decoder" else len(prompt) :]
    return written[: written.index(EOS) + 1] if EOS in written else written


def targets_of(written: list[int], generator: torch.Generator) -> list[list[int]]:
    """The greedy answer where it ends, one that differs from it in a token, one that ends too early, and a random one."""
    random = torch.randint(2, VOCABULARY, (3,), generator=generator).tolist()
    changed = [*written[:-1], EOS]
    changed[0] = 2 + (changed[0] - 1) % (VOCABULARY - 2)
    return [written] * (written[-1] == EOS) + [changed, [*written[: len(written) // 2], EOS], [*random, EOS]]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_exact_matches_are_those_of_greedy_decoding(name: str) -> None:
    form, model, generator = FORMS[name], tiny(name), torch.Generator().manual_seed(0)
    sequences, expected = [], []
    for _ in range(60):
        length = int(torch.randint(1, 8, (), generator=generator))
        prompt = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        written = greedy(model, form, prompt)
        for target in targets_of(written, generator):
            sequences.append(TrainSequence(prompt, target, True))
            expected.append(target == written)
    batch = collate(sequences, form, START)
    with torch.no_grad():
        logits = model(**batch.model_inputs(), use_cache=False).logits
    assert exact_matches(logits, batch.targets, batch.label_mask).tolist() == expected
    assert len(expected) >= 100
    assert 10 <= sum(expected) <= len(expected) - 50
    assert len({tuple(s.target_ids) for s, match in zip(sequences, expected, strict=True) if match}) >= 4


def test_a_token_that_the_teacher_rules_out_counts_nothing() -> None:
    logits = torch.tensor([[[1.0, 0.5, -0.5, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[0.6, 0.3, 0.1, 0.0]])
    loss = top_k_forward_kl_sum(logits, torch.tensor([0]), torch.tensor([[0, 1, 2, 3]]), teacher.log())
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1)[0], teacher, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient[0], logits.softmax(-1)[0] - teacher)
