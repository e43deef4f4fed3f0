"""Layers of a teacher on a GPU done in fewer, larger steps.

A step of decoding reads the weights once and does little with them, so every small kernel and every small matrix counts. Each change is
made only where the layer has the form it is meant for, and kept only where it gives the layer's own numbers on made-up ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPSILONS = ("variance_epsilon", "eps")
_ROTARY = "apply_rotary_pos_emb"


@torch.no_grad()
def fuse(model: nn.Module) -> dict[str, int]:
    """Changes a placed model's layers in place, for forwards without gradients.

    Args:
        model: on its device; on a CPU only the projections are joined, as the rest needs a GPU's kernels. Under ZeRO-3, whose shares
            cannot be joined, nothing is changed.

    Returns:
        How many layers were changed, by kind: norms, projections, feed_forwards, rotary.
    """
    modules = list(model.modules())
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return {}
    changed = {"projections": sum(map(_projections, modules))}
    if next(model.parameters()).is_cuda:
        families = sorted({type(module).__module__ for module in modules})
        changed |= {
            "norms": sum(map(_norm, modules)),
            "feed_forwards": sum(map(_feed_forward, modules)),
            "rotary": sum(map(_rotary, families)),
        }
    return changed


def _norm(module: Any) -> bool:
    """RMSNorm in one kernel in place of seven; another formula (Gemma's 1 + weight) keeps its own."""
    epsilon = next((getattr(module, name) for name in _EPSILONS if isinstance(getattr(module, name, None), float)), None)
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or epsilon is None or weight is None or weight.dim() != 1:
        return False
    from train.teacher import layer_kernels

    def fused(hidden: Tensor) -> Tensor:
        return layer_kernels.norm(hidden, module.weight, epsilon)

    return _swap(module, fused, weight)


def _projections(module: Any) -> bool:
    """Queries, keys and values from one matrix; the three layers keep their names and give views of the result."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    joint = _Joint([layer for layer in layers if isinstance(layer, nn.Linear)])
    return joint.install()


def _feed_forward(module: Any) -> bool:
    """down(silu(gate(x)) * up(x)): gate and up from one matrix, their product in one kernel."""
    layers: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(layer is None for layer in layers) or not _is_silu(getattr(module, "act_fn", None)):
        return False
    if len(list(module.children())) != 4:  # more than these three and the activation: another formula
        return False
    from train.teacher import layer_kernels

    if type(layers[0]) is nn.Linear and type(layers[1]) is nn.Linear:
        _Joint([layers[0], layers[1]]).install()

    def fused(hidden: Tensor) -> Tensor:
        found: Tensor = module.down_proj(layer_kernels.gated(module.gate_proj(hidden), module.up_proj(hidden)))
        return found

    return _swap(module, fused, layers[0].weight)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ in ("SiLUActivation", "SiLU")


def _rotary(name: str) -> bool:
    """The rotary embedding of a family of models in one kernel: the function in its modeling file, for all models of this process."""
    family = sys.modules[name]
    own = getattr(family, _ROTARY, None)
    if own is None or getattr(own, "fused", False):
        return own is not None
    from train.teacher import layer_kernels

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
        known = not others and not options and q.dim() == 4 and q.shape[0] == 1 and cos.shape == (1, q.shape[2], q.shape[3])
        if known and q.is_cuda and not q.requires_grad:
            return layer_kernels.rotate(q, k, cos, sin)
        turned: tuple[Tensor, Tensor] = own(q, k, cos, sin, *others, **options)
        return turned

    probe = [torch.randn(1, heads, 5, 16, device="cuda") for heads in (4, 2)]
    angles = [torch.randn(1, 5, 16, device="cuda") for _ in range(2)]
    try:
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fused(*probe, *angles), own(*probe, *angles), strict=True)):
            return False
    except (TypeError, ValueError, RuntimeError):  # a function of that name with other arguments
        return False
    fused.fused = True  # type: ignore[attr-defined]
    setattr(family, _ROTARY, fused)
    return True


class _Joint:
    """Linear layers over one input as one: their weights become views of one matrix, their outputs views of one product."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = layers
        self._bounds = torch.tensor([0, *(layer.out_features for layer in layers)]).cumsum(0).tolist()
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def install(self) -> bool:
        """Joins the weights; False where some have a bias and others none."""
        if len({layer.bias is None for layer in self.layers}) > 1:
            return False
        self.weight = self._joined([layer.weight for layer in self.layers])
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        self.bias = self._joined(biases) if biases else None
        for number, layer in enumerate(self.layers):
            layer.forward = self._forward_of(number)  # type: ignore[method-assign,assignment]
        return True

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        whole = torch.cat([part.data for part in parts])
        for part, begin, end in zip(parts, self._bounds, self._bounds[1:], strict=False):
            part.data = whole[begin:end]
        return whole

    def _forward_of(self, number: int) -> Callable[[Tensor], Tensor]:
        begin, end = self._bounds[number], self._bounds[number + 1]
        last = number == len(self.layers) - 1

        def forward(hidden: Tensor) -> Tensor:
            if self._input is not hidden or self._output is None:
                self._input, self._output = hidden, F.linear(hidden, self.weight, self.bias)
            found = self._output[..., begin:end]
            if last:  # what is kept longer would be memory of every layer at once
                self._input = self._output = None
            return found

        return forward


def _swap(module: Any, fused: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    """Gives `module` another forward, if that agrees with its own on random numbers of its weight's type and width."""
    generator = torch.Generator(weight.device).manual_seed(0)
    probe = torch.randn(4, weight.shape[-1], generator=generator, device=weight.device, dtype=weight.dtype)
    expected, found = module(probe), fused(probe)
    tolerance = 4 * torch.finfo(weight.dtype).eps  # sums in another order
    if expected.dtype != found.dtype or not (found - expected).norm() <= tolerance * expected.norm():
        return False
    module.forward = fused
    return True
