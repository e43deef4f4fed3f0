"""How much each weight or neuron of a linear layer matters: pure functions of its tensors, the larger the more.

    weights   magnitude |w|, or with the size of what they multiply (Wanda) |w| x ||x||
    neurons   the root of the sum of squares of all weights that lead in and out, or |gradient x weight| summed over them (Taylor)

A neuron of a feed-forward layer is a row of each matrix that leads in (`gate` and `up`; a T5's `wi_0` and `wi_1`, or `wi`) and a column of
the one that leads out (`down`; `wo`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """[out, in] fp32: how far each weight is from 0.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626.
    """
    return weight.detach().float().abs()


def wanda(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """[out, in] fp32: each weight's magnitude times the norm of the input that it multiplies.

    Args:
        weight: [out, in].
        mean_squares: [in] of the inputs over the tokens of some samples; that it is a mean and not a sum scales all scores alike.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, equation 1.
    """
    return magnitude(weight) * mean_squares.to(weight.device, torch.float32).sqrt()


def neuron_norm(inner: Sequence[Tensor], outer: Tensor) -> Tensor:
    """[neurons] fp32: the root of the sum of squares of a neuron's weights, in and out.

    Args:
        inner: matrices [neurons, hidden] that lead in, one or two.
        outer: [hidden, neurons], the way out.
    """
    return _over_neurons([weight.detach().float().square() for weight in inner], outer.detach().float().square()).sqrt()


def neuron_taylor(inner: Sequence[tuple[Tensor, Tensor]], outer: tuple[Tensor, Tensor]) -> Tensor:
    """[neurons] fp32: to first order how much the loss changes if any of a neuron's weights becomes 0, summed over them.

    Args:
        inner: matrices that lead in, each with the loss's gradient to it.
        outer: the way out, with its gradient.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771, section 3.1; summed over a neuron's
    weights one by one, as LLM-Pruner does (Ma et al., arXiv 2305.11627, equation 5).
    """

    def changes(weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight.detach().float() * gradient.detach().float()).abs()

    return _over_neurons([changes(*pair) for pair in inner], changes(*outer))


def _over_neurons(inner: Sequence[Tensor], outer: Tensor) -> Tensor:
    return torch.stack([values.sum(dim=1) for values in inner]).sum(dim=0) + outer.sum(dim=0)
