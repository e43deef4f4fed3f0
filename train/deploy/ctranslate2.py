"""CTranslate2: int8 and float files for encoder-decoder and decoder-only models, and the engine that answers with them.

The only module that imports ctranslate2. Serving needs neither torch nor transformers: tokens come from `tokenizer.json`, the form of
a prompt from `stepdown.json`. Converting needs both.
"""

from __future__ import annotations

import ctypes
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import ctranslate2

from data.prompts import FORMAT_FILE, TextFormat
from train.deploy.targets import TOKENIZER, Sample, Stored, Target
from train.deploy.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Compute = Literal["float32", "float16", "int8", "int8_float16"]
Device = Literal["auto", "cpu", "cuda"]

WEIGHTS = "model.bin"
_TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
"""By their number in the file."""
_CUBLAS = "libcublas.so.12"
_VOCABULARIES = ("shared_vocabulary.json", "vocabulary.json")


def make(source: Path, out: Path, target: Target, calibration: Sequence[Sample]) -> None:
    """Writes a complete CTranslate2 folder (`convert`); the calibration is not read, as int8 is scaled by each row's largest weight."""
    del calibration
    convert(source, out, cast(Compute, target.name.partition("-")[2]))


def stored(folder: Path) -> list[Stored]:
    """What `model.bin` holds, tensor by tensor, a quantized matrix with the scales of its rows."""
    found = dict(_variables((folder / WEIGHTS).read_bytes()))
    tensors = []
    for name, (shape, kind, num_bytes) in found.items():
        if name.endswith("_scale") and name.removesuffix("_scale") in found:
            continue
        scale = found.get(f"{name}_scale")
        is_matrix = len(shape) == 2 and "/layer_" in name and name.endswith("/weight")
        scales, rows = (scale[2], shape[0]) if scale else (0, 0)
        tensors.append(Stored(name, math.prod(shape), num_bytes + scales, kind, is_matrix, rows))
    return tensors


def _variables(content: bytes) -> Iterator[tuple[str, tuple[tuple[int, ...], str, int]]]:
    """Name, shape, type and bytes of each variable: what ModelSpec._serialize of the library writes, read again."""
    place = 4  # version of the file

    def number(size: int) -> int:
        nonlocal place
        place += size
        return int.from_bytes(content[place - size : place], "little")

    def text() -> str:
        nonlocal place
        length = number(2)
        place += length
        return content[place - length : place - 1].decode()

    text()  # the model's kind
    number(4)  # and its revision
    for _ in range(number(4)):
        name = text()
        shape = tuple(number(4) for _ in range(number(1)))
        kind, num_bytes = _TYPES[number(1)], number(4)
        place += num_bytes
        yield name, (shape, kind, num_bytes)


def convert(model_folder: Path, out: Path, compute: Compute) -> None:
    """Writes a complete CTranslate2 folder: weights, configuration, vocabulary, tokenizer and `stepdown.json`.

    Args:
        model_folder: a model of this project (safetensors, tokenizer.json, stepdown.json).
        out: the folder to make; one that exists is replaced.
        compute: type of the stored weights; in the int8 ones each row of a matrix has its own scale, and vectors stay in float.

    Raises:
        ValueError: if the folder is no model of this project, or CTranslate2 has no converter for its architecture.
    """
    import torch

    from train.models import load_folder

    if not (model_folder / TOKENIZER).is_file():
        raise ValueError(f"{model_folder} has no {TOKENIZER}, which the deployed model needs: give the student a fast tokenizer")
    model, tokenizer, text_format = load_folder(model_folder, dtype=torch.float32)
    converter = _converter(model_folder, model, tokenizer, text_format)
    try:
        converter.convert(str(out), quantization=compute, force=True)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"deploy.targets: CTranslate2 {ctranslate2.__version__} cannot convert a student of model type {model.config.model_type!r} "
            f"({str(error).splitlines()[0]}); choose a student of a family that it converts, such as t5, llama, mistral, qwen2 or qwen3"
        ) from error
    for name in (TOKENIZER, FORMAT_FILE):
        shutil.copyfile(model_folder / name, out / name)


