from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import Config, validate
from launch.pipeline import Stage, deployed_from, made_by, stages, task_stage
from train.artifacts import TaskFiles

SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
TRAINED = ["train.labels_only", "train.step_by_step", "train.step_by_step_soft"]
DEPLOYED = ["deploy.ctranslate2-float32", "deploy.ctranslate2-int8"]
STUDENT_RUNGS = [
    f"evaluate.{name}" for name in ("labels_only", "step_by_step", "step_by_step_soft", "ctranslate2-float32", "ctranslate2-int8")
]
MAIN = [
    "train.step_by_step_soft",
    *DEPLOYED,
    *(f"evaluate.{name}" for name in ("step_by_step_soft", "ctranslate2-float32", "ctranslate2-int8")),
]
STUDENTS = {*TRAINED, *DEPLOYED, *STUDENT_RUNGS}
FROM_TEACH = {"teach", "evaluate.teacher", *STUDENTS}
ALL = {"task", "tune", *FROM_TEACH}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        Path(f"{split}.jsonl").write_text(f'{{"question": "{split}?", "answer": "1", "also": "1"}}\n')
    Path("shots.yaml").write_text("- {input: a, rationale: b, label: c}\n")


def values(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "one",
        "task": {"train": "train.jsonl", "test": "test.jsonl", "input": "{question}", "label": "{answer}", "metric": "number"},
        "teacher": {"source": "deepspeed", "model": dict(SMALL), "tune": {"epochs": 2}, "soft_labels": {"on": "both"}},
        "student": {"model": dict(SMALL), "epochs": 3, "loss": {"soft": 0.5}, "baselines": ["labels_only", "step_by_step"]},
        "deploy": {"targets": ["ctranslate2-float32", "ctranslate2-int8"]},
    }
    made = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split("__")
        at = made
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = value
    return made


def config(**changes: Any) -> Config:
    return validate(values(**changes), "file")


def table(made: Config, digest: str = "digest") -> dict[str, Stage]:
    return stages(made, TaskFiles(digest, {}, {}))


def reruns(before: dict[str, Stage], after: dict[str, Stage]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name].key != after[name].key}


