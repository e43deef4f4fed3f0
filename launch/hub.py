"""Whether a model's files on the hub can be had here: from its cache, or over the network. Imports no torch."""

from __future__ import annotations

from train.places import Place

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model")
_SECONDS = 5.0


def check_hub(place: Place, key: str, *, is_tokenizer: bool = False) -> None:
    """That the hub's cache has a model, or the hub gives it: its config.json is fetched, and nothing where the cache has the model.

    Args:
        place: what `train.places.locate` made of a name; one that is not on the hub is left alone.
        key: the configuration key the name was written under.
        is_tokenizer: only the tokenizer is wanted, not weights.

    Raises:
        ValueError: if the hub does not have it, or not for this user.
        RuntimeError: if it is not in the cache and the hub cannot be asked.
    """
    if not place.on_hub:
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        if _is_cached(place.name, is_tokenizer):
            return
        file = _TOKENIZERS[1] if is_tokenizer else CONFIG
        get_hf_file_metadata(hf_hub_url(place.name, file), timeout=_SECONDS)  # at once where there is no network; the next line retries
        hf_hub_download(place.name, file)
    except (GatedRepoError, RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{key} is {place.name!r}, {_refusal(place.name, error, constants.ENDPOINT)}") from error
    except OfflineModeIsEnabled as error:
        raise RuntimeError(
            f"{key} is {place.name!r}, which is neither a folder here nor in the hub's cache ({constants.HF_HUB_CACHE}), and "
            "HF_HUB_OFFLINE forbids to ask the hub: correct the name, unset the variable, or give the model's folder"
        ) from error
    except Exception as error:  # of the network, in whatever form
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"{key} is {place.name!r}, which is neither a folder here nor in the hub's cache ({constants.HF_HUB_CACHE}), and "
            f"{constants.ENDPOINT} cannot be asked ({told[0].rstrip('.')}): connect, bring the cache from a machine that is (`hf download "
            f"{place.name}`), or give the model's folder"
        ) from error


def _is_cached(name: str, is_tokenizer: bool) -> bool:
    """Its description and some weights are there; a download that broke off between several files of weights goes unseen."""
    from huggingface_hub import try_to_load_from_cache

    def has(*files: str) -> bool:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)

    return has(*_TOKENIZERS) if is_tokenizer else has(CONFIG) and has(*_WEIGHTS)


def _refusal(name: str, error: Exception, endpoint: str) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"whose licence must be accepted: do so at {endpoint}/{name}, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"which {endpoint} does not have, or not for you: check the spelling, or log in with `hf auth login` if it is private"
    if isinstance(error, EntryNotFoundError):
        return f"which is on the hub but has no {CONFIG}, as models for transformers do: give the id of such a model"
    return "which is no folder here and cannot be a hub id: check the path, or the spelling (ORGANISATION/NAME)"
