"""A student's engine, attention and recorded passes on one GPU against the CPU's plain forms.

python -m pytest tests/gpu/test_student_gpu.py -m gpu
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from data.batches import collate, token_counts
from data.prompts import TextFormat
from data.rows import TrainSequence
from train.config import TrainingConfig
from train.flat import FlatEngine
from train.learner import Learner
from train.losses import Divergence
from train.passes import open_passes
from train.world import World

pytest.importorskip("triton", exc_type=ImportError)
from train.adamw_kernel import update

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FORM = TextFormat("decoder_only", eos_id=1, pad_id=0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=64)


def sequences(seed: int, count: int) -> list[TrainSequence]:
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(3, 300, (length,), generator=draw).tolist()

    return [TrainSequence(ids(5, 60), [*ids(1, 50), 1], n % 2 == 0) for n in range(count)]


def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300, tie_word_embeddings=True))


PRUNED = "model.model.layers.1.mlp.up_proj.weight"


def half_out(weights: dict[str, Tensor]) -> Tensor:
    return weights[PRUNED].abs() > weights[PRUNED].abs().median()


def trained(
    device: torch.device, *, bf16: bool, compile: str, steps: int = 6, prune_after: int | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of each step and the last weights; steps of two sizes, so that each is recorded and replayed."""
    learner = Learner(model(), divergence=Divergence("forward_kl"))
    engine = FlatEngine(learner.train(), World(0, 1, device), bf16=bf16, weight_decay=0.1, clip_norm=1.0)
    passes = open_passes(learner, engine, TrainingConfig.model_validate({"compile": compile}), packed=True, num_steps=steps, longest=128)
    losses = []
    with learner.packed():
        for step in range(steps):
            given = sequences(step, 16 if step % 2 else 24)
            counts = token_counts(given).clamp(min=1).float()
            scale = (torch.tensor([0.5, 0.5, 0.0]) / counts).to(device)
            halves = (given[::2], given[1::2]) if step % 3 == 2 else (given,)
            sums = torch.zeros(3, device=device)
            for n, part in enumerate(halves):
                sums += passes(scale, collate(part, FORM, 0, packed=True), last=n == len(halves) - 1)
            engine.step(1e-2)
            losses.append(float((scale * sums).sum()))
            if step + 1 == prune_after:
                engine.hold({PRUNED: half_out(engine.gather_weights())})
    return losses, engine.gather_weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_adamw(dtype: torch.dtype) -> None:
    plain = nn.Parameter(torch.randn(5000, device=DEVICE))
    optimizer = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.1)
    masters, first, second = plain.detach().clone(), torch.zeros(5000, device=DEVICE), torch.zeros(5000, device=DEVICE)
    weights = torch.zeros(5000, device=DEVICE, dtype=torch.bfloat16) if dtype == torch.bfloat16 else None
    options = {"rate": 0.01, "decay": 0.1, "betas": (0.9, 0.999), "epsilon": 1e-8, "factor": torch.tensor(0.5, device=DEVICE)}
    for step in range(1, 6):
        gradient = torch.randn(5000, device=DEVICE).to(dtype)
        plain.grad = 0.5 * gradient.float()
        optimizer.step()
        update(masters, first, second, gradient, weights, halted=torch.zeros((), device=DEVICE), step=step, **options)
        torch.testing.assert_close(masters, plain.detach(), rtol=1e-5, atol=1e-6)
        assert weights is None or torch.equal(weights, masters.bfloat16())
    before = masters.clone()
    update(masters, first, second, gradient * torch.nan, weights, halted=torch.ones((), device=DEVICE), step=6, **options)
    assert torch.equal(masters, before)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compares a GPU with the CPU")
def test_fp32_on_a_gpu_is_fp32_on_the_cpu() -> None:
    here, there = trained(torch.device("cpu"), bf16=False, compile="off"), trained(DEVICE, bf16=False, compile="off")
    assert there[0] == pytest.approx(here[0], rel=1e-4)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compares a GPU with the CPU")
@pytest.mark.parametrize("compile", ["off", "layers", "graphs"])
def test_bf16_flash_attention_follows_fp32(compile: str) -> None:
    exact = trained(DEVICE, bf16=False, compile="off")
    found = trained(DEVICE, bf16=True, compile=compile)
    assert found[0] == pytest.approx(exact[0], rel=2e-2)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compares a GPU with itself")
@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_passes_give_what_compiled_ones_do(bf16: bool) -> None:
    compiled = trained(DEVICE, bf16=bf16, compile="layers", steps=12)
    recorded = trained(DEVICE, bf16=bf16, compile="graphs", steps=12)
    assert recorded[0] == pytest.approx(compiled[0], rel=1e-2 if bf16 else 1e-4)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="records passes of a GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_passes_recorded_before_a_pruning_are_not_replayed_after_it(bf16: bool) -> None:
    compiled = trained(DEVICE, bf16=bf16, compile="layers", steps=14, prune_after=6)
    recorded = trained(DEVICE, bf16=bf16, compile="graphs", steps=14, prune_after=6)
    assert int((recorded[1][PRUNED] == 0).sum()) == recorded[1][PRUNED].numel() // 2
    assert recorded[0] == pytest.approx(compiled[0], rel=1e-2 if bf16 else 1e-4)
