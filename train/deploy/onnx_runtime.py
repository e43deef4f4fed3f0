"""ONNX Runtime as the engine of our ONNX files, and the loop that answers with it. Imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from data.prompts import TextFormat
from train.deploy.onnx_decoder import DECODER
from train.deploy.onnx_graph import WEIGHTS, Array
from train.deploy.onnx_t5 import ENCODER
from train.deploy.targets import TOKENIZER
from train.deploy.tokens import Tokens

Device = Literal["auto", "cpu", "cuda"]


class _Generation(Protocol):
    """One batch being answered."""

    def start(self) -> Array:
        """Logits [batch, vocabulary] of the first token."""

    def step(self, tokens: Array) -> Array:
        """Logits of the token after `tokens` [batch]."""


class OnnxRuntime(Tokens):
    """A deployed model, ready to answer on the CPU; loads without torch and transformers."""

    def __init__(self, folder: Path, *, device: Device = "auto", threads: int = 0) -> None:
        """Loads the graphs; the weights stay as they are stored.

        Args:
            folder: what `make` wrote.
            device: cpu, or auto, which is the same here.
            threads: CPU threads for one batch; 0 leaves it to the engine.

        Raises:
            ValueError: if the folder is not a deployed model.
            RuntimeError: if the file is damaged or the device cannot be used.
        """
        if device == "cuda":
            raise RuntimeError("device is cuda, but these ONNX files are for ONNX Runtime on a CPU: choose cpu or auto")
        family = TextFormat.load(folder).family
        needed = [DECODER, WEIGHTS, TOKENIZER] + ([ENCODER] if family == "encoder_decoder" else [])
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise ValueError(f"{folder} is not an ONNX model (it lacks {' and '.join(missing)}): run deploy")
        super().__init__(folder)
        self.device: str = "cpu"
        self._decoder = _session(folder / DECODER, threads)
        self._encoder = _session(folder / ENCODER, threads) if self.family == "encoder_decoder" else None
        self._start_id = int(self._decoder.get_modelmeta().custom_metadata_map.get("start_id", self.format.pad_id))

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without the end-of-sequence token.

        Args:
            prompts: token ids, of any lengths; one batch.
            max_new_tokens: most tokens an answer may take, the end-of-sequence token among them.

        Raises:
            ValueError: if a prompt and its answer could be longer than the file has places for.
        """
        if not prompts or max_new_tokens < 1:
            return [[] for _ in prompts]
        generation = self._generation(prompts, max_new_tokens)
        answers: list[list[int]] = [[] for _ in prompts]
        running = np.ones(len(prompts), bool)
        logits = generation.start()
        for length in range(1, max_new_tokens + 1):
            tokens = logits.argmax(-1)
            running &= tokens != self.format.eos_id
            for row in np.flatnonzero(running):
                answers[row].append(int(tokens[row]))
            if length == max_new_tokens or not running.any():
                break
            logits = generation.step(tokens)
        return answers

    def _generation(self, prompts: Sequence[Sequence[int]], room: int) -> _Generation:
        if self._encoder is not None:
            return _T5Generation(self._encoder, self._decoder, prompts, self._start_id)
        return _DecoderGeneration(self._decoder, prompts, room)

    def logits(self, prompt: Sequence[int], target: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the model gives each token of the vocabulary, before each token of `target`: [len(target), vocabulary]."""
        if self._encoder is not None:
            generation = _T5Generation(self._encoder, self._decoder, [prompt], self._start_id)
            return generation.run(np.array([[self._start_id, *target[:-1]]]))
        return _teacher_forced(self._decoder, prompt, target)

    def log_probs(self, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
        """Natural log-probabilities that the model gives to the tokens of `target`, one after the other, after `prompt`."""
        logits = self.logits(prompt, target).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        totals = np.log(np.exp(logits).sum(-1))
        return [float(row[token] - total) for row, token, total in zip(logits, target, totals, strict=True)]


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised too: no need to print them
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave the CPU to others
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"ONNX Runtime cannot load {path.parent} on device 'cpu' ({reason}): run deploy again") from error


def _cpu(array: Array) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _padded(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Array, Array]:
    """Ids and mask, both int64 [batch, longest], padded on the right."""
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask == 1] = [token for prompt in prompts for token in prompt]
    return ids, mask


class _DecoderGeneration:
    """A batch of a decoder-only model.

    The prompts are padded on the right: the attention takes the length of each row from the mask, writes a new key behind the row's
    own last one, over the padding, and turns it by that place. No row sees another's padding. Keys and values stay where they are:
    the graph reads and writes one buffer.
    """

    def __init__(self, session: Any, prompts: Sequence[Sequence[int]], room: int) -> None:
        self._ids, self._mask = _padded(prompts)
        self._lengths = self._mask.sum(1)
        self._room = self._ids.shape[1] + room - 1
        _check_room(session, self._room)
        self._session, self._binding = session, session.io_binding()
        # A binding does not keep what it points at.
        self._held = [self._bind_cache(entry) for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]

    def _bind_cache(self, entry: Any) -> Any:
        cache = _cpu(np.zeros((len(self._ids), entry.shape[1], self._room, entry.shape[3]), np.float32))
        self._binding.bind_ortvalue_input(entry.name, cache)
        self._binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), cache)
        return cache

    def start(self) -> Array:
        batch, longest = self._ids.shape
        return self._run(self._ids, self._mask, np.arange(batch) * longest + self._lengths - 1)

    def step(self, tokens: Array) -> Array:
        self._lengths += 1
        # As long as the longest row is now; only its width and the sum of each row are read.
        mask = (np.arange(self._lengths.max()) < self._lengths[:, None]).astype(np.int64)
        return self._run(tokens[:, None], mask, np.arange(len(tokens)))

    def _run(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "positions": positions}
        held = {name: _cpu(value) for name, value in feeds.items()}
        for name, value in held.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        return np.asarray(self._binding.get_outputs()[-1].numpy())


def _teacher_forced(session: Any, prompt: Sequence[int], target: Sequence[int]) -> Array:
    ids = np.array([[*prompt, *target[:-1]]], np.int64)
    _check_room(session, ids.shape[1])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "positions": np.arange(len(prompt) - 1, ids.shape[1])}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    return np.asarray(session.run(["logits"], feeds)[0])


def _check_room(session: Any, length: int) -> None:
    most = int(session.get_modelmeta().custom_metadata_map["max_positions"])
    if length > most:
        raise ValueError(
            f"a prompt and its answer of {length} tokens are longer than the ONNX file has places for ({most}): shorten the prompt or "
            "max_new_tokens, or train with a larger student.max_input_tokens"
        )


class _T5Generation:
    """A batch of a T5: its inputs are read once, and each step gives a token for each row."""

    def __init__(self, encoder: Any, decoder: Any, prompts: Sequence[Sequence[int]], start_id: int) -> None:
        ids, mask = _padded(prompts)
        self._decoder, self._start_id, self._batch = decoder, start_id, len(prompts)
        self._feeds = {"attention_mask": _cpu(mask)}
        names = [output.name for output in encoder.get_outputs()]
        looked_at = encoder.run_with_ort_values(None, {"input_ids": _cpu(ids), **self._feeds})
        self._feeds |= dict(zip(names, looked_at, strict=True))
        for entry in decoder.get_inputs():
            if entry.name.startswith("past."):
                self._feeds[entry.name] = _cpu(np.zeros((self._batch, entry.shape[1], 0, entry.shape[3]), np.float32))
        self._past = [output.name.replace("present", "past") for output in decoder.get_outputs()[1:]]

    def start(self) -> Array:
        return self.step(np.full(self._batch, self._start_id))

    def step(self, tokens: Array) -> Array:
        return self.run(tokens[:, None])

    def run(self, ids: Array) -> Array:
        """Logits [batch x new, vocabulary] of the tokens after each of `ids` [batch, new]."""
        logits, *present = self._decoder.run_with_ort_values(None, {**self._feeds, "input_ids": _cpu(ids.astype(np.int64))})
        self._feeds |= dict(zip(self._past, present, strict=True))
        return np.asarray(logits.numpy())
