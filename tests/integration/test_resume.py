"""The engines: the same steps under every ZeRO stage, no update from what is not finite, exact resumption, an end on a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "integration" / "resume_driver.py"
Found = dict[str, dict[str, Any]]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(DRIVER.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def agent(processes: int, *script: object) -> list[str]:
    return [sys.executable, "-m", "launch.agent", "--standalone", "--nproc-per-node", str(processes), *map(str, script)]


def act(folder: Path, processes: int, *names: str) -> dict[str, Found]:
    done = subprocess.run(agent(processes, DRIVER, folder, *names), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""
    return {name: torch.load(folder / f"{processes}-{name}.pt") for name in names}


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Found]:
    return act(folder, 2, "agree", "halt", "save", "refuse")


@pytest.fixture(scope="module")
def one(folder: Path, two: dict[str, Found]) -> dict[str, Found]:
    """After `two`, whose states it resumes."""
    return act(folder, 1, "agree", "save", "resume")


SCRIPT = """
import sys
from launch.local import Stopped, supervise
try:
    sys.exit(supervise(sys.argv[1:], {**__import__("os").environ}))
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.fixture(scope="module")
def stopped(folder: Path, one: dict[str, Found]) -> tuple[Found, int, str]:
    """After `one`: what two processes resume of it, and status and output of a command that gets SIGTERM while they train on."""
    command = [sys.executable, "-c", SCRIPT, *agent(2, DRIVER, folder, "resume", "slow")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: (folder / "slow-0").exists() and (folder / "slow-1").exists(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    return torch.load(folder / "2-resume.pt"), process.returncode, output


# ----- the same steps as plain torch -----


def plain(*, tied: bool, frozen: bool) -> tuple[list[tuple[float, float]], dict[str, Tensor], dict[str, Tensor]]:
    """Steps, and weights before and after them, of torch's AdamW and clipping in one process, without an engine."""
    sys.path.insert(0, str(DRIVER.parent))
    try:
        import resume_driver as driver
    finally:
        sys.path.remove(str(DRIVER.parent))
    model = driver.learner(tied=tied, frozen=frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": driver.DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    steps = []
    for step in range(driver.STEPS):
        ids, targets = (torch.cat(tensors) for tensors in zip(*driver.parts_of(step), strict=True))
        loss = torch.nn.functional.cross_entropy(model.model(ids) @ model.model.lm_head.weight.T, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, driver.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = driver.RATES[step]
        optimizer.step()
        optimizer.zero_grad()
        steps.append((float(loss.detach()), float(norm)))
    return steps, before, {name: p.detach() for name, p in model.named_parameters()}


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in some)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_stage_makes_the_steps_of_plain_torch(one: dict[str, Found], two: dict[str, Found], processes: int) -> None:
    compared = 0
    for name, run in (one if processes == 1 else two)["agree"].items():
        steps, before, after = plain(tied="tied" in name.split() or "bf16=" in name, frozen="frozen" in name)
        weights = dict(run["weights"])
        assert torch.equal(weights.pop("model.table"), torch.linspace(0.123456789, 1.0, 96))
        assert {value.dtype for value in weights.values()} == {torch.float32}
        first = {key: value for key, value in run["before"].items() if key in before}
        moved = largest_difference(before, after)
        assert moved > 0.01
        if "bf16" in name:
            # Frozen weights are kept in bf16 alone; the masters of the others begin where the model did, to the last bit.
            assert largest_difference(first, before) == 0.0 if "frozen" not in name else largest_difference(first, before) < 2**-9
            assert [loss for loss, _ in run["steps"]] == pytest.approx([loss for loss, _ in steps], abs=0.05)
        else:
            assert largest_difference(first, before) == 0.0
            assert [loss for loss, _ in run["steps"]] == pytest.approx([loss for loss, _ in steps], abs=1e-5)
            assert [norm for _, norm in run["steps"]] == pytest.approx([norm for _, norm in steps], abs=1e-4)
            assert largest_difference(weights, after) < 1e-5
        for key in weights if "frozen" in name else ():
            if "layers.0" in key or "wide" in key or "norm" in key:
                assert torch.equal(weights[key], run["before"][key])
        compared += 1
    assert compared == (8 if processes == 1 else 13)


# ----- what is not finite -----


def test_a_gradient_that_is_not_finite_on_one_process_changes_nothing_on_any(two: dict[str, Found]) -> None:
    assert len(two["halt"]) == 7
    for name, run in two["halt"].items():
        assert run["norms"] == [float("inf")] * 2, name
        assert run["changed"] == 0, name
        assert run["steps"] == two["agree"][name]["steps"], name


# ----- resumption -----


@pytest.mark.parametrize("processes", [1, 2])
def test_resumed_it_goes_on_to_the_last_bit(one: dict[str, Found], two: dict[str, Found], processes: int) -> None:
    found = (one if processes == 1 else two)["save"]
    assert len(found) == (3 if processes == 1 else 6)
    for name, run in found.items():
        assert run["point"] == (3, {"seconds": 1.5})
        assert run["resumed"] == run["steps"][3:], name
        assert len({loss for loss, _ in run["steps"]}) == 5
        uninterrupted, resumed = run["weights"]
        assert all(torch.equal(value, resumed[key]) for key, value in uninterrupted.items()), name


def test_only_the_last_state_is_kept(folder: Path, two: dict[str, Found]) -> None:
    states = [path for path in folder.glob("2-? bf16=*") if path.is_dir()]
    assert len(states) == 6
    for state in states:
        shares = ["step-3/share-0.pt"] if state.name.startswith("2-0") else ["step-3/share-0.pt", "step-3/share-1.pt"]
        assert sorted(str(path.relative_to(state)) for path in state.rglob("*.*")) == ["resume.json", *shares]


@pytest.mark.parametrize("onto", [1, 2])
def test_another_number_of_processes_or_another_stage_goes_on_from_the_same_numbers(
    one: dict[str, Found], two: dict[str, Found], stopped: tuple[Found, int, str], onto: int
) -> None:
    saved, resumed = (two["save"], one["resume"]) if onto == 1 else (one["save"], stopped[0])
    assert len(resumed) == 2 * len(saved)
    for name, run in resumed.items():
        origin = saved[name.split(" onto ")[0][2:]]
        tolerance = 0.02 if "True" in name else 1e-5
        expected = origin["steps"][3:]
        assert [loss for loss, _ in run["resumed"]] == pytest.approx([loss for loss, _ in expected], abs=tolerance), name
        assert largest_difference(run["weights"], origin["weights"][0]) < (5e-3 if "True" in name else 1e-5), name


def test_a_state_that_is_not_whole_or_of_another_model_is_refused(two: dict[str, Found]) -> None:
    nothing, other, lost, damaged = two["refuse"]["said"]
    assert nothing == "None"
    assert other == (
        "FOLDER/2-refused-other/step-4 holds the weights of another model: delete FOLDER/2-refused-other to train this model from its start"
    )
    for said, name in ((lost, "lost"), (damaged, "damaged")):
        assert said.startswith(f"FOLDER/2-refused-{name}/step-4/share-1.pt cannot be read (")
        assert said.endswith(f"): delete FOLDER/2-refused-{name} to train this model from its start")


# ----- signals -----


def test_on_sigterm_to_the_command_all_stop_after_one_step_and_save(folder: Path, stopped: tuple[Found, int, str]) -> None:
    _, status, output = stopped
    assert status == 75
    assert output == "stopped by a signal; what is done is kept: the same command goes on from there\n"
    steps = [(folder / f"slow-{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1]
    assert [path.name for path in (folder / "slow").glob("step-*")] == [f"step-{steps[0]}"]


WORKER = """
import os, signal, sys, time
from pathlib import Path
from launch.agent import die_with_parent
die_with_parent()
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""


def started_workers(folder: Path, kind: str) -> subprocess.Popen[str]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = agent(2, script, folder, kind)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: all((folder / str(rank)).is_file() and (folder / str(rank)).read_text() for rank in range(2)), process)
    return process


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the workers")
def test_workers_that_do_not_catch_the_signal_end_at_once_and_the_agent_says_that_it_can_go_on(tmp_path: Path) -> None:
    process = started_workers(tmp_path, "plain")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (75, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the workers")
def test_a_second_sigterm_ends_the_agent_and_its_workers(tmp_path: Path) -> None:
    process = started_workers(tmp_path, "deaf")
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.poll() is None and all(map(is_alive, pids)), "one request that came twice ended it"
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))
