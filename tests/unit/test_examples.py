"""Every configuration in configs/ loads, reads a row of its data, plans, and renders its Slurm scripts: without torch, GPU or network."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data.config import TaskConfig
from data.tasks import prepare, read_task
from data.teacher_prompts import teacher_prompt
from launch import cli, planning, sizes
from launch.chain import missing_jobs
from launch.cluster import load_site
from launch.config import Config, load_config
from launch.pipeline import stages
from launch.slurm import TEMPLATE, job_command, job_request, options, script
from train.artifacts import TaskFiles

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def llama(width: int, neurons: int, layers: int, heads: int, groups: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": width, "intermediate_size": neurons, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", **shape, "num_key_value_heads": groups, "vocab_size": vocabulary, **more}


# As the config.json of each has it.
SHAPES = {
    "google/t5-v1_1-base": {
        "model_type": "t5", "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-32B-Instruct": llama(5120, 27648, 64, 40, 8, 152064, model_type="qwen2"),
    "meta-llama/Llama-3.3-70B-Instruct": llama(8192, 28672, 80, 64, 8, 128256),
    "meta-llama/Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}  # fmt: skip
PAIR = {"premise": "A man climbs.", "hypothesis": "A man sleeps.", "label": "contradiction"}  # of the hub's, the name of the number 2
PROBLEM = {"Body": "Dan had $ 4 and has $ 3 left.", "Question": "What did he spend?", "Equation": "( 4.0 - 3.0 )", "Answer": "1.0"}
RECORDED = {"llm_label": "x", "rationale": "Because."}
# A row as each data set stores it, and the label that it is read with.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "anli_t5": (PAIR, "contradiction"),
    "cqa": ({"input": "Where?", "choices": ["park", "zoo"], "label": "zoo", **RECORDED}, "zoo"),
    "cqa_cut": ({"input": "Where?", "choices": ["park", "zoo"], "label": "zoo", **RECORDED}, "zoo"),
    "cqa_t5": ({"question": "Where?", "choices": {"label": ["A", "B"], "text": ["park", "zoo"]}, "answerKey": "B"}, "zoo"),
    "esnli_t5": ({"gold_label": "neutral", "Sentence1": "A man climbs.", "Sentence2": "He is happy."}, "neutral"),
    "laptop": (PROBLEM, "1.0"),
    "slurm_70b_1b": (PAIR, "contradiction"),
    "svamp": ({"input": "84 in 2 rounds?", "label": "( 84.0 / 2.0 )", **RECORDED}, "( 84.0 / 2.0 )"),
    "svamp_t5": (PROBLEM, "( 4.0 - 3.0 )"),
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No torch, no GPU, and of the hub nothing but shapes; in the repository, as the paths in a configuration start there."""
    monkeypatch.setitem(sys.modules, "torch", None)  # whoever imports it now fails
    monkeypatch.setattr(planning, "detect", list)
    monkeypatch.setattr(planning, "memory_bytes", lambda: 16 * 10**9)
    monkeypatch.chdir(ROOT)

    def fetched(model: str) -> Path:
        path = tmp_path / model / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(SHAPES[model]))
        return path

    monkeypatch.setattr(sizes, "fetched", fetched)


@pytest.fixture
def example(tmp_path: Path) -> Callable[[Path], Config]:
    """Loads a configuration, with files of one or two rows where it names files or data sets."""

    def load(path: Path) -> Config:
        if path.stem not in ROWS:
            return load_config(path)
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({**ROWS[path.stem][0], "n": n}) + "\n" for n in range(2)))
        keys = re.findall(r"^  (train|validation|test): ", path.read_text(), re.MULTILINE)
        return load_config(path, [f"task.{key}={file}" for key in keys])

    return load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_row_of_its_data_is_read(path: Path, example: Callable[[Path], Config], tmp_path: Path) -> None:
    task = example(path).task
    if task.train == "builtin:arithmetic":
        return
    named = TaskConfig.model_validate({**task.model_dump(exclude={"validation_fraction"}, exclude_none=True), "validation": task.test})
    prepare(named, seed=0, folder=tmp_path / "task")
    rows = read_task(tmp_path / "task").train
    assert [row.label for row in rows] == [ROWS[path.stem][1]] * 2
    if task.choices is not None:
        assert ROWS[path.stem][1] in rows[0].choices


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_worked_examples_are_there(path: Path) -> None:
    config = load_config(path)
    asked = config.teacher.rationales
    assert len(teacher_prompt(asked).examples) == (asked.shots if asked.examples else 0)
    # Worked examples in plain sight of a file that a recorded teacher could be replaced by.
    for named in re.findall(r"configs/prompts/\w+\.yaml", path.read_text()):
        assert Path(named).is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_plans_as_its_first_comment_has_it(path: Path) -> None:
    lines = re.findall(r"^#   stepdown (plan .*)$", path.read_text(), re.MULTILINE)
    words = shlex.split(lines[0]) if lines else ["plan", str(path), "--gpu", "A100-80", "--gpus", "1"]
    done = CliRunner().invoke(cli.app, [*words, "--json"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    plan = json.loads(done.output)
    writes_here = load_config(path).teacher.source in ("deepspeed", "vllm")
    for part in [*(["teacher"] if writes_here else []), "student"] if lines else []:
        assert plan[part]["plan"]["fits"], plan
        assert plan[part]["plan"].get("changes", []) == [], plan


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_slurm_scripts_are_rendered(path: Path, example: Callable[[Path], Config], tmp_path: Path) -> None:
    config = example(path)
    if config.launch.device != "cpu" and config.launch.gpus_per_node == "auto":  # which Slurm must be told
        config = config.model_copy(update={"launch": config.launch.model_copy(update={"gpus_per_node": 8})})
    rows = {"train": 10_000, "validation": 1_000, "test": 1_000}
    site = load_site(None)
    jobs = missing_jobs(config, stages(config, TaskFiles("digest", rows, dict.fromkeys(rows, 0))), rows)
    assert next(job.name for job in jobs if job.name != "tune") == "teach"
    assert [job.name for job in jobs][-3:] == ["deploy", "evaluate", "report"]
    for job in jobs:
        request = job_request(job, config, tmp_path, site, sys.executable)
        text = script(TEMPLATE.read_text(), options(job, config, site), site, job_command(sys.executable, tmp_path / "request.json"))
        assert text.startswith("#!")
        assert f"#SBATCH --job-name={config.name}.{job.name}\n" in text
        assert ("--gpus-per-node" in text) == (config.launch.device != "cpu" and job.name != "report")
        assert request.processes == (config.launch.cpu_processes if config.launch.device == "cpu" else 8)


def test_the_example_for_a_cluster_asks_for_two_nodes_of_eight(example: Callable[[Path], Config]) -> None:
    config = example(ROOT / "configs" / "slurm_70b_1b.yaml")
    rows = {"train": 162_865, "validation": 3_200, "test": 3_200}
    jobs = missing_jobs(config, stages(config, TaskFiles("digest", rows, dict.fromkeys(rows, 0))), rows)
    assert {job.name: (job.nodes, job.array) for job in jobs} == {
        "teach": (1, "0-15%2"),
        "train.labels_only": (2, None),
        "train.step_by_step_soft": (2, None),
        "deploy": (1, "0-3"),
        "evaluate": (1, None),
        "report": (1, None),
    }
    asked = [options(job, config, load_site(None)) for job in jobs]
    assert all({"--partition=a100", "--time=12:00:00", "--requeue"} <= set(words) for words in asked)
