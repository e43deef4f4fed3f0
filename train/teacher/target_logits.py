"""The teacher's logits at target tokens, from one forward over many sequences.

Three forms, one result. Joined: sequences in one row without padding (`attention.py`), what their contexts begin with computed once, and
the context of several targets once. Padded: any other decoder-only model, and ZeRO-3. Encoder-decoder: the target in the decoder.
The head is computed at scored tokens only, by the model itself (`logits_to_keep`), so that its own scaling or capping of logits holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from data.prompts import TextFormat
from train.engine import InferenceModel
from train.runtimes import pad
from train.teacher.attention import Joined, KeyValueCache, Layer, attending
from train.varlen import UnsupportedAttention

_MIN_PREFIX = 16
"""Tokens that contexts must share for a forward of their own to pay."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A context and the targets that may follow it, each on its own."""

    context: list[int]
    """At least one token; an encoder-decoder reads it in the encoder."""
    targets: list[list[int]]
    first: int = 0
    """How many tokens at the head of a target are not scored."""

    @property
    def num_rows(self) -> int:
        """Tokens that are scored."""
        return sum(len(target) - self.first for target in self.targets)

    @property
    def longest(self) -> int:
        """Tokens of context and longest target."""
        return len(self.context) + max(map(len, self.targets))


