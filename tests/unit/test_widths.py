"""Students that are too narrow for a file are told before they are trained, and only those."""

from __future__ import annotations

from typing import Any

import pytest

from launch.architecture import Architecture, architecture_of, assumed_architecture
from launch.widths import HEAD_MULTIPLE, LEAST_GROUP, check_widths
from train.deploy.targets import BLOCKS, TARGETS, fallback_of

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}


def llama(**sizes: Any) -> Architecture:
    named = {"width": "hidden_size", "neurons": "intermediate_size", "heads": "num_attention_heads"}
    return architecture_of(
        {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 300, **WIDE, **{named[key]: size for key, size in sizes.items()}}
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_student_of_usual_sizes_is_left_alone(target: str) -> None:
    check_widths(TARGETS[target], llama())
    check_widths(TARGETS[target], assumed_architecture(10**6 + 7))


@pytest.mark.parametrize(
    ("target", "sizes", "told"),
    [
        (
            "onnx-int8",
            {"width": 64, "heads": 8},
            "deploy.targets holds onnx-int8, but a head of student.model has 8 numbers, and ONNX Runtime's attention takes multiples of "
            "16: choose a student of fewer or larger heads, or another target",
        ),
        (
            "compressed-tensors-w4a16",
            {"width": 48, "heads": 3},
            "deploy.targets holds compressed-tensors-w4a16, where 32 weights of a row or more share a scale, but student.model has rows of "
            "48: choose compressed-tensors-w8a16, or widths that are multiples of 32",
        ),
        (
            # Of a layer 4 x 64 x 64 weights of attention and 2 x 64 x 128 of the gated layer, in blocks of 32: Q5_0, 5.5 bits.
            "gguf-q4_k_m",
            {"width": 64, "neurons": 128},
            "deploy.targets holds gguf-q4_k_m, whose blocks are of 256 weights of a row, but student.model has rows of 64 and 128, which "
            "are stored as something larger: 5.50 bits a weight in place of 4.5; take a target of more bits, or a student whose sizes are "
            "multiples of 256",
        ),
        (
            # 4 x 64 x 64 and 2 x 64 x 256 weights fall back to 4.5 bits, the 256 x 64 behind the neurons stay at 2.0625: (49152 x 4.5 +
            # 16384 x 2.0625) / 65536 = 3.89.
            "gguf-tq2_0",
            {"width": 64, "neurons": 256},
            "deploy.targets holds gguf-tq2_0, whose blocks are of 256 weights of a row, but student.model has rows of 64, which are stored "
            "as something larger: 3.89 bits a weight in place of 2; take a target of more bits, or a student whose sizes are multiples "
            "of 256",
        ),
        (
            "gguf-q8_0",
            {"width": 48, "neurons": 80, "heads": 3},
            "deploy.targets holds gguf-q8_0, whose blocks are of 32 weights of a row, but student.model has rows of 48 and 80, which are "
            "stored as something larger: 16.00 bits a weight in place of 8; take a target of more bits, or a student whose sizes are "
            "multiples of 32",
        ),
    ],
)
def test_a_narrow_student_is_told_which_sizes_the_file_takes(target: str, sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError) as raised:
        check_widths(TARGETS[target], llama(**sizes))
    assert str(raised.value) == told


def test_what_a_narrow_student_can_become_is_let_pass() -> None:
    narrow = llama(width=48, neurons=80, heads=6)
    for target in ("ctranslate2-int8", "gguf-f16", "compressed-tensors-w8a16", "compressed-tensors-w8a8"):
        check_widths(TARGETS[target], narrow)
    t5 = architecture_of({"model_type": "t5", "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 1, "vocab_size": 300})
    check_widths(TARGETS["onnx-int8"], t5)


def test_the_bits_are_those_that_a_file_of_these_sizes_holds() -> None:
    """tests/integration/test_quantize.py makes it: 3.96 bits a weight."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = architecture_of({"model_type": "llama", "vocab_size": 320, **sizes})
    with pytest.raises(ValueError, match=r"3\.96 bits a weight in place of 2"):
        check_widths(TARGETS["gguf-tq2_0"], model)


def test_the_constants_are_those_of_the_code() -> None:
    import gguf

    from train.deploy import compressed_tensors, onnx_decoder

    sizes = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] for name in BLOCKS}
    assert {name: (block, 8 * size / block) for name, (block, size) in sizes.items()} == BLOCKS
    assert {target.type for target in TARGETS.values() if target.format == "gguf"} | {fallback_of(name) for name in BLOCKS} <= set(BLOCKS)
    assert onnx_decoder._HEAD_SIZES == HEAD_MULTIPLE
    assert min(compressed_tensors._GROUPS) == LEAST_GROUP
