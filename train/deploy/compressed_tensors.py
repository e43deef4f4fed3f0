"""compressed-tensors: safetensors with int or FP8 weights, which vLLM (decoder-only) and transformers load.

The only module that imports llmcompressor, compressed_tensors (the library, not this file) and loguru; `stored` needs none of them.
transformers computes with the weights restored to floats: what is smaller there is the file, not the memory. Embeddings and the output
matrix stay in bfloat16, tied or not.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.prompts import FORMAT_FILE
from train.deploy.targets import TOKENIZER, Sample, Stored, Target
from train.runtimes import TransformersRuntime

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from train.grids import Grid

CONFIG = "config.json"
MIN_CALIBRATION_ROWS = 16
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_QUANTIZATION = "quantization_config"
_METHOD = "compressed-tensors"
_LOG_LEVEL = "LLM_COMPRESSOR_LOG_LEVEL"
_GROUPS = (128, 64, 32)
"""Weights of a row that share a scale: what vLLM's kernels for 4 bits know."""
_MAX_OFF_GRID = 1e-3
"""Relative to a matrix."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the matrices of the layers are stored, and how their inputs are rounded."""

    num_bits: int
    kind: Literal["int", "float"] = "int"
    rounds_inputs: bool = False
    """To 8 bits of the same kind, each token with a scale of its own, found as it comes by."""
    groups: tuple[int, ...] = ()
    """Sizes of group to choose from; none: one scale a row."""
    symmetric: bool = True
    observer: Literal["memoryless_minmax", "memoryless_mse"] = "memoryless_minmax"
    """Scales that reach the largest weight, or those with the least squared error."""

    @property
    def pipeline(self) -> str:
        """How calibration rows run: through the whole model at once, or layer by layer, each seeing what those before it have lost.

        The latter runs each layer twice. It took the error of the logits from 0.73 to 0.58 at 2 bits, and gave nothing at 4
        (SmolLM2-135M). It finds the layers by tracing the code, which fails silently for T5: none is calibrated.
        """
        return "sequential" if self.num_bits < 4 else "basic"


# Below 4 bits no kernel of vLLM waits for it, and small groups with a zero point are worth their 0.4 bits: at 2 bits, 0.49 of relative
# error of the logits rather than 0.73 for groups of 128 without (a small random Llama). Scales that leave out extremes took it from 0.21 to
# 0.12 at 4 bits, and from 0.58 to 0.42 at 2 (SmolLM2-135M).
_SCHEMES: dict[str, _Scheme] = {
    "I8": _Scheme(8, rounds_inputs=True),
    "INT8": _Scheme(8),
    "INT4": _Scheme(4, groups=_GROUPS, observer="memoryless_mse"),
    "INT3": _Scheme(3, groups=_GROUPS[-1:], symmetric=False, observer="memoryless_mse"),
    "INT2": _Scheme(2, groups=_GROUPS[-1:], symmetric=False, observer="memoryless_mse"),
    "F8_E4M3": _Scheme(8, "float", rounds_inputs=True),
}
"""By the type of a target: plain I8 and F8_E4M3 are safetensors' own, INT4 and the like are packed; BF16 is none of these."""


def make(source: Path, out: Path, target: Target, calibration: Sequence[Sample]) -> None:
    """Writes a complete folder: weights, configuration, tokenizer and `stepdown.json`.

    Weights are chosen by GPTQ on the calibration rows, for W8A8 of a decoder-only model after SmoothQuant.
    Weights that stand on a grid already, as those that recovered do, are stored as they are, by the scales that lie beside their folder.
    What is not quantized, and every scale, is stored in bfloat16.

    Args:
        source: a model of this project (safetensors, tokenizer.json, stepdown.json).
        out: the folder to make.
        target: what the weights become.
        calibration: token ids of training rows; BF16 reads none.

    Raises:
        ValueError: if the folder is no model of this project, the rows are too few, or a row of a matrix divides into no group.
        RuntimeError: if what would be stored of a matrix is far from what was chosen for it.
    """
    import torch

    from train.calibration import inputs_of
    from train.grids import read_scales
    from train.models import load_folder

    if not (source / TOKENIZER).is_file():
        raise ValueError(f"{source} has no {TOKENIZER}, which the deployed model needs: give the student a fast tokenizer")
    scheme = _SCHEMES.get(target.type)
    chosen = read_scales(source)
    if scheme and not chosen and len(calibration) < MIN_CALIBRATION_ROWS:
        raise ValueError(
            f"deploy.targets holds {target.name}, which is calibrated on training rows, but there are {len(calibration)} and it needs "
            f"{MIN_CALIBRATION_ROWS} or more: give more training rows, or choose compressed-tensors-bf16, which needs none"
        )
    model, tokenizer, form = load_folder(source, dtype=torch.float32)
    with _quiet():
        _import_silently()
        if scheme and chosen:
            _oneshot(model, tokenizer, _modifier(model, scheme, target, is_chosen=True), "datafree")
            _set_scales(model, chosen)
            _check_rounded(model, target)
        elif scheme:
            rows = [inputs_of(prompt, target_ids, form.family == "encoder_decoder") for prompt, target_ids in calibration]
            _quantize(model, tokenizer, scheme, _modifier(model, scheme, target), rows)
            _check_rounded(model, target)
        _save(model, out)
    for name in (TOKENIZER, FORMAT_FILE, *(name for name in _TOKENIZER_FILES if (source / name).is_file())):
        shutil.copyfile(source / name, out / name)


