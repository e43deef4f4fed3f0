"""Which model a configuration or a command line means, and its shape, from config.json alone. Imports no torch."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.architecture import Architecture, architecture_of, assumed_architecture
from launch.estimators import Size
from launch.parameters import buffer_bytes, config_of, count_parameters, is_known, largest_module, parse_parameters
from train.config import CutModel, ModelSource, ScratchModel

CONFIG = "config.json"
_VOCABULARY = 512
"""Of a tokenizer that is trained on the task's texts, where `vocabulary` is left out."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Sized:
    """A model's shape, or why it is not known."""

    model: Architecture | None
    unknown: str = ""


def sized(model: ModelSource | None, teacher: ModelSource | None, key: str) -> Sized:
    """The shape of a model as the configuration names it; of a hub id the config.json alone is fetched.

    Args:
        model: what stands under `key`.
        teacher: the model that a `{cut_from: teacher}` is cut from.
        key: the configuration key, for what is said where it is not known.
    """
    source = teacher if isinstance(model, CutModel) else model
    if isinstance(source, ScratchModel) and source.tokenizer is not None:
        return Sized(None, f"the size of {key} is not known before its tokenizer is read")
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not source.endswith(".gguf") and not Path(source).exists():
        try:
            source = str(fetched(source).parent)
        except RuntimeError as error:
            return Sized(None, f"the size of {key} is not known: {error}")
    vocabulary = source.vocabulary if isinstance(source, ScratchModel) else None
    named = model if isinstance(model, CutModel) else source
    config = None if named is None else config_of(named, vocabulary=vocabulary or _VOCABULARY, teacher=source)
    if config is None:
        return Sized(None, f"the size of {key} is not known before its files are read")
    if not is_known(config):
        return Sized(None, f"{key} is of model_type {config.get('model_type')!r}, whose parameters cannot be counted")
    return Sized(architecture_of(config))


def shape_here(model: ModelSource, teacher: ModelSource | None) -> Architecture | None:
    """The shape of a model as far as this machine tells: of a hub id only what its cache holds. Arguments as `sized`."""
    source = teacher if isinstance(model, CutModel) else model
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not Path(source).exists():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, CONFIG)
        if not isinstance(cached, str):
            return None
        source = str(Path(cached).parent)
    named = model if isinstance(model, CutModel) else source
    config = None if named is None else config_of(named, vocabulary=_VOCABULARY, teacher=source)
    return architecture_of(config) if config is not None and is_known(config) else None


def shape_of(model: str | None, params: str | None) -> tuple[str, Architecture]:
    """A model by itself, and what it is called. Arguments and errors as `size_of`."""
    name, config = _named(model, params)
    if config is not None:
        return name, architecture_of(config)
    assert params is not None
    return name, assumed_architecture(parse_parameters(params))


def size_of(model: str | None, params: str | None) -> tuple[str, Size]:
    """A model by itself as estimators see it, and what it is called.

    Args:
        model: a model folder, its config.json, or a hub id, whose config.json alone is fetched.
        params: a number of parameters in place of a model.

    Raises:
        ValueError: if neither or both are given, or the model's parameters cannot be counted.
        RuntimeError: if the hub does not give its config.json.
    """
    name, config = _named(model, params)
    if config is None:
        assert params is not None
        return name, Size(parse_parameters(params), 0, 0)
    return name, Size(count_parameters(config), largest_module(config), buffer_bytes(config))


def _named(model: str | None, params: str | None) -> tuple[str, Mapping[str, Any] | None]:
    """What a model is called, and its config.json; None of a number of parameters."""
    if (model is None) == (params is None):
        raise ValueError("give a configuration, a model (its folder, config.json or hub id), or --params, such as --params 70B")
    if model is None:
        return f"{params} parameters", None
    path = Path(model)
    path = path / CONFIG if path.is_dir() else path
    return model, dict(json.loads((path if path.is_file() else fetched(model)).read_text()))


def fetched(model: str) -> Path:
    """The config.json of a hub id, from the hub or its cache.

    Raises:
        ValueError: if it is no hub id.
        RuntimeError: if the hub does not give it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell each of its retries
    try:
        if isinstance(cached := try_to_load_from_cache(model, CONFIG), str):
            return Path(cached)
        get_hf_file_metadata(hf_hub_url(model, CONFIG))  # without a network it fails at once, the download after half a minute
        return Path(hf_hub_download(model, CONFIG))
    except HFValidationError:
        raise ValueError(f"{model} is no YAML file, no folder with a {CONFIG}, and no hub id") from None
    except Exception as error:  # of the network, in whatever form
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"the hub does not give {CONFIG} of {model}: {told[0]}; give its folder, or --params") from error
