"""What a verifier lets pass, and each way in which a file can be something else than its name says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from data.examples import TaskExample
from data.prompts import TextFormat
from train.config import DeployTarget
from train.deploy import ctranslate2, targets, verify
from train.deploy.stage import samples_of
from train.deploy.targets import TARGETS, Stored, check_possible
from train.deploy.verify import Probe, VerifyRequest, check_error, check_slope, check_stored

Q4, F16, INT8 = TARGETS["gguf-q4_0"], TARGETS["gguf-f16"], TARGETS["ctranslate2-int8"]
SOURCE = 4 * 3 * 1024
PROBES = [Probe([5, 6], [7, 8], [-0.5, -1.0]), Probe([5], [9], [-2.0])]


def matrix(bits: float, kind: str = "Q4_0", name: str = "blk.0.ffn_up.weight") -> Stored:
    return Stored(name, 1024, int(1024 * bits / 8), kind, is_matrix=True)


EMBEDDING = Stored("token_embd.weight", 1024, 1088, "Q8_0", is_matrix=False)


def test_every_target_of_the_configuration_is_known() -> None:
    assert tuple(TARGETS) == get_args(DeployTarget)
    for name, target in TARGETS.items():
        assert target.name == name
        same = [other for other in TARGETS.values() if other.format == target.format and not other.quantizes]
        assert same, "what is quantized has something of its own runtime to be compared with"


def test_a_target_says_for_which_models_it_is() -> None:
    check_possible(F16, "decoder_only")
    with pytest.raises(ValueError, match=r"holds gguf-f16, which is for decoder_only models, but the student is encoder_decoder: use ctr"):
        check_possible(F16, "encoder_decoder")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else object())
    with pytest.raises(ValueError, match=r"holds gguf-q4_0, which needs xllamacpp: pip install 'stepdown\[gguf\]', or remove it"):
        check_possible(Q4, "decoder_only")


def test_scales_are_allowed_and_dense_matrices_are_not() -> None:
    check_stored(Q4, [matrix(4.5), matrix(4.5), EMBEDDING], SOURCE)
    check_stored(Q4, [matrix(4.5)] * 20 + [matrix(8.0, "Q8_0")], SOURCE * 10)
    with pytest.raises(RuntimeError, match=r"gguf-q4_0 holds 10.25 bits a weight .* its name says 4 \(1 of 2 as F16\): rows that"):
        check_stored(Q4, [matrix(4.5), matrix(16, "F16")], SOURCE)
    with pytest.raises(RuntimeError, match=r"holds 32.00 bits a weight .*\(none as anything else\)"):
        check_stored(replace(Q4, type="F32"), [matrix(32, "F32")], 10 * SOURCE)


def test_a_scale_for_each_row_is_allowed_however_short_the_rows() -> None:
    short = Stored("decoder/layer_0/x/weight", 1024, 1024 + 4 * 64, "int8", is_matrix=True, num_scaled_rows=64)
    assert short.bits == 10
    check_stored(INT8, [short], SOURCE)
    with pytest.raises(RuntimeError, match=r"ctranslate2-int8 holds 10.00 bits a weight"):
        check_stored(INT8, [replace(short, num_scaled_rows=0)], SOURCE)


def test_a_file_of_nothing_and_one_that_is_no_smaller() -> None:
    with pytest.raises(RuntimeError, match=r"gguf-q4_0 holds no matrix of the model's layers"):
        check_stored(Q4, [EMBEDDING], SOURCE)
    with pytest.raises(
        RuntimeError, match=r"ctranslate2-int8 takes 2,048 bytes, not fewer than its fp32 source \(2,048\): the model is too"
    ):
        check_stored(INT8, [matrix(8), matrix(8)], 2048)
    check_stored(TARGETS["ctranslate2-float32"], [matrix(32), matrix(32)], 8192)


def test_the_distance_is_the_mean_over_tokens_and_bounded_by_the_bits() -> None:
    assert check_error(Q4, PROBES, [[-0.8, -1.0], [-1.4]]) == pytest.approx((0.3 + 0.0 + 0.6) / 3)
    with pytest.raises(RuntimeError, match=r"gguf-f16 is 0.30 nats a token away from the fp32 model on 2 training rows, more than 0.05"):
        check_error(F16, PROBES, [[-0.8, -1.0], [-1.4]])
    assert check_error(TARGETS["gguf-tq2_0"], PROBES, [[-9.0, -9.0], [-9.0]]) > 5, "of 2 bits nothing is promised but numbers"


def test_what_is_hardly_possible_is_as_good_as_impossible() -> None:
    sure = [Probe([1], [2], [-40.0])]
    assert check_error(F16, sure, [[-14.0]]) == 0.0
    assert check_error(Q4, sure, [[-9.5]]) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_number_that_is_not_finite_is_told(value: float) -> None:
    with pytest.raises(RuntimeError, match=r"gguf-tq2_0 gives log-probabilities that are not finite"):
        check_error(TARGETS["gguf-tq2_0"], PROBES, [[-0.5, value], [-2.0]])


def test_a_number_too_few_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"gguf-q4_0 gives log-probabilities that are not finite \(\[-0.5\]\)"):
        check_error(Q4, PROBES, [[-0.5], [-2.0]])


SURE = [Probe([1], [2, 3], [-0.001, -0.002]), Probe([1], [4], [-6.0], is_other=True), Probe([2], [5], [-9.0], is_other=True)]


def test_logits_scaled_otherwise_are_seen_though_every_answer_is_the_same() -> None:
    eightfold = [[-0.0, -0.0], [-48.0], [-72.0]]
    assert check_error(F16, SURE, eightfold) < 0.01, "only tokens of the text itself are compared"
    with pytest.raises(RuntimeError, match=r"gguf-f16 gives log-probabilities 8 times those of the fp32 model: its logits are scaled"):
        check_slope(F16, SURE, eightfold)
    with pytest.raises(RuntimeError, match=r"gguf-q4_0 gives log-probabilities 0.13 times"):
        check_slope(Q4, SURE, [[-0.001, -0.0], [-0.75], [-1.125]])
    for scaled in (0.8, 1.3):
        check_slope(Q4, SURE, [[scaled * value for value in probe.log_probs] for probe in SURE])
    check_slope(TARGETS["gguf-tq2_0"], SURE, [[-1.0, -1.0], [-1.0], [-1.0]])
    check_slope(F16, SURE[:1], [[-0.1, -0.1]])


def test_what_a_recipe_mixes_in_is_no_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(log_probs=lambda prompt, target: [-0.5] * len(target), answer=lambda prompts, max_new_tokens: [])
    held = [*[matrix(4.5, "Q4_K")] * 9, matrix(6.5625, "Q6_K"), matrix(5.5, "Q5_0", "blk.2.ffn_up.weight"), EMBEDDING]
    monkeypatch.setattr(verify, "open_runtime", lambda *_, **__: engine)
    monkeypatch.setattr(verify, "module_of", lambda target: SimpleNamespace(stored=lambda folder: held))
    monkeypatch.setattr(verify, "check_error", lambda *_: 0.0)
    monkeypatch.setattr(verify, "check_slope", lambda *_: None)
    found = verify.run(VerifyRequest("gguf-q4_k_m", "model", 20 * SOURCE, PROBES, str(tmp_path / "found.json")))
    assert found.fallbacks == ["blk.2.ffn_up.weight"]


def test_a_file_is_opened_by_its_own_runtime_and_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, Path]] = []

    class Engine:
        def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
            return [next(p.log_probs for p in PROBES if p.prompt == prompt)[n] - 0.1 for n in range(len(target))]

        def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
            assert [list(prompt) for prompt in prompts] == [[5, 6], [5]]
            return [[]] * 2

    def open_runtime(kind: str, folder: Path, **_: Any) -> Engine:
        opened.append((kind, folder))
        return Engine()

    held = [matrix(4.5), *[matrix(4.5, name="blk.1.ffn_up.weight")] * 38, matrix(8.5, "Q8_0", "blk.2.ffn_up.weight"), EMBEDDING]
    monkeypatch.setattr(verify, "open_runtime", open_runtime)
    monkeypatch.setattr(verify, "module_of", lambda target: SimpleNamespace(stored=lambda folder: held))
    request = VerifyRequest("gguf-q4_0", "model", 20 * SOURCE, PROBES, str(tmp_path / "found.json"))
    request.write(tmp_path / "request.json")
    found = verify.run(VerifyRequest.read(tmp_path / "request.json"))
    assert opened == [("llama_cpp", Path("model"))]
    assert found.error_nats == pytest.approx(0.1)
    assert found.bits_a_weight == pytest.approx((39 * 4.5 + 8.5) / 40)
    assert found.bits_a_parameter == pytest.approx((39 * 4.5 + 8.5 + 8.5) / 41)
    assert (found.types, found.fallbacks) == ({"Q4_0": 39, "Q8_0": 2}, ["blk.2.ffn_up.weight"])
    assert json.loads((tmp_path / "found.json").read_text())["fallbacks"] == ["blk.2.ffn_up.weight"]
    assert verify.Verified.read(tmp_path / "found.json") == found


def test_ctranslate2_takes_a_gpu_only_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctranslate2.ctranslate2, "get_cuda_device_count", lambda: 1)
    monkeypatch.setattr(ctranslate2.ctypes, "CDLL", lambda name: None)
    assert [ctranslate2._usable(device) for device in ("cpu", "auto", "cuda")] == ["cpu", "auto", "cuda"]
    monkeypatch.setattr(ctranslate2.ctypes, "CDLL", missing)
    library = (
        "device is cuda, but CTranslate2 needs libcublas.so.12, which is not found: pip install nvidia-cublas-cu12 and put its lib folder "
        "on LD_LIBRARY_PATH, or choose device cpu"
    )
    none = (
        "device is cuda, but CTranslate2 needs a GPU that its CUDA can use, of which it finds none: see nvidia-smi for the driver's "
        "version, or choose device cpu"
    )
    for told in (library, none):
        assert [ctranslate2._usable(device) for device in ("cpu", "auto")] == ["cpu", "cpu"]
        with pytest.raises(RuntimeError, match=rf"\A{re.escape(told)}\Z"):
            ctranslate2._usable("cuda")
        monkeypatch.setattr(ctranslate2.ctranslate2, "get_cuda_device_count", lambda: 0)


def test_calibration_reads_what_the_student_does() -> None:
    rows = [TaskExample("a", "ab", "x"), TaskExample("b", "cd", "y", rationale="own")]
    form = TextFormat("encoder_decoder", 0, 0, max_input_tokens=64, max_label_tokens=8, max_rationale_tokens=32)

    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    def words(form: TextFormat) -> list[tuple[str, str]]:
        found = samples_of(rows, {"a": "why"}, form, encode)
        return [("".join(map(chr, prompt)).rstrip("\0"), "".join(map(chr, target)).rstrip("\0")) for prompt, target in found]

    assert words(form) == [("predict: ab", "x"), ("explain: ab", "why"), ("predict: cd", "y"), ("explain: cd", "own")]
    assert words(replace(form, part="solve")) == [("solve: ab", "why Answer:x"), ("solve: cd", "own Answer:y")]
