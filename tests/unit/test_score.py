"""What is stored of a teacher's distributions, against hand-computed values, torch's own functions and one forward for each sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from data.config import SoftLabelsConfig
from data.prompts import TextFormat
from data.soft_labels import Sampled, TopK
from train.engine import InferenceModel
from train.teacher.distributions import draw, largest, target_log_probs, top_log_probs
from train.teacher.draws import uniform
from train.teacher.score import Scorer, Solution, auto_batch_tokens
from train.world import World

KNOWN, ROWS = 90, 96
"""Tokens of the tokenizer, and rows of the models, which are more."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": ROWS, "pad_token_id": 0}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
FORM = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)


def build(name: str) -> Any:
    torch.manual_seed(3)
    makers: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=ROWS)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**DECODER, logit_scale=0.25)),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=3.0, sliding_window=16)
        ),
        "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=ROWS)),
        "windowed": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, sliding_window=12)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=ROWS, decoder_start_token_id=0)
        ),
    }
    model = makers[name]().eval()
    with torch.no_grad():  # distributions far from uniform, so that a wrong position or a missing scale shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * (0.3 if name != "t5" else 0.5))
    return model


def scorer(name: str, *, batch_tokens: int = 4096, sharding: Any = "replica", vocabulary: int = KNOWN, **soft: Any) -> Scorer:
    teacher = InferenceModel(build(name), sharding, 0, 1, True, World(0, 1, torch.device("cpu")))
    form = replace(FORM, family="encoder_decoder") if name == "t5" else FORM
    return Scorer(teacher, form, SoftLabelsConfig(**soft), vocabulary=vocabulary, batch_tokens=batch_tokens)


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(2, KNOWN, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SOLUTIONS = [Solution(ids(n, 3 + 5 * n % 11), ids(50 + n, 4 + n % 3), [9, 10], [*ids(90 + n, 1 + n % 2), 1]) for n in range(5)] + [
    Solution(ids(8, 4), [], [9, 10], [44, 1])
]
KEYS = [101, -7, 3, 2**62, 5, 6]


def alone(model: Any, context: list[int], target: list[int], vocabulary: int = KNOWN) -> Tensor:
    """Logits [T, V] at the target's tokens, from a forward over this one sequence."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=torch.tensor([context]), decoder_input_ids=torch.tensor([[0, *target[:-1]]])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
    return logits[:, :vocabulary].float()


def entropies(model: Any, solution: Solution) -> tuple[Tensor, Tensor]:
    """The teacher's cross-entropy at each token of rationale and label."""
    target = solution.rationale_ids + solution.mark_ids + solution.label_ids
    losses = F.cross_entropy(alone(model, solution.prompt_ids, target), torch.tensor(target), reduction="none")
    return losses[: len(solution.rationale_ids)], losses[-len(solution.label_ids) :]


# ----- arithmetic on logits -----


def test_top_log_probs_by_hand() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log() + 3
    found, log_probs, at_target = top_log_probs(logits, torch.tensor([2]), 2)
    assert found.tolist() == [[1, 3]]
    assert log_probs[0].exp().tolist() == pytest.approx([0.5, 0.25])
    assert at_target.exp().tolist() == pytest.approx([0.125])


@pytest.mark.parametrize(("width", "k"), [(5, 5), (300, 7), (4096, 32), (5000, 32), (6400, 64), (130, 1)])
def test_largest_is_topk(width: int, k: int) -> None:
    values = torch.randn(9, width)
    values[0, :] = 1.0  # ties: the values are still those of topk
    values[1, -1], values[2, 0] = 9.0, 9.0
    best, at = largest(values, k)
    expected = values.topk(k)
    assert torch.equal(best, expected.values)
    assert torch.equal(at[1:], expected.indices[1:])
    assert torch.equal(values.gather(1, at), best)
    assert all(len(set(row)) == k for row in at.tolist())


def test_target_log_probs_are_the_negative_cross_entropy() -> None:
    logits, targets = torch.randn(20, 300) * 5, torch.randint(0, 300, (20,))
    expected = -F.cross_entropy(logits, targets, reduction="none")
    assert target_log_probs(logits, targets) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("width", "temperature"), [(3, 1.0), (256, 0.5), (1000, 1.0), (1000, 2.0)])
