"""How much each input of a model's linear layers carries: what tells which neurons and heads a smaller model can do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
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
    sums: dict[nn.Module, Tensor] = {}
    tokens: dict[nn.Module, int] = {}
    hooks = [module.register_forward_pre_hook(partial(_add, sums, tokens)) for module in model.modules() if isinstance(module, nn.Linear)]
    training = model.training
    model.eval()
    try:
        for inputs, targets in samples:
            model(**_arguments(model, inputs, targets), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {module: total / tokens[module] for module, total in sums.items()}


def _add(sums: dict[nn.Module, Tensor], tokens: dict[nn.Module, int], module: nn.Module, arguments: tuple[Tensor]) -> None:
    rows = arguments[0].flatten(end_dim=-2).float()
    sums[module] = sums.get(module, 0) + rows.square().sum(dim=0)
    tokens[module] = tokens.get(module, 0) + len(rows)


def _arguments(model: PreTrainedModel, inputs: Sequence[int], targets: Sequence[int]) -> dict[str, Any]:
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
