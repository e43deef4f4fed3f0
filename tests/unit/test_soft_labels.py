from __future__ import annotations

import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from data.packing import LEAST_LOG_PROB, LOG_PROB_STEP, TARGET_STEP, pack, unpack
from data.records import TeacherRecord
from data.soft_labels import AnswerDistribution, Sampled, SoftLabels, TopK, sampled_of
from data.store import read_records, shard_path, write_shard
from train.losses import Divergence, sampled_forward_kl_sum, top_k_divergence_sum

FP32 = 2.0**-23


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def distributions(random: np.random.Generator, num_tokens: int, vocabulary: int, scale: float = 3.0) -> NDArray[np.float32]:
    return log_softmax(scale * random.standard_normal((num_tokens, vocabulary))).astype(np.float32)


def top_k_of(log_probs: NDArray[np.float32], k: int, ids: NDArray[np.int32] | None = None) -> TopK:
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
    names = order.astype(np.int32) if ids is None else ids[order]
    return TopK(names, np.take_along_axis(log_probs, order, axis=1), log_probs[:, 0].copy())


def drawn_of(random: np.random.Generator, log_probs: NDArray[np.float32], draws: int, temperature: float = 1.0) -> Sampled:
    p = np.exp(log_softmax(log_probs.astype(np.float64) / temperature))
    ids = np.stack([random.choice(len(row), draws, p=row) for row in p]).astype(np.int32)
    return sampled_of(ids, log_probs[:, 0].copy(), temperature)


