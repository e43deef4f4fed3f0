from __future__ import annotations

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
from train.losses import cross_entropy_sum, exact_matches, top_k_forward_kl_sum
from train.teacher.score import top_k

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


# Soft labels: the reference works on whole distributions in float64


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
    found = top_k(teacher, torch.zeros(num_positions, dtype=torch.int64), k)
    return student, teacher, positions, torch.from_numpy(found.ids).long(), torch.from_numpy(found.log_probs)


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
    found = top_k(logits[0], torch.zeros(L, dtype=torch.int64), k)
    ids, log_probs = torch.from_numpy(found.ids).long(), torch.from_numpy(found.log_probs)
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


def test_losses_of_bf16_logits_are_computed_in_fp32() -> None:
    student, _, positions, ids, log_probs = soft_case(3, 4)
    half = student.bfloat16()
    targets, mask = torch.ones(N, L, dtype=torch.int64), torch.ones(N, L, dtype=torch.bool)
    for loss in (lambda x: top_k_forward_kl_sum(x, positions, ids, log_probs), lambda x: cross_entropy_sum(x, targets, mask)):
        value, gradient = value_and_gradient(loss, half)
        assert (value.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(value, loss(half.float()))


@pytest.mark.parametrize("k", [1, 3, V - 1, V])
@pytest.mark.parametrize("teacher_scale", [1.0, 1e4])
@pytest.mark.parametrize("student_scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(student_scale: float, teacher_scale: float, k: int) -> None:
    signs = torch.where(random_logits(5, L, V) > 0, 1.0, -1.0)
    found = top_k(teacher_scale * signs, torch.zeros(L, dtype=torch.int64), k)
    ids, log_probs = torch.from_numpy(found.ids).long(), torch.from_numpy(found.log_probs)
    student = -student_scale * signs[None]
    targets, mask = torch.arange(L)[None], torch.ones(1, L, dtype=torch.bool)
    for loss in (lambda x: top_k_forward_kl_sum(x, torch.arange(L), ids, log_probs), lambda x: cross_entropy_sum(x, targets, mask)):
        value, gradient = value_and_gradient(loss, student)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


# What the teacher's side stores


def test_top_k_by_hand() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.25, 0.125, 0.125, 0.5]]).log() + 7
    found = top_k(logits, torch.tensor([0, 3]), 2)
    assert found.ids.tolist() == [[1, 2], [3, 0]]
    assert found.log_probs == pytest.approx(torch.tensor([[0.5, 0.25], [0.5, 0.25]]).log().numpy())
    assert found.target_log_probs == pytest.approx(torch.tensor([0.125, 0.5]).log().numpy())
    assert (str(found.ids.dtype), str(found.log_probs.dtype), str(found.target_log_probs.dtype)) == ("int32", "float32", "float32")


def test_top_k_of_bf16_logits_is_normalized_in_fp32() -> None:
    logits = random_logits(2, 4, 3000, scale=1.0).bfloat16()
    found = top_k(logits, torch.zeros(4, dtype=torch.int64), 3000)
    assert torch.from_numpy(found.log_probs).double().exp().sum(1) == pytest.approx([1.0] * 4, abs=1e-5)


def test_top_k_takes_a_small_vocabulary_whole() -> None:
    assert top_k(random_logits(0, 2, 5), torch.tensor([1, 2]), 32).ids.shape == (2, 5)


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
