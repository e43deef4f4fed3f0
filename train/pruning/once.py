"""A model pruned in one go: weights set to zero, or neurons, heads and layers removed.

score (scores.py, train/activity.py) -> choose (masks.py) -> set to zero, or cut (train/neurons.py, train/heads.py, train/cutting.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from train.activity import Sample, arguments_of, column_scores, measure
from train.config import PruneConfig
from train.cutting import cut_layers, layers_of
from train.heads import keep_heads, possible_counts
from train.neurons import FeedForward, feed_forwards, keep_neurons
from train.pruning.masks import keep_globally, keep_in_matrix, keep_in_rows, keep_n_of_m
from train.pruning.scores import magnitude, neuron_norm, neuron_taylor, wanda
from train.slicing import make_modules_agree


def prune(model: PreTrainedModel, config: PruneConfig, samples: Sequence[Sample], key: str) -> dict[str, Tensor]:
    """Takes out of a model what `config` asks for, in place.

    Args:
        model: whole, in any float dtype; of no use where this raises. Without neurons, heads or layers it is a plain smaller model of its
            type, whose configuration says so.
        config: what to take out.
        samples: texts like those that the model will meet, some thousand tokens; read by all methods but magnitude and neuron.
        key: what `config` was written under, such as student.prune, for messages.

    Returns:
        Of single weights the masks, bool by parameter, True where a weight stayed; else nothing.

    Raises:
        ValueError: if nothing is left to prune, m does not divide a row, or the model's neurons, heads or layers cannot be told.
    """
    if config.makes_zeros:
        linears = prunable(model, config.exclude, key)
        check_pattern(linears, config, key)
        weights = {f"{name}.weight": linear.weight for name, linear in linears.items()}
        mean_squares = weight_norms(model, linears, samples) if config.method == "wanda" else {}
        masks = choose_weights(weights, config, config.fraction or 0.0, mean_squares)
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).masked_fill_(~mask, 0.0)
        return masks
    assert config.fraction is not None
    asked = f"{key}.method is {config.method}"
    stacks = layers_of(model, key)
    if config.method == "layer":
        cut_layers(model, max(1, len(stacks[0]) - round(config.fraction * len(stacks[0]))), key, samples)
    elif config.method == "head":
        possible = possible_counts(model.config)
        wished = (1.0 - config.fraction) * max(possible, default=1)
        count = min(possible, key=lambda number: abs(number - wished), default=1)
        keep_heads(model, stacks, measure(model, samples), count, asked)
        make_modules_agree(model, key)
    else:
        parts = feed_forwards(model, [layer for stack in stacks for layer in stack], asked)
        count = kept_neurons(parts[0].outer.in_features, config.fraction, config.round_to)
        keep_neurons(model, parts, _neuron_scores(model, parts, config, samples), count)
        make_modules_agree(model, key)
    return {}


def prunable(model: PreTrainedModel, exclude: Sequence[str], key: str) -> dict[str, nn.Linear]:
    """Linear layers inside the model's stacks of layers, by name: not the embeddings, the head, or what a pattern names.

    Raises:
        ValueError: if a pattern names none of them, or none is left.
    """
    inside = {id(module) for stack in layers_of(model, key) for layer in stack for module in layer.modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside}
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in linear):
            some = ", ".join(list(linear)[:3])
            raise ValueError(f"{key}.exclude holds {pattern!r}, which is no matrix of the model: name some of {some}, ..., or remove it")
    left = {name: module for name, module in linear.items() if not any(fnmatchcase(name, pattern) for pattern in exclude)}
    if not left:
        raise ValueError(f"{key}.exclude leaves nothing to prune: all {len(linear)} matrices of the model's layers match it")
    return left


def weight_norms(model: PreTrainedModel, linears: Mapping[str, nn.Linear], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Of each matrix the mean squares [in] of its inputs, by parameter: what Wanda needs besides the weights."""
    activity = measure(model, samples)
    return {f"{name}.weight": activity[linear] for name, linear in linears.items()}


