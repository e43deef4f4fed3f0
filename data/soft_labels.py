"""Codecs of the teacher's distributions: how soft labels lie in memory and in Parquet. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SOFT_LABEL_FIELDS = pa.struct(
    [
        pa.field("ids", pa.list_(pa.int32())),
        pa.field("log_probs", pa.list_(pa.float32())),
        pa.field("target_log_probs", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class TopK:
    """The k largest probabilities at each of T target tokens; the rest of the mass is one more bucket.

    The missing mass is 1 - sum(exp(log_probs)): renormalising the k away would bias the student's gradient.
    """

    ids: NDArray[np.int32]
    """Token ids [T, k]."""
    log_probs: NDArray[np.float32]
    """Natural logarithms of their probabilities [T, k], at temperature 1."""
    target_log_probs: NDArray[np.float32]
    """Log-probability of the target token itself [T]; its negative mean is the teacher's cross-entropy (self-check)."""

    def __post_init__(self) -> None:
        assert self.ids.shape == self.log_probs.shape, (self.ids.shape, self.log_probs.shape)
        assert self.target_log_probs.shape == self.ids.shape[:1], (self.target_log_probs.shape, self.ids.shape)

    def __len__(self) -> int:
        return len(self.target_log_probs)

    def cut(self, length: int) -> TopK:
        """The soft labels of the first `length` tokens."""
        return TopK(self.ids[:length], self.log_probs[:length], self.target_log_probs[:length])

    def to_arrow(self) -> dict[str, Any]:
        """A value of the Arrow struct `SOFT_LABEL_FIELDS`."""
        return {"ids": self.ids.ravel(), "log_probs": self.log_probs.ravel(), "target_log_probs": self.target_log_probs}

    @classmethod
    def from_arrow(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_arrow`."""
        targets = np.asarray(value["target_log_probs"], dtype=np.float32)
        shape = (len(targets), len(value["ids"]) // max(1, len(targets)))
        return cls(np.asarray(value["ids"], np.int32).reshape(shape), np.asarray(value["log_probs"], np.float32).reshape(shape), targets)
