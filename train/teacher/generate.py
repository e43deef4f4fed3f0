"""The live teacher writes: which loop decodes, and the plain one.

A decoder-only teacher on a GPU decodes in `decode.py`; everything else - a CPU, an encoder-decoder, ZeRO-3 - through the model's own
`generate`. Either way the next token is chosen by `choose`, whose draws depend on the request's key alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from data.examples import TaskExample
from data.prompts import TextFormat
from train.engine import InferenceModel
from train.runtimes import pad
from train.teacher.draws import draw_keys, gumbel
from train.teacher.writing import Request, Sampling, Writer, Written

_CPU_BATCH = 32
_GPU_BATCH = 256
CHECK_EVERY = 8
"""Steps between two looks for rows that have ended, where looking makes the device wait."""


class Prompts(Protocol):
    """What builds a local model's requests."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded; the same for every request of a teacher."""

    form: TextFormat
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    """Any of them ends an answer."""
    vocabulary: int
    """Tokens that the tokenizer knows; a model's rows beyond them are never written."""
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]

    def ended(self, ids: Sequence[int]) -> bool:
        """The newest tokens hold an end-of-sequence token, or their text a stop string."""
        return any(eos in ids for eos in self.eos_ids) or self.stops(ids[-self.tail :])

    @property
    def tail(self) -> int:
        """How many of the newest tokens can hold a stop string that was not there at the last look (no token is shorter than a byte)."""
        return CHECK_EVERY + max((len(stop.encode()) for stop in self.stop), default=0)

    def stops(self, ids: Sequence[int]) -> bool:
        """The text of `ids` holds a stop string."""
        return bool(self.stop) and any(stop in self._text(ids) for stop in self.stop)

    def written(self, ids: Sequence[int]) -> Written:
        """What a row of tokens says, cut at the first end-of-sequence token and before the first stop string.

        The result does not depend on how far the row was decoded beyond its end.
        """
        ends = [ids.index(eos) for eos in self.eos_ids if eos in ids]
        kept = list(ids[: min(ends, default=len(ids))])
        if self.stops(kept):
            low, high = 1, len(kept)  # the fewest tokens whose text holds a stop string
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.stops(kept[:middle]) else (middle + 1, high)
            kept = kept[:low]
        text = self._text(kept)
        end = min((text.index(stop) for stop in self.stop if stop in text), default=len(text))
        return Written(text[:end].strip(), len(kept))

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def choose(logits: Tensor, sampling: Sampling, keys: Tensor, steps: Tensor) -> Tensor:
    """The next token of each row: the most probable one, or a draw by the Gumbel-max trick.

    Args:
        logits: [B, V], any float dtype.
        sampling: temperature and nucleus.
        keys: [B] int64, of the requests.
        steps: [B] int64, how many tokens each row has written.

    Returns:
        [B] int64.

    Source:
        Nucleus: Holtzman et al. 2020, arXiv 1904.09751.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the mass before each token: the first is always kept
        scores = scores.masked_fill(torch.empty_like(before, dtype=torch.bool).scatter_(1, order, before >= sampling.top_p), float("-inf"))
    return (scores + gumbel(keys, steps, logits.shape[-1])).argmax(dim=-1)


def open_writer(
    teacher: InferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    form: TextFormat,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int | Literal["auto"],
) -> Writer:
    """The writer for a placed model.

    Args:
        teacher: placed on its devices.
        tokenizer: the teacher's.
        form: its family and special tokens.
        prompts: builds the requests.
        max_new_tokens: most tokens written for one request.
        sampling: greedy or sampled.
        batch_size: most requests decoded at once; auto: by free memory on a GPU, 32 elsewhere.
    """
    known = getattr(getattr(teacher.model, "generation_config", None), "eos_token_id", None)
    ends = known if isinstance(known, list) else [known] if known is not None else []
    decoding = Decoding(
        form=form,
        tokenizer=tokenizer,
        eos_ids=tuple(dict.fromkeys([form.eos_id, *prompts.stop_ids, *ends])),
        vocabulary=len(tokenizer),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=prompts.stop,
    )
    if form.family == "decoder_only" and teacher.world.device.type == "cuda" and not teacher.in_step:
        from train.teacher.decode import LoopWriter
        from train.teacher.trial import reason_against

        if (reason := reason_against(teacher)) is None:
            return LoopWriter(teacher, decoding, prompts, batch_size=batch_size)
        if teacher.world.is_main:
            logging.getLogger(__name__).warning("teacher: decoding with plain generate, because %s", reason)
    return PlainWriter(teacher, decoding, prompts, batch_size=_plain_batch(teacher, decoding) if batch_size == "auto" else batch_size)


def _plain_batch(teacher: InferenceModel, decoding: Decoding) -> int:
    """Requests that half of a GPU's free memory holds at their longest, as `generate` copies its cache when that grows; 32 on a CPU."""
    if teacher.world.device.type != "cuda":
        return _CPU_BATCH
    from train.teacher.decode import free_bytes, token_bytes

    longest = decoding.form.max_input_tokens + decoding.max_new_tokens
    return max(1, min(_GPU_BATCH, free_bytes(teacher) // 2 // (longest * token_bytes(teacher))))


class PlainWriter:
    """The model's own `generate`, in batches of like length; a chunk's batches hold nothing of another chunk."""

    def __init__(self, teacher: InferenceModel, decoding: Decoding, prompts: Prompts, *, batch_size: int) -> None:
        self.teacher, self.decoding, self.prompts, self.batch_size = teacher, decoding, prompts, batch_size
        form = decoding.form
        # A hub model's own settings (penalties, a temperature) would make this something else than what was configured.
        teacher.model.generation_config = GenerationConfig(
            eos_token_id=list(decoding.eos_ids),
            pad_token_id=form.pad_id,
            decoder_start_token_id=getattr(teacher.model.config, "decoder_start_token_id", None),
        )

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example."""
        return self.prompts.request(example, hint, key)

    def write(self, work: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Written]]]:
        """Answers chunk by chunk; out of memory, it goes on with batches of half the size."""
        for number, requests in work:
            yield number, self._answers(requests)

    def _answers(self, requests: Sequence[Request]) -> list[Written]:
        found: dict[int, Written] = {}
        batches = batches_by_length([request.ids for request in requests], self.batch_size)
        # In step, a process with fewer batches than another answers its first request again.
        batches += [batches[0][:1]] * (self.teacher.most(len(batches)) - len(batches))
        while batches:
            positions = batches[0]
            try:
                rows = self._generate([requests[n] for n in positions])
            except torch.OutOfMemoryError:
                # Processes in step cannot halve apart: one would wait for the other.
                if len(positions) == 1 or self.teacher.sharding != "replica":
                    raise
                torch.cuda.empty_cache()
                self.batch_size = len(positions) // 2
                batches = [part for batch in batches for part in _parts(batch, self.batch_size)]
                continue
            found |= {n: self.decoding.written(row) for n, row in zip(positions, rows, strict=True)}
            batches.pop(0)
        return [found[n] for n in range(len(requests))]

    @torch.no_grad()
    def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        decoder_only = self.decoding.form.family == "decoder_only"
        ids, mask = pad([request.ids for request in requests], self.decoding.form.pad_id, left=decoder_only)
        device = next(self.teacher.model.parameters()).device
        start = ids.shape[1] if decoder_only else 1
        output = self.teacher.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.decoding.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[_Chosen(self.decoding, draw_keys([request.key for request in requests], device), start)],
            stopping_criteria=[_Stopped(self.decoding, start)] if self.decoding.stop else None,
            synced_gpus=self.teacher.in_step,
        )
        rows: list[list[int]] = output[:, start:].tolist()
        return rows


class _Chosen(LogitsProcessor):  # type: ignore[misc]
    """Leaves `generate`, which takes the largest score, no other choice than `choose`'s."""

    def __init__(self, decoding: Decoding, keys: Tensor, start: int) -> None:
        self.decoding, self.keys, self.start = decoding, keys, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = torch.full_like(self.keys, input_ids.shape[1] - self.start)
        chosen = choose(scores[:, : self.decoding.vocabulary], self.decoding.sampling, self.keys, steps)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends rows whose newest tokens spell a stop string."""

    def __init__(self, decoding: Decoding, start: int) -> None:
        self.decoding, self.start = decoding, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        newest = input_ids[:, max(self.start, input_ids.shape[1] - self.decoding.tail) :].tolist()
        return torch.tensor([self.decoding.stops(row) for row in newest], device=input_ids.device)


def batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Positions of `prompts` in batches of like length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    return _parts(order, batch_size)


def _parts(positions: Sequence[int], size: int) -> list[list[int]]:
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
