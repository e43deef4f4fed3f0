"""A model from a hub id, a folder, a GGUF file or a file inside a Python package, from scratch, or cut from its teacher; and its folder.

This room (with train/tokenization.py) is the only one that touches the Auto classes of transformers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from data.prompts import TextFormat
from train.activity import Sample
from train.artifacts import Family
from train.config import CutModel, ModelSource, ScratchModel
from train.cutting import cut
from train.lora import plain_name
from train.places import Place, locate
from train.sources import quiet, reading
from train.tokenization import (
    check_same_vocabulary,
    decode,
    encoder,
    load_tokenizer,
    pad_id,
    save_tokenizer,
    text_format,
    tokenizer_source,
)

__all__ = [
    "check_same_vocabulary",
    "decode",
    "encoder",
    "family_of",
    "load_folder",
    "load_model",
    "load_tokenizer",
    "num_parameters",
    "save_model",
    "skeleton",
    "text_format",
    "tied_weights",
    "tokenizer_source",
]

_MAX_POSITIONS = 4096


def load_model(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    dtype: torch.dtype,
    teacher_folder: str | Path | None = None,
    key: str = "student.model",
    samples: Sequence[Sample] | None = None,
) -> PreTrainedModel:
    """A model on the CPU, in evaluation mode.

    Args:
        source: what the configuration names: a hub id, a folder, a .gguf file, package:NAME/FILE, from scratch, or cut from the teacher.
        tokenizer: the model's tokenizer; a model from scratch gets its vocabulary.
        seed: of the random weights of a model from scratch; the global generator is left as it was.
        dtype: of the weights.
        teacher_folder: the teacher's folder (or its name); read for a cut student only.
        key: the configuration key of the model, for messages.
        samples: token ids of the task's texts, by which it is chosen what a cut student keeps; random ones where None.

    Raises:
        ValueError: if the name means nothing, a folder lacks weights or configuration, or what is to be kept of a teacher does not exist.
        RuntimeError: if a package is missing, files are broken or a download failed.
    """
    if isinstance(source, ScratchModel):
        return _from_scratch(source, tokenizer, seed, key).to(dtype=dtype).eval()
    if isinstance(source, CutModel):
        assert teacher_folder is not None, "a cut student needs its teacher"
        model = _pretrained(str(teacher_folder), dtype, "teacher.model")
        cut(model, source, key, samples)
    else:
        model = _pretrained(source, dtype, key)
    rows, ids = model.get_input_embeddings().weight.shape[0], _vocabulary_size(tokenizer)
    if ids > rows:
        raise ValueError(
            f"{key} has embeddings for {rows} tokens, but its tokenizer gives ids up to {ids - 1}: they do not belong together"
        )
    return model


def _from_scratch(source: ScratchModel, tokenizer: PreTrainedTokenizerBase, seed: int, key: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        if source.from_scratch == "t5":
            return T5ForConditionalGeneration(_t5_config(source, tokenizer))
        return LlamaForCausalLM(_llama_config(source, tokenizer, key))


def _t5_config(source: ScratchModel, tokenizer: PreTrainedTokenizerBase) -> T5Config:
    return T5Config(
        vocab_size=_vocabulary_size(tokenizer),
        d_model=source.d_model,
        d_kv=source.d_model // source.heads,
        d_ff=source.d_ff or 4 * source.d_model,
        num_layers=source.layers,
        num_decoder_layers=source.layers,
        num_heads=source.heads,
        dropout_rate=source.dropout,
        feed_forward_proj=source.feed_forward,
        tie_word_embeddings=True,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=pad_id(tokenizer),
    )


def _llama_config(source: ScratchModel, tokenizer: PreTrainedTokenizerBase, key: str) -> LlamaConfig:
    if (width := source.d_model // source.heads) % 2:
        raise ValueError(
            f"{key}.heads is {source.heads}, which makes heads of width {width}, but a llama turns the numbers of a head in pairs: "
            "choose d_model and heads whose quotient is even"
        )
    return LlamaConfig(
        vocab_size=_vocabulary_size(tokenizer),
        hidden_size=source.d_model,
        intermediate_size=source.d_ff or 4 * source.d_model,
        num_hidden_layers=source.layers,
        num_attention_heads=source.heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=pad_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    # Some tokenizers leave gaps between their ids: the largest one counts.
    ids: list[int] = list(tokenizer.get_vocab().values())
    return max(len(tokenizer), max(ids) + 1)


def _pretrained(source: str, dtype: torch.dtype, key: str) -> PreTrainedModel:
    place = locate(source, key)
    if not place.on_hub and place.gguf_file is None:
        _check_folder(Path(place.name), source, key)
    with reading(key, source, place), _no_bar_of_its_own(place):
        config = AutoConfig.from_pretrained(place.name, **place.arguments)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, info = auto.from_pretrained(place.name, config=config, dtype=dtype, output_loading_info=True, **place.arguments)
        assert isinstance(model, PreTrainedModel)
    if info["missing_keys"]:
        # transformers would fill them with random numbers and only warn.
        example = min(info["missing_keys"])
        raise ValueError(
            f"{key} is {source!r}, whose weights lack {len(info['missing_keys'])} tensors of a {type(model).__name__} (such as {example}): "
            "the checkpoint is incomplete, or was made for another task"
        )
    if family_of(model) == "encoder_decoder" and model.config.decoder_start_token_id is None:
        model.config.decoder_start_token_id = model.config.pad_token_id
    return _unquantized(model) if place.gguf_file is not None else model


def _check_folder(folder: Path, source: str, key: str) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key} is {source!r}, a folder without config.json: give one that save_pretrained made, or the .gguf file itself")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise ValueError(f"{key} is {source!r}, a folder without weights (*.safetensors or *.bin); it holds {held}: copy them there")


@contextlib.contextmanager
def _no_bar_of_its_own(place: Place) -> Iterator[None]:
    # The GGUF reader of transformers 5.17 draws a bar that no setting turns off; delete when it asks transformers.utils.logging.
    with contextlib.redirect_stderr(io.StringIO()) if place.gguf_file is not None else contextlib.nullcontext():
        yield


def _unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a model read from a GGUF file: that one counts as quantized and refuses `save_pretrained`."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), quiet():
        plain = type(model)(config).to(dtype=model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """Whether a model reads its input in an encoder or in front of what it writes."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    return "encoder_decoder" if config.is_encoder_decoder else "decoder_only"


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters of a model; tied weights count once, and a partitioned weight (ZeRO-3) counts whole."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters())


