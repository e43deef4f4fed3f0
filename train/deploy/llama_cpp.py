"""llama.cpp as the engine of GGUF files, through the package xllamacpp, which alone this module imports.

The engine runs in this process and answers on a loopback port of its own. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import xllamacpp
from numpy.typing import NDArray

from train.cores import usual_threads
from train.deploy.targets import GGUF_FILE
from train.deploy.tokens import Tokens
from train.runtimes import until

Device = Literal["auto", "cpu", "cuda"]
_ALL = 1 << 24
"""More tokens than any vocabulary has."""
_SURE = 1e6
"""Added to a logit that is to be the largest."""
_SLOTS = 8
"""Sequences that the engine works on at once; more wait."""


class LlamaCppRuntime(Tokens):
    """A GGUF file, ready to answer."""

    def __init__(self, folder: Path, *, device: Device = "auto", threads: int = 0) -> None:
        """Loads the file.

        Args:
            folder: what `train.deploy.gguf.make` wrote.
            device: auto takes a GPU where the engine was built for one.
            threads: CPU threads; 0: OMP_NUM_THREADS, or all that this process may use. They wait for each other busily: on fewer cores
                than threads the engine all but stands still.

        Raises:
            ValueError: if the folder holds no GGUF file.
            RuntimeError: if the file is damaged or the device cannot be used.
        """
        if not (folder / GGUF_FILE).is_file():
            raise ValueError(f"{folder} has no {GGUF_FILE}: run deploy")
        super().__init__(folder)
        self._letter = self.encode("a")[0]
        has_gpu = any("cuda" in str(found).lower() for found in xllamacpp.get_device_info())
        if device == "cuda" and not has_gpu:
            raise RuntimeError("device is cuda, but this xllamacpp was built without it: choose cpu or auto")
        self.device: str = "cuda" if has_gpu and device != "cpu" else "cpu"
        self._server = self._started(folder, threads or usual_threads())
        self._address = urlsplit(self._server.listening_address).netloc

    def _started(self, folder: Path, threads: int) -> Any:
        wanted = xllamacpp.CommonParams()
        wanted.model.path = str(folder / GGUF_FILE)
        wanted.hostnames, wanted.port = ["127.0.0.1"], 0
        wanted.n_parallel, wanted.n_ctx = _SLOTS, _SLOTS * (self.format.max_input_tokens + self._longest_target)
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
        wanted.n_gpu_layers = -1 if self.device == "cuda" else 0
        wanted.warmup, wanted.verbosity, wanted.ui = False, -1, False
        try:
            with _silent():
                return xllamacpp.Server(wanted)
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(f"llama.cpp cannot load {folder / GGUF_FILE} ({error}): run deploy again") from error

    @property
    def _longest_target(self) -> int:
        form = self.format
        return max(form.max_answer_tokens, form.max_label_tokens + form.max_rationale_tokens)

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without the end-of-sequence token.

        Args:
            prompts: token ids, of any lengths; one batch.
            max_new_tokens: most tokens an answer may take, the end-of-sequence token among them.
        """
        if not prompts:
            return []
        found = self._post("/completion", prompt=[list(prompt) for prompt in prompts], n_predict=max_new_tokens, return_tokens=True)
        answers = found if isinstance(found, list) else [found]
        by_prompt = {answer["index"]: answer["tokens"] for answer in answers}
        end = self.format.eos_id
        return [until(by_prompt[n], end) for n in range(len(prompts))]

    def logits(self, prompt: Sequence[int], target: Sequence[int]) -> NDArray[np.float32]:
        """[len(target), vocabulary] natural log-probabilities of every token after `prompt` and the targets before it."""
        return np.stack([self._next_token([*prompt, *target[:n]]) for n in range(len(target))])

    def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        """Natural log-probabilities that the model gives to the tokens of `target`, one after the other, after `prompt`."""
        return [self._log_prob([*prompt, *target[:n]], token) for n, token in enumerate(target)]

    def cuts_as_trained(self, text: str) -> bool:
        """Whether the engine's own tokenizer gives a text the tokens that the student learnt."""
        found = self._post("/tokenize", content=text, add_special=False, parse_special=False)
        return bool(found["tokens"] == self.encode(text))

    def _log_prob(self, ids: Sequence[int], token: int) -> float:
        # The token is taken, whatever its probability; what is told of it is as before. All of a vocabulary takes a second to tell.
        found = self._post("/completion", prompt=list(ids), n_predict=1, n_probs=1, logit_bias=[[token, _SURE]], cache_prompt=True)
        if not found.get("completion_probabilities"):
            return float(self._next_token(ids)[token])
        value = found["completion_probabilities"][0]["logprob"]
        return float("nan") if value is None else float(value)

    def _next_token(self, ids: Sequence[int]) -> NDArray[np.float32]:
        # Of an end of sequence, or a part of a letter, nothing is written, and no probabilities are. So a letter is taken.
        taken = [[self._letter, _SURE]]
        found = self._post("/completion", prompt=list(ids), n_predict=1, n_probs=_ALL, logit_bias=taken, cache_prompt=True)
        # What is not finite is written as null.
        given = {one["id"]: one["logprob"] for one in found["completion_probabilities"][0]["top_logprobs"]}
        values = np.full(max(given) + 1, np.nan, np.float32)
        for token, value in given.items():
            values[token] = np.nan if value is None else value
        return values

    def _post(self, path: str, **values: Any) -> Any:
        body = json.dumps({"temperature": 0.0, "cache_prompt": False, **values})
        with contextlib.closing(http.client.HTTPConnection(self._address)) as connection:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"llama.cpp answered {answer.status} to {path}: {text[:300].decode(errors='replace')}")
        return json.loads(text)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing that C++ writes to standard error inside reaches the terminal: its loader prints hundreds of lines whatever it is told."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        before = os.dup(2)
        stack.callback(os.close, before)
        os.dup2(nowhere.fileno(), 2)
        stack.callback(os.dup2, before, 2)
        yield
