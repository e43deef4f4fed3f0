"""How a model's files are read without noise, and how a failure to read them is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from pickle import UnpicklingError

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers.utils import logging

from train.places import Place

# What transformers lets through of a broken file: no JSON, no safetensors, no pickle, a tensor of another shape, a config of another type.
_FAILURES = (OSError, ValueError, KeyError, RuntimeError, httpx.HTTPError, SafetensorError, UnpicklingError, StrictDataclassError)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers and the hub client from printing progress bars and warnings; restores their settings."""
    verbosity, hub_verbosity, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading(key: str, source: str, place: Place) -> Iterator[None]:
    """Wraps a `from_pretrained`: no noise, and failures told in the configuration's terms.

    Raises:
        ValueError: if there is no such model on the hub, or it is of a kind that writes no text.
        RuntimeError: if files are broken, the model is gated, or a download failed.
    """
    with quiet():
        try:
            yield
        except _FAILURES as error:
            network = any(isinstance(cause, OSError | httpx.HTTPError | HFValidationError) for cause in _chain(error))
            raise (_hub_failure(key, source, error) if place.on_hub and network else _local_failure(key, source, error)) from error


def _local_failure(key: str, source: str, error: Exception) -> Exception:
    if "Unrecognized configuration class" in str(error):
        return ValueError(f"{key} is {source!r}, a model of a kind that writes no text: give an encoder-decoder (T5) or a decoder-only one")
    return RuntimeError(f"{key} is {source!r}, whose files transformers cannot load: {_first_line(error)}")


def _hub_failure(key: str, source: str, error: Exception) -> Exception:
    causes = list(_chain(error))
    page = f"{constants.ENDPOINT}/{source}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return RuntimeError(f"{key} is {source!r}, a gated model: accept its terms at {page}, then `hf auth login`")
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return ValueError(
            f"{key} is {source!r}: there is no such folder in {Path.cwd()} and no such model at {constants.ENDPOINT}; check the name "
            "(a private model needs `hf auth login`)"
        )
    # What is left is the network or the cache's disk. transformers reports a lost connection in many ways, some without a cause.
    telling = (cause for cause in causes if isinstance(cause, httpx.HTTPError | HfHubHTTPError) or getattr(cause, "errno", None))
    reason = next(telling, error)
    return RuntimeError(
        f"{key} is {source!r}: the download from {constants.ENDPOINT} was interrupted, or the hub could not be reached "
        f"({type(reason).__name__}: {_first_line(reason)}). The same command continues it, keeping the files that arrived whole; "
        "a folder works as well, and so does HF_HUB_OFFLINE=1 with a cached copy"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
