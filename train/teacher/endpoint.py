"""A teacher behind an OpenAI-compatible server: vLLM's, llama.cpp's, SGLang's, or a provider's."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

from data.examples import TaskExample
from train.config import EndpointConfig
from train.teacher.alignment import Vocabulary, read_tokens
from train.teacher.pauses import Backoff
from train.teacher.server import Server, api_key
from train.teacher.writing import Request, Sampling, Written

MakeRequest = Callable[[TaskExample, str | None, int], Request]
_SEED_MASK = 2**31 - 1
_MOST_STOPS = 4
"""OpenAI's API takes no more; the rest is applied here alone."""


@dataclass(frozen=True, slots=True)
class LogProbs:
    """The log-probabilities to ask for."""

    k: int
    """A token; 20 at most."""
    vocabulary: Vocabulary


@dataclass(slots=True)
class _Chunk:
    number: int
    answers: list[Written | None]
    missing: int


_Done = SimpleQueue[tuple[_Chunk, int, Future[Written]]]
"""What came back: the chunk and the place in it."""


class EndpointWriter:
    """Writes through a server; one process is enough, as the work is the server's.

    A request's seed comes from its key, so that a server that honours seeds answers it the same whenever it is asked. What a server adds
    of its own accord stays (llama.cpp draws from the 40 most probable tokens only).
    """

    def __init__(
        self,
        config: EndpointConfig,
        model: str,
        make_request: MakeRequest,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        log_probs: LogProbs | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """Reads the key from the environment; nothing is sent before `write`.

        Args:
            config: the server.
            model: the server's name of the model.
            make_request: makes a request of an example, a hint and a key, with the text or the messages that `config.api` wants.
            sampling: how tokens are chosen.
            max_new_tokens: most tokens written.
            stop: strings that end an answer.
            log_probs: what to ask for beside the text, or None.
            backoff: pauses between tries, if not the usual.

        Raises:
            ValueError: if the key in the environment cannot be sent.
        """
        self.config = config
        self.model = model
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stop = tuple(stop)
        self._log_probs = log_probs
        self._make_request = make_request
        self._backoff = backoff or Backoff()
        self.failures: Counter[str] = Counter()
        """Tries in vain so far, by status or `timeout`, `connection`, `garbage`."""
        api_key(config.key_variable)  # one that cannot be sent is told now

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example."""
        return self._make_request(example, hint, key)

    def write(self, work: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Written]]]:
        """Answers chunks of requests, `config.concurrency` at once; takes the next chunk when fewer are under way.

        Raises:
            RuntimeError: if the server refuses a request for good, or gives no answer in all tries. It says what was handed out before.
        """
        source = iter(work)
        done: _Done = SimpleQueue()
        under_way = kept = 0
        more = True
        with self._asking() as ask:
            while more or under_way:
                while more and under_way < self.config.concurrency:
                    taken = next(source, None)
                    if taken is None:
                        more = False
                    elif not taken[1]:
                        yield taken[0], []
                    else:
                        under_way += len(taken[1])
                        _send(ask, taken[0], taken[1], done)
                if not under_way:
                    return
                chunk, place, future = done.get()
                under_way -= 1
                chunk.answers[place] = _result(future, kept)
                chunk.missing -= 1
                if not chunk.missing:
                    yield chunk.number, [answer for answer in chunk.answers if answer is not None]
                    kept += len(chunk.answers)

    @contextmanager
    def _asking(self) -> Iterator[Callable[[Request], Future[Written]]]:
        """A function that sends a request in an event loop of its own: requests go on while the caller works on what came back."""
        loop = asyncio.new_event_loop()
        server = Server(self.config, self.model, self._backoff)
        server.failures = self.failures
        room = asyncio.Semaphore(self.config.concurrency)
        path = "/chat/completions" if self.config.api == "chat" else "/completions"

        async def answer(request: Request) -> Written:
            async with room:
                return await server.post(path, self._body(request), self._read)

        thread = Thread(target=loop.run_forever, name="endpoint", daemon=True)
        thread.start()
        try:
            yield lambda request: asyncio.run_coroutine_threadsafe(answer(request), loop)
        finally:
            asyncio.run_coroutine_threadsafe(_end(server), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": request.key & _SEED_MASK,
            "n": 1,
        }
        if self.stop:
            body["stop"] = list(self.stop[:_MOST_STOPS])
        chat = self.config.api == "chat"
        assert request.messages if chat else request.text, "a request has what the server's API wants"
        body |= {"messages": list(request.messages)} if chat else {"prompt": request.text}
        if self._log_probs is not None:
            body |= {"logprobs": True, "top_logprobs": self._log_probs.k} if chat else {"logprobs": self._log_probs.k}
        return body

    def _read(self, answer: Any) -> Written:
        """What a response of either API holds; ValueError where it is none."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if self.config.api == "chat" else choice["text"]
            # Null stands for an empty answer: a refusal, or a model that used up its tokens thinking.
            text = "" if text is None else text
            usage = answer.get("usage") or {}
            num_tokens = int(usage.get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"its text is {json.dumps(text)[:80]}")
        tokens = read_tokens(choice.get("logprobs"), self._log_probs.vocabulary) if self._log_probs is not None else ()
        return Written(before_stop(text, self.stop).strip(), num_tokens, tokens)


def _send(ask: Callable[[Request], Future[Written]], number: int, requests: Sequence[Request], done: _Done) -> None:
    chunk = _Chunk(number, [None] * len(requests), len(requests))
    for place, request in enumerate(requests):
        ask(request).add_done_callback(partial(_report, done, chunk, place))


def _report(done: _Done, chunk: _Chunk, place: int, future: Future[Written]) -> None:
    done.put((chunk, place, future))


def _result(future: Future[Written], kept: int) -> Written:
    try:
        return future.result()
    except RuntimeError as error:
        raise RuntimeError(f"{error}. The {kept} answers handed out before are kept; the same command goes on from there") from error


async def _end(server: Server) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.close()


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings: servers differ in how many they honour, and some in whether."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]