def test_draws_invert_the_cumulated_distribution(width: int, temperature: float) -> None:
    logits = torch.randn(40, width) * 3
    keys, positions = torch.arange(40) * 7919, torch.arange(40) % 5
    found = draw(logits, keys, positions, 64, temperature)
    ends = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    numbers = uniform(keys[:, None], positions[:, None], torch.arange(64)).double()
    expected = torch.searchsorted(ends, numbers, right=True)
    # The reference's weights are fp64: a number may lie within fp32's error of a border.
    near = (ends[:, None, :] - numbers[:, :, None]).abs().amin(dim=-1) < 1e-6
    assert ((found == expected) | near).all()
    assert near.float().mean() < 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5]).repeat(2000, 1)
    found = draw(logits, torch.full((2000,), 11), torch.arange(2000), 10, temperature)
    seen = np.bincount(found.flatten().numpy(), minlength=5)
    assert chisquare(seen, (logits[0].double() / temperature).softmax(dim=-1).numpy() * seen.sum()).pvalue > 0.001


def test_a_token_without_weight_is_never_drawn() -> None:
    logits = torch.full((50, 700), float("-inf"))
    logits[:, [3, 256, 511, 698]] = torch.tensor([0.0, -20.0, 1.0, 0.5])
    found = draw(logits, torch.arange(50), torch.zeros(50, dtype=torch.int64), 200, 1.0)
    assert set(found.flatten().tolist()) == {3, 511, 698}
    certain = torch.full((4, 700), float("-inf"))
    certain[:, 699] = 0.0
    assert draw(certain, torch.arange(4), torch.arange(4), 50, 1.0).eq(699).all()


# ----- a teacher -----


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "gemma2", "bloom", "windowed", "t5"])
def test_stored_log_probs_are_the_teachers_cross_entropy(name: str) -> None:
    whole = scorer(name, on="both", k=8)
    assert whole._forward.joins == (name in ("llama", "gpt2", "cohere", "windowed"))
    found = whole.tokens(SOLUTIONS, KEYS)
    model = whole.teacher.model
    for solution, (rationale, label) in zip(SOLUTIONS, found, strict=True):
        assert rationale is not None
        assert label is not None
        for soft, losses in zip((rationale, label), entropies(model, solution), strict=True):
            assert isinstance(soft, TopK)
            assert -soft.target_log_probs == pytest.approx(losses.numpy(), abs=2e-5)


def test_a_window_shorter_than_a_sequence_is_not_joined() -> None:
    windowed = scorer("windowed", on="both", k=8)
    windowed.tokens(SOLUTIONS, KEYS)
    assert not windowed._forward.joins
    windowed.tokens([Solution([5, 6, 7], [8], [9], [10, 1])], [1])
    assert windowed._forward.joins


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_top_k_in_any_company(name: str) -> None:
    found = scorer(name, on="both", k=ROWS).tokens(SOLUTIONS, KEYS)
    model = build(name)
    for solution, (rationale, _) in zip(SOLUTIONS, found, strict=True):
        target = solution.rationale_ids + solution.mark_ids + solution.label_ids
        expected = alone(model, solution.prompt_ids, target).log_softmax(dim=-1)[: len(solution.rationale_ids)]
        assert isinstance(rationale, TopK)
        assert rationale.ids.shape == (len(solution.rationale_ids), KNOWN)  # rows beyond the tokenizer's are not tokens
        assert np.take_along_axis(expected.numpy(), rationale.ids.astype(np.int64), 1) == pytest.approx(rationale.log_probs, abs=2e-5)
        assert np.exp(rationale.log_probs).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    for tokens in (1, 40):
        again = scorer(name, on="both", k=ROWS, batch_tokens=tokens).tokens(SOLUTIONS, KEYS)
        for pair, other in zip(found, again, strict=True):
            for one, two in zip(pair, other, strict=True):
                assert isinstance(one, TopK)
                assert isinstance(two, TopK)
                assert one.log_probs == pytest.approx(two.log_probs, abs=2e-5)


def test_only_the_part_that_is_stored_is_scored() -> None:
    both = scorer("llama", on="both", k=4).tokens(SOLUTIONS, KEYS)
    labels = scorer("llama", on="label", k=4).tokens(SOLUTIONS, KEYS)
    rationales = scorer("llama", on="rationale", k=4).tokens(SOLUTIONS, KEYS)
    for (rationale, label), (none, one), (other, nothing) in zip(both, labels, rationales, strict=True):
        assert none is None
        assert nothing is None
        assert isinstance(rationale, TopK)
        assert isinstance(label, TopK)
        assert isinstance(one, TopK)
        assert isinstance(other, TopK)
        assert one.target_log_probs == pytest.approx(label.target_log_probs, abs=1e-5)
        assert other.target_log_probs == pytest.approx(rationale.target_log_probs, abs=1e-5)
    assert len(both[-1][0] or []) == 0
    assert rationales[-1][0] is not None
    assert rationales[-1][0].ids.shape == (0, 4)


