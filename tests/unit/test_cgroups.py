"""What a container or a job gets of its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import hardware
from train import cgroups
from train.cores import usual_threads


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mount of the groups, without any limit; `own` beside it is what the kernel says of this process."""
    monkeypatch.setattr(cgroups, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    (tmp_path / "own").write_text("0::/\n")
    return tmp_path / "mount"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_nothing_limits(groups: Path) -> None:
    assert (cgroups.cpu_limit(), cgroups.memory_limit()) == (None, None)
    write(groups / "cpu.max", "max 100000")
    write(groups / "memory.max", "max")
    assert (cgroups.cpu_limit(), cgroups.memory_limit()) == (None, None)
    (groups.parent / "own").unlink()
    assert (cgroups.cpu_limit(), cgroups.memory_limit()) == (None, None)


def test_the_narrowest_of_a_group_and_those_around_it_holds(groups: Path) -> None:
    (groups.parent / "own").write_text("0::/slice/job\n")
    write(groups / "slice/job/cpu.max", "800000 100000")
    write(groups / "slice/cpu.max", "250000 100000")
    write(groups / "slice/job/memory.max", "1000")
    write(groups / "slice/memory.max", "2000")
    assert (cgroups.cpu_limit(), cgroups.memory_limit()) == (3, 1000), "two and a half processors are three threads"


def test_a_part_of_a_processor_is_one_thread(groups: Path) -> None:
    write(groups / "cpu.max", "20000 100000")
    assert cgroups.cpu_limit() == 1


def test_the_first_version_and_a_path_that_only_the_host_knows(groups: Path) -> None:
    (groups.parent / "own").write_text("7:memory:/docker/5f\n4:cpu,cpuacct:/docker/5f\n1:name=systemd:/docker/5f\n")
    write(groups / "cpu/cpu.cfs_quota_us", "400000")
    write(groups / "cpu/cpu.cfs_period_us", "100000")
    write(groups / "memory/memory.limit_in_bytes", "9223372036854771712")
    write(groups / "memory/docker/5f/memory.limit_in_bytes", "4096")
    assert (cgroups.cpu_limit(), cgroups.memory_limit()) == (4, 4096)
    write(groups / "cpu/cpu.cfs_quota_us", "-1")
    assert cgroups.cpu_limit() is None


def test_the_machine_is_no_more_than_its_container_gets(groups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores = hardware.cpu_count()
    write(groups / "cpu.max", "100000 100000")
    assert hardware.cpu_count() == 1
    write(groups / "cpu.max", "99900000 100000")
    assert hardware.cpu_count() == cores
    monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\n")
    write(groups / "memory.max", "512000")
    assert hardware.memory_bytes() == 512_000
    write(groups / "memory.max", "9223372036854771712")
    assert hardware.memory_bytes() == 1_024_000


def test_threads_are_what_the_environment_says_or_one_a_core(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usual_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert usual_threads() == hardware.cpu_count()
    write(groups / "cpu.max", "100000 100000")
    assert usual_threads() == 1
