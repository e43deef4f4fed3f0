"""How long to wait before a server is asked again."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between tries: exponential, with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    first_seconds: float = 1.0
    longest_seconds: float = 60.0

    def pause(self, tries: int) -> float:
        """Seconds to wait after this many tries (1 or more)."""
        return random.uniform(0.0, min(self.longest_seconds, self.first_seconds * 2.0 ** min(tries - 1, 30)))


def wait_seconds(headers: Mapping[str, str], now: float) -> float:
    """How long a refusal asks to wait; 0 where it does not say.

    Args:
        headers: of the response, names in lower case (or a mapping that does not mind): retry-after-ms, retry-after (seconds, or an HTTP
            date), and OpenAI's x-ratelimit-reset-* beside an x-ratelimit-remaining-* of 0.
        now: seconds since 1970.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"\d+(\.\d+)?", value):
            return float(value) * unit
        if value and name == "retry-after":
            return _until(value, now)
    resets = (
        headers.get(f"x-ratelimit-reset-{of}", "") for of in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{of}") == "0"
    )
    return max((sum(float(n) * _UNITS[unit] for n, unit in _DURATION.findall(reset)) for reset in resets), default=0.0)


def _until(date: str, now: float) -> float:
    try:
        moment = parsedate_to_datetime(date)
    except ValueError:
        return 0.0
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now)