def _converter(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> Any:
    """CTranslate2's own converter, given our model and tokenizer, with its assumptions corrected where they do not hold."""
    from ctranslate2.converters import TransformersConverter  # imports torch: not for a process that serves

    class FolderConverter(TransformersConverter):  # type: ignore[misc]
        def load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            # Its T5 loader takes tied embeddings for "the output is scaled". transformers 5 ties always and keeps the scaling in a key
            # of its own; delete this once T5Loader reads `scale_decoder_outputs`.
            if hasattr(model.config, "scale_decoder_outputs"):
                model.config.tie_word_embeddings = model.config.scale_decoder_outputs
            return model

        def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            # It numbers the tokens in a row: where a tokenizer leaves gaps, or the embedding has more rows, each row needs a name.
            named = tokenizer.get_vocab()
            unnamed = set(range(model.get_input_embeddings().weight.shape[0])) - set(named.values())
            tokenizer.get_vocab = lambda: {**named, **{f"<unused_{i}>": i for i in unnamed}}
            return tokenizer

        def _load(self) -> Any:
            spec = super()._load()
            # A tokenizer may lack these tokens, and the engine refuses a null; the padding token is one that no text holds.
            pad = tokenizer.convert_ids_to_tokens(text_format.pad_id)
            spec.config.unk_token = spec.config.unk_token or pad
            spec.config.bos_token = spec.config.bos_token or pad
            # The tokenizer's idea of an end-of-sequence token may be wrong (SmolLM2's GGUF); ours is what the student learnt.
            spec.config.eos_token = tokenizer.convert_ids_to_tokens(text_format.eos_id)
            return spec

    return FolderConverter(str(folder))


def lacks_for_gpu() -> str | None:
    """What the engine lacks to multiply on a GPU here, of which it finds out only when it first does; None where it can."""
    if not ctranslate2.get_cuda_device_count():
        return "a GPU that its CUDA can use, of which it finds none: see nvidia-smi for the driver's version"
    try:
        ctypes.CDLL(_CUBLAS)
    except OSError:
        return f"{_CUBLAS}, which is not found: pip install nvidia-cublas-cu12 and put its lib folder on LD_LIBRARY_PATH"
    return None


def _usable(device: Device) -> Device:
    """The device; of auto the one that the engine can use.

    Raises:
        RuntimeError: if device is cuda and it cannot.
    """
    if device == "cpu" or not (lacks := lacks_for_gpu()):
        return device
    if device == "cuda":
        raise RuntimeError(f"device is cuda, but CTranslate2 needs {lacks}, or choose device cpu")
    return "cpu"


class Ctranslate2Runtime(Tokens):
    """A deployed model, ready to answer; loads without torch and transformers."""

    def __init__(self, folder: Path, *, device: Device = "auto", threads: int = 0) -> None:
        """Loads the model with the weights as they are stored.

        Args:
            folder: what `convert` wrote.
            device: auto takes the GPU where there is one.
            threads: CPU threads for one batch; 0 leaves it to the engine.

        Raises:
            ValueError: if the folder is not a deployed model.
            RuntimeError: if the file is damaged or the device cannot be used.
        """
        vocabulary = next((folder / name for name in _VOCABULARIES if (folder / name).is_file()), None)
        if vocabulary is None or not (folder / WEIGHTS).is_file():
            raise ValueError(f"{folder} is not a CTranslate2 model (it needs {WEIGHTS} and a vocabulary): run deploy")
        super().__init__(folder)
        # The engine takes and gives names of tokens: one for each row of the embedding, also those beyond the tokenizer's size.
        self._tokens: list[str] = json.loads(vocabulary.read_text(encoding="utf-8"))
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        engine = ctranslate2.Translator if self.family == "encoder_decoder" else ctranslate2.Generator
        place = _usable(device)
        try:
            self._engine = engine(str(folder), device=place, intra_threads=threads)
        except RuntimeError as error:
            raise RuntimeError(
                f"CTranslate2 cannot load {folder} on device {place!r} ({error}): run deploy again, or choose device cpu"
            ) from error
        self.device: str = self._engine.device
        self.compute_type: str = self._engine.compute_type
        """What the engine computes in here; it differs from the stored type where the device lacks it."""

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without the end-of-sequence token.

        Args:
            prompts: token ids, of any lengths; one batch.
            max_new_tokens: most tokens an answer may take, the end-of-sequence token among them.
        """
        if not prompts:
            return []
        batch = [[self._tokens[i] for i in prompt] for prompt in prompts]
        end = [self._tokens[self.format.eos_id]]
        if self.family == "decoder_only":
            results = self._engine.generate_batch(
                batch, beam_size=1, max_length=max_new_tokens, end_token=end, include_prompt_in_result=False, cache_static_prompt=False
            )
            return [list(result.sequences_ids[0]) for result in results]
        # The engine's defaults would cut long inputs and forbid an empty answer.
        results = self._engine.translate_batch(
            batch, beam_size=1, max_decoding_length=max_new_tokens, end_token=end, min_decoding_length=0, max_input_length=0
        )
        return [[self._ids[token] for token in result.hypotheses[0]] for result in results]

    def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        """Natural log-probabilities that the model gives to the tokens of `target`, one after the other, after `prompt`."""
        source, wanted = [[self._tokens[i] for i in ids] for ids in (prompt, target)]
        if self.family == "decoder_only":
            return list(self._engine.score_batch([source + wanted], max_input_length=0)[0].log_probs)[-len(wanted) :]
        return list(self._engine.score_batch([source], [wanted], max_input_length=0)[0].log_probs)[: len(wanted)]
