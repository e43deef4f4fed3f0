"""Trains small stand-ins for a student under every engine in one start of torchrun; `test_resume.py` starts it.

    torchrun --nproc-per-node N tests/integration/resume_driver.py FOLDER ACT [ACT ...]

The acts are functions here: each gives what rank 0 writes to FOLDER/N-ACT.pt.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.config import TrainingConfig
from train.engine import TrainEngine, open_engine, start, stop
from train.signals import STOPPED, Stopped, catching
from train.world import World

VOCABULARY, WIDTH, STEPS = 300, 96, 5
RATES = [0.0, 3e-3, 1e-2, 5e-3, 2e-3]
CLIP, DECAY = 0.5, 0.1


class SummedLoss(torch.autograd.Function):
    """Cross-entropy of a head, whose gradients are computed in the forward; the weight is not kept for the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        log_probs = (hidden.float() @ weight.float().T).log_softmax(dim=-1)
        gradient = log_probs.exp()
        gradient[torch.arange(len(targets)), targets] -= 1.0
        ctx.save_for_backward((gradient @ weight.float()).to(hidden), (gradient.T @ hidden.float()).to(weight))
        return -log_probs[torch.arange(len(targets)), targets].sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        to_hidden, to_weight = ctx.saved_tensors
        return gradients[0] * to_hidden, gradients[0] * to_weight, None


