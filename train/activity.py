"""What each layer, and each input of a linear layer, does on samples: what tells which of them a smaller model can do without."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

Sample = tuple[Sequence[int], Sequence[int]]
"""Token ids of an input (for the encoder, where there is one) and of what follows it."""
Activity = Mapping[nn.Module, Tensor]
"""Of each linear layer, the mean square of each input over the tokens, float32."""

_RANDOM_SAMPLES, _RANDOM_TOKENS = 4, 256


@torch.no_grad()
def measure(model: PreTrainedModel, samples: Sequence[Sample]) -> Activity:
    """Runs the model on samples, one by one, and takes the mean squares of what goes into each linear layer that is used.

    Args:
        model: left as it was.
        samples: token ids; at least one.
    """
    means: dict[nn.Module, _Mean] = defaultdict(_Mean)

    def add(module: nn.Module, arguments: tuple[Tensor]) -> None:
        means[module].add(arguments[0].flatten(end_dim=-2).float().square())

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    _run(model, samples, [module.register_forward_pre_hook(add) for module in linear])
    return {module: mean.value for module, mean in means.items()}


@torch.no_grad()
def influences(model: PreTrainedModel, layers: Sequence[nn.Module], samples: Sequence[Sample]) -> list[float]:
    """How much each layer turns its input: 1 - the cosine similarity of what goes in and what comes out, the mean over the tokens.

    Args:
        model: left as it was.
        layers: of its stacks; each takes the residual stream first and gives it first.
        samples: token ids; at least one.

    Source:
        Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, arXiv 2403.03853, equation 1.
    """
    means: dict[nn.Module, _Mean] = defaultdict(_Mean)

    def add(module: nn.Module, arguments: tuple[Tensor, ...], named: Mapping[str, Any], result: Tensor | tuple[Tensor, ...]) -> None:
        before = arguments[0] if arguments else named["hidden_states"]
        after = result if isinstance(result, Tensor) else result[0]
        means[module].add(1 - functional.cosine_similarity(before.float(), after.float(), dim=-1).flatten())

    _run(model, samples, [layer.register_forward_hook(add, with_kwargs=True) for layer in layers])
    return [float(means[layer].value) for layer in layers]


class _Mean:
    """Of rows that come a few at a time, along the first dimension."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, rows: Tensor) -> None:
        self._sum = self._sum + rows.sum(dim=0)
        self._count += len(rows)

    @property
    def value(self) -> Tensor:
        assert isinstance(self._sum, Tensor), "nothing was added"
        return self._sum / self._count


def _run(model: PreTrainedModel, samples: Sequence[Sample], hooks: Sequence[RemovableHandle]) -> None:
    training = model.training
    model.eval()
    try:
        for inputs, targets in samples:
            model(**arguments_of(model, inputs, targets), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def arguments_of(model: PreTrainedModel, inputs: Sequence[int], targets: Sequence[int]) -> dict[str, Any]:
    """What a forward reads of a sample: all of it in a row; an encoder-decoder its targets behind a start."""

    def row(ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=model.device)

    if not model.config.is_encoder_decoder:
        return {"input_ids": row([*inputs, *targets])}
    start = model.config.decoder_start_token_id
    return {"input_ids": row(inputs), "decoder_input_ids": row([0 if start is None else start, *targets])}


def random_samples(model: PreTrainedModel) -> list[Sample]:
    """Tokens drawn evenly from the vocabulary, always the same: where there is no text at hand."""
    draw, vocabulary = torch.Generator().manual_seed(0), model.get_input_embeddings().weight.shape[0]
    length = min(_RANDOM_TOKENS, getattr(model.config, "max_position_embeddings", None) or _RANDOM_TOKENS)
    rows = torch.randint(vocabulary, (_RANDOM_SAMPLES, length), generator=draw).tolist()
    return [(row[: length // 2], row[length // 2 :]) for row in rows]


def column_scores(linear: nn.Linear, activity: Activity) -> Tensor:
    """What each input of a linear layer adds to its output: its root mean square times the norm of its column.

    Args:
        linear: one of the layers measured.
        activity: what `measure` gave.

    Returns:
        One score an input, float32.

    Source:
        The norm over each column of the scores of Sun et al., A Simple and Effective Pruning Approach for Large Language Models (Wanda),
        arXiv 2306.11695, equation 1.
    """
    norms: Tensor = linear.weight.detach().float().norm(dim=0)
    return norms * activity[linear].sqrt()