def test_the_stages_in_their_order() -> None:
    assert list(table(config())) == ["task", "tune", "teach", *TRAINED, *DEPLOYED, "evaluate.teacher", *STUDENT_RUNGS]
    assert [s.place for s in table(config()).values()] == ["here", *["worker"] * 5, *["process"] * 8]


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        # What a result does not depend on.
        ({"launch__device": "cpu", "launch__cpu_processes": 2}, set()),
        ({"launch__device": "cuda", "launch__gpus_per_node": 2}, set()),
        ({"tracking__wandb": "disabled", "tracking__project": "p", "tracking__entity": "e"}, set()),
        ({"student__micro_batch_tokens": 4, "student__zero_stage": 3, "student__save_every": 5}, set()),
        ({"student__zero_stage": 2, "student__offload_optimizer": True, "student__activation_checkpointing": True}, set()),
        ({"student__compile": "off", "student__log_every": 3}, set()),
        ({"teacher__tune__micro_batch_tokens": 4, "teacher__tune__zero_stage": 0}, set()),
        ({"teacher__sharding": "replica", "teacher__batch_size": 4, "evaluate__batch_size": 4}, set()),
        ({"output": "elsewhere"}, set()),
        ({"name": "two"}, set()),
        ({"student__learning_rate": 5e-4, "teacher__soft_labels__k": 32}, set()),
        ({"task__max_rejected": 0.5}, set()),
        ({"student__seed": 0}, set()),  # the run's, written out
        ({"deploy__vocabulary": "whole"}, set()),
        # What it does depend on.
        ({"seed": 1}, ALL),
        ({"teacher__tune__epochs": 3}, ALL - {"task"}),
        ({"teacher__model__d_model": 32}, ALL - {"task"}),
        ({"teacher__soft_labels__k": 4}, FROM_TEACH),
        ({"teacher__rationales__max_new_tokens": 5}, FROM_TEACH),
        ({"student__epochs": 4}, STUDENTS),
        ({"student__model__d_model": 32}, STUDENTS),
        ({"student__targets": "teacher"}, STUDENTS),
        ({"student__seed": 1}, STUDENTS),
        ({"student__data_fraction": 0.5}, STUDENTS),
        ({"student__lora": {}}, STUDENTS),
        ({"student__patience": 3}, STUDENTS),
        ({"student__loss": {"soft": 0.5, "divergence": "reverse_kl"}}, set(MAIN)),
        ({"student__max_rationale_tokens": 9}, STUDENTS),
        ({"student__loss__soft": 0.7}, set(MAIN)),
        ({"teacher__rationales__keep": "agreeing"}, STUDENTS - {"train.labels_only", "evaluate.labels_only"}),
        ({"teacher__rationales__keep": "agreeing", "teacher__rationales__drop_rows": True}, STUDENTS),
        ({"deploy__vocabulary": "task"}, {*DEPLOYED, *STUDENT_RUNGS[-2:]}),
        ({"deploy__vocabulary": 300}, {*DEPLOYED, *STUDENT_RUNGS[-2:]}),
        ({"evaluate__timed_examples": 5}, {"evaluate.teacher", *STUDENT_RUNGS}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_changed_key_reruns_from_the_stage_that_it_touches(change: dict[str, Any], rerun: set[str]) -> None:
    assert reruns(table(config()), table(config(**change))) == rerun


def test_dropping_rows_is_another_training_of_every_arm() -> None:
    kept, dropped = config(teacher__rationales__keep="agreeing"), config(teacher__rationales={"keep": "agreeing", "drop_rows": True})
    assert reruns(table(kept), table(dropped)) == STUDENTS


def test_another_metric_reruns_what_judges_answers() -> None:
    again = reruns(table(config()), table(config(task__metric="expression")))
    assert again == {"task", *FROM_TEACH}


def test_another_template_is_another_task_and_only_another_digest_goes_further() -> None:
    other = config(task__label="{also}")
    assert reruns(table(config()), table(other)) == {"task"}
    assert reruns(table(config()), table(other, "other rows")) == ALL


def test_the_content_of_a_file_counts_and_not_its_place(tmp_path: Path) -> None:
    before = task_stage(config())
    (tmp_path / "moved").mkdir()
    Path("train.jsonl").rename("moved/rows.jsonl")
    assert task_stage(config(task__train="moved/rows.jsonl")).key == before.key
    assert task_stage(config(task__train=str(tmp_path / "moved" / "rows.jsonl"))).key == before.key
    Path("moved/rows.jsonl").write_text('{"question": "other?", "answer": "1"}\n')
    assert task_stage(config(task__train="moved/rows.jsonl")).key != before.key


def test_the_few_shot_file_counts_by_content() -> None:
    few = {"teacher__model": "OWNER/teacher", "teacher__tune": None, "teacher__rationales": {"examples": "shots.yaml", "shots": 1}}
    before = table(config(**few))
    assert "tune" not in before
    Path("shots.yaml").rename("others.yaml")
    moved = {**few, "teacher__rationales": {"examples": "others.yaml", "shots": 1}}
    assert reruns(before, table(config(**moved))) == set()
    Path("others.yaml").write_text("[]\n")
    assert reruns(before, table(config(**moved))) == FROM_TEACH
    with pytest.raises(
        ValueError, match=r"\Ateacher.rationales.examples: shots.yaml does not exist; give a YAML file of few-shot examples\Z"
    ):
        table(config(**few))


def test_a_model_folder_counts_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    before = table(config(student__model=str(folder)))
    assert reruns(before, table(config(student__model=str(folder)))) == set()
    (folder / "model.safetensors").write_text("weights")
    assert reruns(before, table(config(student__model=str(folder)))) == STUDENTS


def test_two_runs_share_what_their_teacher_made_and_nothing_else() -> None:
    one, two = table(config()), table(config(name="two", student__epochs=9))
    shared = {name for name in one if one[name].folder == two[name].folder}
    assert shared == {"tune", "teach"}
    assert one["tune"].folder == Path("runs/shared") / f"tune-{one['tune'].key}"
    renamed = table(config(name="two"))
    assert {name for name in one if one[name].folder != renamed[name].folder} == ALL - shared
    assert renamed["task"].folder == Path("runs/two") / one["task"].folder.name
    elsewhere = table(config(output="other"))
    assert all(stage.folder.parts[0] == "other" for stage in elsewhere.values())


def test_another_target_leaves_the_others_alone() -> None:
    before, after = table(config()), table(config(deploy__targets=["ctranslate2-int8", "ctranslate2-float16", "ctranslate2-float32"]))
    assert {name: stage.key for name, stage in after.items() if name in before} == {name: stage.key for name, stage in before.items()}
    assert after.keys() - before.keys() == {"deploy.ctranslate2-float16", "evaluate.ctranslate2-float16"}


def test_a_target_of_few_bits_recovers_beside_the_one_that_is_only_rounded() -> None:
    targets = ["gguf-q8_0", "gguf-q4_0", "onnx-int4"]
    settings = config(deploy__targets=targets, deploy__recover={"epochs": 2})
    found = table(settings)
    files = ["gguf-q8_0", "gguf-q4_0", "gguf-q4_0-recovered", "onnx-int4", "onnx-int4-recovered"]
    assert [stage.detail for stage in found.values() if stage.kind == "deploy"] == files
    assert [stage.detail for stage in found.values() if stage.kind == "recover"] == ["gguf-q4_0", "onnx-int4"]
    assert [stage.detail for stage in found.values() if stage.kind == "evaluate"][-5:] == files
    of = {name: deployed_from(settings, found, found[f"deploy.{name}"]).name for name in files}
    assert of["gguf-q4_0-recovered"] == "recover.gguf-q4_0"
    assert of["gguf-q4_0"] == "train.step_by_step_soft"
    assert found["recover.gguf-q4_0"].place == "worker"
    assert made_by(settings, found, "gguf-q4_0-recovered").name == "deploy.gguf-q4_0-recovered"


def test_a_recovery_depends_on_its_settings_and_its_student_alone() -> None:
    def of(**values: Any) -> dict[str, Stage]:
        return table(config(deploy__targets=["gguf-q8_0", "gguf-q4_0"], **values))

    first, longer, other = of(deploy__recover={}), of(deploy__recover={"epochs": 2}), of(deploy__recover={}, student__epochs=4)
    assert first["recover.gguf-q4_0"].key != longer["recover.gguf-q4_0"].key
    assert first["deploy.gguf-q4_0"].key == longer["deploy.gguf-q4_0"].key == of()["deploy.gguf-q4_0"].key
    assert first["recover.gguf-q4_0"].key != other["recover.gguf-q4_0"].key
    assert first["deploy.gguf-q4_0-recovered"].key != longer["deploy.gguf-q4_0-recovered"].key


def test_another_baseline_leaves_the_others_alone() -> None:
    before, after = table(config(student__baselines=[])), table(config())
    assert all(after[name].key == stage.key for name, stage in before.items())
    assert after.keys() - before.keys() == {f"{kind}.{arm}" for kind in ("train", "evaluate") for arm in ("labels_only", "step_by_step")}


def test_a_baseline_has_the_key_of_the_same_student_alone() -> None:
    alone = table(config(student__loss={"label": 1.0, "rationale": 0.0}, student__baselines=[]))
    assert alone["train.labels_only"].key == table(config())["train.labels_only"].key


def test_a_single_task_student_has_stages_of_its_own_and_its_baselines_keep_theirs() -> None:
    one_task = {"student__single_task": True, "student__loss": {"label": 1.0, "rationale": 0.0}}
    two_tasks, single = table(config()), table(config(**one_task))
    assert [name for name in single if name.startswith("train.")] == ["train.labels_only", "train.step_by_step", "train.single_task"]
    assert all(single[name].key == two_tasks[name].key for name in ("train.labels_only", "train.step_by_step", "teach"))
    assert single["train.single_task"].key != single["train.labels_only"].key
    assert single["deploy.ctranslate2-int8"].key != two_tasks["deploy.ctranslate2-int8"].key
    kept = table(config(**one_task, teacher__rationales__keep="agreeing"))
    unchanged = {"task", "tune", "teach", "evaluate.teacher", "train.labels_only", "evaluate.labels_only"}
    assert reruns(single, kept) == single.keys() - unchanged


def test_a_live_teacher_is_another_training_and_needs_no_stored_soft_labels() -> None:
    live = config(student__loss={"soft": 0.5, "teacher": "live"}, teacher__soft_labels=None)
    assert "train.step_by_step_soft" in table(live)
    assert reruns(table(config()), table(config(student__loss={"soft": 0.5, "teacher": "live"}))) == set(MAIN)


def test_a_recorded_teacher_needs_no_model() -> None:
    made = config(teacher={"source": "recorded", "label": "{answer}", "rationale": "{also}"}, student__loss={}, student__baselines=[])
    assert list(table(made))[:3] == ["task", "teach", "train.step_by_step"]


def test_a_stage_is_done_when_its_artifact_is_there() -> None:
    stage = task_stage(config())
    assert (stage.kind, stage.detail, stage.is_done) == ("task", "", False)
    TaskFiles("d", {}, {}).write(stage.folder)
    assert stage.is_done
    assert json.loads((stage.folder / "artifact.json").read_text())["digest"] == "d"
    deployed = table(config())["deploy.ctranslate2-int8"]
    assert (deployed.kind, deployed.detail) == ("deploy", "ctranslate2-int8")
