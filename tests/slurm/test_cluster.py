from __future__ import annotations
import pytest
pytestmark = pytest.mark.slurm
def test_two_nodes(cluster):
    print(cluster.ask("sinfo"))
    print(cluster.ask("srun", "--nodes=2", "hostname"))
    print(cluster.ask("scontrol","show","nodes"))
