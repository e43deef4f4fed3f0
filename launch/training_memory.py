"""The memory of a training step of `train.trainer`, by process. Arithmetic only: imports no torch.

A step's fullest moment may be the end of the forward pass, where all activations meet the head's logits; the start of the backward pass,
where the head's gradients and the first layer's meet them; the first reduction of a bucket of gradients; the embedding's gradient at the
end; or the update. Each is counted, and the largest taken.

Sources, beside the code of train/: Rajbhandari et al., ZeRO (arXiv 1910.02054), section 3; DeepSpeed 0.19.8, runtime/bf16_optimizer.py
(what ZeRO 1 is in bf16), runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py and partitioned_param_coordinator.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from launch.architecture import Architecture
from launch.memory import WORKSPACE_BYTES, Memory, fullest

_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once (`train.engine`)."""
_LIVE = 1_000_000_000
"""Elements of weights that ZeRO-3 holds whole at once, as a weight is kept that is soon needed again (`stage3_max_live_parameters`)."""
_SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3 updates at once (`sub_group_size`)."""
_CHUNK_BYTES = 256 * 2**20
_CHUNKS_A_PRODUCT = 4
"""Both of `train.head_loss`."""
_WORKSPACES = 2
"""The forward pass multiplies in one thread, the backward pass in another; counted on CPUs, too, which have none."""
_LIVE_CHUNKS = 7
"""Chunks in fp32 beside each other where a live teacher's distribution meets the student's: values, log-probabilities of both, their
gradient and what it is made of (`train.loss_gradients`)."""


@dataclass(frozen=True, slots=True)
class Step:
    """How a student is trained."""

    processes: int
    zero_stage: Literal[0, 1, 2, 3]
    precision: Literal["fp32", "bf16"]
    tokens: int
    """Of one forward: read by a decoder-only model, or by the encoder of an encoder-decoder."""
    targets: int
    """Tokens of one forward at which a loss is computed; what the decoder of an encoder-decoder reads."""
    longest: int
    """Tokens of a sequence; of use only where attention's scores are kept."""
    forwards: int = 1
    """Of one process in a step."""
    offload: bool = False
    checkpointing: bool = False
    compiled: bool = False
    graphs: bool = False
    """Whole passes are recorded as CUDA graphs."""
    adapters: int | None = None
    """Parameters of LoRA's adapters; None where all weights are trained."""
    masked: int = 0
    """Weights under a mask."""
    live: Architecture | None = None
    """A teacher beside the student."""

    @property
    def element(self) -> int:
        """Bytes of a number of the forward pass."""
        return 2 if self.precision == "bf16" else 4

    def under(self, zero_stage: Literal[0, 1, 2, 3], *, offload: bool = False) -> Step:
        """The same under another ZeRO stage: passes are recorded under 0 alone, and ZeRO 3 compiles nothing."""
        compiled = self.compiled and zero_stage < 3
        return replace(self, zero_stage=zero_stage, offload=offload, compiled=compiled, graphs=self.graphs and zero_stage == 0)


def training_memory(model: Architecture, step: Step) -> Memory:
    """The fullest moment of training, on each of the step's processes.

    A recorded pass has its own pool of memory, of the size of what plain passes leave free in torch's: the first of a size runs as it is.
    """
    most = fullest(moments(model, step).values())
    return replace(most, recorded=most.activations + most.head) if step.graphs else most


def host_bytes(model: Architecture, step: Step) -> int:
    """What an offloaded optimizer takes of the host's memory, by process: masters, moments and gradients in fp32, and weights in bf16."""
    each = 4 + 8 + 4 + (step.element if step.zero_stage < 3 else 0)
    return each * _share(_trained(model, step), step) if step.offload else 0


def adapter_parameters(model: Architecture, rank: int, modules: Sequence[str] | None) -> int:
    """Of LoRA's adapters: rank x (inputs + outputs) of each adapted layer.

    Args:
        model: that is adapted.
        rank: of each adapter.
        modules: names of the layers, or their ends; all but the head where None.
    """
    names = None if modules is None else {module.rpartition(".")[2] for module in modules}
    adapted = [sizes for name, sizes in model.linears.items() if names is None or name in names]
    return sum(rank * (inputs + outputs) * count for inputs, outputs, count in adapted)


