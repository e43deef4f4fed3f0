"""A server of OpenAI's protocol: JSON goes out, JSON comes back, and what fails for a while is tried again."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

import httpx

from train.config import EndpointConfig
from train.teacher.pauses import Backoff, wait_seconds

T = TypeVar("T")

_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""Refusals that another try may not meet, as all of 500 and above."""
_LONGEST_WAIT_SECONDS = 3600.0
"""What a server may ask to wait before it is better to come back another time."""
_QUIET_SECONDS = 30.0
"""Between two lines about failures."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A try that was in vain."""

    reason: str
    kind: str
    """Names it among the counts: a status, `timeout`, `connection`, `garbage`."""
    wait_seconds: float = 0.0
    """What the server asks for."""

    @property
    def throttled(self) -> bool:
        return self.kind == "429"


class Server:
    """One address with its key. Lives in one event loop; `post` may run there as often as there is work."""

    def __init__(self, config: EndpointConfig, model: str, backoff: Backoff) -> None:
        """Opens no connection yet.

        Raises:
            ValueError: if the key cannot be sent.
        """
        self.config = config
        self.model = model
        self.backoff = backoff
        self.failures: Counter[str] = Counter()
        """Tries in vain by status, `timeout`, `connection` or `garbage`."""
        self._num_answered = 0
        self._resume_at = 0.0
        self._told_at = -_QUIET_SECONDS
        self._key = api_key(config.key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connections = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        # The whole exchange has one deadline (in _try): a server that sends a byte now and then is no better than a silent one.
        self._client = httpx.AsyncClient(headers=headers, limits=connections, timeout=None)

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.aclose()

    async def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Asks until there is an answer.

        Args:
            path: below the server's address, such as /completions.
            body: sent as JSON.
            read: takes the answer from the decoded JSON; its ValueError counts as a try in vain.

        Raises:
            RuntimeError: if the server refuses for good, or the tries are used up.
        """
        tries = 0
        while True:
            await self._pause_over()
            answered_before = self._num_answered
            result = await self._try(path, body, read)
            if not isinstance(result, _Failure):
                self._num_answered += 1
                return result
            self.failures[result.kind] += 1
            # While a server that limits its rate answers others, only patience is missing: such a try does not count.
            tries += not (result.throttled and self._num_answered > answered_before)
            if tries > self.config.retries:
                raise RuntimeError(f"{self._name} gave no answer in {tries} tries, the last time because {result.reason}")
            await self._wait(result, tries)

    async def _wait(self, failure: _Failure, tries: int) -> None:
        pause = max(self.backoff.pause(max(1, tries)), failure.wait_seconds)
        now = time.monotonic()
        if failure.throttled:
            self._resume_at = max(self._resume_at, now + pause)
        if now - self._told_at >= _QUIET_SECONDS:
            self._told_at = now
            print(f"{self._name}: {failure.reason}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        await asyncio.sleep(pause)

    async def _pause_over(self) -> None:
        # The rate is limited for all requests alike, so that one refused holds all back. The end may move while they wait.
        while (left := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _try(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T | _Failure:
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                response = await self._client.post(self.config.url.rstrip("/") + path, json=body)
        except TimeoutError:
            return _Failure(f"it did not answer within timeout_seconds ({self.config.timeout_seconds:g})", "timeout")
        except httpx.RequestError as error:
            return _Failure(f"the connection failed ({type(error).__name__}: {error})", "connection")
        if response.status_code != HTTPStatus.OK:
            return self._refused(response)
        try:
            return read(response.json())
        except ValueError as error:  # no JSON, or not of the protocol
            return _Failure(f"what it answered is no completion ({error}): {self._shown(response.text)}", "garbage")

    def _refused(self, response: httpx.Response) -> _Failure:
        status = response.status_code
        said = self._shown(_message(response))
        # OpenAI's status for a used-up budget is that of a rate limit, but no pause brings it back.
        spent = status == HTTPStatus.TOO_MANY_REQUESTS and "insufficient_quota" in response.text
        if spent or (status not in _PASSING and status < HTTPStatus.INTERNAL_SERVER_ERROR):
            self._stop(status, said)
        wait = wait_seconds(response.headers, time.time())
        if wait > _LONGEST_WAIT_SECONDS:
            raise RuntimeError(f"{self._name} asks to wait {wait:,.0f} s (status {status}: {said}): start the same command again then")
        return _Failure(f"it answered {status} ({said})", str(status), wait)

    def _stop(self, status: int, said: str) -> NoReturn:
        variable = self.config.key_variable
        key = f"the key in {variable}" if self._key else f"no key, as {variable} is not set: export it, or name another in key_variable"
        advice = {
            401: f"; it was sent {key}",
            403: f"; it was sent {key}",
            404: f"; check the address and teacher.model ({self.model!r})",
        }
        moved = "; give the address that it moved to" if 300 <= status < 400 else ""
        raise RuntimeError(f"{self._name} refused a request with status {status}: {said}{advice.get(status, moved)}")

    @property
    def _name(self) -> str:
        return f"teacher.endpoint.url ({self.config.url})"

    def _shown(self, text: str) -> str:
        """A server's words for a message: short, and without the key, which some repeat."""
        text = " ".join((text.replace(self._key, "[key]") if self._key else text).split())
        return repr(text if len(text) <= 300 else f"{text[:297]}...")


def api_key(variable: str) -> str:
    """The key in an environment variable; empty where that is not set.

    Raises:
        ValueError: if it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        # An HTTP library would repeat the whole header in its message.
        raise ValueError(
            f"the variable {variable} (teacher.endpoint.key_variable) holds no key: there are blanks inside, or characters beyond ASCII"
        )
    return key


def _message(response: httpx.Response) -> str:
    """What an error response says, in OpenAI's form or any other."""
    try:
        said = response.json()
    except ValueError:
        return response.text or response.reason_phrase
    error = said.get("error", said) if isinstance(said, dict) else said
    found = error.get("message", error) if isinstance(error, dict) else error
    return found if isinstance(found, str) else json.dumps(found)