class Model(nn.Module):
    """An embedding, some layers and a head; under ZeRO 3 the layers of 96 x 96 stay whole, the other matrices are sharded."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("table", torch.linspace(0.123456789, 1.0, WIDTH))
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) * self.table.to(self.embedding.weight.dtype)
        for layer in self.layers:
            hidden = hidden + functional.gelu(layer(hidden))
        return hidden + self.narrow(functional.gelu(self.norm(self.wide(hidden))))


class Learner(nn.Module):
    """Reads the head's weight itself, past the head's own forward."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.model = Model(tied=tied)

    def forward(self, *, ids: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        total = SummedLoss.apply(self.model(ids), self.model.lm_head.weight, targets)
        return total * share, torch.stack([total.detach().float()] * 3)


def learner(*, tied: bool = True, frozen: bool = False, seed: int = 3) -> Learner:
    torch.manual_seed(seed)
    made = Learner(tied=tied)
    if frozen:
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("layers.0" not in name and "wide" not in name and "norm" not in name)
    return made


def parts_of(step: int) -> list[tuple[Tensor, Tensor]]:
    """The (ids, targets) of a step, in 2 or 4 parts of unequal lengths."""
    draw = torch.Generator().manual_seed(step)
    lengths = [(17, 5), (9, 8, 3, 12), (21, 4), (6, 6, 13, 2), (11, 19)][step % STEPS]
    return [(torch.randint(VOCABULARY, (n,), generator=draw), torch.randint(VOCABULARY, (n,), generator=draw)) for n in lengths]


def train(engine: TrainEngine, world: World, steps: Iterable[int], spoilt: float | None = None) -> Iterator[tuple[float, float]]:
    """(loss a token, norm of the gradient) of each step; `spoilt` multiplies the first loss of the last process."""
    for step in steps:
        parts = parts_of(step)
        tokens = sum(len(ids) for ids, _ in parts)
        mine = parts[world.rank :: world.size]
        summed = torch.zeros(())
        for number, (ids, targets) in enumerate(mine):
            total, sums = engine.forward(ids=ids, targets=targets, share=1.0 / tokens)
            if spoilt is not None and world.rank == world.size - 1 and number == 0:
                total = total * spoilt
            engine.backward(total, last=number == len(mine) - 1)
            summed = summed + sums[0]
        yield float(world.sum(summed)) / tokens, float(engine.step(RATES[step % STEPS]))


def opened(world: World, stage: int, module: nn.Module, *, bf16: bool = False, offload: bool = False) -> TrainEngine:
    precision = "bf16" if bf16 else "fp32"
    config = TrainingConfig(zero_stage=stage, offload_optimizer=offload, precision=precision, weight_decay=DECAY, clip_norm=CLIP)
    return open_engine(module, world, config)


def agree(world: World, _: Path) -> dict[str, Any]:
    """Losses, norms and weights of five steps, and the weights before them; one module is wrapped again and again."""
    again, first = learner(), learner().state_dict()
    found: dict[str, Any] = {}

    def note(name: str, engine: TrainEngine) -> None:
        before = engine.gather_weights()
        found[name] = {"before": before, "steps": list(train(engine, world, range(STEPS))), "weights": engine.gather_weights()}
        engine.release()

    for stage in (0, 1, 3) if world.size == 1 else (0, 1, 2, 3, 1):
        again.load_state_dict(first)
        note(f"{stage} tied", opened(world, stage, again))
        if stage != 2:
            note(f"{stage} untied", opened(world, stage, learner(tied=False)))
    for stage, bf16, offload in HALTED if world.size == 2 else ():
        if bf16 or offload:
            note(f"{stage} {bf16=} {offload=}", opened(world, stage, learner(), bf16=bf16, offload=offload))
    note("2 frozen", opened(world, 2, learner(tied=False, frozen=True), offload=True))
    note("3 bf16 frozen", opened(world, 3, learner(tied=False, frozen=True), bf16=True))
    return found


def snapshot(engine: Any) -> list[Tensor]:
    """What this process keeps of masters and moments, and of the model's own weights."""
    flats = [tensor for flat in engine._shard().flats for tensor in flat.values()]
    return [tensor.detach().clone() for tensor in (*flats, *(getattr(p, "ds_tensor", p) for p in engine.module.parameters()))]


HALTED = [(1, False, False), (2, False, False), (3, False, False), (3, False, True), (1, True, False), (2, True, True), (3, True, True)]
"""(ZeRO stage, bf16, offloading)"""


def halt(world: World, _: Path) -> dict[str, Any]:
    """Five steps, and two between them whose gradient is not finite on one process; on how many processes those changed anything."""
    found: dict[str, Any] = {}
    for stage, bf16, offload in HALTED:
        engine = opened(world, stage, learner(), bf16=bf16, offload=offload)
        steps, norms, same = list(train(engine, world, range(2))), [], True
        for step, spoilt in ((1, float("inf")), (3, float("nan"))):
            before = snapshot(engine)
            norms += [norm for _, norm in train(engine, world, [step], spoilt)]
            same = same and all(torch.equal(a, b) for a, b in zip(before, snapshot(engine), strict=True))
            steps += train(engine, world, [2] if step == 1 else [3, 4])
        changed = int(world.sum(torch.tensor(int(not same))))
        name = f"{stage} {bf16=} {offload=}" if bf16 or offload else f"{stage} tied"
        found[name] = {"steps": steps, "norms": norms, "changed": changed}
    return found


SAVED = [(0, False, False), (1, False, False), (3, False, False), (2, False, True), (2, True, True), (1, True, False)]
"""(ZeRO stage, bf16, offloading)"""


def save(world: World, folder: Path) -> dict[str, Any]:
    """Trains three steps, saves, trains the rest; and the rest again with another model that resumes."""
    found: dict[str, Any] = {}
    for stage, bf16, offload in SAVED[: 3 if world.size == 1 else None]:
        name = f"{stage} {bf16=}"
        engine = opened(world, stage, learner(), bf16=bf16, offload=offload)
        steps = list(train(engine, world, range(2)))
        engine.save(folder / f"{world.size}-{name}", 2, {"is": "replaced"})
        steps += train(engine, world, [2])
        engine.save(folder / f"{world.size}-{name}", 3, {"seconds": 1.5})
        steps += train(engine, world, [3, 4])
        other = opened(world, stage, learner(seed=8), bf16=bf16, offload=offload)
        point = other.resume(folder / f"{world.size}-{name}")
        assert point is not None
        resumed = list(train(other, world, range(point.step, STEPS)))
        both = [engine.gather_weights(), other.gather_weights()]
        found[name] = {"steps": steps, "resumed": resumed, "weights": both, "point": (point.step, point.state)}
    return found


def resume(world: World, folder: Path) -> dict[str, Any]:
    """Resumes what other processes saved, under the same ZeRO stage and another."""
    found: dict[str, Any] = {}
    for saved in sorted(folder.glob(f"{3 - world.size}-* bf16=*")):
        stage, bf16 = int(saved.name[2]), saved.name.endswith("True")
        for onto in (stage, (stage + 1) % 4):
            engine = opened(world, onto, learner(seed=8), bf16=bf16)
            point = engine.resume(saved)
            assert point is not None
            steps = list(train(engine, world, range(point.step, STEPS)))
            found[f"{saved.name} onto {onto}"] = {"resumed": steps, "weights": engine.gather_weights()}
    return found


def refuse(world: World, folder: Path) -> dict[str, Any]:
    """What is said of a state that cannot be resumed."""
    engine = opened(world, 2, learner(tied=False))
    said = [str(engine.resume(folder / "nothing"))]
    for name in ("other", "lost", "damaged"):
        place = folder / f"{world.size}-refused-{name}"
        opened(world, 2, learner(tied=name == "other")).save(place, 4, {})
        if world.is_main and name != "other":
            file = place / "step-4" / f"share-{world.size - 1}.pt"
            file.unlink() if name == "lost" else file.write_bytes(file.read_bytes()[:1000])
        world.barrier()
        try:
            engine.resume(place)
        except RuntimeError as error:
            said.append(str(error).replace(str(folder), "FOLDER"))
    return {"said": said}


def slow(world: World, folder: Path) -> dict[str, Any]:
    """Trains until a signal asks for an end, as the trainer does."""
    engine = opened(world, 1, learner())
    with catching() as signals:
        for step in range(10_000):
            list(train(engine, world, [step]))
            time.sleep(0.05 * (1 + world.rank))
            (folder / f"slow-{world.rank}").write_text(str(step + 1))
            if int(world.sum(torch.tensor(int(signals.asked is not None)))):
                engine.save(folder / "slow", step + 1, {"asked": signals.asked})
                time.sleep(1.0)  # a large student takes longer
                raise Stopped(f"stopped by {signals.asked} after step {step + 1}; the state is saved")
    return {}


ACTS = {act.__name__: act for act in (agree, halt, save, resume, refuse, slow)}


def main() -> int:
    folder, *names = sys.argv[1:]
    world = start("cpu")
    status = 0
    for name in names:
        try:
            found = ACTS[name](world, Path(folder))
            if world.is_main:
                torch.save(found, Path(folder) / f"{world.size}-{name}.pt")
        except Stopped:
            status = STOPPED
    stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