def moments(model: Architecture, step: Step) -> dict[str, Memory]:
    """Every moment of a step that may be the fullest, the loading of the model among them."""
    states, kept = _states(model, step), kept_activations(model, step)
    lasting = states + Memory(buffers=_lasting_buffers(model, step) + _WORKSPACES * WORKSPACE_BYTES)
    gradient = step.element * model.embedding if step.adapters is None else 0
    # A tied embedding's gradient from the head waits for that from the embedding itself.
    waiting = gradient if model.tied else 0
    one = step.element * model.largest_matrix if step.adapters is None else 0  # a weight's gradient, before it is added to the others
    in_backward = lasting + Memory(gradients=one, buffers=_backward_buffers(model, step))
    saved = _head_saved(model, step)
    reduced, flattened = _reduction(model, step)
    return {
        "loading": _loading(model, step),
        "end of the forward pass": lasting + Memory(activations=kept, head=_head_forward(model, step)),
        "backward pass of the head": in_backward + Memory(activations=kept, head=2 * saved),
        "backward pass of a layer": in_backward + Memory(activations=kept + _layer_backward(model, step), head=waiting),
        "reduction of gradients": in_backward
        + Memory(gradients=_late_gradients(model, step), activations=int(kept * (1 - reduced)), head=waiting, buffers=flattened),
        "gradient of the embedding": in_backward
        + Memory(gradients=_late_gradients(model, step), head=max((3 if model.tied else 1) * gradient, _widened(model, step))),
        "update": lasting + Memory(gradients=_late_gradients(model, step), buffers=_update_buffers(model, step)),
    }


def _trained(model: Architecture, step: Step) -> int:
    return model.parameters if step.adapters is None else step.adapters


