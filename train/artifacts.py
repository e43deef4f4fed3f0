"""What one stage hands to the next, as JSON beside the files it speaks of. Imports no torch.

`artifact.json` is written last, atomically: a stage folder that holds one is done.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

Family = Literal["encoder_decoder", "decoder_only"]
ARTIFACT = "artifact.json"
MEMORY_FILE = "memory.json"
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Artifact:
    """Base of what stages hand on; `kind` is the class name in the file."""

    def write(self, folder: Path) -> None:
        """Marks `folder` as done: writes `artifact.json` by rename, after everything else is on disk."""
        write_json(folder / ARTIFACT, {"kind": type(self).__name__, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The artifact of a finished stage.

        Raises:
            RuntimeError: if the stage is not done, or the file holds another kind.
        """
        path = folder / ARTIFACT
        if not path.is_file():
            raise RuntimeError(f"{folder} has no {ARTIFACT}: that stage has not finished; run it first")
        try:
            values = json.loads(path.read_text())
            if (kind := values.pop("kind")) != cls.__name__:
                raise RuntimeError(f"{path} holds a {kind}, not a {cls.__name__}: the folder belongs to another stage")
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RuntimeError(
                f"{path} cannot be read ({error}): another version wrote it, or it is damaged; delete {folder} and run again"
            ) from error


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The most memory that one process of a stage held; beside the artifact, as the parts of a stage and what stops it note theirs too."""

    device: str
    """The GPU, as torch names it, or `CPU`."""
    device_bytes: int | None
    """Memory of one GPU; None on a CPU."""
    processes: int
    peak_bytes: int
    """Of the process that held most: on a GPU what torch had allocated there, on a CPU what was resident, libraries included."""

    def write(self, folder: Path) -> None:
        """Notes it, unless an earlier start of the same stage held more on as many devices of the kind."""
        before = self.read(folder)
        if before is None or (replace(before, peak_bytes=0) != replace(self, peak_bytes=0)) or before.peak_bytes < self.peak_bytes:
            write_json(folder / MEMORY_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Of the stage, or of that of its parts which held most; None where an earlier version ran it."""
        found = [
            cls(**json.loads(path.read_text())) for path in (folder / MEMORY_FILE, *folder.glob(f"part-*/{MEMORY_FILE}")) if path.is_file()
        ]
        return max(found, key=lambda peak: peak.peak_bytes, default=None)


class Request:
    """Base of what a process of its own is asked to do: a dataclass of plain values, in a file of JSON."""

    __slots__ = ()

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        write_json(path, asdict(self))  # type: ignore[call-overload]  # those that derive from it are dataclasses

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class TaskFiles(Artifact):
    """The canonical examples of a task: train.jsonl, validation.jsonl, test.jsonl and rejected.jsonl."""

    digest: str
    """sha256 over the canonical files."""
    rows: dict[str, int]
    rejected: dict[str, int]
    leaked: int = 0
    """Training rows whose input is also a test row's; they stay in."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint(Artifact):
    """A model that plain transformers loads: `model/` in the stage's folder, safetensors and tokenizer."""

    family: Family
    num_parameters: int
    weight_bytes: int
    steps: int
    best_step: int
    validation: dict[str, float]
    counts: dict[str, int]
    """label_rows, rationale_rows, rows cut for length and the like: what the student really trained on."""
    max_input_tokens: int
    max_label_tokens: int
    max_rationale_tokens: int
    processes: int = 1
    seconds: float = 0.0
    """From when each start began to load; of a start that was stopped, until the state it saved last."""
    sparsity: dict[str, list[int]] = field(default_factory=dict)
    """Of a pruned one by kind of matrix: its weights, and how many of them are 0 in the file."""
    layer_sparsity: dict[str, list[int]] = field(default_factory=dict)
    """The same by layer, in their order."""
    compressed_bytes: int | None = None
    """Of a pruned one: what its weights' file takes when it is compressed (zlib)."""

    def plus_since(self, moment: float) -> Checkpoint:
        """With the seconds since a `time.monotonic()` besides."""
        return replace(self, seconds=self.seconds + time.monotonic() - moment)


@dataclass(frozen=True, slots=True)
class Records(Artifact):
    """What the teacher wrote: Parquet shards with a manifest in the stage's folder."""

    rows: dict[str, int]
    """Rows of each split."""
    parseable: dict[str, int]
    agreeing: dict[str, int]
    """Labels that are the gold one, without a hint."""
    generated_tokens: int = 0
    record_bytes: int = 0
    soft_label_tokens: int = 0
    sharding: str = "recorded"
    """replica, tensor or zero3; where the teacher does not run in our processes, its source: recorded, endpoint or vllm."""
    tensor_degree: int = 1
    processes: int = 1
    seconds: float = 0.0
    rationalized: dict[str, int] = field(default_factory=dict)
    """Records of each split whose rationale was written with the gold label as a hint."""
    unparseable: dict[str, int] = field(default_factory=dict)
    """Labels that cannot be used, by reason, over all splits."""
    mean_votes: float = 1.0
    """Samples that gave a record's label, on average over the usable ones; 1 where one was drawn."""


@dataclass(frozen=True, slots=True)
class DeployedModel(Artifact):
    """A file that a runtime loads: `model/` in the stage's folder."""

    target: str
    runtime: str
    family: Family
    weight_bytes: int
    """Bytes of the weights file alone."""
    total_bytes: int
    """Bytes of everything a user must copy: weights, configuration, tokenizer."""
    source_weight_bytes: int
    """Bytes of the fp32 checkpoint it was made from."""
    num_parameters: int
    max_input_tokens: int
    max_label_tokens: int
    num_tokens: int | None = None
    """Rows of the embedding; None where an earlier version made it."""
    seconds: float = 0.0
    bits_a_parameter: float | None = None
    """Measured in the file, over all of its tensors."""
    bits_a_weight: float | None = None
    """Of the matrices of the model's layers, with scales and zero points."""
    error_nats: float | None = None
    """Mean distance of log-probabilities to the fp32 model's, on tokens of training rows."""
    types: dict[str, int] = field(default_factory=dict)
    """Tensors by what they are stored as."""
    fallbacks: list[str] = field(default_factory=list)
    """Matrices of the layers that are stored as something else than the target says."""
    cuts_as_trained: bool | None = None
    """Whether the engine's own tokenizer gives texts the tokens that the student learnt; None where it has none."""


@dataclass(frozen=True, slots=True)
class EvalResult(Artifact):
    """One rung of the ladder on the test split; answers.jsonl beside it has one line an item."""

    rung: str
    runtime: str
    """What answered: transformers, ctranslate2, or the teacher's source (deepspeed, vllm, endpoint, recorded)."""
    num_items: int
    num_correct: int
    num_unparseable: int
    num_agreeing_with_teacher: int | None
    num_parameters: int | None
    weight_bytes: int | None
    total_bytes: int | None
    examples_per_second: dict[str, float] | None
    """By batch size, as text: {"1": ..., "32": ...}; None where nothing was run (recorded teacher)."""
    peak_memory_bytes: int | None
    """Peak resident memory of the process that served it (on a GPU: peak device memory)."""
    device: str
    load_seconds: float | None
    first_token_seconds: float | None = None
    """Of one prompt by itself, the mean."""
    token_seconds: float | None = None
    """Each token after the first, one prompt by itself, the mean."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON so that a reader sees the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The number of a process is its own within its node only.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