def pairs(labels: TopK) -> list[dict[int, float]]:
    return [dict(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in zip(labels.ids, labels.log_probs, strict=True)]


def assert_near(found: NDArray[np.float32], given: NDArray[np.float32], step: float) -> None:
    assert found.dtype == np.float32
    assert found.shape == given.shape
    assert (np.isneginf(found) == np.isneginf(given)).all()
    finite = np.isfinite(given)
    wanted = given[finite].astype(np.float64).clip(LEAST_LOG_PROB, 0)
    error = np.abs(found[finite] - wanted)
    assert (error <= step / 2 + FP32 * np.abs(wanted)).all(), error.max()


def assert_unpacks(labels: SoftLabels) -> SoftLabels:
    """Everything comes back as promised, also from what came back."""
    found = unpack(pack(labels))
    assert_near(found.target_log_probs, labels.target_log_probs, TARGET_STEP)
    if isinstance(labels, TopK):
        assert isinstance(found, TopK)
        assert (found.ids.dtype, found.ids.shape) == (np.dtype(np.int32), labels.ids.shape)
        sort = [np.argsort(side.ids, axis=1) for side in (found, labels)]
        ids = [np.take_along_axis(side.ids, order, axis=1) for side, order in zip((found, labels), sort, strict=True)]
        values = [np.take_along_axis(side.log_probs, order, axis=1) for side, order in zip((found, labels), sort, strict=True)]
        assert (ids[0] == ids[1]).all()
        assert_near(values[0], values[1], LOG_PROB_STEP)
        assert (found.log_probs[:, 1:] <= found.log_probs[:, :-1]).all()
    else:
        assert isinstance(found, Sampled)
        for name in ("ids", "counts", "distinct"):
            assert getattr(found, name).dtype == np.int32
            assert (getattr(found, name) == getattr(labels, name)).all()
        assert (found.draws, found.temperature) == (labels.draws, labels.temperature)
    return found


# Bytes by hand


def packed(kind: bytes, text: str) -> bytes:
    text = text.replace(" ", "")
    body = bytes(int(text[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(text), 8))
    return kind + zlib.crc32(kind + body).to_bytes(4, "little") + body


def test_drawn_tokens_by_hand() -> None:
    given = sampled_of(np.array([[3, 0, 3]], np.int32), np.array([-1.0], np.float32), 1.0)
    text = (
        "01 01 01 01  0 1 1 1"  # 1 token and 1, 3 draws, 2 known ids and 1, 2 ids in all and 1: 2 3 3 3
        f"{0:032b} {0x3FF00000:032b}"  # 1.0 in double precision, low word first
        "01111 00000 00000 00000"  # parameters of four arrays
        "001"  # 1 nat is 65536 steps; 1 is added, as 0 is kept for minus infinity: twice 2^15 and 1
        "001"  # 2 distinct ids
        "1 001"  # 0 from -1 leaves 0; 3 from 0 leaves 2
        "1 1"  # places 0 and 1, no gap
        "000000000000001"  # the 1 after twice 2^15
        "1"  # 0 came once; that 3 came twice follows
    )
    assert pack(given) == packed(b"S1", text)


def test_probable_tokens_by_hand() -> None:
    given = TopK(np.array([[2, 0]], np.int32), np.array([[-0.5, -2.0]], np.float32) / 1024, np.array([-1.0], np.float32))
    text = (
        "01 01 01  0 1 1"  # 1 token and 1, 2 ids a token and 1, 2 known ids and 1: 2 3 3
        "01111 00000 00000 00000 00001"  # parameters of five arrays
        "001"  # of the target, as above
        "1 01"  # 0 from -1 leaves 0; 2 from 0 leaves 1
        "1 1"  # places 0 and 1, no gap
        "001"  # the least log-probability is 2 steps below 0
        "1 01"  # of id 0 1, as it is the least itself; of id 2 3: half a step below 0 rounds to 0, which is 2 above the least
        "000000000000001 1 1"  # what the parameters split off: of the target, of 1 and of 3
    )
    assert pack(given) == packed(b"K1", text)


# Round trips


@st.composite
def probable(draw: st.DrawFn) -> TopK:
    num_tokens, k = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([k, k + 1, 10 * k, 2**20]))
    ids = np.array([random.choice(vocabulary, k, replace=False) for _ in range(num_tokens)], np.int32).reshape(num_tokens, k)
    log_probs = -random.exponential(draw(st.sampled_from([1e-4, 1.0, 20.0, 3e4])), (num_tokens, k)).astype(np.float32)
    log_probs[random.random((num_tokens, k)) < draw(st.sampled_from([0.0, 0.2, 1.0]))] = -np.inf
    return TopK(ids, log_probs, -random.exponential(2.0, num_tokens).astype(np.float32))


@st.composite
def drawn(draw: st.DrawFn) -> Sampled:
    num_tokens, draws = draw(st.integers(0, 40)), draw(st.sampled_from([1, 2, 7, 50, 300, 4096]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([1, 3, 1000, 2**20]))
    ids = (vocabulary * random.random((num_tokens, draws)) ** draw(st.sampled_from([1, 5]))).astype(np.int32)
    return sampled_of(ids, -random.exponential(2.0, num_tokens).astype(np.float32), draw(st.floats(0.01, 10.0)))


@settings(max_examples=40, deadline=None)
@given(probable())
def test_probable_tokens_come_back(labels: TopK) -> None:
    assert_unpacks(labels)


@settings(max_examples=40, deadline=None)
@given(drawn())
def test_drawn_tokens_come_back(labels: Sampled) -> None:
    assert_unpacks(labels)


@settings(max_examples=20, deadline=None)
@given(st.one_of(probable(), drawn()), st.integers(0, 45))
def test_cutting_and_packing_may_change_places(labels: SoftLabels, length: int) -> None:
    first, then = unpack(pack(labels.cut(length))), unpack(pack(labels)).cut(length)
    assert type(first) is type(then)
    assert len(first) == min(length, len(labels))
    names = ("ids", "log_probs") if isinstance(labels, TopK) else ("ids", "counts", "distinct")
    for name in (*names, "target_log_probs"):
        assert getattr(first, name).shape == getattr(then, name).shape
        assert (getattr(first, name) == getattr(then, name)).all()


def test_no_token_keeps_its_format() -> None:
    random = np.random.default_rng(0)
    log_probs = distributions(random, 3, 50)
    top, sampled = assert_unpacks(top_k_of(log_probs, 5).cut(0)), assert_unpacks(drawn_of(random, log_probs, 9, 0.7).cut(0))
    assert isinstance(top, TopK)
    assert top.ids.shape == top.log_probs.shape == (0, 5)
    assert isinstance(sampled, Sampled)
    assert (len(sampled), sampled.draws, sampled.temperature) == (0, 9, 0.7)


def test_the_whole_vocabulary_costs_nothing_for_its_ids() -> None:
    found = assert_unpacks(given := top_k_of(distributions(np.random.default_rng(0), 20, 3000), 3000))
    assert isinstance(found, TopK)
    assert np.exp(found.log_probs.astype(np.float64)).sum(axis=1) == pytest.approx([1.0] * 20, abs=LOG_PROB_STEP / 2)
    # A bit for the place of each, and for its log-probability what its spread of 3 nats asks for.
    assert len(pack(given)) * 8 / given.ids.size < 1.2 + np.log2(3.0 / LOG_PROB_STEP * np.sqrt(2 * np.pi * np.e)) + 1.5


def test_ids_may_be_as_large_as_their_type() -> None:
    ids = np.array([[2**31 - 1, 0, 2**20]], np.int32)
    found = assert_unpacks(TopK(ids, np.array([[-1.0, -2.0, -3.0]], np.float32), np.zeros(1, np.float32)))
    assert isinstance(found, TopK)
    assert found.ids.tolist() == ids.tolist()


def test_ids_of_a_token_come_most_probable_first_and_equal_ones_by_id() -> None:
    step = LOG_PROB_STEP
    log_probs = np.array([[-5 * step, -2 * step, -2.1 * step, -np.inf, -1.9 * step]], np.float32)
    found = unpack(pack(TopK(np.array([[1, 9, 3, 0, 7]], np.int32), log_probs, np.zeros(1, np.float32))))
    assert isinstance(found, TopK)
    assert found.ids.tolist() == [[3, 7, 9, 1, 0]]
    assert found.log_probs.tolist() == [[-2 * step, -2 * step, -2 * step, -5 * step, -np.inf]]


def test_probabilities_of_0_come_back_and_the_least_ones_stay_above_0() -> None:
    log_probs = np.array([[-0.5, LEAST_LOG_PROB, -1e9, -np.inf], [-np.inf] * 4], np.float32)
    found = unpack(pack(TopK(np.array([[4, 5, 6, 7]] * 2, np.int32), log_probs, np.array([-np.inf, -1e9], np.float32))))
    assert isinstance(found, TopK)
    assert found.log_probs.tolist() == [[-0.5, LEAST_LOG_PROB, LEAST_LOG_PROB, -np.inf], [-np.inf] * 4]
    assert found.target_log_probs.tolist() == [-np.inf, LEAST_LOG_PROB]


def test_a_log_probability_that_rounding_put_above_0_is_0() -> None:
    found = unpack(pack(TopK(np.array([[4]], np.int32), np.array([[1e-6]], np.float32), np.array([1e-6], np.float32))))
    assert isinstance(found, TopK)
    assert (found.log_probs.tolist(), found.target_log_probs.tolist()) == ([[0.0]], [0.0])


def test_the_mean_over_the_targets_is_the_cross_entropy_to_five_digits() -> None:
    labels = top_k_of(distributions(np.random.default_rng(3), 500, 100), 4)
    found = unpack(pack(labels)).target_log_probs.mean(dtype=np.float64)
    assert found == pytest.approx(labels.target_log_probs.mean(dtype=np.float64), abs=1e-5)


# Damage


PACKED = [
    pack(top_k_of(distributions(np.random.default_rng(0), 3, 20), 4)),
    pack(drawn_of(np.random.default_rng(0), distributions(np.random.default_rng(0), 3, 20), 6)),
]


@pytest.mark.parametrize("data", PACKED, ids=["top_k", "sampled"])
def test_a_flipped_bit_anywhere_is_noticed(data: bytes) -> None:
    for at in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(RuntimeError, match="packed soft labels"):
            unpack(bytes(damaged))


@pytest.mark.parametrize("data", PACKED, ids=["top_k", "sampled"])
def test_truncated_bytes_are_noticed_at_any_length(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(RuntimeError, match=r"packed soft labels"):
            unpack(data[:length])
    message = f"packed soft labels ({len(data) - 1} bytes) do not match their checksum: they are truncated or damaged"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        unpack(data[:-1])


@pytest.mark.parametrize("data", [b"", b"K", b"K2" + PACKED[0][2:], b"PAR1"])
def test_other_bytes_are_told_apart(data: bytes) -> None:
    message = f"packed soft labels start with {data[:2]!r}, not b'K1' or b'S1': another version wrote them, or damage"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        unpack(data)


def broken(**changes: Any) -> Sampled:
    values = {"ids": [1, 4], "counts": [2, 1], "distinct": [2]}
    arrays = {name: np.array(changes.get(name, value), np.int32) for name, value in values.items()}
    return Sampled(**arrays, target_log_probs=np.zeros(1, np.float32), draws=3, temperature=1.0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (broken(counts=[2, 2]), "counts do not add up to the draws"),
        (broken(ids=[4, 1]), "the ids of a token are not distinct and ascending"),
        (TopK(np.array([[5, 5]], np.int32), np.zeros((1, 2), np.float32), np.zeros(1, np.float32)), "are not distinct and ascending"),
        (TopK(np.array([[5]], np.int32), np.full((1, 1), np.nan, np.float32), np.zeros(1, np.float32)), "is not a number"),
        (TopK(np.array([[5]], np.int32), np.zeros((1, 1), np.float32), np.ones(1, np.float32)), "is above 0"),
    ],
)
def test_labels_that_contradict_themselves_are_our_own_bug(labels: SoftLabels, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        pack(labels)


def test_arrays_that_do_not_fit_together_are_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        broken(counts=[3])
    with pytest.raises(AssertionError):
        broken(distinct=[1, 1])


# Draws as counts


def test_drawn_tokens_are_counted_by_hand() -> None:
    found = sampled_of(np.array([[7, 2, 7, 7], [2, 2, 2, 2], [9, 8, 2, 1]], np.int32), np.zeros(3, np.float32), 0.5)
    assert (found.ids.tolist(), found.counts.tolist(), found.distinct.tolist()) == ([2, 7, 2, 1, 2, 8, 9], [1, 3, 4, 1, 1, 1, 1], [2, 1, 4])
    assert (found.draws, found.temperature, len(found)) == (4, 0.5, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 60), st.integers(1, 30))
def test_drawn_tokens_are_counted_as_a_counter_does(seed: int, num_tokens: int, draws: int, vocabulary: int) -> None:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (num_tokens, draws), dtype=np.int32)
    found = sampled_of(ids, np.zeros(num_tokens, np.float32), 1.0)
    counted = [sorted(Counter(row.tolist()).items()) for row in ids]
    assert list(zip(found.ids.tolist(), found.counts.tolist(), strict=True)) == [pair for row in counted for pair in row]
    assert found.distinct.tolist() == [len(row) for row in counted]
    assert [array.dtype for array in (found.ids, found.counts, found.distinct)] == [np.dtype(np.int32)] * 3


# In the store


def test_every_kind_of_soft_label_comes_back_from_a_shard(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    log_probs = distributions(random, 6, 40)
    top, sampled = top_k_of(log_probs, 5), drawn_of(random, log_probs, 8)
    answers = AnswerDistribution(("größer", "no"), (0.75, 0.25))
    basic: dict[str, Any] = {"split": "train", "text": "", "rationale": "", "label": None, "parseable": False, "agrees": False}
    records = [
        TeacherRecord(id="a", **basic, label_soft=top.cut(2), rationale_soft=top),
        TeacherRecord(id="b", **basic, rationale_soft=sampled),
        TeacherRecord(id="c", **basic, answers=answers),
        TeacherRecord(id="d", **basic, label_soft=sampled.cut(0)),
    ]
    write_shard(shard_path(tmp_path, "train", 0), records)
    first, second, third, fourth = read_records(tmp_path, "train")
    assert [pack(soft) for soft in (first.label_soft, first.rationale_soft) if soft] == [pack(top.cut(2)), pack(top)]
    assert (second.rationale_soft is not None, second.label_soft, second.answers) == (True, None, None)
    assert pack(second.rationale_soft or top) == pack(sampled)
    assert (third.answers, third.label_soft, third.rationale_soft) == (answers, None, None)
    assert fourth.label_soft is not None
    assert len(fourth.label_soft) == 0


# Size


def zipf(num_tokens: int, vocabulary: int) -> NDArray[np.float32]:
    """Each token has its own Zipf distribution: frequent ids are likely everywhere, and each context raises some."""
    random = np.random.default_rng(7)
    logits = -np.log(np.arange(1, vocabulary + 1)) + 1.7 * random.gumbel(size=(num_tokens, vocabulary))
    return log_softmax(logits).astype(np.float32)


def test_bytes_a_token_on_zipf_distributions() -> None:
    log_probs = zipf(24, 49_152)
    names = np.random.default_rng(8).permutation(49_152).astype(np.int32)  # a tokenizer orders its ids in another way
    top = top_k_of(log_probs, 32, names)
    random = np.random.default_rng(9)
    ids = np.stack([random.choice(names, 50, p=p / p.sum()) for p in np.exp(log_probs.astype(np.float64))])
    sampled = sampled_of(ids.astype(np.int32), log_probs[:, 0].copy(), 1.0)
    assert 9 < sampled.distinct.mean() < 20
    assert len(pack(top)) / 24 < 132
    assert len(pack(sampled)) / 24 < 36


# What the student learns from them

V = 12
STUDENT = 1.5 * torch.randn(1, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEACHER = 2.0 * torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient_of(loss: Tensor, logits: Tensor) -> NDArray[np.float64]:
    return torch.autograd.grad(loss, logits)[0].flatten().double().numpy()


def full_gradient(temperature: float) -> NDArray[np.float64]:
    logits = STUDENT.clone().requires_grad_()
    teacher, student = (TEACHER / temperature).log_softmax(-1), (logits[0] / temperature).log_softmax(-1)
    return gradient_of(temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum"), logits)


def sampled_gradient(labels: Sampled, num_sets: int) -> NDArray[np.float64]:
    logits = STUDENT.float().clone().requires_grad_()
    filled = np.arange(labels.distinct.max()) < labels.distinct[:, None]
    ids, log_probs = np.zeros(filled.shape, np.int64), np.full(filled.shape, -np.inf, np.float32)
    ids[filled], log_probs[filled] = labels.ids, np.log(labels.counts / labels.draws)
    at_each = logits.expand(len(labels), -1)
    loss = sampled_forward_kl_sum(at_each, torch.from_numpy(ids), torch.from_numpy(log_probs), labels.temperature)
    return gradient_of(loss / num_sets, logits)


def chi_square(found: NDArray[np.float64], wanted: NDArray[np.float64], p: NDArray[np.float64], num_draws: int, scale: float) -> float:
    """A sum of V - 1 squared standard normals where the mean gradient is `wanted`: its noise is that of shares of `num_draws`."""
    return float((num_draws * ((found - wanted) / scale) ** 2 / p).sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("draws", [1, 7, 50])
def test_the_gradient_of_drawn_tokens_is_unbiased(draws: int, temperature: float) -> None:
    """False alarm: one in a million for each case, had the seed not been fixed."""
    num_sets = 8000
    p = (TEACHER / temperature).softmax(-1)
    ids = torch.multinomial(p, num_sets * draws, replacement=True, generator=torch.Generator().manual_seed(draws)).view(num_sets, draws)
    labels = unpack(pack(sampled_of(ids.int().numpy(), np.zeros(num_sets, np.float32), temperature)))
    assert isinstance(labels, Sampled)
    found, wanted, bound = sampled_gradient(labels, num_sets), full_gradient(temperature), stats.chi2.ppf(1 - 1e-6, V - 1)
    noise = (p.numpy(), num_sets * draws, temperature)
    assert chi_square(found, wanted, *noise) < bound
    # What the test can see: two hundredths of the mass at the wrong token.
    moved = np.zeros(V)
    moved[[int(p.argmax()), int(p.argmin())]] = [-0.02 * temperature, 0.02 * temperature]
    assert chi_square(found, wanted + moved, *noise) > bound


def top_k_tensors(k: int) -> tuple[Tensor, Tensor]:
    found = unpack(pack(top_k_of(TEACHER.log_softmax(-1)[None].float().numpy(), k)))
    assert isinstance(found, TopK)
    return torch.from_numpy(found.ids).long(), torch.from_numpy(found.log_probs)


def test_probable_tokens_are_exact_where_k_is_the_vocabulary() -> None:
    teacher, student, logits = TEACHER.log_softmax(-1), STUDENT[0].log_softmax(-1), STUDENT.clone().requires_grad_()
    ids, _ = top_k_tensors(V)
    exact = top_k_divergence_sum(logits, ids, teacher[ids[0]][None], Divergence("forward_kl"))
    assert float(exact.detach()) == pytest.approx(float((teacher.exp() * (teacher - student)).sum()), abs=1e-6)
    assert gradient_of(exact, logits) == pytest.approx(full_gradient(1.0), abs=1e-6)


def test_what_packing_rounds_is_lost_in_the_gradient() -> None:
    logits = STUDENT.clone().requires_grad_()
    found = gradient_of(top_k_divergence_sum(logits, *top_k_tensors(V), Divergence("forward_kl")), logits)
    # A probability is off by half a step of its own size, and the student's share of their sum as much.
    assert np.abs(found - full_gradient(1.0)).max() < LOG_PROB_STEP * float(TEACHER.softmax(-1).max())
    fewer = gradient_of(top_k_divergence_sum(logits, *top_k_tensors(V // 2), Divergence("forward_kl")), logits)
    assert np.abs(fewer - full_gradient(1.0)).max() > LOG_PROB_STEP
