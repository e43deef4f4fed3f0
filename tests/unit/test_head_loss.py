from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from train import head_loss
from train.config import DivergenceKind
from train.head_loss import Head, LiveRows, chunk_rows, head_losses, head_matches
from train.losses import Divergence, Targets, loss_sums

M, H, V, KNOWN, S = 13, 6, 29, 26, 7
SCALE = torch.tensor([0.3, 0.7, 1.1])
KINDS: tuple[DivergenceKind, ...] = get_args(DivergenceKind)


@dataclass
class Case:
    """A batch with soft labels at some rows, in no order, and a head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Targets
    teacher: LiveRows

    def plain(self, head: Head, divergence: Divergence, vocabulary: int | None = KNOWN, *, live: bool = False) -> Tensor:
        """The oracle on all logits at once."""
        logits = self.hidden @ head.weight.T * head.scale
        logits = logits if head.bias is None else logits + head.bias
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        teacher = self.teacher.hidden @ self.teacher.head.weight.T if live else None
        return loss_sums(logits, self.targets, divergence, vocabulary=vocabulary, teacher_logits=teacher)


def case(
    codec: str, *, k: int = 4, num_soft: int = S, temperature: float = 1.0, dtype: torch.dtype = torch.float64, spread: float = 1.0
) -> Case:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias, teacher = random(M, H), spread * random(V, H), random(V), LiveRows(random(num_soft, 5), Head(random(V + 3, 5)))
    logits = (teacher.hidden @ teacher.head.weight.T)[:, :KNOWN].double()
    ids, log_probs = torch.zeros(num_soft, 0, dtype=torch.int64), torch.zeros(num_soft, 0)
    if codec == "top_k":
        log_probs, ids = logits.log_softmax(-1).topk(k)
    elif codec == "sampled" and num_soft:
        draws = torch.multinomial((logits / temperature).softmax(-1), k, replacement=True, generator=generator)
        counts = [row.unique(return_counts=True) for row in draws]
        ids = torch.stack([F.pad(found, (0, k - len(found))) for found, _ in counts])
        log_probs = torch.stack([F.pad((n / k).double().log(), (0, k - len(n)), value=float("-inf")) for _, n in counts])
    tokens = torch.randint(KNOWN, (M,), generator=generator)
    rows = torch.randperm(M, generator=generator)[:num_soft]
    if codec == "top_k" and num_soft:
        # One target is among the ids of its soft label, one is not.
        tokens[rows[0]] = ids[0, -1]
        log_probs[-1, -1] = float("-inf")
    weights = torch.rand(M, generator=generator) * (torch.rand(M, generator=generator) < 0.8)
    part = torch.randint(3, (M,), generator=generator)
    targets = Targets(tokens, part, weights, rows, ids, log_probs.to(dtype), temperature if codec == "sampled" else None)
    return Case(hidden, weight, bias, targets, teacher)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference, as a share of the largest value of each tensor where that is above 1."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(found, wanted, strict=True))


def compare(
    case: Case, divergence: Divergence, *, chunk: int | None, live: bool = False, vocabulary: int | None = KNOWN, **head: Any
) -> float:
    """Largest difference to the oracle in total, sums and gradients to hidden, weight and bias."""
    with_bias = head.pop("with_bias", True)
    inputs = leaves(case.hidden, case.weight, *([case.bias] if with_bias else []))
    own = Head(inputs[1], inputs[2] if with_bias else None, **head)
    sums = replace(case, hidden=inputs[0]).plain(own, divergence, vocabulary, live=live)
    total = (SCALE * sums).sum()
    wanted = [sums.detach(), total.detach(), *torch.autograd.grad(total, inputs)]
    total, sums = head_losses(
        inputs[0],
        own,
        case.targets,
        SCALE,
        divergence,
        vocabulary=vocabulary,
        chunk_tokens=chunk,
        live=case.teacher if live else None,
    )
    assert not sums.requires_grad
    found = [sums, total.detach(), *torch.autograd.grad(total, inputs)]
    assert [tensor.dtype for tensor in found[2:]] == [tensor.dtype for tensor in inputs]
    return gap(found, wanted)


# The plain form is the oracle

TOP_K = [("top_k", kind, k) for kind in KINDS for k in (1, 4, KNOWN)]
OTHERS = [("sampled", "forward_kl", 1), ("sampled", "forward_kl", 9), *(("live", kind, 0) for kind in KINDS)]


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
@pytest.mark.parametrize(("codec", "kind", "k"), TOP_K + OTHERS)
def test_chunks_give_what_the_plain_form_gives(codec: str, kind: DivergenceKind, k: int, chunk: int | None) -> None:
    divergence = Divergence(kind, beta=0.3, skew=0.2)
    for num_soft in (0, S, M):
        assert compare(case(codec, k=k, num_soft=num_soft), divergence, chunk=chunk, live=codec == "live") < 1e-10


@pytest.mark.parametrize("head", [{"softcap": 3.0}, {"scale": 0.5}, {"softcap": 2.0, "scale": 3.0}, {"with_bias": False}], ids=str)
@pytest.mark.parametrize(
    ("codec", "kind", "k"), [("top_k", "forward_kl", 4), ("top_k", "jsd", 4), ("live", "jsd", 0), ("none", "forward_kl", 0)]
)
def test_heads_of_every_kind(codec: str, kind: DivergenceKind, k: int, head: dict[str, Any]) -> None:
    num_soft = 0 if codec == "none" else S
    assert compare(case(codec, k=k, num_soft=num_soft), Divergence(kind), chunk=2, live=codec == "live", **head) < 1e-10


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_temperatures_of_a_live_teacher(kind: DivergenceKind, temperature: float) -> None:
    assert compare(case("live"), Divergence(kind, temperature=temperature), chunk=2, live=True) < 1e-10


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperatures_of_draws(temperature: float) -> None:
    assert compare(case("sampled", k=9, temperature=temperature), Divergence(), chunk=2) < 1e-10


@pytest.mark.parametrize(("codec", "kind"), [("top_k", "forward_kl"), ("top_k", "reverse_kl"), ("sampled", "forward_kl")])
def test_a_tokenizer_that_knows_every_id(codec: str, kind: DivergenceKind) -> None:
    assert compare(case(codec), Divergence(kind), chunk=2, vocabulary=None) < 1e-10


@pytest.mark.parametrize(("codec", "kind"), [("top_k", "reverse_kl"), ("top_k", "forward_kl"), ("sampled", "forward_kl"), ("live", "jsd")])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_labels_that_only_fill_the_batch_count_nothing(codec: str, kind: DivergenceKind, temperature: float) -> None:
    found, live = case(codec, k=9, temperature=temperature), codec == "live"
    fills = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    log_probs = found.targets.soft_log_probs.masked_fill((fills == 0)[:, None], float("-inf"))
    targets = replace(found.targets, soft_weights=fills, soft_log_probs=log_probs)
    divergence = Divergence(kind, temperature if live else 1.0)
    assert compare(replace(found, targets=targets), divergence, chunk=2, live=live) < 1e-10
    kept = fills > 0
    teacher = LiveRows(found.teacher.hidden[kept], found.teacher.head)
    ids, rows = targets.soft_ids[kept], targets.soft_rows[kept]
    fewer = replace(targets, soft_rows=rows, soft_ids=ids, soft_log_probs=log_probs[kept], soft_weights=None)
    sums = [
        head_losses(found.hidden, Head(found.weight), t, SCALE, divergence, vocabulary=KNOWN, live=source if live else None)[1]
        for t, source in ((targets, found.teacher), (fewer, teacher))
    ]
    torch.testing.assert_close(*sums)


def test_a_target_that_the_tokenizer_does_not_know() -> None:
    found = case("top_k", num_soft=M)
    found.targets.ids[:] = KNOWN + torch.arange(M) % (V - KNOWN)
    assert compare(found, Divergence(), chunk=2) < 1e-10


@pytest.mark.parametrize(
    ("codec", "kind"), [("top_k", "forward_kl"), ("top_k", "skew_reverse_kl"), ("live", "jsd"), ("sampled", "forward_kl")]
)
def test_the_chunk_changes_nothing(codec: str, kind: DivergenceKind) -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found, results = case(codec, dtype=dtype), []
        for chunk in (1, 3, 4, 100):
            inputs = leaves(found.hidden, found.weight, found.bias)
            total, sums = head_losses(
                inputs[0],
                Head(inputs[1], inputs[2]),
                found.targets,
                SCALE,
                Divergence(kind),
                vocabulary=KNOWN,
                chunk_tokens=chunk,
                live=found.teacher if codec == "live" else None,
            )
            results.append([total.detach(), sums, *torch.autograd.grad(total, inputs)])
        assert max(gap(result, results[0]) for result in results[1:]) < bound


@pytest.mark.parametrize("spread", [30.0, 3e3])
@pytest.mark.parametrize(("codec", "kind"), [("top_k", kind) for kind in KINDS] + [("sampled", "forward_kl"), ("live", "jsd")])
def test_a_student_that_is_sure_gives_numbers(codec: str, kind: DivergenceKind, spread: float) -> None:
    # The probabilities of all but a few ids are 0 in fp32, also their sum. Logits of hundreds are rounded to 1e-5.
    found = case(codec, dtype=torch.float32, spread=spread)
    assert compare(found, Divergence(kind), chunk=2, live=codec == "live") < 1e-4


@pytest.mark.parametrize(("codec", "kind", "k"), [*(("top_k", kind, 4) for kind in KINDS), ("sampled", "forward_kl", 9), *OTHERS[2:]])
def test_the_gradient_is_the_derivative(codec: str, kind: DivergenceKind, k: int) -> None:
    found = case(codec, k=k)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        live = found.teacher if codec == "live" else None
        head = Head(weight, bias, 0.5, 3.0)
        return head_losses(hidden, head, found.targets, SCALE, Divergence(kind), vocabulary=KNOWN, chunk_tokens=3, live=live)[0]

    assert torch.autograd.gradcheck(total, leaves(found.hidden, found.weight, found.bias), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: DivergenceKind, temperature: float) -> None:
    found = case("live")
    hidden, weight = leaves(found.hidden, found.weight)
    live = LiveRows(hidden.detach()[found.targets.soft_rows], Head(weight.detach()))
    only_soft = torch.tensor([0.0, 0.0, 1.0])
    targets = replace(found.targets, weights=torch.zeros(M))
    total, _ = head_losses(hidden, Head(weight), targets, only_soft, Divergence(kind, temperature=temperature), chunk_tokens=2, live=live)
    assert float(total.detach()) == pytest.approx(0, abs=1e-12)
    assert gap(list(torch.autograd.grad(total, [hidden, weight])), [torch.zeros(M, H), torch.zeros(V, H)]) < 1e-12


# Dtypes


@pytest.mark.parametrize(("codec", "kind"), [("top_k", "forward_kl"), ("live", "jsd")])
def test_bf16_is_as_near_as_its_logits_are(codec: str, kind: DivergenceKind) -> None:
    found = case(codec, dtype=torch.bfloat16)
    inputs = leaves(found.hidden, found.weight, found.bias)
    whole = leaves(*(tensor.float() for tensor in inputs))
    results = []
    for hidden, weight, bias in (inputs, whole):
        live = LiveRows(found.teacher.hidden.to(hidden.dtype), Head(found.teacher.head.weight.to(hidden.dtype)))
        total, sums = head_losses(
            hidden,
            Head(weight, bias),
            found.targets,
            SCALE,
            Divergence(kind),
            vocabulary=KNOWN,
            chunk_tokens=2,
            live=live if codec == "live" else None,
        )
        assert (total.dtype, sums.dtype) == (torch.float32, torch.float32)
        results.append([total.detach(), *torch.autograd.grad(total, [hidden, weight, bias])])
    assert [gradient.dtype for gradient in results[0][1:]] == [torch.bfloat16] * 3
    for half, full in zip(*results, strict=True):
        assert float((half.float() - full).norm() / full.norm()) < 0.01


@pytest.mark.parametrize("chunk", [1, 100])
def test_a_weight_in_fp32_gets_a_gradient_in_fp32(chunk: int) -> None:
    found = case("top_k", dtype=torch.float32)
    hidden, weight = leaves(found.hidden.bfloat16(), found.weight)
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = head_losses(hidden, Head(weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN, chunk_tokens=chunk)
    to_hidden, to_weight = torch.autograd.grad(total, [hidden, weight])
    assert (total.dtype, to_hidden.dtype, to_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert not torch.equal(to_weight, to_weight.bfloat16().float())


def test_autocast_changes_nothing() -> None:
    found = case("top_k", dtype=torch.float32)
    plain = head_losses(found.hidden, Head(found.weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head_losses(found.hidden, Head(found.weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN)
    assert torch.equal(torch.stack([inside[0], *inside[1]]), torch.stack([plain[0], *plain[1]]))


# What is wanted, and when


def test_a_frozen_weight_gets_no_gradient() -> None:
    found = case("top_k")
    (hidden,) = leaves(found.hidden)
    total, _ = head_losses(hidden, Head(found.weight, found.bias), found.targets, SCALE, Divergence(), vocabulary=KNOWN, chunk_tokens=2)
    total.backward()
    assert found.weight.grad is None
    inputs = leaves(found.hidden, found.weight, found.bias)
    whole, _ = head_losses(inputs[0], Head(*inputs[1:]), found.targets, SCALE, Divergence(), vocabulary=KNOWN)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(whole, inputs)[0])


def test_a_frozen_body_gets_no_gradient() -> None:
    found = case("top_k")
    for chunk in (2, 100):
        (weight,) = leaves(found.weight)
        total, _ = head_losses(found.hidden, Head(weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN, chunk_tokens=chunk)
        (own,) = leaves(found.weight)
        wanted = (SCALE * found.plain(Head(own), Divergence())).sum()
        torch.testing.assert_close(torch.autograd.grad(total, weight), torch.autograd.grad(wanted, own))


def test_without_a_gradient_there_is_no_graph() -> None:
    found = case("top_k")
    hidden, weight = leaves(found.hidden, found.weight)
    with torch.no_grad():
        total, sums = head_losses(hidden, Head(weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN, chunk_tokens=2)
    assert total.grad_fn is None
    wanted = found.plain(Head(found.weight), Divergence())
    torch.testing.assert_close(sums, wanted)
    torch.testing.assert_close(total, (SCALE * wanted).sum())


def test_the_weight_is_read_in_the_forward_pass_only() -> None:
    # ZeRO-3 takes it away afterwards.
    found = case("top_k")
    hidden, weight = leaves(found.hidden, found.weight)
    total, _ = head_losses(hidden, Head(weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN)
    weight.data.fill_(float("nan"))
    hidden.data.fill_(float("nan"))
    total.backward()
    assert torch.isfinite(torch.cat([hidden.grad, weight.grad])).all()


def test_the_incoming_gradient_counts_each_time() -> None:
    found = case("top_k")
    (hidden,) = leaves(found.hidden)
    total, _ = head_losses(hidden, Head(found.weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN)
    (once,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (thrice,) = torch.autograd.grad(3 * total, hidden)
    torch.testing.assert_close(thrice, 3 * once)


def test_the_total_is_the_weighted_sums() -> None:
    found = case("top_k")
    total, sums = head_losses(found.hidden, Head(found.weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN)
    assert float(total) == pytest.approx(0.3 * float(sums[0]) + 0.7 * float(sums[1]) + 1.1 * float(sums[2]), rel=1e-6)


def test_no_target_is_zero_with_a_gradient() -> None:
    found = case("top_k", num_soft=0)
    none = Targets(
        *(tensor[:0] for tensor in (found.targets.ids, found.targets.part, found.targets.weights)), *(found.targets.soft_rows,) * 3, None
    )
    inputs = leaves(found.hidden[:0], found.weight, found.bias)
    total, sums = head_losses(inputs[0], Head(*inputs[1:]), none, SCALE, Divergence())
    assert (float(total.detach()), sums.tolist()) == (0, [0, 0, 0])
    total.backward()
    assert [tuple(tensor.grad.shape) for tensor in inputs] == [(0, H), (V, H), (V,)]
    assert torch.equal(inputs[1].grad, torch.zeros(V, H))
    sums, right = head_matches(inputs[0], Head(*inputs[1:]), none)
    assert (sums.tolist(), right.tolist()) == ([0, 0, 0], [])


def test_rows_that_only_fill_the_batch_count_nothing() -> None:
    found = case("top_k", num_soft=0)
    inputs = leaves(found.hidden, found.weight)
    targets = replace(found.targets, weights=torch.zeros(M))
    total, sums = head_losses(inputs[0], Head(inputs[1]), targets, SCALE, Divergence(), chunk_tokens=2)
    assert (float(total.detach()), sums.tolist()) == (0, [0, 0, 0])
    assert gap(list(torch.autograd.grad(total, inputs)), [torch.zeros(M, H), torch.zeros(V, H)]) == 0


def test_what_is_not_defined_is_refused() -> None:
    found = case("sampled")
    with pytest.raises(ValueError, match=r"divergence is jsd, but with teacher\.soft_labels\.format: sampled"):
        head_losses(found.hidden, Head(found.weight), found.targets, SCALE, Divergence("jsd"))
    with pytest.raises(ValueError, match=r"temperature is 2, but the soft labels of teacher\.soft_labels\.format: top_k"):
        head_losses(found.hidden, Head(found.weight), case("top_k").targets, SCALE, Divergence(temperature=2.0))
    small = LiveRows(found.teacher.hidden, Head(found.teacher.head.weight[:9]))
    with pytest.raises(AssertionError, match="the teacher has 9 ids, but 26 are compared"):
        head_losses(found.hidden, Head(found.weight), found.targets, SCALE, Divergence(), vocabulary=KNOWN, live=small)


# Memory and speed: what can be seen without a GPU


class Recorded(TorchDispatchMode):
    """The largest result of an operation, in elements, and the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("codec", "kind"), [("top_k", "forward_kl"), ("live", "jsd"), ("sampled", "forward_kl")])
