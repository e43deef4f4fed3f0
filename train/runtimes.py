"""What answers: one interface over plain transformers and the engines of deployed files.

Nothing heavy is imported here: a process that serves a deployed file must not pay, in memory, for a framework that its user does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from data.prompts import Part, TextFormat
from train.artifacts import Family

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Device = Literal["auto", "cpu", "cuda"]
RuntimeKind = Literal["transformers", "ctranslate2", "llama_cpp", "onnx", "compressed_tensors"]


_OFTEN_ON_CPUS = ("ctranslate2", "llama_cpp", "onnx")
"""Engines that often cannot use the GPU that torch uses, for want of a GPU's part or of its CUDA: they take a GPU where they can."""


def device_for(kind: str, device: Device) -> Device:
    """Where to serve what is asked to be on `device`: cuda is auto for the engines that often cannot.

    Args:
        kind: a `RuntimeKind`, or what else answers.
        device: that was asked for.
    """
    return "auto" if device == "cuda" and kind in _OFTEN_ON_CPUS else device


class Runtime(Protocol):
    """A loaded model that answers prompts."""

    @property
    def family(self) -> Family:
        """Whether it reads its input in an encoder or in front of what it writes."""

    @property
    def format(self) -> TextFormat:
        """How the model is called."""

    @property
    def device(self) -> str:
        """Where it runs: cpu or cuda."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and outer white space."""

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of one batch of prompts, without the end-of-sequence token."""

    def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        """Natural log-probabilities of the tokens of `target`, one after the other, after `prompt`."""

    def peak_device_bytes(self) -> int | None:
        """Most GPU memory held; None on a CPU, or where the engine does not tell."""


class TransformersRuntime:
    """A model folder in plain transformers: `generate`, greedy."""

    def __init__(
        self, folder: Path, *, device: Device = "auto", dtype: Literal["float32", "bfloat16"] = "float32", threads: int = 0
    ) -> None:
        """Loads a model folder of this project.

        Args:
            folder: safetensors, tokenizer and stepdown.json.
            device: auto takes the GPU where there is one.
            dtype: type of weights and arithmetic.
            threads: CPU threads; 0 leaves it to torch.

        Raises:
            ValueError: if the folder is not a model of this project.
            RuntimeError: if device is cuda and there is none.
        """
        import torch

        from train.models import load_folder

        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("device is cuda, but torch finds no GPU: choose cpu or auto")
        if threads:
            torch.set_num_threads(threads)
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        model, tokenizer, form = load_folder(folder, dtype=getattr(torch, dtype))
        self._serve(model.to(place), tokenizer, form)

    @classmethod
    def over(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: TextFormat) -> TransformersRuntime:
        """Serves a live model where it lies; its generation settings are replaced, and it is put into evaluation mode."""
        runtime = cls.__new__(cls)
        runtime._serve(model, tokenizer, form)
        return runtime

    def _serve(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: TextFormat) -> None:
        from transformers import GenerationConfig

        from train.models import decode, encoder

        self._model, self._tokenizer, self.format = model.eval(), tokenizer, form
        self.device: str = model.device.type
        self.family: Family = form.family
        self.encode = encoder(self._tokenizer)
        self._decode = decode
        # A hub model's own generation settings (temperature, penalties) would make this something else than plain greedy decoding.
        self._model.generation_config = GenerationConfig(
            eos_token_id=self.format.eos_id,
            pad_token_id=self.format.pad_id,
            decoder_start_token_id=getattr(self._model.config, "decoder_start_token_id", None),
        )

    @property
    def num_tokens(self) -> int:
        """Rows of the embedding."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and outer white space."""
        return self._decode(self._tokenizer, list(ids))

    def close(self) -> None:
        """Gives the model's memory back; only the format and the tokenizer are of use afterwards."""
        del self._model

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without the end-of-sequence token.

        Args:
            prompts: token ids, of any lengths; one batch.
            max_new_tokens: most tokens an answer may take, the end-of-sequence token among them.
        """
        import torch

        if not prompts:
            return []
        ids, mask = pad(prompts, self.format.pad_id, left=self.family == "decoder_only")
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=max_new_tokens, do_sample=False
            )
        first = ids.shape[1] if self.family == "decoder_only" else 1
        return [until(row, self.format.eos_id) for row in output[:, first:].tolist()]

    def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        """Natural log-probabilities that the model gives to the tokens of `target`, one after the other, after `prompt`."""
        rows = self._logits(prompt, target).double().log_softmax(dim=-1)
        return [float(row[token]) for row, token in zip(rows, target, strict=True)]

    def logits(self, prompt: Sequence[int], target: Sequence[int]) -> NDArray[np.float32]:
        """[tokens of target, vocabulary] what the tokens of `target` are chosen from."""
        found: NDArray[np.float32] = self._logits(prompt, target).numpy()
        return found

    def _logits(self, prompt: Sequence[int], target: Sequence[int]) -> torch.Tensor:
        import torch

        def row(ids: Sequence[int]) -> torch.Tensor:
            return torch.tensor([[*ids]], device=self.device)

        with torch.inference_mode():
            if self.family == "encoder_decoder":
                start = self._model.config.decoder_start_token_id
                logits = self._model(input_ids=row(prompt), decoder_input_ids=row([start, *target[:-1]]), use_cache=False).logits[0]
            else:
                logits = self._model(input_ids=row([*prompt, *target]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found: torch.Tensor = logits.float().cpu()
        return found

    def peak_device_bytes(self) -> int | None:
        """Most GPU memory that torch has held; None on a CPU."""
        import torch

        return int(torch.cuda.max_memory_allocated()) if self.device == "cuda" else None


def pad(prompts: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one batch of ids and its mask, both int64 [batch, longest].

    The mask follows the lengths: a token whose id is the padding's is still a token.
    """
    import torch

    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt, dtype=ids.dtype)
        mask[row, place] = 1
    return ids, mask