def counting(one: Scorer) -> list[tuple[int, ...]]:
    """Shapes of what every forward of the model reads, from now on."""
    shapes: list[tuple[int, ...]] = []

    def note(module: Any, arguments: Any, named: dict[str, Tensor]) -> None:
        shapes.append(tuple(named.get("input_ids", named.get("decoder_input_ids")).shape))

    one.teacher.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


def test_what_all_prompts_begin_with_is_computed_once() -> None:
    opening = ids(7, 40)
    solutions = [replace(s, prompt_ids=opening + s.prompt_ids) for s in SOLUTIONS]
    one = scorer("llama", on="both", k=4)
    shapes = counting(one)
    found = one.tokens(solutions, KEYS)
    own = sum(len(s.prompt_ids) - 40 + len(s.rationale_ids) + len(s.mark_ids) + len(s.label_ids) - 1 for s in solutions)
    assert shapes == [(1, 40), (1, own)]
    one.tokens(solutions, KEYS)
    assert shapes == [(1, 40), (1, own), (1, own)]
    for solution, (rationale, label) in zip(solutions, found, strict=True):
        for soft, losses in zip((rationale, label), entropies(one.teacher.model, solution), strict=True):
            assert soft is not None
            assert -soft.target_log_probs == pytest.approx(losses.numpy(), abs=2e-5)


def test_prompts_that_are_alike_or_begin_like_another() -> None:
    prompt = ids(7, 30)
    solutions = [replace(SOLUTIONS[0], prompt_ids=prompt), replace(SOLUTIONS[1], prompt_ids=prompt)]
    solutions.append(replace(SOLUTIONS[2], prompt_ids=[*prompt, 5, 6]))
    one = scorer("llama", on="both", k=4)
    shapes = counting(one)
    found = one.tokens(solutions, KEYS[:3])
    assert shapes[0] == (1, 29)  # each keeps a token of its own, whose logits predict the first target
    for solution, (rationale, _) in zip(solutions, found, strict=True):
        assert rationale is not None
        assert -rationale.target_log_probs == pytest.approx(entropies(one.teacher.model, solution)[0].numpy(), abs=2e-5)


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_choices_are_scored_after_their_context(name: str) -> None:
    opening = ids(4, 20)
    contexts = [opening + ids(n, 3 + n) for n in range(4)]
    choices = [[ids(10 * n + m, 1 + m) for m in range(2 + n % 2)] for n in range(4)]
    one = scorer(name, format="choices")
    shapes = counting(one)
    found = one.choices(contexts, choices)
    if name == "llama":  # prefix; contexts but their last tokens; that token and the choice, for each choice
        own = sum(len(c) for group in choices for c in group)
        assert shapes == [(1, 20), (1, sum(len(c) - 21 for c in contexts)), (1, own)]
    for context, group, sums in zip(contexts, choices, found, strict=True):
        expected = [-F.cross_entropy(alone(one.teacher.model, context, c), torch.tensor(c), reduction="sum") for c in group]
        assert sums == pytest.approx([float(value) for value in expected], abs=5e-5)
    small = scorer(name, format="choices", batch_tokens=8).choices(contexts, choices)
    assert [value for sums in small for value in sums] == pytest.approx([value for sums in found for value in sums], abs=5e-5)
    assert one.choices([[5]], [[[6], [7, 8]]])[0] == pytest.approx(
        [-float(F.cross_entropy(alone(one.teacher.model, [5], c), torch.tensor(c), reduction="sum")) for c in ([6], [7, 8])], abs=5e-5
    )


def test_draws_depend_on_the_key_alone() -> None:
    settings = {"format": "sampled", "draws": 30, "temperature": 1.5}
    one = scorer("llama", on="both", **settings)
    together = one.tokens(SOLUTIONS, KEYS)
    for n, solution in enumerate(SOLUTIONS):
        (rationale, label), (single, _) = together[n], one.tokens([solution], [KEYS[n]])[0]
        _, only = scorer("llama", on="label", **settings).tokens([solution], [KEYS[n]])[0]
        for soft, again in ((rationale, single), (label, only)):
            assert isinstance(soft, Sampled)
            assert isinstance(again, Sampled)
            assert (soft.ids.tolist(), soft.counts.tolist()) == (again.ids.tolist(), again.counts.tolist())
        target = solution.rationale_ids + solution.mark_ids + solution.label_ids
        logits = alone(one.teacher.model, solution.prompt_ids, target)
        drawn = draw(logits, torch.full((len(target),), KEYS[n]), torch.arange(len(target)), 30, 1.5)
        assert isinstance(rationale, Sampled)
        expected = [sorted(set(row)) for row in drawn[: len(solution.rationale_ids)].tolist()]
        assert rationale.ids.tolist() == [token for row in expected for token in row]
        assert -rationale.target_log_probs == pytest.approx(entropies(one.teacher.model, solution)[0].numpy(), abs=2e-5)
    other = one.tokens(SOLUTIONS[:1], [KEYS[0] + 1])[0][0]
    assert isinstance(other, Sampled)
    assert isinstance(together[0][0], Sampled)
    assert other.counts.tolist() != together[0][0].counts.tolist()


