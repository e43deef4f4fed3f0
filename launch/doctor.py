"""`stepdown doctor`: what is installed, what this machine has, and what to do about the rest. Imports none of the libraries it checks.

stepdown doctor
"""

from __future__ import annotations

import netrc
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from launch.hardware import DetectedGpu, cpu_count, detect, known_gpu, memory_bytes
from train.told import run_told

_ROOT = Path(__file__).resolve().parents[1]
_OLDEST_PYTHON = (3, 11)
_EXTRAS = {
    "gguf": "reads .gguf files, and makes and serves them",
    "onnx": "makes and serves ONNX files",
    "vllm": "makes and reads safetensors of few bits (compressed-tensors)",
    "dev": "runs the tests",
}
_ASK_TORCH = """
import sys
from train.engine import uses_cuda
from train.told import status_of
sys.exit(status_of(lambda: uses_cuda("auto", int(sys.argv[1]))))
"""
_ASK_CTRANSLATE2 = """
import sys
from train.deploy.ctranslate2 import lacks_for_gpu
sys.exit(lacks_for_gpu())
"""
_MARKS = {True: "[green]ok[/]", False: "[red]broken[/]", None: "[yellow]note[/]"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's answer."""

    name: str
    ok: bool | None
    """False: a run breaks; None: worth knowing, nothing breaks."""
    found: str
    advice: str
    """What to do; empty where there is nothing to do."""


def checks(folder: Path = Path("runs")) -> list[Check]:
    """Everything that the doctor looks at.

    Args:
        folder: where runs are kept; it need not exist yet.
    """
    gpus = detect()
    project = _project(_ROOT)
    return [
        python_check(sys.version_info[:3]),
        *library_checks(project.dependencies, project.pins),
        *[extra_check(name, purpose, project.extras[name]) for name, purpose in _EXTRAS.items()],
        *device_checks(gpus, _installed("torch")),
        *torch_checks(len(gpus), _installed("torch")),
        *ctranslate2_checks(len(gpus), _installed("ctranslate2")),
        *compiler_checks(),
        wandb_check(os.environ, Path.home()),
        disk_check(folder),
        *shared_memory_checks(Path("/dev/shm"), len(gpus)),
    ]


def render(console: Console, folder: Path = Path("runs")) -> bool:
    """Prints the checks as a table, and what to do under it; True where nothing is broken."""
    found = checks(folder)
    table = Table("", "what", "found", box=None, header_style="bold", pad_edge=False)
    for check in found:
        table.add_row(_MARKS[check.ok], check.name, check.found)
    console.print(table)
    for check in found:
        if check.advice:
            console.print(f"{_MARKS[check.ok]} {check.name}: {check.advice}")
    return all(check.ok is not False for check in found)


# ----- Python and libraries -----


@dataclass(frozen=True, slots=True)
class Project:
    """What the repository's own files ask for."""

    dependencies: list[Requirement]
    extras: dict[str, list[Requirement]]
    pins: dict[str, str]
    """The tested version of each package."""


def _project(root: Path) -> Project:
    values: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = {name: [Requirement(text) for text in texts] for name, texts in values["optional-dependencies"].items()}
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return Project([Requirement(text) for text in values["dependencies"]], extras, {name.lower(): pin for name, pin in pins.items()})


def python_check(running: tuple[int, ...]) -> Check:
    """Whether this Python is new enough."""
    text, oldest = ".".join(map(str, running)), ".".join(map(str, _OLDEST_PYTHON))
    if running >= _OLDEST_PYTHON:
        return Check("Python", True, text, "")
    return Check(
        "Python", False, text, f"install Python {oldest} or newer and make the environment with it: make venv PYTHON=python{oldest}"
    )


def library_checks(requirements: list[Requirement], pins: Mapping[str, str]) -> list[Check]:
    """Whether each library is installed, in the range that pyproject.toml gives, and the version that constraints.txt tests."""
    return [_library_check(requirement, pins.get(requirement.name.lower())) for requirement in requirements]


def _library_check(requirement: Requirement, pin: str | None) -> Check:
    name, found = requirement.name, _installed(requirement.name)
    if found is None:
        return Check(name, False, "not installed", "pip install -c constraints.txt -e .")
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, False, found, f"needs {requirement.specifier}: pip install -c constraints.txt '{requirement}'")
    if pin is not None and found.split("+")[0] != pin:
        return Check(name, None, found, f"tested with {pin}; other versions in {requirement.specifier} should work")
    return Check(name, True, found, "")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def extra_check(name: str, purpose: str, requirements: list[Requirement]) -> Check:
    """What is missing of an optional group of packages."""
    missing = [requirement.name for requirement in requirements if _installed(requirement.name) is None]
    if not missing:
        return Check(f"extra {name}", True, "installed", "")
    advice = f"{purpose}; where you want that: pip install -c constraints.txt -e '.[{name}]'"
    return Check(f"extra {name}", None, f"without {', '.join(missing)}", advice)


# ----- the machine -----