def until(ids: list[int], eos_id: int) -> list[int]:
    """The ids before the first end-of-sequence token; all where there is none."""
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def model_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of a model folder's weights alone (safetensors, or a deployed model's file), and of all its files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    weights = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".bin", ".gguf"))
    return weights, sum(path.stat().st_size for path in files)


def open_runtime(
    kind: RuntimeKind, folder: Path, *, device: Device = "auto", dtype: Literal["float32", "bfloat16"] = "float32", threads: int = 0
) -> Runtime:
    """Loads a model into the runtime that serves it; only that runtime's libraries are imported.

    Raises:
        ValueError: if the folder is not what the runtime loads.
        RuntimeError: if the weights are damaged or the device is missing.
    """
    if kind == "transformers":
        return TransformersRuntime(folder, device=device, dtype=dtype, threads=threads)
    if kind == "compressed_tensors":
        from train.deploy.compressed_tensors import CompressedTensorsRuntime

        return CompressedTensorsRuntime(folder, device=device, dtype=dtype, threads=threads)
    if kind == "onnx":
        from train.deploy.onnx_runtime import OnnxRuntime

        return OnnxRuntime(folder, device=device, threads=threads)
    if kind == "llama_cpp":
        from train.deploy.llama_cpp import LlamaCppRuntime

        return LlamaCppRuntime(folder, device=device, threads=threads)
    from train.deploy.ctranslate2 import Ctranslate2Runtime

    return Ctranslate2Runtime(folder, device=device, threads=threads)


def answers(
    runtime: Runtime,
    inputs: Sequence[str],
    part: Part,
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """What a model writes for each input, in the order of the inputs.

    Args:
        runtime: the loaded model.
        inputs: texts as the task gives them; the prompt is built here.
        part: what is asked for.
        batch_size: prompts answered at once; they are sorted by length first, so that little is padding.
        max_new_tokens: most tokens of one answer.
        advance: called after each batch with the number of its prompts.
    """
    prompts = [runtime.format.prompt_ids(part, text, runtime.encode)[0] for text in inputs]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, ids in zip(batch, runtime.answer([prompts[i] for i in batch], max_new_tokens), strict=True):
            texts[i] = runtime.decode(ids)
        advance(len(batch))
    return texts