def grids(model: PreTrainedModel, target: Target) -> dict[str, Grid]:
    """How each matrix is rounded, by its name.

    Raises:
        ValueError: if a row of a matrix divides into no group.
    """
    import torch

    from train.grids import Grid, matrices

    scheme = _SCHEMES[target.type]
    kind: Literal["symmetric", "asymmetric"] = "symmetric" if scheme.symmetric else "asymmetric"
    return dict.fromkeys(matrices(model), Grid(kind, scheme.num_bits, _group(model, scheme.groups, target), torch.bfloat16))


def _modifier(model: PreTrainedModel, scheme: _Scheme, target: Target, *, is_chosen: bool = False) -> Any:
    """llm-compressor's step that rounds the weights, where they are not chosen yet: all linear layers but the output matrix."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    group = _group(model, scheme.groups, target) if scheme.groups else None
    inputs = QuantizationArgs(num_bits=8, type=scheme.kind, strategy="token", dynamic=True) if scheme.rounds_inputs else None
    weights = QuantizationArgs(
        num_bits=scheme.num_bits,
        type=scheme.kind,
        symmetric=scheme.symmetric,
        strategy="group" if group else "channel",
        group_size=group,
        observer=scheme.observer,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    return (QuantizationModifier if is_chosen else GPTQModifier)(config_groups=groups, ignore=["lm_head"])


def _group(model: PreTrainedModel, sizes: Sequence[int], target: Target) -> int:
    """The largest size that divides the rows of all matrices."""
    import torch

    widths = {name: module.in_features for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for size in sizes:
        if all(width % size == 0 for width in widths.values()):
            return size
    name, width = next((name, width) for name, width in widths.items() if width % sizes[-1])
    raise ValueError(
        f"deploy.targets holds {target.name}, where {sizes[-1]} weights of a row or more share a scale, but the rows of {name} have "
        f"{width}, which {sizes[-1]} does not divide: choose compressed-tensors-w8a16, or widths that are multiples of {sizes[-1]}"
    )


def _quantize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scheme: _Scheme, modifier: Any, rows: Sequence[Any]) -> None:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    # SmoothQuant comes in a run of its own: in one run GPTQ would weigh its errors by inputs from before the smoothing. For T5 it knows
    # no pairs of norm and matrix. A float's steps grow with its size, so FP8 gains nothing by it.
    if scheme.rounds_inputs and scheme.kind == "int" and not model.config.is_encoder_decoder:
        _oneshot(model, tokenizer, SmoothQuantModifier(smoothing_strength=0.5), scheme.pipeline, rows)
    _oneshot(model, tokenizer, modifier, scheme.pipeline, rows)


def _oneshot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, modifier: Any, pipeline: str, rows: Sequence[Any] = ()) -> None:
    import torch
    from compressed_tensors.offload import remove_dispatch, set_onload_device
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    from train.models import tied_weights

    loader: Any = DataLoader(rows, batch_size=1, collate_fn=lambda batch: batch[0]) if rows else None  # type: ignore[arg-type]
    if rows and (accelerator := torch.accelerator.current_accelerator(check_available=True)):
        set_onload_device(model, accelerator)  # the pipelines `sequential` and `datafree` do so themselves
    tied = tied_weights(model)
    oneshot(model=model, processor=tokenizer, dataset=loader, num_calibration_samples=len(rows), recipe=[modifier], pipeline=pipeline)
    # Left as they are, parameters would be copies on the accelerator, tied ones two, and what is written to them lost.
    remove_dispatch(model)
    for target, source in tied.items():
        module, _, name = target.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))


def _set_scales(model: PreTrainedModel, scales: Mapping[str, torch.Tensor]) -> None:
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None):
            module.weight_scale.data.copy_(scales[f"{name}.scale"])
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(scales[f"{name}.zero"])


def _check_rounded(model: PreTrainedModel, target: Target) -> None:
    """That every matrix was reached: scales that nothing set are whatever the memory held, and only GPTQ moves weights onto their grid."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    for name, module in model.named_modules():
        if weights := getattr(getattr(module, "quantization_scheme", None), "weights", None):
            stored = fake_quantize(module.weight.data, module.weight_scale, getattr(module, "weight_zero_point", None), weights)
            # A comparison with NaN is false.
            if not (stored - module.weight.data).norm() <= _MAX_OFF_GRID * module.weight.data.norm():
                raise RuntimeError(
                    f"deploy.targets: what {target.name} would store of {name} is not what was chosen for it: calibration did not reach "
                    "this matrix, or the checkpoint's weights are not finite; train again, or remove the target"
                )