def device_checks(gpus: list[DetectedGpu], torch_version: str | None) -> list[Check]:
    """The GPUs (or cores and memory), and whether the installed torch can use them."""
    memory = memory_bytes()
    size = "unknown memory" if memory is None else f"{memory / 1e9:.0f} GB of memory"
    machine = Check("machine", True, f"{cpu_count()} cores, {size}", "")
    if not gpus:
        return [machine, Check("GPU", None, "none", "runs go on the CPU, with gloo between processes; small models only")]
    lines = [_gpu_check(gpu, gpus.count(gpu)) for gpu in dict.fromkeys(gpus)]
    if torch_version is not None and torch_version.endswith("+cpu"):
        advice = f"torch {torch_version} has no CUDA and leaves the GPUs idle: remove the environment and make it again without TORCH_INDEX"
        lines.append(Check("torch on GPU", False, torch_version, advice))
    return [machine, *lines]


def torch_checks(gpus: int, torch_version: str | None) -> list[Check]:
    """Whether torch opens the GPUs, asked in a process of its own; nothing to say without GPUs, or of a torch that has no CUDA."""
    if not gpus or torch_version is None or torch_version.endswith("+cpu"):
        return []
    try:
        run_told([sys.executable, "-c", _ASK_TORCH, str(gpus)], "torch", {**os.environ, "PYTHONSAFEPATH": "1"})
    except RuntimeError as error:
        return [Check("torch on GPU", False, torch_version, str(error))]
    return [Check("torch on GPU", True, torch_version, "")]


def ctranslate2_checks(gpus: int, installed: str | None) -> list[Check]:
    """Whether CTranslate2 can serve on the GPUs, asked in a process of its own; nothing to say without GPUs."""
    if not gpus or installed is None:
        return []
    try:
        run_told([sys.executable, "-c", _ASK_CTRANSLATE2], "ctranslate2", {**os.environ, "PYTHONSAFEPATH": "1"})
    except RuntimeError as error:
        return [Check("ctranslate2 on GPU", None, "serves on the CPU", f"on the GPU it needs {error}")]
    return [Check("ctranslate2 on GPU", True, installed, "")]


def _gpu_check(gpu: DetectedGpu, number: int) -> Check:
    found = f"{number} x {gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB each"
    known = known_gpu(gpu.name)
    if known is not None and known.bf16_flops is None:
        return Check("GPU", None, found, "it has no bf16 arithmetic: set precision: fp32")
    return Check("GPU", True, found, "")


def compiler_checks() -> list[Check]:
    """A C++ compiler and ninja: only DeepSpeed's fused optimizers on a GPU build anything."""
    lines = []
    for name, commands in {"C++ compiler": ("c++", "g++", "clang++"), "ninja": ("ninja",)}.items():
        path = next(filter(None, map(_program, commands)), None)
        advice = "" if path else "DeepSpeed builds its fused operators with it on a GPU; nothing on a CPU needs it"
        lines.append(Check(name, True if path else None, path or "none", advice))
    return lines


def _program(command: str) -> str | None:
    # The environment's own folder counts too: `.venv/bin/stepdown` runs without it on the PATH.
    return shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))


def wandb_check(environment: Mapping[str, str], home: Path) -> Check:
    """Whether Weights & Biases will show runs live. Reads that a key is there, never prints it."""
    mode = environment.get("WANDB_MODE", "")
    if mode in ("offline", "disabled"):
        return Check(
            "W&B login", None, f"WANDB_MODE={mode}", "" if mode == "disabled" else "runs are kept on disk; send them with wandb sync"
        )
    if environment.get("WANDB_API_KEY"):
        return Check("W&B login", True, "WANDB_API_KEY is set", "")
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    given = environment.get("NETRC")
    files = [Path(given).expanduser()] if given else [home / ".netrc", home / "_netrc"]
    for path in files:
        if path.is_file() and _has_login(path, host):
            return Check("W&B login", True, f"{host} in {path}", "")
    return Check("W&B login", None, f"no key for {host}", "runs are tracked offline; for live curves: wandb login")


def _has_login(path: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(path).hosts
    except (netrc.NetrcParseError, OSError):
        return False


def disk_check(folder: Path, fails_under: float = 1e9, notes_under: float = 20e9) -> Check:
    """Whether runs can be written, and how much space there is for them.

    Args:
        folder: where runs are kept.
        fails_under: bytes without which even a small run ends badly.
        notes_under: bytes without which a run with a real checkpoint may.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        return Check("output folder", False, f"{place} cannot be written", f"make {place} writable, or keep runs in another folder")
    free = shutil.disk_usage(place).free
    found = f"{folder}: {free / 1e9:.1f} GB free"
    if free < fails_under:
        return Check("output folder", False, found, f"free {fails_under / 1e9:.0f} GB there, or keep runs in another folder")
    if free < notes_under:
        return Check("output folder", None, found, "enough for small models; a 1B student's checkpoints take about 16 GB each")
    return Check("output folder", True, found, "")


def shared_memory_checks(folder: Path, gpus: int, least: float = 1e9) -> list[Check]:
    """Size of the shared memory, which NCCL needs between the GPUs of a node; nothing to say where the system has none.

    Args:
        folder: where the system mounts it.
        gpus: of this machine.
        least: bytes under which several GPUs run into it.
    """
    if not folder.is_dir():
        return []
    size = shutil.disk_usage(folder).total
    found = f"{size / 1e9:.1f} GB at {folder}"
    if gpus > 1 and size < least:
        return [
            Check(
                "shared memory",
                False,
                found,
                f"NCCL fails below {least / 1e9:.0f} GB: start the container with --shm-size=8g or --ipc=host",
            )
        ]
    return [Check("shared memory", True, found, "")]