def choose_weights(
    weights: Mapping[str, Tensor],
    config: PruneConfig,
    fraction: float,
    mean_squares: Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Masks of single weights, by parameter, each where its parameter lies.

    Args:
        weights: matrices [out, in], by parameter; m of a pattern divides their rows.
        config: magnitude or wanda.
        fraction: to take out, where there is no pattern.
        mean_squares: of the inputs, by parameter; for wanda.
        before: masks so far.
        device: where one matrix at a time is scored and sorted (all of them together with the scope global, where they lie); where the
            parameter lies, if left out.
    """

    def scores_of(name: str, weight: Tensor) -> Tensor:
        return wanda(weight, mean_squares[name]) if config.method == "wanda" else magnitude(weight)

    def mask_of(scores: Tensor, so_far: Tensor | None) -> Tensor:
        if config.n_of_m is not None:
            return keep_n_of_m(scores, *config.n_of_m)
        choose = keep_in_rows if config.method == "wanda" else keep_in_matrix
        return choose(scores, fraction, so_far)

    if config.scope == "global":
        return keep_globally({name: scores_of(name, weight) for name, weight in weights.items()}, fraction, before)
    masks = {}
    for name, weight in weights.items():
        place = weight.device if device is None else device
        so_far = before[name].to(place) if before else None
        masks[name] = mask_of(scores_of(name, weight.to(place)), so_far).to(weight.device)
    return masks


def check_pattern(linears: Mapping[str, nn.Linear], config: PruneConfig, key: str) -> None:
    """That the m of an n:m pattern divides every row.

    Raises:
        ValueError: where it does not.
    """
    for name, linear in linears.items() if config.n_of_m is not None else ():
        assert config.n_of_m is not None
        if linear.in_features % config.n_of_m[1]:
            raise ValueError(
                f"{key}.pattern is {config.pattern}, but a row of {name} has {linear.in_features} weights, which {config.n_of_m[1]} does "
                f"not divide: exclude it ({key}.exclude), or choose another pattern"
            )


def mean_loss(model: PreTrainedModel, samples: Sequence[Sample]) -> float:
    """Cross-entropy of samples, nats a token: of what follows the input, or of all tokens but the first where nothing does."""
    with torch.no_grad():
        losses = [_losses(model, sample) for sample in samples]
    return float(torch.cat(losses).double().mean())


def kept_neurons(total: int, fraction: float, multiple: int) -> int:
    """The width that is left, to the nearest multiple."""
    kept = total - round(fraction * total)
    return min(total, max(multiple, round(kept / multiple) * multiple))


def _neuron_scores(model: PreTrainedModel, parts: Sequence[FeedForward], config: PruneConfig, samples: Sequence[Sample]) -> list[Tensor]:
    if config.method == "neuron_activity":
        activity = measure(model, samples)
        return [column_scores(part.outer, activity) for part in parts]
    if config.method == "neuron":
        return [neuron_norm([linear.weight for linear in part.inner], part.outer.weight) for part in parts]
    gradients = _gradients(model, [linear.weight for part in parts for linear in (*part.inner, part.outer)], samples)

    def pair(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        return linear.weight, gradients[linear.weight]

    return [neuron_taylor([pair(linear) for linear in part.inner], pair(part.outer)) for part in parts]


def _gradients(model: PreTrainedModel, weights: Sequence[Tensor], samples: Sequence[Sample]) -> dict[Tensor, Tensor]:
    """Of the mean loss over the tokens of the samples, in fp32."""
    sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, tokens = model.training, 0
    model.eval().requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for sample in samples:
            losses = _losses(model, sample)
            for weight, gradient in zip(weights, torch.autograd.grad(losses.sum(), weights), strict=True):
                sums[weight] += gradient
            tokens += len(losses)
    finally:
        model.train(training)
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
    return {weight: total / tokens for weight, total in sums.items()}


def _losses(model: PreTrainedModel, sample: Sample) -> Tensor:
    """[n] nats of the tokens that are predicted."""
    inputs, targets = sample
    logits = model(**arguments_of(model, inputs, targets), use_cache=False).logits[0].float()
    if model.config.is_encoder_decoder:
        # The input of the decoder is the targets behind a start; the last token is read and predicts nothing.
        return functional.cross_entropy(logits[:-1], torch.tensor(list(targets), device=logits.device), reduction="none")
    ids = torch.tensor([*inputs, *targets], device=logits.device)
    first = max(1, len(inputs)) if targets else 1
    return functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="none")
