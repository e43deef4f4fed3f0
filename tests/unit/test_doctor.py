"""The doctor's checks and the devices it reads, on machines that the tests make up."""

from __future__ import annotations

import io
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from launch import doctor, hardware
from launch.doctor import Check
from launch.hardware import GPUS, DetectedGpu, known_gpu

TWO_A100 = "NVIDIA A100-SXM4-80GB, 81920, GPU-aaaa-1\nNVIDIA A100-SXM4-80GB, 81920, GPU-bbbb-2\n"
A100 = DetectedGpu("NVIDIA A100-SXM4-80GB", 81920 * 2**20)


def fake_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, output: str, status: int = 0) -> None:
    """Puts a program called nvidia-smi, and nothing else, on the PATH."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{output}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# ----- devices -----


def test_devices_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_smi(monkeypatch, tmp_path, TWO_A100)
    assert hardware.detect() == [A100, A100]


def test_the_driver_is_asked_for_what_is_parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_smi(monkeypatch, tmp_path, "")
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\nprintf "%s " "$@" > {tmp_path}/asked\n')
    assert hardware.detect() == []
    assert (tmp_path / "asked").read_text() == "--query-gpu=name,memory.total,uuid --format=csv,noheader,nounits "


def test_without_a_driver_there_are_no_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.detect() == []


def test_a_driver_that_finds_none_or_fails_gives_no_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_smi(monkeypatch, tmp_path, "No devices were found\n", status=6)
    assert hardware.detect() == []
    fake_smi(monkeypatch, tmp_path, "No devices were found\n", status=0)
    assert hardware.detect() == []


def test_a_driver_that_hangs_gives_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired(arguments[0], options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert hardware.detect() == []


@pytest.mark.parametrize(
    ("visible", "memories"),
    [("0,1,2", [1, 2, 3]), ("2,0", [3, 1]), ("1", [2]), ("", []), ("-1", []), ("0,7,1", [1]), ("GPU-c,GPU-a", [3, 1]), ("GPU-x,0", [])],
)
def test_only_visible_devices_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, memories: list[int]) -> None:
    fake_smi(monkeypatch, tmp_path, "One, 1, GPU-a\nTwo, 2, GPU-b\nThree, 3, GPU-c\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.memory_bytes // 2**20 for gpu in hardware.detect()] == memories


def test_a_chip_that_shares_the_machines_memory_reports_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_smi(monkeypatch, tmp_path, "NVIDIA GB10, [N/A], GPU-a\n")
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 128 * 10**9)
    assert hardware.detect() == [DetectedGpu("NVIDIA GB10", 128 * 10**9)]


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200-141GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_reported_names_find_their_row(reported: str, name: str) -> None:
    gpu = known_gpu(reported)
    assert gpu is not None
    assert gpu.name == name


def test_every_row_has_a_reported_name_of_its_own() -> None:
    assert len(GPUS) == 9
    assert len({gpu.reported for gpu in GPUS}) == len({gpu.name for gpu in GPUS}) == 9


@pytest.mark.parametrize(
    "reported", ["NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", ""]
)
def test_a_variant_with_other_figures_is_not_taken_for_its_neighbour(reported: str) -> None:
    assert known_gpu(reported) is None


def test_only_the_t4_lacks_bf16() -> None:
    assert [gpu.name for gpu in GPUS if gpu.bf16_flops is None] == ["T4"]
    assert all(gpu.bf16_flops in (None, gpu.fp16_flops) for gpu in GPUS)


def test_memory_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(hardware, "_MEMINFO", meminfo)
    assert hardware.memory_bytes() is None
    meminfo.write_text("MemTotal:       16384 kB\nMemFree:  1 kB\n")
    assert hardware.memory_bytes() == 16384 * 1024


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_cores_are_those_of_this_process() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert hardware.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, mine)


# ----- Python and libraries -----


def test_python() -> None:
    assert doctor.python_check((3, 11, 7)) == Check("Python", True, "3.11.7", "")
    assert doctor.python_check((3, 10, 4)) == Check(
        "Python", False, "3.10.4", "install Python 3.11 or newer and make the environment with it: make venv PYTHON=python3.11"
    )


@pytest.mark.parametrize(
    ("installed", "ok", "advice"),
    [
        ("5.17.0", True, ""),
        ("5.17.0+local", True, ""),
        ("5.17.2", None, r"tested with 5\.17\.0; other versions in <5\.18,>=5\.17 should work"),
        ("5.23.0", False, r"needs <5\.18,>=5\.17: pip install -c constraints.txt 'transformers<5\.18,>=5\.17'"),
        (None, False, r"pip install -c constraints\.txt -e \."),
    ],
)
def test_a_library(monkeypatch: pytest.MonkeyPatch, installed: str | None, ok: bool | None, advice: str) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: installed)
    [check] = doctor.library_checks([Requirement("transformers>=5.17,<5.18")], {"transformers": "5.17.0"})
    assert (check.name, check.ok, check.found) == ("transformers", ok, installed or "not installed")
    assert re.fullmatch(advice, check.advice)


def test_an_extra_is_never_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [Requirement("gguf>=0.19"), Requirement("other")]
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    assert doctor.extra_check("gguf", "reads files", wanted) == Check(
        "extra gguf", None, "without gguf, other", "reads files; where you want that: pip install -c constraints.txt -e '.[gguf]'"
    )
    monkeypatch.setattr(doctor, "_installed", lambda name: "1.0")
    assert doctor.extra_check("gguf", "reads files", wanted) == Check("extra gguf", True, "installed", "")


def test_every_pin_lies_in_its_range_and_every_extra_is_explained() -> None:
    project = doctor._project(doctor._ROOT)
    extras = [requirement for requirements in project.extras.values() for requirement in requirements]
    for requirement in [*project.dependencies, *extras]:
        assert requirement.specifier.contains(project.pins[requirement.name.lower()]), requirement
    assert set(project.extras) == set(doctor._EXTRAS)


# ----- the machine -----


def test_a_machine_without_a_gpu() -> None:
    machine, gpu = doctor.device_checks([], "2.13.0+cpu")
    assert machine.ok
    assert "cores" in machine.found
    assert gpu == Check("GPU", None, "none", "runs go on the CPU, with gloo between processes; small models only")


def test_equal_gpus_are_counted() -> None:
    _, gpu = doctor.device_checks([A100, A100], "2.13.0")
    assert gpu == Check("GPU", True, "2 x NVIDIA A100-SXM4-80GB, 86 GB each", "")


def test_a_torch_without_cuda_beside_a_gpu_is_broken() -> None:
    *_, torch = doctor.device_checks([A100], "2.13.0+cpu")
    assert (torch.name, torch.ok) == ("torch on GPU", False)
    assert (
        torch.advice
        == "torch 2.13.0+cpu has no CUDA and leaves the GPUs idle: remove the environment and make it again without TORCH_INDEX"
    )


def test_a_torch_that_cannot_open_the_gpus_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = "import sys; sys.exit('error: torch 9.9 cannot use the ' + sys.argv[1] + ' GPU(s) that nvidia-smi lists')"
    monkeypatch.setattr(doctor, "_ASK_TORCH", ask)
    told = "torch 9.9 cannot use the 2 GPU(s) that nvidia-smi lists"
    assert doctor.torch_checks(2, "9.9+cu130") == [Check("torch on GPU", False, "9.9+cu130", told)]
    monkeypatch.setattr(doctor, "_ASK_TORCH", "")
    assert doctor.torch_checks(2, "9.9+cu130") == [Check("torch on GPU", True, "9.9+cu130", "")]
    assert doctor.torch_checks(0, "9.9+cu130") == []
    assert doctor.torch_checks(2, "9.9+cpu") == [], "another check tells of it"


def test_ctranslate2_is_asked_whether_it_can_serve_on_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = doctor._ASK_CTRANSLATE2

    def found(gpus: int, library: str) -> Check:
        """Where the engine sees so many GPUs, and its library has this name."""
        changed = (
            f"import train.deploy.ctranslate2 as own\nown.ctranslate2.get_cuda_device_count = lambda: {gpus}\nown._CUBLAS = '{library}'"
        )
        monkeypatch.setattr(doctor, "_ASK_CTRANSLATE2", f"{changed}\n{asked}")
        [check] = doctor.ctranslate2_checks(2, "4.8")
        return check

    assert doctor.ctranslate2_checks(0, "4.8") == doctor.ctranslate2_checks(2, None) == []
    assert found(2, "libc.so.6") == Check("ctranslate2 on GPU", True, "4.8", "")
    missing = "on the GPU it needs libnone.so, which is not found: pip install nvidia-cublas-cu12 and put its lib folder on LD_LIBRARY_PATH"
    assert found(2, "libnone.so") == Check("ctranslate2 on GPU", None, "serves on the CPU", missing)
    none = "on the GPU it needs a GPU that its CUDA can use, of which it finds none: see nvidia-smi for the driver's version"
    assert found(0, "libc.so.6") == Check("ctranslate2 on GPU", None, "serves on the CPU", none)


def test_a_gpu_without_bf16_is_noted() -> None:
    _, gpu = doctor.device_checks([DetectedGpu("Tesla T4", 15360 * 2**20)], None)
    assert (gpu.ok, gpu.advice) == (None, "it has no bf16 arithmetic: set precision: fp32")


def test_a_compiler_is_only_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_program", lambda command: None)
    advice = "DeepSpeed builds its fused operators with it on a GPU; nothing on a CPU needs it"
    assert doctor.compiler_checks() == [Check("C++ compiler", None, "none", advice), Check("ninja", None, "none", advice)]
    monkeypatch.setattr(doctor, "_program", lambda command: {"clang++": "/opt/clang++", "ninja": "/opt/ninja"}.get(command))
    assert doctor.compiler_checks() == [Check("C++ compiler", True, "/opt/clang++", ""), Check("ninja", True, "/opt/ninja", "")]


def test_wandb_login(tmp_path: Path) -> None:
    nobody = doctor.wandb_check({}, tmp_path)
    assert nobody == Check("W&B login", None, "no key for api.wandb.ai", "runs are tracked offline; for live curves: wandb login")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password s3cret\n")
    assert doctor.wandb_check({}, tmp_path) == Check("W&B login", True, f"api.wandb.ai in {tmp_path / '.netrc'}", "")
    assert doctor.wandb_check({"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path).found == "no key for wandb.example.org"
    elsewhere = tmp_path / "elsewhere"
    assert doctor.wandb_check({"NETRC": str(elsewhere)}, tmp_path).ok is None
    assert doctor.wandb_check({"WANDB_MODE": "offline", "WANDB_API_KEY": "s3cret"}, tmp_path).advice.endswith("wandb sync")
    assert doctor.wandb_check({"WANDB_MODE": "disabled"}, tmp_path) == Check("W&B login", None, "WANDB_MODE=disabled", "")
    keyed = doctor.wandb_check({"WANDB_API_KEY": "s3cret"}, tmp_path)
    assert keyed == Check("W&B login", True, "WANDB_API_KEY is set", "")


def test_a_broken_netrc_is_no_login(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine\n")
    assert doctor.wandb_check({}, tmp_path).ok is None


def test_the_output_folder(tmp_path: Path) -> None:
    runs = tmp_path / "not" / "yet"
    assert doctor.disk_check(runs, 0, 0).ok is True
    assert not runs.exists()
    short = doctor.disk_check(runs, 1e18)
    assert (short.ok, short.advice) == (False, "free 1000000000 GB there, or keep runs in another folder")
    tight = doctor.disk_check(runs, 0, 1e18)
    assert (tight.ok, tight.advice) == (None, "enough for small models; a 1B student's checkpoints take about 16 GB each")


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor.disk_check(tmp_path / "file" / "runs")
    assert (check.ok, check.found) == (False, f"{tmp_path / 'file'} cannot be written")
    assert check.advice == f"make {tmp_path / 'file'} writable, or keep runs in another folder"


def test_shared_memory(tmp_path: Path) -> None:
    assert doctor.shared_memory_checks(tmp_path / "missing", 8) == []
    assert doctor.shared_memory_checks(tmp_path, 1, 1e18)[0].ok is True
    [check] = doctor.shared_memory_checks(tmp_path, 2, 1e18)
    assert (check.ok, check.advice) == (
        False,
        "NCCL fails below 1000000000 GB: start the container with --shm-size=8g or --ipc=host",
    )


# ----- the whole -----


def test_every_check_is_shown_with_its_advice_and_the_verdict_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("first", True, "here", ""), Check("second", None, "odd", "look at it"), Check("third", False, "gone", "bring it back")]
    monkeypatch.setattr(doctor, "checks", lambda folder: found)
    console = Console(width=100, file=io.StringIO())
    assert doctor.render(console) is False
    text = console.file.getvalue()
    for line in ("first", "here", "note second: look at it", "broken third: bring it back"):
        assert line in text
    monkeypatch.setattr(doctor, "checks", lambda folder: found[:2])
    assert doctor.render(Console(quiet=True)) is True


def test_this_environment_passes(tmp_path: Path) -> None:
    found = {check.name: check for check in doctor.checks(tmp_path)}
    for name in ("Python", "torch", "deepspeed", "transformers", "ctranslate2", "extra dev", "machine"):
        assert found[name].ok is not False, found[name]
    assert {"extra gguf", "GPU", "C++ compiler", "ninja", "W&B login", "output folder"} <= set(found)