def skeleton(source: str, key: str) -> PreTrainedModel:
    """A named model without its weights (on torch's meta device): enough to tell its family and to count its parameters.

    Args:
        source: a hub id, folder, .gguf file or package:NAME/FILE.
        key: the configuration key it was written under, for messages.

    Raises:
        ValueError: if the name means nothing.
        RuntimeError: if the configuration cannot be fetched.
    """
    place = locate(source, key)
    with reading(key, source, place):
        config = AutoConfig.from_pretrained(place.name, **place.arguments)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def _persistent(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what a model works out for itself when it is made: rotary frequencies and the like."""
    own = {plain_name(f"{prefix}.{name}") for prefix, module in model.named_modules() for name in module._non_persistent_buffers_set}
    return {name: value for name, value in weights.items() if name not in own}


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    format: TextFormat,
    folder: Path,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes a folder that plain transformers loads: safetensors, configuration, tokenizer, and `stepdown.json`.

    Args:
        model: gives the architecture, and the weights where `state_dict` is None. Its configuration is set to the format's special tokens.
        tokenizer: goes into the folder.
        format: how the model is called.
        folder: made where missing.
        state_dict: the whole weights, gathered from a sharded run, under the model's own names; of a model with adapters, what
            `merged_weights` gives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _set_special_tokens(model, tokenizer, format)
    with quiet():
        if state_dict is None:
            assert all(plain_name(name) == name for name, _ in model.named_parameters()), "a model with adapters is saved by merged weights"
            model.save_pretrained(folder)
        else:
            weights = _persistent(model, _without_tied_copies(model, state_dict))
            model.save_pretrained(folder, state_dict=weights)
            # save_pretrained notes the precision of the live model, which trains in another one than the gathered weights have.
            model.config.dtype = next(value.dtype for value in state_dict.values() if value.is_floating_point())
            model.config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    format.save(folder)


def replace_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, format: TextFormat, stage_folder: Path) -> None:
    """Writes `model/` in a stage's folder, in place of what may lie there, once the new one is whole."""
    new, old = stage_folder / ".model.new", stage_folder / "model"
    shutil.rmtree(new, ignore_errors=True)
    save_model(model, tokenizer, format, new)
    shutil.rmtree(old, ignore_errors=True)
    new.replace(old)


def _set_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, format: TextFormat) -> None:
    tokens = {"eos_token_id": format.eos_id, "pad_token_id": format.pad_id, "bos_token_id": tokenizer.bos_token_id}
    if format.family == "encoder_decoder":
        tokens["decoder_start_token_id"] = model.config.decoder_start_token_id
    for name, value in tokens.items():
        setattr(model.config, name, value)
    # A new one: sampling defaults of the model it came from are not this model's, which answers greedily.
    model.generation_config = GenerationConfig(**tokens)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are the same as another one: a T5's configuration says so of its head, which a checkpoint may hold apart."""
    pairs = model.all_tied_weights_keys.items()
    return {target: source for target, source in pairs if model.get_parameter(target) is model.get_parameter(source)}


def _without_tied_copies(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # A gathered state dict holds tied weights as separate copies, which would be written twice.
    tied = tied_weights(model)
    weights = {name: value for name, value in state_dict.items() if tied.get(name) not in state_dict}
    missing = _plain_names(model) - state_dict.keys()
    assert not missing, f"the gathered weights lack {sorted(missing)[:3]}"
    return weights


def _plain_names(model: PreTrainedModel) -> set[str]:
    # A model that trains through adapters still holds them when its merged weights are saved.
    return {plain for name, _ in model.named_parameters() if (plain := plain_name(name)) is not None}


def load_folder(folder: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TextFormat]:
    """The model, its tokenizer and its format from a folder that `save_model` made.

    Raises:
        ValueError: if the folder is not one, or is incomplete.
        RuntimeError: if its files are broken.
    """
    format = TextFormat.load(folder)
    tokenizer = load_tokenizer(str(folder), texts=None, folder=None, key="model folder")
    return load_model(str(folder), tokenizer, seed=0, dtype=dtype, key="model folder"), tokenizer, format
