"""A real Slurm of two nodes on this machine: installed where it is missing, on loopback only, ended by process id.

Both nodes are this host, each `slurmd` in a UTS namespace with a name of its own. That takes root.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "slurm-wlm-basic-plugins")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
HOSTS = Path("/etc/hosts")
HOSTS_LINE = "127.0.0.1 node1 node2 slurmctl # of stepdown's tests\n"
CONF = """
ClusterName=stepdown
SlurmctldHost=slurmctl(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,preempt_send_user_signal
DefMemPerCPU=100
ReturnToService=0
KillWait=3
MinJobAge=600
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-2] NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm; its programs find it by `environment`."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def stepdown(self, folder: Path, *arguments: str, status: int = 0, **variables: str) -> str:
        """Standard output and error of a command, which must end with `status`."""
        command = [sys.executable, "-m", "launch.cli", *arguments]
        environment = {**self.environment, "COLUMNS": "200", **variables}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, label: str) -> str:
        """Of a job or an array task, as squeue says; empty where there is none."""
        rows = self.ask("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").splitlines()
        return dict(row.split(maxsplit=1) for row in rows).get(label, "")

    def drain(self) -> None:
        """Cancels every job, and waits for their ends."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False)
        until(lambda: not self.ask("squeue", "--noheader"), "an empty queue")


def until(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def wait() -> Callable[..., None]:
    """Waits for a condition, and fails with what it waited for."""
    return until


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of two nodes on one host takes root")
    _install()
    root = tmp_path_factory.mktemp("slurm")
    with _resolved(), _started(root) as running:
        yield running
        running.drain()


def _install() -> None:
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        pytest.skip(f"Slurm is not installed, and there is no apt-get to install {', '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"apt-get {command[0]} fails, so there is no Slurm: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def _resolved() -> Iterator[None]:
    """The nodes' names stand for this host, as long as the cluster runs."""
    before = HOSTS.read_text()
    if HOSTS_LINE not in before:
        HOSTS.write_text(f"{before.rstrip()}\n{HOSTS_LINE}")
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(HOSTS_LINE, ""))


def _free_ports(count: int) -> int:
    """The first of neighbouring ports that nobody listens on."""
    for first in range(17000, 19000, count):
        with _listening(first, count) as free:
            if free:
                return first
    raise AssertionError("no free ports")


@contextmanager
def _listening(first: int, count: int) -> Iterator[bool]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for n, each in enumerate(sockets):
            each.bind(("127.0.0.1", first + n))
        yield True
    except OSError:
        yield False
    finally:
        for each in sockets:
            each.close()


@contextmanager
def _started(root: Path) -> Iterator[Cluster]:
    first = _free_ports(3)
    (root / "slurm.conf").write_text(CONF.format(root=root, controller=first, first=first + 1, last=first + 2))
    (root / "gres.conf").write_text(f"AutoDetect=off\nNodeName=node[1-2] Name=gpu File={root}/dev/nvidia[0-1]\n")
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (root / "state").mkdir()
    (root / "dev").mkdir()
    for n in range(2):
        os.mknod(root / "dev" / f"nvidia{n}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # another /dev/null, for Slurm to count
    key = root / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    socket_file, conf = root / "munge.socket", root / "slurm.conf"
    munge = [f"--{name}={root / f'munge.{end}'}" for name, end in (("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
    commands = [
        ["munged", "--foreground", f"--key-file={key}", f"--socket={socket_file}", *munge, "--force"],
        _named("slurmctl", f"slurmctld -D -f {conf}"),
        *(_named(node, f"slurmd -D -f {conf} -N {node}") for node in ("node1", "node2")),
    ]
    running, cluster = [], Cluster(root)
    try:
        for command in commands:
            with (root / f"{command[0]}-{len(running)}.out").open("w") as output:
                process = subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output, start_new_session=True)
            running.append(process)
            until(lambda: socket_file.exists(), "munged", 20)
        idle = ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"]
        until(lambda: _said(cluster, idle) == "2", "two idle nodes", 30)
        yield cluster
    finally:
        for process in reversed(running):
            process.terminate()
        for process in reversed(running):
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _named(host: str, command: str) -> list[str]:
    """The command on a host of this name."""
    return ["unshare", "--uts", "bash", "-c", f"hostname {host}; exec {command}"]


def _said(cluster: Cluster, command: list[str]) -> str:
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False).stdout.strip()