def test_the_logits_are_never_whole_and_nothing_waits_for_the_device(codec: str, kind: DivergenceKind) -> None:
    found, chunk = case(codec), 1
    hidden, weight = leaves(found.hidden, found.weight)
    with Recorded() as seen:
        total, _ = head_losses(
            hidden,
            Head(weight),
            found.targets,
            SCALE,
            Divergence(kind),
            vocabulary=KNOWN,
            chunk_tokens=chunk,
            live=found.teacher if codec == "live" else None,
        )
        total.backward()
    assert seen.largest <= max(head_loss.CHUNKS_A_PRODUCT * chunk * (V + 3), V * H) < M * V
    assert {"aten.mm.default", "aten.amax.default" if codec != "live" else "aten._log_softmax.default"} <= seen.names
    assert not seen.names & {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}


def test_chunks_take_a_quarter_of_a_gibibyte() -> None:
    assert chunk_rows(128_256) == 512
    assert chunk_rows(49_152) == 1280
    assert chunk_rows(32_000) == 2048
    # Few rows would leave the device idle.
    assert chunk_rows(1_000_000) == 256
    assert 4 * 512 * 128_256 <= head_loss.CHUNK_BYTES < 4 * 640 * 128_256


# Validation


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5}], ids=str)
def test_matches_are_the_most_probable_tokens(chunk: int | None, head: dict[str, Any]) -> None:
    found = case("none", num_soft=0)
    own = Head(found.weight, found.bias, **head)
    logits = found.hidden @ found.weight.T * own.scale + found.bias
    found.targets.ids[::2] = logits.argmax(dim=1)[::2]
    sums, right = head_matches(found.hidden.requires_grad_(), own, found.targets, chunk_tokens=chunk)
    assert torch.equal(right, logits.argmax(dim=1) == found.targets.ids)
    assert 0 < int(right.sum()) < M
    torch.testing.assert_close(sums, found.plain(own, Divergence()).detach())
    assert not sums.requires_grad