def _save(model: PreTrainedModel, out: Path) -> None:
    """Packs, rounds the rest to bfloat16, and writes weights and configuration."""
    import torch
    from compressed_tensors import ModelCompressor

    # Packed first: the weights stand on the grid of the scales as they were before rounding those.
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.to(torch.bfloat16)
    type(model).save_pretrained(model, out)
    compressor.update_config(str(out))
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    (out / CONFIG).write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2), encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log of the libraries: theirs go to the terminal whatever transformers is told."""
    from loguru import logger

    from train.sources import quiet

    for name in ("llmcompressor", "compressed_tensors"):
        logger.disable(name)
    # Of a name that llm-compressor's tracing uses, and torch means to rename.
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    level = tracing.level
    tracing.setLevel(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        tracing.setLevel(level)


def _import_silently() -> None:
    """Imports llm-compressor, which opens a log of its own on stdout and writes into it while it is imported.

    Its switch for "no log" is no help: with it the 0.14 lacks a level of messages that GPTQ writes at, and fails.
    """
    before = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = "critical"
    try:
        import llmcompressor  # noqa: F401
    finally:
        if before is None:
            del os.environ[_LOG_LEVEL]
        else:
            os.environ[_LOG_LEVEL] = before


def stored(folder: Path) -> list[Stored]:
    """Every tensor of the model as the files hold it; a packed matrix is one with its scales, zero points and shape.

    Args:
        folder: what `make` wrote.
    """
    parts: dict[str, dict[str, _Entry]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in _entries(file).items():
            owner, _, part = name.rpartition(".")
            parts.setdefault(owner, {})[part] = entry
    no_matrix = _not_of_layers(folder)
    tensors: list[Stored] = []
    for owner, entries in sorted(parts.items()):
        weight = _joined(owner, entries, owner not in no_matrix)
        tensors += [weight] if weight else []
        tensors += [_alone(f"{owner}.{part}", entry) for part, entry in entries.items() if not (weight and part.startswith("weight"))]
    return tensors


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of a safetensors file."""

    type: str
    values: torch.Tensor
    """Mapped, not read."""

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes


def _entries(path: Path) -> dict[str, _Entry]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: _Entry(file.get_slice(name).get_dtype(), file.get_tensor(name)) for name in names}


def _joined(owner: str, entries: Mapping[str, _Entry], is_of_layers: bool) -> Stored | None:
    """The weight of a module with all that is kept to restore it; None for a module without one."""
    num_bytes = sum(entry.num_bytes for part, entry in entries.items() if part.startswith("weight"))
    if packed := entries.get("weight_packed"):
        rows, columns = entries["weight_shape"].values.tolist()
        # A row is padded to whole words, by less than a bit a weight.
        return Stored(f"{owner}.weight", rows * columns, num_bytes, f"INT{32 * packed.values.shape[-1] // columns}", is_of_layers)
    if weight := entries.get("weight"):
        return Stored(f"{owner}.weight", weight.values.numel(), num_bytes, weight.type, is_of_layers and weight.values.dim() > 1)
    return None


def _alone(name: str, entry: _Entry) -> Stored:
    return Stored(name, entry.values.numel(), entry.num_bytes, entry.type, is_matrix=entry.values.dim() > 1)


def _not_of_layers(folder: Path) -> set[str]:
    """Names of the modules that are tables of embeddings (T5's of distances too) or the output matrix."""
    import torch

    from train.models import skeleton

    model = skeleton(str(folder), "model folder")
    return {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings()
    }


class CompressedTensorsRuntime(TransformersRuntime):
    """A deployed model in transformers: weights restored to floats once, inputs rounded at each matrix where the file says so."""

    def __init__(
        self,
        folder: Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        threads: int = 0,
    ) -> None:
        """Loads the model.

        Args:
            folder: what `make` wrote.
            device: auto takes the GPU where there is one.
            dtype: type of the restored weights and the arithmetic.
            threads: CPU threads; 0 leaves it to torch.

        Raises:
            ValueError: if the folder is not a deployed model.
            RuntimeError: if a file is damaged, or device is cuda and there is none.
        """
        _check_folder(folder)
        with _quiet():
            super().__init__(folder, device=device, dtype=dtype, threads=threads)
            # Left alone they are restored at the first call of the whole model, but `generate` calls T5's encoder before that.
            if quantizer := getattr(self._model, "hf_quantizer", None):
                quantizer.compressor.decompress_model(self._model)


def _check_folder(folder: Path) -> None:
    config = folder / CONFIG
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} is not a compressed-tensors model (it needs {CONFIG} and *.safetensors): run deploy")
    method = json.loads(config.read_text(encoding="utf-8")).get(_QUANTIZATION, {}).get("quant_method", _METHOD)
    if method != _METHOD:
        raise ValueError(f"{folder} is not a compressed-tensors model, but one quantized by {method}: run deploy")
