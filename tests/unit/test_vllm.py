from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from data.examples import TaskExample
from train.teacher.vllm import VllmWriter
from train.teacher.writing import Request, Sampling, Written

# What of vLLM is called, with the names, kinds and defaults of its own signatures (LLM, LLM.generate, SamplingParams, CompletionOutput).


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


@dataclass
class LLM:
    model: str
    tensor_parallel_size: int = field(default=1, kw_only=True)
    max_model_len: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        MADE.append(self)
        self.environment = dict(os.environ)
        self.calls: list[tuple[list[dict[str, Any]], list[SamplingParams]]] = []
        if self.max_model_len is not None and self.max_model_len > 4096:
            raise ValueError("max_model_len is greater than the model's")

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams] | None = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert sampling_params is not None and len(sampling_params) == len(prompts) and not use_tqdm
        self.calls.append((prompts, sampling_params))
        return [RequestOutput([answer(prompt["prompt_token_ids"])]) for prompt in prompts]


MADE: list[LLM] = []
ENDS: dict[int, tuple[str | None, int | str | None]] = {0: ("stop", None), 1: ("length", None), 2: ("stop", "\nQuestion:"), 3: ("stop", 7)}


def answer(ids: list[int]) -> CompletionOutput:
    """Repeats the prompt, and ends in the way that its first token names."""
    return CompletionOutput(0, f" said {ids} ", [*ids, 99], *ENDS[ids[0] % 4])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LLM]]:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    yield MADE
    MADE.clear()


def make_request(example: TaskExample, hint: str | None, key: int) -> Request:
    return Request(key, ids=(len(example.input), len(hint or "")))


def writer(model: str, max_input_tokens: int = 100) -> VllmWriter:
    return VllmWriter(
        model,
        make_request,
        sampling=Sampling(0.7, 0.9),
        max_input_tokens=max_input_tokens,
        max_new_tokens=28,
        num_gpus=2,
        stop=("\nQuestion:",),
        stop_ids=(7,),
    )


def test_chunks_are_answered_in_order(vllm: list[LLM], tmp_path: Path) -> None:
    teacher = writer(str(tmp_path))
    work = [(n, [Request(n * 10 + i, ids=(n, i)) for i in range(n % 3)]) for n in range(7)]
    found = list(teacher.write(iter(work)))
    assert [number for number, _ in found] == list(range(7))
    assert [[w.text for w in answers] for _, answers in found] == [[f"said [{n}, {i}]" for i in range(n % 3)] for n in range(7)]
    assert [len(prompts) for prompts, _ in vllm[0].calls] == [3, 3]  # chunks 0 to 3 and 4 to 6 together


def test_work_without_requests_asks_nothing(vllm: list[LLM], tmp_path: Path) -> None:
    assert list(writer(str(tmp_path)).write([(0, []), (1, [])])) == [(0, []), (1, [])]
    assert vllm[0].calls == []


def test_the_engine_gets_what_was_configured(vllm: list[LLM], tmp_path: Path) -> None:
    teacher = writer(str(tmp_path))
    request = teacher.request(TaskExample("e", "2 * 3?", "6"), "6", -5)
    assert request == Request(-5, ids=(6, 1))
    list(teacher.write([(0, [request])]))
    (engine,) = vllm
    assert (engine.model, engine.tensor_parallel_size, engine.max_model_len) == (str(tmp_path), 2, 128)
    parameters = SamplingParams(temperature=0.7, top_p=0.9, seed=2**31 - 5, stop=["\nQuestion:"], stop_token_ids=[7], max_tokens=28)
    assert engine.calls == [([{"prompt_token_ids": [6, 1]}], [parameters])]


@pytest.mark.parametrize(("first", "num_tokens"), [(0, 2), (1, 3), (2, 3), (3, 2)])
def test_the_token_that_ends_an_answer_is_not_counted(vllm: list[LLM], tmp_path: Path, first: int, num_tokens: int) -> None:
    found = list(writer(str(tmp_path)).write([(0, [Request(1, ids=(first, 5))])]))
    assert found == [(0, [Written(f"said [{first}, 5]", num_tokens)])]


def test_the_engines_processes_do_not_take_themselves_for_torchruns(
    vllm: list[LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    writer(str(tmp_path))
    assert not variables.keys() & vllm[0].environment.keys()
    assert vllm[0].environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert {name: os.environ.get(name) for name in variables} == variables


def test_an_engine_that_does_not_start_is_told(vllm: list[LLM], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        writer(str(tmp_path), max_input_tokens=9000)
    assert str(raised.value) == (
        f"teacher.model is {str(tmp_path)!r}: vLLM cannot start with 2 GPU(s), rationales.max_input_tokens 9000 and max_new_tokens 28 "
        "(ValueError: max_model_len is greater than the model's); its own messages stand above"
    )


def test_a_machine_without_vllm_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RuntimeError) as raised:
        writer(str(tmp_path))
    assert str(raised.value) == (
        "teacher.source is vllm, but vLLM cannot be imported (import of vllm halted; None in sys.modules): pip install vllm, in an "
        "environment of its own if it asks for another torch; or serve the model with `vllm serve` and set source to endpoint"
    )


def test_a_model_that_is_not_there_is_told(vllm: list[LLM]) -> None:
    with pytest.raises(ValueError, match=r"\Ateacher.model is './nowhere', but nowhere does not exist: check the path"):
        writer("./nowhere")
    assert vllm == []