def _share(count: int, step: Step) -> int:
    return -(-count // step.processes)


def _is_summed(step: Step) -> bool:
    """Gradients in bf16 are added up in fp32: of several forwards, or several processes."""
    return step.precision == "bf16" and (step.forwards > 1 or step.processes > 1)


# ----- weights, gradients and optimizer -----


def _states(model: Architecture, step: Step) -> Memory:
    """What stays from step to step."""
    trained, size = _trained(model, step), step.element
    weights = size * (trained + (model.parameters if step.adapters is not None else 0))
    if step.zero_stage == 0:
        # In fp32 the weights are the masters.
        gradients, optimizer = size * trained + (4 * trained if _is_summed(step) else 0), (12 if size == 2 else 8) * trained
    else:
        gradients, optimizer = _lasting_gradients(trained, step), 0 if step.offload else 12 * _share(trained, step)
    if step.zero_stage == 3:
        weights = _share(weights, step)
    teacher = size * step.live.parameters if step.live is not None else 0
    return Memory(weights=weights, gradients=gradients, optimizer=optimizer, masks=step.masked, teacher=teacher)


def _lasting_gradients(trained: int, step: Step) -> int:
    """Of ZeRO 1 to 3."""
    if step.zero_stage == 1:
        # Each weight's gradient stays, set to 0; their sum over micro-batches is in fp32. Offloaded, there is the sum alone.
        return (4 if step.offload or step.precision == "fp32" else 6) * trained
    if step.zero_stage == 2:
        return 4 * _share(trained, step) if step.forwards > 1 else 0
    return 0 if step.offload else 4 * _share(trained, step)


def _late_gradients(model: Architecture, step: Step) -> int:
    """What ZeRO 2 makes at the first reduction of a step's only forward: this process's share of the gradients, in fp32."""
    return 4 * _share(_trained(model, step), step) if step.zero_stage == 2 and step.forwards == 1 else 0


def _loading(model: Architecture, step: Step) -> Memory:
    """ZeRO 0 brings the model to the device in fp32 and lays what is trained into buffers; the others convert it before."""
    if step.zero_stage:
        return Memory()
    trained, size = _trained(model, step), step.element
    frozen = model.parameters if step.adapters is not None else 0
    return Memory(weights=4 * (frozen + trained), gradients=size * trained, optimizer=(4 + size if size == 2 else 4) * trained)


# ----- what is on its way between processes -----


def _bucket(model: Architecture, step: Step) -> int:
    return min(_BUCKET, _trained(model, step))


def _lasting_buffers(model: Architecture, step: Step) -> int:
    """What ZeRO keeps: a gradient on its way to the host (1, 2); the bucket of gradients, and gathered weights (3)."""
    if step.zero_stage in (1, 2):
        largest = min(_trained(model, step), max(model.embedding, model.largest_matrix))
        return step.element * largest if step.offload else 0
    if step.zero_stage == 3:
        return step.element * (_bucket(model, step) + min(model.parameters, _LIVE))
    return 0


def _backward_buffers(model: Architecture, step: Step) -> int:
    """The bucket that ZeRO 2 (and 1, where DeepSpeed's stage 1 is not its bf16 optimizer) fills in each backward pass."""
    if step.zero_stage == 2:
        return step.element * _bucket(model, step)
    return 4 * _bucket(model, step) if step.zero_stage == 1 and (step.offload or step.precision == "fp32") else 0


def _reduction(model: Architecture, step: Step) -> tuple[float, int]:
    """The share of the layers whose backward pass has run when the first bucket is full, and what reducing that takes."""
    bucket, size = _bucket(model, step), step.element
    done = min(1.0, bucket / max(1, model.body if step.adapters is None else _trained(model, step)))
    if step.zero_stage == 2:
        return done, size * bucket
    if step.zero_stage == 3:
        return done, size * bucket + 4 * _share(bucket, step)
    return 1.0, 0


def _widened(model: Architecture, step: Step) -> int:
    """ZeRO 1 adds a gradient to the sum in fp32, through a copy of it."""
    is_bf16 = step.zero_stage == 1 and step.precision == "bf16"
    return 4 * (model.embedding if step.adapters is None else 0) if is_bf16 else 0


def _update_buffers(model: Architecture, step: Step) -> int:
    """ZeRO 2 takes norms through a copy in fp64; ZeRO 3 too, and updates from a copy of the gradients."""
    trained, largest = _share(_trained(model, step), step), max(model.embedding, model.largest_matrix)
    if step.offload or step.zero_stage < 2:
        return 0
    if step.zero_stage == 2:
        return 8 * min(trained, largest)
    return max(8 * min(trained, _share(largest, step)), 4 * min(_share(_SUB_GROUP, step), trained))


# ----- the head -----


def head_rows(vocabulary: int, targets: int) -> tuple[int, int]:
    """Rows of logits at once in the model's precision, and of a chunk in fp32 (`train.head_loss`)."""
    chunk = max(256, _CHUNK_BYTES // (4 * vocabulary) // 128 * 128)
    return max(1, min(targets, _CHUNKS_A_PRODUCT * chunk)), min(targets, chunk)


def _head_forward(model: Architecture, step: Step) -> int:
    """Logits, the gradients made of them, and the states at the targets."""
    size, (rows, chunk) = step.element, head_rows(model.vocabulary, step.targets)
    logits, states = size * rows * model.vocabulary, size * model.width * (2 * step.targets + rows)
    if step.live is not None:
        logits += size * rows * model.vocabulary + 4 * _LIVE_CHUNKS * chunk * model.vocabulary
    if step.adapters is not None:
        return logits + states
    if step.targets <= rows:
        return logits + size * model.embedding + states
    # The weight's gradient is summed in fp32, then rounded, when the logits are gone.
    return max(logits + 4 * model.embedding, (4 + size if size == 2 else 4) * model.embedding) + states


def _head_saved(model: Architecture, step: Step) -> int:
    """What is made in the forward pass for the backward pass: gradients of weight and states."""
    return step.element * ((model.embedding if step.adapters is None else 0) + model.width * step.targets)


# ----- the layers -----


def kept_activations(model: Architecture, step: Step) -> int:
    """What the layers keep for the backward pass."""
    size = step.element
    last_norm = (size + 4) * model.width * (step.targets if model.encoder_layers else step.tokens)
    if step.checkpointing:
        return size * model.width * _layer_tokens(model, step) + last_norm
    return _all_layers(model, step) + last_norm


def _layer_tokens(model: Architecture, step: Step) -> int:
    """Tokens times layers that read them."""
    if model.encoder_layers:
        return model.encoder_layers * step.tokens + model.layers * step.targets
    return model.layers * step.tokens


def _all_layers(model: Architecture, step: Step) -> int:
    each = token_bytes(model, step)
    if not model.encoder_layers:
        return model.layers * step.tokens * each
    # Cross-attention keeps queries, output and scores of the decoder's tokens, keys and values of the encoder's.
    cross = _norm_bytes(model, step) + step.element * 2 * model.queries + _score_bytes(model, step)
    decoder = model.layers * (step.targets * (each + cross) + step.tokens * step.element * 2 * model.queries)
    return model.encoder_layers * step.tokens * each + decoder


def token_bytes(model: Architecture, step: Step) -> int:
    """What a layer keeps of a token."""
    size = step.element
    attention = size * (2 * model.queries + 2 * model.keys) + (_score_bytes(model, step) if not model.packs else 4 * model.heads)
    if size == 4 and model.packs:
        # Without flash attention sequences lie side by side, and the output goes back to its place in the row.
        attention += size * model.queries
    # Inputs of the activation function, what it gives, the product, and the other factor; a compiler computes one of them again.
    inner = (3 if step.compiled else 4) if model.gated else 2
    return model.norms * _norm_bytes(model, step) + attention + size * inner * model.experts_a_token * model.neurons


def _norm_bytes(model: Architecture, step: Step) -> int:
    """Of a norm: its input (in fp32 where nothing is compiled), normalized too where its weight is trained, its output, and a scale."""
    size = step.element
    if step.compiled:
        return 2 * size * model.width + 4
    return (4 + (size if step.adapters is None else 0) + size) * model.width + 4


def _score_bytes(model: Architecture, step: Step) -> int:
    """Attention's probabilities, where they are made: in fp32 and in the forward's precision."""
    return (4 + step.element) * model.heads * step.longest


def _layer_backward(model: Architecture, step: Step) -> int:
    """What the backward pass of the last layer adds: gradients inside the feed-forward layer, and with checkpointing its activations."""
    tokens = step.targets if model.encoder_layers else step.tokens
    inner = step.element * tokens * (2 * model.experts_a_token * model.neurons + 2 * model.width)
    if step.adapters is not None:  # an adapter's output is scaled and added beside the layer's
        inner += step.element * tokens * model.neurons
    return inner + (tokens * token_bytes(model, step) if step.checkpointing else 0)
