"""A teacher in vLLM's offline engine: one process that holds the GPUs of this node."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from data.examples import TaskExample
from train.places import locate
from train.teacher.writing import Request, Sampling, Written

MakeRequest = Callable[[TaskExample, str | None, int], Request]
_SEED_MASK = 2**31 - 1
_CHUNKS_AT_ONCE = 4
"""Chunks given to the engine together: it batches as it goes and refills what is finished, but idles at the end of each call."""


class VllmWriter:
    """Writes with `vllm.LLM`. Each request has a seed of its own, from its key: it is answered the same in any company."""

    def __init__(
        self,
        model: str,
        make_request: MakeRequest,
        *,
        sampling: Sampling,
        max_input_tokens: int,
        max_new_tokens: int,
        num_gpus: int,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Starts the engine and loads the model.

        Args:
            model: hub id or folder (`teacher.model`).
            make_request: makes a request, with its prompt as ids, of an example, a hint and a key.
            sampling: how tokens are chosen.
            max_input_tokens: most tokens of a prompt.
            max_new_tokens: most tokens written.
            num_gpus: of this node; every matrix is split over them (tensor parallel).
            stop: strings that end an answer.
            stop_ids: tokens that end one beside the model's end of sequence.

        Raises:
            ValueError: if there is no such model.
            RuntimeError: if vLLM is not installed, or cannot start.
        """
        self._make_request = make_request
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stop, self._stop_ids = list(stop), list(stop_ids)
        self._vllm = _import()
        place = locate(model, "teacher.model")
        try:
            with _outside_torchrun():
                self._engine = self._vllm.LLM(
                    model=place.name,
                    tensor_parallel_size=num_gpus,
                    max_model_len=max_input_tokens + max_new_tokens,  # a long-context model's own would claim memory for it
                )
        except Exception as error:  # the engine runs in processes of its own and passes on whatever stopped them
            raise RuntimeError(
                f"teacher.model is {model!r}: vLLM cannot start with {num_gpus} GPU(s), rationales.max_input_tokens {max_input_tokens} and "
                f"max_new_tokens {max_new_tokens} ({type(error).__name__}: {error}); its own messages stand above"
            ) from error

    def request(self, example: TaskExample, hint: str | None, key: int) -> Request:
        """The request for an example."""
        return self._make_request(example, hint, key)

    def write(self, work: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Written]]]:
        """Answers chunks of requests, a few at a time."""
        source = iter(work)
        while chunks := list(islice(source, _CHUNKS_AT_ONCE)):
            answers = iter(self._answers([request for _, requests in chunks for request in requests]))
            for number, requests in chunks:
                yield number, list(islice(answers, len(requests)))

    def _answers(self, requests: Sequence[Request]) -> list[Written]:
        if not requests:
            return []
        prompts = [{"prompt_token_ids": list(request.ids)} for request in requests]
        outputs = self._engine.generate(prompts, [self._parameters(request.key) for request in requests], use_tqdm=False)
        return [_written(output.outputs[0]) for output in outputs]

    def _parameters(self, key: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._max_new_tokens,
            stop=self._stop,
            stop_token_ids=self._stop_ids,
            seed=key & _SEED_MASK,
        )


def _written(completion: Any) -> Written:
    # The last token of an answer that ended by itself is an end of sequence, and no text; a stop string was text.
    ended = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
    return Written(completion.text.strip(), len(completion.token_ids) - ended)


def _import() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise RuntimeError(
            f"teacher.source is vllm, but vLLM cannot be imported ({error}): pip install vllm, in an environment of its own if it asks for "
            "another torch; or serve the model with `vllm serve` and set source to endpoint"
        ) from error


@contextmanager
def _outside_torchrun() -> Iterator[None]:
    """Hides from the engine's processes that torchrun started this one.

    With torchrun's variables set they would take its store for theirs and wait for it for ever (vLLM issue 1865, PyTorch pull request
    192113). Delete when the oldest torch that we take has that change.
    """
    names = {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"}
    names |= {"ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"} | {name for name in os.environ if name.startswith("TORCHELASTIC_")}
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