class TargetLogits:
    """Forwards of one placed teacher."""

    def __init__(self, teacher: InferenceModel, form: TextFormat) -> None:
        """Looks at what the teacher can do; a tensor group's processes must all call it.

        Args:
            teacher: placed on its devices.
            form: for family and padding.
        """
        self.teacher, self.form = teacher, form
        self._device = teacher.world.device
        self._encoder_decoder = form.family == "encoder_decoder"
        known = inspect.signature(teacher.model.forward).parameters
        self._keeps, self._positions = "logits_to_keep" in known, "position_ids" in known
        self._prefix_ids: list[int] = []
        self._cache = KeyValueCache(1, 0)
        self._can_join = self._keeps and self._positions and not self._encoder_decoder and not teacher.in_step and self._attends()
        self.joins = self._can_join
        """Sequences are joined; decided anew by `prepare`."""

    def prepare(self, units: Sequence[Unit]) -> None:
        """Chooses the form for the forwards over these units, and computes what all their contexts begin with.

        Args:
            units: all that the next forwards may hold.
        """
        config = self.teacher.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        longest = max((unit.longest for unit in units), default=0)
        self.joins = self._can_join and longest <= min((w for w in windows if w is not None), default=longest)
        contexts = [unit.context for unit in units]
        shared = _common_start(contexts) if self.joins and len(contexts) > 1 else []
        if len(shared) < _MIN_PREFIX:
            shared = []
        if shared != self._prefix_ids:
            self._prefix_ids, self._cache = shared, KeyValueCache(1, 0, len(shared))
            if shared:
                self._row(self._cache, [shared], [0], [0], [0], store=True, as_prefix=True)

    def cost(self, units: Sequence[Unit]) -> tuple[int, int]:
        """Tokens that a forward over these units computes, and rows of logits that it makes."""
        targets = [target for unit in units for target in unit.targets]
        if self.joins:
            contexts = sum(len(unit.context) - len(self._prefix_ids) for unit in units)
            return contexts + sum(map(len, targets)), sum(unit.num_rows for unit in units)
        if self._encoder_decoder:
            decoded = len(targets) * max(map(len, targets))
            return len(units) * max(len(unit.context) for unit in units) + decoded, decoded
        kept = max(len(target) - unit.first for unit in units for target in unit.targets)
        return len(targets) * max(unit.longest for unit in units), len(targets) * kept

    def __call__(self, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
        """One forward.

        Args:
            units: at least one.

        Returns:
            (logits [R, V] in the model's dtype, rows [n] int64: those of the scored tokens, unit by unit, target by target).
        """
        if self.joins:
            return self._joined(units)
        return self._decoder(units) if not self._encoder_decoder else self._encoder(units)

    def idle(self) -> None:
        """A forward over one token, for a process that has nothing left while the others go on."""
        self([Unit([self.form.eos_id], [[self.form.eos_id]])])

    # ----- sequences joined in a row -----

    def _attends(self) -> bool:
        """The joined form holds for this model: every layer's attention goes through it and asks for nothing that it does not do."""
        cache = KeyValueCache(1, 0)
        try:
            self._row(cache, [[self.form.eos_id] * 2], [0], [0], [0])
        except UnsupportedAttention:
            return False
        return len(cache.layers) == int(self.teacher.model.config.get_text_config().num_hidden_layers)

    def _joined(self, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
        prefix, cache = len(self._prefix_ids), self._cache
        # The last token of a context is read with each target: its logits predict the first one.
        heads = [unit.context[prefix:-1] for unit in units] if any(len(unit.targets) > 1 for unit in units) else [[] for _ in units]
        if filled := [n for n, head in enumerate(heads) if head]:
            cache = _with_room(cache, len(units), max(map(len, heads)))
            self._row(cache, [heads[n] for n in filled], filled, [0] * len(filled), [0], store=True)
        own: list[list[int]] = []
        slots: list[int] = []
        rows: list[int] = []
        begin = 0
        for slot, unit in enumerate(units):
            done = prefix + len(heads[slot])
            for target in unit.targets:
                own.append((unit.context + target[:-1])[done:])
                slots.append(slot if filled else 0)
                first = begin + len(unit.context) - 1 - done + unit.first
                begin += len(own[-1])
                rows.extend(range(first, begin))
        logits = self._row(cache, own, slots, [len(heads[slot]) for slot in slots] if filled else [0] * len(own), rows)
        return logits, torch.arange(len(rows), device=self._device)

    def _row(
        self,
        cache: KeyValueCache,
        sequences: Sequence[list[int]],
        slots: Sequence[int],
        cached: Sequence[int],
        rows: Sequence[int],
        *,
        store: bool = False,
        as_prefix: bool = False,
    ) -> Tensor:
        """Logits [len(rows), V] at tokens of the row that the sequences make."""
        prefix = 0 if as_prefix else cache.prefix
        ends = torch.tensor([0, *map(len, sequences)]).cumsum(0)
        positions = [prefix + before + n for before, ids in zip(cached, sequences, strict=True) for n in range(len(ids))]
        batch = Joined(
            starts=self.placed(ends, torch.int32),
            longest=max(map(len, sequences)),
            slots=self.placed(slots, torch.int32),
            cached=self.placed(cached, torch.int32),
            prefixed=self.placed([int(prefix > 0)] * len(sequences), torch.int32),
            store=store,
            as_prefix=as_prefix,
        )
        with attending(self.teacher.model, cache, batch):
            found: Tensor = self.teacher.model(
                input_ids=self.placed([token for ids in sequences for token in ids])[None],
                position_ids=self.placed(positions)[None],
                logits_to_keep=self.placed(rows),
                use_cache=False,
            ).logits[0]
        return found

    # ----- sequences padded to the longest -----

    def _decoder(self, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
        # Padded on the left, so that the targets end together and the head can leave out what stands before them.
        ids, mask = pad([unit.context + target[:-1] for unit in units for target in unit.targets], self.form.pad_id, left=True)
        inputs = {"input_ids": self.placed(ids), "attention_mask": self.placed(mask)}
        if self._positions:
            inputs["position_ids"] = self.placed((mask.cumsum(1) - 1).clamp(min=0))
        lengths = [len(target) - unit.first for unit in units for target in unit.targets]
        keep = {"logits_to_keep": max(lengths)} if self._keeps else {}
        logits: Tensor = self.teacher.model(**inputs, **keep, use_cache=False).logits
        width = logits.shape[1]
        rows = [n * width + width - length + at for n, length in enumerate(lengths) for at in range(length)]
        return logits.flatten(0, 1), self.placed(rows)

    def _encoder(self, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
        model = self.teacher.model
        start = getattr(model.config, "decoder_start_token_id", None) or 0
        owners = [n for n, unit in enumerate(units) for _ in unit.targets]
        ids, mask = (self.placed(t) for t in pad([unit.context for unit in units], self.form.pad_id, left=False))
        decoder, _ = pad([[start, *target[:-1]] for unit in units for target in unit.targets], self.form.pad_id, left=False)
        if len(owners) == len(units):
            read = {"input_ids": ids}
        elif self.teacher.in_step:  # every process gathers the same layers in the same order: through the whole model only
            read, mask = {"input_ids": ids[owners]}, mask[owners]
        else:
            states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            read, mask = {"encoder_outputs": BaseModelOutput(last_hidden_state=states[owners])}, mask[owners]
        logits: Tensor = model(**read, attention_mask=mask, decoder_input_ids=self.placed(decoder), use_cache=False).logits
        starts = [n * logits.shape[1] for n in range(len(owners))]
        rows = [starts[n] + at for n, (owner, target) in enumerate(_targets(units)) for at in range(units[owner].first, len(target))]
        return logits.flatten(0, 1), self.placed(rows)

    def placed(self, values: Sequence[int] | Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers on the teacher's device; the host does not wait for what runs there."""
        tensor = torch.as_tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def _targets(units: Sequence[Unit]) -> list[tuple[int, list[int]]]:
    return [(n, target) for n, unit in enumerate(units) for target in unit.targets]


def _common_start(contexts: Sequence[list[int]]) -> list[int]:
    """What all contexts begin with, leaving each at least one token of its own."""
    first, last = min(contexts), max(contexts)  # in the order of words: what these two share, all share
    length = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: min(length, min(map(len, contexts)) - 1)]


def _with_room(cache: KeyValueCache, slots: int, capacity: int) -> KeyValueCache:
    """A cache with the same prefix and room for sequences after it."""
    layers = {}
    for number, layer in cache.layers.items():
        heads, _, width = layer.prefix_keys.shape
        keys, values = (layer.prefix_keys.new_zeros(slots, heads, capacity, width) for _ in range(2))
        layers[number] = Layer(keys, values, layer.prefix_keys, layer.prefix_values)
    return KeyValueCache(slots, capacity, cache.prefix, layers)
