"""What every source of rationales has in common: requests in, texts out, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from data.examples import TaskExample


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One text to write."""

    key: int
    """Seeds its draws (`draws.record_key`): the same request is answered the same in any company."""
    ids: tuple[int, ...] = ()
    """The prompt as token ids, for a model that runs here."""
    text: str = ""
    """The prompt as text, for a server that wants no messages."""
    messages: tuple[dict[str, str], ...] = ()
    """The prompt as chat messages (role, content), for a server that wants them."""


@dataclass(frozen=True, slots=True)
class ServerToken:
    """A token that a server generated, with the most probable tokens at its place."""

    text: bytes
    """Empty for what has no text, such as most servers' end of sequence."""
    id: int | None
    """None where it is not known which token of the vocabulary it is."""
    log_prob: float
    """Natural logarithm, as the server gives it: vLLM and llama.cpp at temperature 1, whatever they sample at."""
    top: tuple[tuple[int, float], ...]
    """(id, log-probability) of the tokens known, most probable first."""


@dataclass(frozen=True, slots=True)
class Written:
    """What came back for a request."""

    text: str
    """Without special tokens and outer white space; ends before the first stop string, if there was one."""
    num_tokens: int
    """Tokens generated, the end-of-sequence token not counted; 0 where a server does not tell."""
    tokens: tuple[ServerToken, ...] = ()
    """All that a server generated, where its log-probabilities were asked for; `text` may end before."""


class Writer(Protocol):
    """A teacher that writes."""

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example; `hint` is the gold label where the teacher is asked to explain it (STaR)."""

    def write(self, work: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Written]]]:
        """Answers chunks of requests.

        Args:
            work: (number, requests); taken only when there is room for them, so that an iterator may claim work as it goes.

        Yields:
            (number, answers in the order of the requests), each chunk when it is whole, in any order.
        """