def test_slices_of_rows_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scorer("llama", on="both", k=8).tokens(SOLUTIONS, KEYS)
    monkeypatch.setattr("train.teacher.score._SLICE", 3 * KNOWN)
    monkeypatch.setattr("train.teacher.score._HEAD_BYTES", 12 * 4 * ROWS)
    sliced = scorer("llama", on="both", k=8)
    assert (sliced._slice, sliced._rows) == (3, 12)
    for pair, other in zip(whole, sliced.tokens(SOLUTIONS, KEYS), strict=True):
        for one, two in zip(pair, other, strict=True):
            assert one is not None
            assert two is not None
            assert one.target_log_probs == pytest.approx(two.target_log_probs, abs=2e-5)


def test_nothing_to_score() -> None:
    one = scorer("llama", on="rationale")
    assert one.tokens([], []) == []
    assert one.choices([], []) == []
    assert one.choices([[5, 6]], [[]]) == [[]]


def test_a_teacher_in_step_scores_padded_and_through_the_whole_model() -> None:
    for name in ("llama", "gpt2", "t5"):  # gpt2 has absolute positions, which padding on the left must not shift
        plain, stepping = scorer(name, on="both", k=4), scorer(name, on="both", k=4, sharding="zero3")
        assert not stepping._forward.joins
        for pair, other in zip(plain.tokens(SOLUTIONS, KEYS), stepping.tokens(SOLUTIONS, KEYS), strict=True):
            for one, two in zip(pair, other, strict=True):
                assert one is not None
                assert two is not None
                assert one.target_log_probs == pytest.approx(two.target_log_probs, abs=2e-5)
        choices = [[[6], [7, 8]], [[9]]]
        expected = plain.choices([[5], [3, 4]], choices)
        assert [v for sums in stepping.choices([[5], [3, 4]], choices) for v in sums] == pytest.approx(
            [v for sums in expected for v in sums], abs=2e-5
        )


# ----- out of memory -----


def limited(one: Scorer, most: int) -> list[int]:
    """Lets forwards over more than `most` tokens run out of memory; gives the sizes of those that ran."""
    sizes: list[int] = []

    def check(module: Any, arguments: Any, named: dict[str, Tensor]) -> None:
        size = named["input_ids"].numel()
        if size > most:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(size)

    one.teacher.model.register_forward_pre_hook(check, with_kwargs=True)
    return sizes


def test_out_of_memory_halves_the_budget_and_keeps_what_is_done() -> None:
    one = scorer("llama", on="both", k=4)
    expected = one.tokens(SOLUTIONS, KEYS)
    sizes = limited(one, 40)
    found = one.tokens(SOLUTIONS, KEYS)
    assert len(sizes) > 2
    assert sum(sizes) == sum(len(s.prompt_ids + s.rationale_ids + s.mark_ids + s.label_ids) - 1 for s in SOLUTIONS)
    for pair, other in zip(expected, found, strict=True):
        for a, b in zip(pair, other, strict=True):
            assert a is not None
            assert b is not None
            assert a.target_log_probs == pytest.approx(b.target_log_probs, abs=2e-5)


def test_a_sequence_that_memory_does_not_hold_stops_with_a_way_out() -> None:
    one = scorer("llama", on="both", k=4)
    limited(one, 5)
    with pytest.raises(RuntimeError, match=r"one sequence of 20 tokens to score: lower teacher\.rationales\.max_input_tokens .* zero3"):
        one.tokens([Solution(ids(1, 10), ids(2, 7), [9], [10, 1])], [0])


def test_out_of_memory_is_not_retried_where_others_wait() -> None:
    one = scorer("llama", on="both", k=4, sharding="zero3")
    limited(one, 40)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        one.tokens(SOLUTIONS, KEYS)


def test_numbers_that_are_not_finite_are_refused() -> None:
    one = scorer("llama", on="label", k=4)
    with torch.no_grad():
        one.teacher.model.model.norm.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite at 14 of 14 tokens: its weights are damaged"):
        one.tokens(SOLUTIONS, KEYS)


def test_tokens_of_a_forward_on_a_cpu() -> None:
    assert auto_batch_tokens(scorer("llama").teacher) == 4096
