"""How much arithmetic a training needs, and what share of a device's peak it reaches. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from data.batches import read_tokens
from data.rows import TrainSequence


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Floating-point operations of a model's forward and backward, by what it reads."""

    per_input_token: float
    """Of the weights that an input token meets; for an encoder-decoder those of the encoder."""
    per_target_token: float
    """Of those that a target token meets besides: the decoder's where there is one."""
    head: float
    """Of the head, for a predicted token."""
    attention: float
    """Times the square of a sequence's length: scores and their products with values, the causal half of them; decoder-only."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Arithmetic:
        """Counted from a model's matrices: two operations a weight and token, three times over with the backward pass."""
        head = _operations(model.get_output_embeddings())
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder:
            return cls(_operations(model.get_encoder()), _operations(model.get_decoder()), head, 0.0)
        body = _operations(model) - head
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        return cls(body, body, head, 6.0 * config.num_hidden_layers * width)

    def useful(self, sequences: Sequence[TrainSequence]) -> float:
        """Operations that these sequences need: no padding, no head where nothing is predicted, nothing computed twice."""
        inputs, targets = sum(len(s.input_ids) for s in sequences), sum(len(s.target_ids) for s in sequences)
        squares = sum(read_tokens(s) ** 2 for s in sequences)
        # A decoder-only model reads all but the last target token.
        read = targets - len(sequences) if self.attention else targets
        return inputs * self.per_input_token + read * self.per_target_token + targets * self.head + squares * self.attention


def _operations(module: nn.Module) -> float:
    """Of one token: two for each weight of a matrix in the forward pass, twice that in the backward pass, once for a frozen one.

    Embeddings are left out: a look-up multiplies nothing.
    """
    layers = [m for m in module.modules() if not isinstance(m, nn.Embedding)]
    matrices = [p for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2]
    return float(sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices))
