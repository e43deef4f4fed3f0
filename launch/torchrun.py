"""Arguments of torchrun, as words. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where and as what the processes of several nodes find one another."""

    nodes: int
    host: str
    """The first node."""
    port: int
    id: str
    """Of this start: those left over from an earlier one do not join."""
    is_host: bool | None = None
    """Whether this node is the first; None lets torchrun compare its name with `host`."""


def torchrun(processes: int, rendezvous: Rendezvous | None) -> list[str]:
    """Arguments of torchrun: processes of each node, and where several nodes meet."""
    if rendezvous is None:
        return ["--standalone", "--nproc-per-node", str(processes)]
    hosts = [] if rendezvous.is_host is None else ["--rdzv-conf", f"is_host={str(rendezvous.is_host).lower()}"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{rendezvous.host}:{rendezvous.port}", "--rdzv-id", rendezvous.id, *hosts]
    return ["--nnodes", str(rendezvous.nodes), "--nproc-per-node", str(processes), *meeting, "--max-restarts", "0"]