EOS = 1


def tiny(name: str) -> PreTrainedModel:
    """Large random weights over a small vocabulary: greedy answers differ from input to input, and many of them end."""
    sizes = {"vocab_size": 8, "pad_token_id": 0, "eos_token_id": EOS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "t5":
            config = T5Config(
                **sizes, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, tie_word_embeddings=False
            )
            model: PreTrainedModel = T5ForConditionalGeneration(config)
        else:
            layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(**sizes, **layers, bos_token_id=None, max_position_embeddings=32))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25 if name == "t5" else 0.7)
        return model.eval()


def states_of(model: PreTrainedModel, prompt: list[int], target: list[int]) -> Tensor:
    """[T, H]: what the head turns into the logits of a target's tokens."""
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *target[:-1]]])}
        states: Tensor = model.model(**inputs).last_hidden_state if hasattr(model, "model") else t5_states(model, inputs)
        return states[0]
    return model.model(torch.tensor([prompt + target[:-1]])).last_hidden_state[0, len(prompt) - 1 :]


def t5_states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    encoded = model.encoder(input_ids=inputs["input_ids"]).last_hidden_state
    decoded: Tensor = model.decoder(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=encoded).last_hidden_state
    return decoded


@pytest.mark.parametrize("name", ["t5", "llama"])
@torch.no_grad()
def test_texts_that_match_at_every_token_are_those_of_greedy_decoding(name: str) -> None:
    model, generator = tiny(name), torch.Generator().manual_seed(0)
    expected, found, texts = [], [], set()
    for _ in range(40):
        prompt = torch.randint(2, 8, (int(torch.randint(1, 8, (), generator=generator)),), generator=generator).tolist()
        ids = torch.tensor([prompt])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=1)
        written = output[0].tolist()[1 if name == "t5" else len(prompt) :]
        written = written[: written.index(EOS) + 1] if EOS in written else written
        changed = [2 + (written[0] - 1) % 6, *written[1:-1], EOS]
        for target in ([*written], changed, [*written[: len(written) // 2], EOS]):
            states = states_of(model, prompt, target)
            targets = Targets(
                torch.tensor(target), *(torch.zeros(len(target), dtype=torch.int64),) * 2, *(torch.zeros(0, dtype=torch.int64),) * 3, None
            )
            found.append(bool(head_matches(states, Head(model.lm_head.weight), targets)[1].all()))
            expected.append(target == written)
            texts.add(tuple(written))
    assert found == expected
    assert 40 <= sum(expected) < len(expected) - 30
    assert len(texts) >= 4
