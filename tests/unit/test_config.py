from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from data.config import RationalesConfig, Section, SoftLabelsConfig
from launch.config import Config, dump_config, hashed, json_schema, load_config, validate
from train.config import CutModel, LossConfig, StudentConfig, TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"from_scratch": "t5", "d_model": 16, "layers": 1, "heads": 2}
LIVE: dict[str, Any] = {
    "name": "small",
    "task": {"train": "builtin:arithmetic", "validation": "builtin:arithmetic", "test": "builtin:arithmetic", "metric": "number"},
    "teacher": {"source": "deepspeed", "model": dict(SMALL), "tune": {"epochs": 2}, "soft_labels": {"on": "label"}},
    "student": {"model": dict(SMALL), "epochs": 3},
}
RECORDED: dict[str, Any] = {**LIVE, "teacher": {"source": "recorded", "label": "{answer}", "rationale": "{why}"}}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with `a.b.c` set to each value."""
    values = copy.deepcopy(base)
    for key, value in changes.items():
        *parents, last = key.split(".")
        at = values
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = value
    return values


def message(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"\Afile:\n  ") as raised:
        validate(values, "file")
    return "\n".join(line.removeprefix("  ") for line in str(raised.value).splitlines()[1:])


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def load(folder: Path, *overrides: str) -> Config:
    return load_config(write(folder, yaml.safe_dump(LIVE)), overrides)


@pytest.mark.parametrize("base", [LIVE, RECORDED])
def test_the_small_configurations_are_valid(base: dict[str, Any]) -> None:
    assert validate(base, "file").name == "small"


# ----- what the validators say -----

HUB = "OWNER/teacher"


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (
            LIVE,
            {"task.arithmetic": {"min_steps": 3, "max_steps": 1}},
            "task.arithmetic: min_steps is 3, more than max_steps (1): lower min_steps",
        ),
        (
            LIVE,
            {"task": {"train": "a.jsonl", "test": "b.jsonl", "metric": "text", "arithmetic": {}}},
            "task: arithmetic has no effect: no split reads builtin:arithmetic; remove it",
        ),
        (
            LIVE,
            {"task.validation": None, "task.arithmetic": {"validation_rows": 3}},
            "task: arithmetic.validation_rows has no effect unless validation is builtin:arithmetic: set that, or remove it",
        ),
        (LIVE, {"task.choices": "options"}, "task: choices has no effect with metric 'number': remove it, or set metric to choice"),
        (LIVE, {"task.metric": "choice"}, "task: metric is choice but choices is missing: name the field that lists the answer choices"),
        (LIVE, {"task.validation_fraction": 0.2}, "task: validation_fraction has no effect where validation is given: remove one of them"),
        (
            LIVE,
            {"teacher.rationales.shots": 2},
            "teacher.rationales: shots has no effect without examples: name a YAML file of few-shot examples, or remove shots",
        ),
        (
            LIVE,
            {"teacher.rationales.drop_rows": True},
            "teacher.rationales: drop_rows has no effect with keep: all; set keep to agreeing or parseable, or remove drop_rows",
        ),
        (LIVE, {"student.model.heads": 3}, "student.model: heads is 3, which does not divide d_model (16): choose a divisor"),
        (
            LIVE,
            {"student.model": {"from_scratch": "llama", "dropout": 0.1}},
            "student.model: dropout has no effect on llama: remove it",
        ),
        (
            LIVE,
            {"student.model": {"from_scratch": "llama", "feed_forward": "relu"}},
            "student.model: feed_forward has no effect on llama: remove it",
        ),
        (
            LIVE,
            {"student.model": {"from_scratch": "t5", "vocabulary": 400, "tokenizer": "some/folder"}},
            "student.model: vocabulary has no effect where tokenizer is given: remove one of them",
        ),
        (
            LIVE,
            {"student.loss": {"label": 0, "rationale": 0}},
            "student.loss: label, rationale and soft are all 0: give at least one a weight",
        ),
        (
            LIVE,
            {"student.loss": {"divergence": "forward_kl"}},
            "student.loss: divergence has no effect while soft is 0: give soft a weight, or remove divergence",
        ),
        (RECORDED, {"teacher.model": HUB}, "teacher: model has no effect with source: recorded; remove it"),
        (RECORDED, {"teacher.sharding": "zero3"}, "teacher: sharding has no effect with source: recorded; remove it"),
        (RECORDED, {"teacher.batch_size": 8}, "teacher: batch_size has no effect with source: recorded; remove it"),
        (RECORDED, {"teacher.tune": {}}, "teacher: tune has no effect with source: recorded; remove it"),
        (RECORDED, {"teacher.soft_labels": {}}, "teacher: soft_labels has no effect with source: recorded; remove it"),
        (LIVE, {"teacher.label": "{answer}"}, "teacher: label has no effect with source: deepspeed; remove it"),
        (LIVE, {"teacher.rationale": "{why}"}, "teacher: rationale has no effect with source: deepspeed; remove it"),
        (
            RECORDED,
            {"teacher.rationales.max_new_tokens": 8},
            "teacher: rationales.max_new_tokens has no effect with source: recorded; remove it",
        ),
        (
            RECORDED,
            {"teacher.rationale": None},
            "teacher: source is recorded but label or rationale is missing: give both as templates over a row's fields",
        ),
        (
            LIVE,
            {"teacher.model": None},
            "teacher: source is deepspeed but model is missing: give a hub id, a folder, a .gguf file or {from_scratch: ...}",
        ),
        (
            LIVE,
            {"teacher.model": {"cut_from": "teacher", "layers": 1}},
            "teacher: model is {cut_from: teacher}, but a teacher cannot be cut from itself: name a model",
        ),
        (
            LIVE,
            {"teacher.tune": None},
            "teacher: model has random weights and tune is missing: a teacher from scratch must be tuned on the task's gold solutions",
        ),
        (
            LIVE,
            {"teacher.rationales.max_input_tokens": 64},
            "teacher: rationales.max_input_tokens has no effect on a tuned teacher: set tune.max_input_tokens, and remove it",
        ),
        (
            LIVE,
            {"teacher.rationales.examples": "shots.yaml"},
            "teacher: rationales.examples has no effect on a tuned teacher, which learnt the form of its answer: remove one of them",
        ),
        (
            LIVE,
            {"student.baselines": ["step_by_step"]},
            "student: baselines holds step_by_step, which is what this student's loss already is: remove it, or change loss",
        ),
        (LIVE, {"student.baselines": ["labels_only"] * 2}, "student: baselines names an arm twice: remove one"),
        (LIVE, {"launch": {"device": "cpu", "gpus_per_node": 2}}, "launch: gpus_per_node has no effect with device: cpu; remove it"),
        (LIVE, {"launch": {"device": "cuda", "cpu_processes": 2}}, "launch: cpu_processes has no effect with device: cuda; remove it"),
        (LIVE, {"name": "shared"}, "name is shared, which is the folder that runs share: choose another"),
        (
            RECORDED,
            {"deploy": {"targets": ["gguf-q8_0"], "recover": {"epochs": 2}}},
            "deploy.recover has no effect on deploy.targets gguf-q8_0, which have more than 4 bits or are K-quants: add one of gguf-q4_0, "
            "gguf-tq2_0, gguf-tq1_0, gguf-q1_0, onnx-int4, compressed-tensors-w4a16, compressed-tensors-w3a16, compressed-tensors-w2a16, "
            "or remove it",
        ),
        (
            RECORDED,
            {"deploy": {"targets": ["gguf-q4_0"], "recover": {"loss": {"soft": 1}}}},
            "deploy.recover.loss.soft has a weight, but teacher.soft_labels is missing: set deploy.recover.loss.teacher to live, which "
            "is the student as it was before it was rounded, or set soft to 0",
        ),
        (
            RECORDED,
            {"deploy": {"targets": ["gguf-q8_0", "gguf-q1_0"]}, "student.prune": {"method": "wanda", "fraction": 0.5}},
            "deploy.targets holds gguf-q1_0, whose codes have no 0, but student.prune.method is wanda, which sets weights to 0: use "
            "gguf-tq1_0 or gguf-q3_k_m, which have one, or prune neurons, heads or layers",
        ),
        (
            RECORDED,
            {"student.loss.soft": 0.5},
            "student.loss.soft has a weight, but teacher.soft_labels is missing: add it or set student.loss.teacher to live (a recorded "
            "teacher can do neither), or set soft to 0",
        ),
        (
            RECORDED,
            {"student.loss.soft": 0.5, "student.loss.teacher": "live"},
            "student.loss.teacher is live, but with teacher.source: recorded no model of the teacher runs here: set teacher.source to "
            "deepspeed, or remove student.loss.teacher",
        ),
        (
            LIVE,
            {"student.single_task": True},
            "student: single_task learns rationale and label as one target, whose loss is loss.label, but loss.rationale is 0.5, not 0: "
            "set loss to {label: 1, rationale: 0}, or single_task to false",
        ),
        (
            LIVE,
            {"student.single_task": True, "student.loss": {"label": 1, "rationale": 0, "soft": 0.25}},
            "student: single_task learns rationale and label as one target, whose loss is loss.label, but loss.soft is 0.25, not 0: "
            "set loss to {label: 1, rationale: 0}, or single_task to false",
        ),
        (
            RECORDED,
            {"student.model": {"cut_from": "teacher", "layers": 2}},
            "student.model is {cut_from: teacher}, but a recorded teacher has no layers: name a model",
        ),
        (
            RECORDED,
            {"student.loss.rationale": 0, "teacher.rationales.keep": "agreeing"},
            "teacher.rationales.keep has no effect while student.loss.rationale is 0: remove it, or add drop_rows: true",
        ),
        (
            RECORDED,
            {"launch.slurm.teacher_tasks": 4},
            "launch.slurm.teacher_tasks is 4, but a recorded teacher only copies: remove it",
        ),
        (
            RECORDED,
            {"launch.slurm.teacher_nodes": 2},
            "launch.slurm.teacher_nodes is 2, but with teacher.source: recorded one process asks for all answers: remove it",
        ),
        (
            LIVE,
            {"launch.slurm.teacher_tasks_at_once": 2},
            "launch.slurm: teacher_tasks_at_once is 2, which limits nothing where teacher_tasks is left out: remove it, or raise "
            "teacher_tasks",
        ),
        (
            RECORDED,
            {"task.rationale": "{why}"},
            "task.rationale has no effect without teacher.tune, which learns from it: remove it, or tune the teacher",
        ),
    ],
)
def test_a_section_that_contradicts_itself_is_told(base: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    assert message(changed(base, changes)) == expected


def test_a_single_task_student_is_an_arm_of_its_own_beside_arms_of_two_tasks() -> None:
    loss = {"label": 2, "rationale": 0}
    made = validate(
        changed(LIVE, {"student.single_task": True, "student.loss": loss, "student.baselines": ["labels_only", "step_by_step"]}), "file"
    ).student
    assert (made.arm, list(made.arms)) == ("single_task", ["labels_only", "step_by_step", "single_task"])
    own, labels_only, step_by_step = (made.of_arm(arm) for arm in ("single_task", "labels_only", "step_by_step"))
    assert [student.single_task for student in (own, labels_only, step_by_step)] == [True, False, False]
    assert [(student.loss.label, student.loss.rationale) for student in (own, labels_only, step_by_step)] == [(2, 0), (1, 0), (0.5, 0.5)]
    assert [student.arm for student in (own, labels_only, step_by_step)] == ["single_task", "labels_only", "step_by_step"]
    assert own.baselines == []


def test_a_single_task_student_has_a_use_for_rationales_to_keep() -> None:
    single = {"student.single_task": True, "student.loss": {"label": 1, "rationale": 0}, "teacher.rationales.keep": "agreeing"}
    assert validate(changed(RECORDED, single), "file").teacher.rationales.keep == "agreeing"


# ----- keys and types -----


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"taks": {}}, "taks: unknown key; did you mean task?"),
        ({"student.epoch": 3}, "student.epoch: unknown key; did you mean epochs?"),
        ({"teacher.tune.learning_rat": 1}, "teacher.tune.learning_rat: unknown key; did you mean learning_rate?"),
        (
            {"teacher.soft_labels.K_": 1},
            "teacher.soft_labels.K_: unknown key; known keys here: draws, format, k, likelihood, on, temperature",
        ),
        ({"student.model.d_modle": 3}, "student.model.d_modle: unknown key; did you mean d_model?"),
        ({"student.model": {"cut_from": "teacher", "layer": 3}}, "student.model.layer: unknown key; did you mean layers?"),
        (
            {"student.model": {"cut_from": "teacher", "layers": 3, "vocabulary": 3}},
            "student.model.vocabulary: unknown key; known keys here: cut_from, heads, layers, neurons",
        ),
        ({"tracking": {1: 2}}, "tracking.1: unknown key; known keys here: entity, project, wandb"),
        ({"name": None}, "name: is None; input should be a valid string"),
        ({"name": "my run"}, "name: is 'my run'; string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'"),
        ({"seed": "one"}, "seed: is 'one'; input should be a valid integer, unable to parse string as an integer"),
        ({"student.epochs": 0}, "student.epochs: is 0; input should be greater than 0"),
        ({"student.epochs": float("inf")}, "student.epochs: is inf; input should be a finite number"),
        ({"student.zero_stage": 4}, "student.zero_stage: is 4; input should be 'auto', 0, 1, 2 or 3"),
        (
            {"deploy": {"targets": ["ctranslate2-int8", "int4"]}},
            "deploy.targets.1: is 'int4'; input should be 'ctranslate2-float32', 'ctranslate2-float16', 'ctranslate2-int8', "
            "'ctranslate2-int8_float16', 'gguf-f16', 'gguf-q8_0', 'gguf-q5_1', 'gguf-q5_0', 'gguf-q4_0', "
            "'gguf-tq2_0', 'gguf-tq1_0', 'gguf-q1_0', "
            "'gguf-q6_k', 'gguf-q4_k_m', 'gguf-q3_k_m', 'gguf-q2_k', 'onnx-float32', "
            "'onnx-int8', 'onnx-int4', 'compressed-tensors-bf16', 'compressed-tensors-w8a8', 'compressed-tensors-fp8', "
            "'compressed-tensors-w8a16', 'compressed-tensors-w4a16', 'compressed-tensors-w3a16' or 'compressed-tensors-w2a16'",
        ),
        ({"deploy": {"targets": ["gguf-q4_0"], "recover": {"epochs": 0}}}, "deploy.recover.epochs: is 0; input should be greater than 0"),
        ({"deploy": {"targets": []}}, "deploy.targets: is []; list should have at least 1 item after validation, not 0"),
        (
            {"student.micro_batch_tokens": "big"},
            "student.micro_batch_tokens: is 'big'; input should be a valid integer, unable to parse string as an integer, or 'auto'",
        ),
        ({"student.micro_batch_tokens": {"a": 1}}, "student.micro_batch_tokens: is {'a': 1}; input should be a valid integer, or 'auto'"),
        ({"student.data_fraction": 0}, "student.data_fraction: is 0; input should be greater than 0"),
        ({"student.data_fraction": 1.5}, "student.data_fraction: is 1.5; input should be less than or equal to 1"),
        ({"student.seed": -1}, "student.seed: is -1; input should be greater than or equal to 0"),
        (
            {"student.model": {"layers": 3}},
            "student.model: is {'layers': 3}; input should be a hub id, a folder, a .gguf file, package:NAME/FILE, "
            "{from_scratch: t5 or llama, ...} or {cut_from: teacher, layers: N}",
        ),
        (
            {"student.model": {"cut_from": "teacher", "layers": {"a": 1}}},
            "student.model.layers: is {'a': 1}; input should be a valid integer, or a valid list",
        ),
        (
            {"student.model": {"cut_from": "teacher"}},
            "student.model: cut_from cuts nothing: give layers, neurons or heads, or name the teacher's model",
        ),
        ({"deploy": None}, "deploy: is None; keys with values belong here: license, recover, targets, vocabulary"),
        (
            {"deploy": "ctranslate2-int8"},
            "deploy: is 'ctranslate2-int8'; keys with values belong here: license, recover, targets, vocabulary",
        ),
    ],
)
def test_a_wrong_key_or_value_is_told(changes: dict[str, Any], expected: str) -> None:
    assert message(changed(LIVE, changes)) == expected


@pytest.mark.parametrize("key", ["name", "task", "teacher", "student"])
def test_a_missing_key_is_told(key: str) -> None:
    assert message({k: v for k, v in LIVE.items() if k != key}) == f"{key}: missing; it has no default"


def test_every_fault_is_told_at_once() -> None:
    told = message(changed(LIVE, {"seed": -1, "student.epoch": 1, "task.metric": None}))
    assert [line.partition(":")[0] for line in told.splitlines()] == ["seed", "task.metric", "student.epoch"]


def test_a_section_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValidationError, match="frozen"):
        config.student.epochs = 4.0  # type: ignore[misc]


# ----- the file -----


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ValueError, match=rf"\Aconfiguration {tmp_path}/confg.yaml does not exist; there are {tmp_path}/config.yaml\Z"):
        load_config(tmp_path / "confg.yaml")
    with pytest.raises(ValueError, match=rf"\Aconfiguration {tmp_path}/none/confg.yaml does not exist\Z"):
        load_config(tmp_path / "none" / "confg.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds nothing, not keys with values; see configs/ for examples"),
        ("- a\n", "holds a list, not keys with values"),
        ("name: [a\n", r"is not valid YAML: while parsing"),
        ("name: a\ntask: {}\nname: b\n", r"is not valid YAML: the key 'name' stands twice\n.*line 3"),
        ("student: {epochs: 1, epochs: 2}\n", "is not valid YAML: the key 'epochs' stands twice"),
        ("? [a, b]\n: 1\n", "is not valid YAML: a key is a list or a mapping, not a word"),
        ("name: !!python/object:os.system x\n", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=f"configuration .*config.yaml {expected}"):
        load_config(write(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=r"config.yaml is not valid YAML: 'utf-8' codec can't decode"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("on", "off", "yes", "no", "y", "2026-01-31", "12:00:00", "1_000", "label")],
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("~", None),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        ("009", 9),
        ("1e-4", 1e-4),
        ("5E3", 5000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("-.inf", -float("inf")),
        ("'1e3'", "1e3"),
    ],
)
def test_words_and_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    from launch.config import _StrictLoader

    read = yaml.load(f"a: {text}\n", _StrictLoader)["a"]
    assert (read, type(read)) == (value, type(value))


def test_on_is_a_key(tmp_path: Path) -> None:
    text = dump_config(validate(LIVE, "file")).replace("soft_labels:\n    on: label", "soft_labels: {on: rationale}")
    assert "{on: rationale}" in text
    config = load_config(write(tmp_path, text))
    assert config.teacher.soft_labels is not None
    assert config.teacher.soft_labels.on == "rationale"


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    text = json.dumps({k: v for k, v in LIVE.items() if k != "student"})[1:-1]
    path = write(
        tmp_path, f"{{{text}, student: {{model: &m {{from_scratch: t5, d_model: 16}}, loss: {{<<: {{label: 1}}, rationale: 2}}}}}}"
    )
    assert load_config(path).student.loss == LossConfig(label=1.0, rationale=2.0)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: str(path.name))
def test_every_example_loads(path: Path) -> None:
    assert load_config(path).name


# ----- overrides -----


def test_overrides_reach_every_depth_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path, "student.epochs=2", "student.epochs=4e-1", "evaluate.batch_size=7", "student.loss.label=1", "teacher.tune.warmup=0"
    )
    assert (config.student.epochs, config.evaluate.batch_size, config.student.loss.label) == (0.4, 7, 1.0)
    assert config.teacher.tune == TrainingConfig(epochs=2, warmup=0)


def test_overrides_take_lists_mappings_words_and_null(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "deploy.targets=[ctranslate2-float32, ctranslate2-int8]",
        "student.model={cut_from: teacher, layers: [0]}",
        "teacher.soft_labels=",
        "student.validate_every=null",
        "name=a=b".replace("=b", "-b"),
        "task.label={answer}".replace("{answer}", "'{answer}'"),
    )
    assert config.deploy.targets == ["ctranslate2-float32", "ctranslate2-int8"]
    assert config.student.model == CutModel(cut_from="teacher", layers=[0])
    assert (config.teacher.soft_labels, config.student.validate_every, config.name, config.task.label) == (None, None, "a-b", "{answer}")


def test_an_override_changes_one_place_of_what_an_alias_repeats(tmp_path: Path) -> None:
    text = dump_config(validate(LIVE, "file"))
    once = "model:\n    from_scratch: t5\n    d_model: 16\n    layers: 1\n    heads: 2\n"
    assert text.count(once) == 2
    first, second, third = text.split(once)
    path = write(tmp_path, f"{first}model: &small {{from_scratch: t5, d_model: 16}}\n{second}model: *small\n{third}")
    config = load_config(path, ["student.model.d_model=32"])
    assert (hashed(config)["teacher"]["model"]["d_model"], hashed(config)["student"]["model"]["d_model"]) == (16, 32)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.epochs", "override 'student.epochs' is not of the form key.sub=value"),
        ("=3", "override '=3' is not of the form key.sub=value"),
        ("student..epochs=3", "override 'student..epochs=3' is not of the form key.sub=value"),
        (".name=3", "override '.name=3' is not of the form key.sub=value"),
        (
            "task.input={text}",
            'task.input: is {text} without quotes, which YAML reads as a mapping: write "{text}", on the command line '
            "'task.input=\"{text}\"'",
        ),
        ("name=[a", "override 'name=[a': the value is not valid YAML ("),
        ("name.sub=3", "override 'name.sub=3': name is 'small', which has no keys below it; override it whole"),
        (
            "student.baselines.0=a",
            "override 'student.baselines.0=a': baselines is ['labels_only'], which has no keys below it; override it whole",
        ),
        ("student.epoch=3", "student.epoch: unknown key; did you mean epochs?"),
        ("student.model.d_model=9", "student.model: heads is 2, which does not divide d_model (9): choose a divisor"),
    ],
)
def test_a_wrong_override_is_told(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        load(tmp_path, "student.baselines=[labels_only]", override)


# ----- back to a file -----


@settings(max_examples=60, deadline=None)
@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,6}", fullmatch=True).filter(lambda name: name != "shared"),
    output=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
    learning_rate=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**31 - 1),
    micro=st.one_of(st.just("auto"), st.integers(1, 9)),
    validate_every=st.none() | st.integers(1, 9),
    soft=st.floats(0, 10),
)
def test_dump_and_load_give_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    output: str,
    learning_rate: float,
    seed: int,
    micro: Any,
    validate_every: Any,
    soft: float,
) -> None:
    changes = {"name": name, "output": output, "seed": seed, "student.learning_rate": learning_rate, "student.micro_batch_tokens": micro}
    config = validate(changed(LIVE, {**changes, "student.validate_every": validate_every, "student.loss.soft": soft}), "file")
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert again.model_dump(exclude_unset=True) == config.model_dump(exclude_unset=True)


@pytest.mark.parametrize("name", ["1e5", "010", "true-ish", "null.", "1.5", "0x1F", "on", "2026-01-31"])
def test_a_name_that_looks_like_a_number_survives(tmp_path: Path, name: str) -> None:
    config = validate({**LIVE, "name": name}, "file")
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_dumped_configuration_holds_no_defaults_which_could_be_knobs_without_effect() -> None:
    assert yaml.safe_load(dump_config(validate(RECORDED, "file"))) == RECORDED


# ----- what counts for a result -----


def test_hashed_fills_in_defaults_and_leaves_out_what_does_not_count() -> None:
    student = hashed(StudentConfig(model="m"), without=("model",))
    assert (student["epochs"], student["loss"]["label"]) == (10.0, 0.5)
    assert {"lora", "single_task", "seed", "data_fraction", "patience"} <= student.keys()
    assert not {"micro_batch_tokens", "zero_stage", "offload_optimizer", "compile", "save_every", "log_every", "model"} & student.keys()
    config = hashed(validate(LIVE, "file"))
    assert config["launch"] == config["tracking"] == {}
    assert config["evaluate"] == {"timed_examples": 128}
    assert not {"sharding", "batch_size"} & config["teacher"].keys()
    assert "output" not in config
    assert hashed(SoftLabelsConfig(k=32)) == hashed(SoftLabelsConfig())
    assert hashed(RationalesConfig(keep="agreeing")) != hashed(RationalesConfig())


# ----- the schema -----


def sections(kind: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """Every section that can stand in a configuration, found through the annotations."""
    if kind in seen:
        return
    seen.add(kind)
    yield kind
    pending = [field.annotation for field in kind.model_fields.values()]
    while pending:
        annotation: Any = pending.pop()
        pending += get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from sections(annotation, seen)


def test_every_key_has_a_description() -> None:
    found = list(sections(Config, set()))
    assert len(found) == 20
    for section in found:
        for name, field in section.model_fields.items():
            assert (field.description or "").endswith("."), f"{section.__name__}.{name}"
        assert section.model_config.get("extra") == "forbid"


def test_the_schema_is_closed_described_and_complete() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert (schema["$schema"], schema["title"]) == ("https://json-schema.org/draft/2020-12/schema", "Stepdown configuration")
    assert set(schema["required"]) == {"name", "task", "teacher", "student"}
    for section in [schema, *schema["$defs"].values()]:
        assert section["additionalProperties"] is False
        for value in section["properties"].values():
            # pydantic leaves a description out where the section's own says the same.
            assert value.get("description") or schema["$defs"][value["$ref"].rpartition("/")[2]]["description"]
    references = re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema))
    assert set(references) == set(schema["$defs"])
    assert set(schema["properties"]) == set(Config.model_fields)
