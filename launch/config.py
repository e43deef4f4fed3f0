"""The root configuration: loading, overrides, errors that name the key, JSON Schema. Imports no torch.

config = load_config(Path("configs/quickstart.yaml"), ["student.epochs=2"])
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data.config import Section, TaskConfig
from train.config import CutModel, DeployConfig, EvaluateConfig, StudentConfig, TeacherConfig, TrackingConfig
from train.deploy.targets import MAX_RECOVERED_BITS, TARGETS

RESOLVED = "config.yaml"
WORD = r"^[A-Za-z0-9_.,@:+-]+$"
"""Of Slurm's names: what needs no quotes in a job script."""


class SlurmConfig(Section):
    """How `stepdown submit` asks a Slurm cluster; what all runs of a cluster share stands in its site file."""

    partition: str | None = Field(None, pattern=WORD, description="Partition of all jobs; left out: the site file's, else the cluster's.")
    time: str | None = Field(
        None,
        pattern=r"^(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d)$",
        description="Time limit of each job as Slurm writes it (minutes, H:MM:SS, D-HH:MM:SS); what takes longer goes on in a new turn.",
    )
    signal_seconds: int = Field(
        120, ge=1, le=65535, description="Seconds before the time limit at which a job is told to save; Slurm may be 60 s early."
    )
    max_restarts: int = Field(5, ge=0, description="Restarts in a row without progress after which a job fails.")
    teacher_tasks: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Array tasks that share the teacher's records; left out: launch.nodes / teacher_nodes, 1 for recorded teachers."
    )
    teacher_tasks_at_once: Annotated[int, Field(ge=1)] | None = Field(None, description="Most of them that run together; left out: all.")
    teacher_nodes: int = Field(1, ge=1, description="Nodes of each of them, for a teacher that one node does not hold.")

    @model_validator(mode="after")
    def _limit_is_one(self) -> Self:
        if self.teacher_tasks_at_once is not None and self.teacher_tasks_at_once >= (self.teacher_tasks or 0):
            asked = "left out" if self.teacher_tasks is None else self.teacher_tasks
            raise ValueError(
                f"teacher_tasks_at_once is {self.teacher_tasks_at_once}, which limits nothing where teacher_tasks is {asked}: remove it, "
                "or raise teacher_tasks"
            )
        return self


class LaunchConfig(Section):
    """On what the stages run."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs where there are any, else the CPU.", json_schema_extra={"hashed": False}
    )
    gpus_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="GPUs to use, a process each; auto: all.", json_schema_extra={"hashed": False}
    )
    cpu_processes: int = Field(1, ge=1, description="Processes on a machine without GPUs.", json_schema_extra={"hashed": False})
    nodes: int = Field(1, ge=1, description="Nodes that train together, alike in GPUs.", json_schema_extra={"hashed": False})
    slurm: SlurmConfig = Field(
        default_factory=lambda: SlurmConfig.model_validate({}),
        description="What `stepdown submit` asks for.",
        json_schema_extra={"hashed": False},
    )

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> Self:
        idle = {"cpu": "gpus_per_node", "cuda": "cpu_processes"}.get(self.device)
        if idle is not None and getattr(self, idle) != type(self).model_fields[idle].default:
            raise ValueError(f"{idle} has no effect with device: {self.device}; remove it")
        return self


class Config(Section):
    """One file: a task, a teacher, a student and what to ship."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run's folder: letters, digits, dot, dash, underscore."
    )
    output: str = Field(
        "runs", description="Folder of all runs; runs in one folder share what their teachers wrote.", json_schema_extra={"hashed": False}
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of splits, initial weights, order and dropout.")
    task: TaskConfig = Field(description="Examples and how answers are compared.")
    teacher: TeacherConfig = Field(description="Who teaches.")
    student: StudentConfig = Field(description="The small model.")
    deploy: DeployConfig = Field(default_factory=lambda: DeployConfig.model_validate({}), description="The files to ship.")
    evaluate: EvaluateConfig = Field(default_factory=lambda: EvaluateConfig.model_validate({}), description="How rungs are measured.")
    launch: LaunchConfig = Field(default_factory=lambda: LaunchConfig.model_validate({}), description="On what the stages run.")
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig.model_validate({}), description="Where the numbers go.")

    @property
    def uses_rationales(self) -> bool:
        """Some arm of the student learns from rationales."""
        return self.student.single_task or any(arm.rationale for arm in self.student.arms.values())

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        rationales = self.teacher.rationales
        if self.name == "shared":
            raise ValueError("name is shared, which is the folder that runs share: choose another")
        if isinstance(self.student.model, CutModel) and self.teacher.source in ("recorded", "endpoint"):
            kind = "a recorded teacher has no layers" if self.teacher.source == "recorded" else "a server does not give its layers away"
            raise ValueError(f"student.model is {{cut_from: teacher}}, but {kind}: name a model")
        if rationales.keep != "all" and not rationales.drop_rows and not self.uses_rationales:
            raise ValueError("teacher.rationales.keep has no effect while student.loss.rationale is 0: remove it, or add drop_rows: true")
        if self.task.rationale is not None and self.teacher.tune is None:
            raise ValueError("task.rationale has no effect without teacher.tune, which learns from it: remove it, or tune the teacher")
        return self

    @model_validator(mode="after")
    def _soft_labels_have_a_source(self) -> Self:
        loss, source, stored = self.student.loss, self.teacher.source, self.teacher.soft_labels
        if not loss.soft:
            return self
        if loss.teacher == "live" and source != "deepspeed":
            raise ValueError(
                f"student.loss.teacher is live, but with teacher.source: {source} no model of the teacher runs here: "
                "set teacher.source to deepspeed, or remove student.loss.teacher"
            )
        if loss.teacher == "live":
            return self
        if stored is None:
            raise ValueError(
                "student.loss.soft has a weight, but teacher.soft_labels is missing: add it or set student.loss.teacher to live (a "
                "recorded teacher can do neither), or set soft to 0"
            )
        if loss.divergence != "forward_kl" and stored.format != "top_k":
            raise ValueError(
                f"student.loss.divergence is {loss.divergence}, but teacher.soft_labels.format is {stored.format}, which serves forward_kl "
                "only: set divergence to forward_kl, format to top_k, or student.loss.teacher to live"
            )
        return self

    @model_validator(mode="after")
    def _teacher_tasks_have_work(self) -> Self:
        slurm, source = self.launch.slurm, self.teacher.source
        if source == "recorded" and (slurm.teacher_tasks or 1) > 1:
            raise ValueError(f"launch.slurm.teacher_tasks is {slurm.teacher_tasks}, but a recorded teacher only copies: remove it")
        if source != "deepspeed" and slurm.teacher_nodes > 1:
            raise ValueError(
                f"launch.slurm.teacher_nodes is {slurm.teacher_nodes}, but with teacher.source: {source} one process asks for all answers: "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _recovery_has_a_target(self) -> Self:
        recover, targets = self.deploy.recover, self.deploy.targets
        if recover is None:
            return self
        if not any(TARGETS[target].can_recover for target in targets):
            few = ", ".join(name for name, target in TARGETS.items() if target.can_recover)
            raise ValueError(
                f"deploy.recover has no effect on deploy.targets {', '.join(targets)}, which have more than {MAX_RECOVERED_BITS} bits or "
                f"are K-quants: add one of {few}, or remove it"
            )
        if recover.loss and recover.loss.soft and recover.loss.teacher == "records" and self.teacher.soft_labels is None:
            raise ValueError(
                "deploy.recover.loss.soft has a weight, but teacher.soft_labels is missing: set deploy.recover.loss.teacher to live, which "
                "is the student as it was before it was rounded, or set soft to 0"
            )
        return self

    @model_validator(mode="after")
    def _zeros_have_a_place(self) -> Self:
        prune = self.student.prune
        if prune is not None and prune.makes_zeros:
            lost = [name for name in self.deploy.targets if not TARGETS[name].holds_zeros]
            if lost:
                raise ValueError(
                    f"deploy.targets holds {lost[0]}, whose codes have no 0, but student.prune.method is {prune.method}, which sets "
                    "weights to 0: use gguf-tq1_0 or gguf-q3_k_m, which have one, or prune neurons, heads or layers"
                )
        return self

    @model_validator(mode="after")
    def _soft_labels_fit(self) -> Self:
        soft = self.teacher.soft_labels
        if soft is not None and soft.format == "choices" and self.task.metric != "choice":
            raise ValueError(
                f"teacher.soft_labels.format is choices, but task.metric is {self.task.metric}, whose examples have no answer choices: "
                "set metric to choice and name the field that lists them in task.choices, or use format: answers, top_k or sampled"
            )
        return self


class _StrictLoader(yaml.SafeLoader):
    """Reads words and numbers as YAML 1.2 does and PyYAML does not; refuses a key that stands twice.

    `on`, `off`, `yes`, `no`, 2026-01-31 and 12:00:00 are words, 1e-4 is a number.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping, not a word", key_node.start_mark)
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes what `_StrictLoader` would not read back as the same text."""


def _use_yaml_1_2(*readers: type[yaml.resolver.BaseResolver]) -> None:
    """The core schema of YAML 1.2, which has no dates, no base 60, and no octal but 0o17.

    Source: YAML 1.2.2, section 10.3.2.
    """
    patterns = {
        "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
        "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
        "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
        "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+.0123456789"]),
        "merge": (r"<<", ["<"]),
    }
    for reader in readers:
        reader.yaml_implicit_resolvers = {}
        for name, (pattern, first) in patterns.items():
            reader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_MERGE = "tag:yaml.org,2002:merge"
_use_yaml_1_2(_StrictLoader, _StrictDumper)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides.

    Args:
        path: the file.
        overrides: each `key.sub=value`, the value read as YAML; later ones win.

    Raises:
        ValueError: for a missing or broken file, an unknown key (the nearest known one is named), a wrong type or value, an idle knob.
    """
    if not path.is_file():
        near = ", ".join(str(p) for p in sorted(path.parent.glob("*.yaml"))[:5]) if path.parent.is_dir() else ""
        raise ValueError(f"configuration {path} does not exist{f'; there are {near}' if near else ''}")
    values = read_yaml(path, f"configuration {path}")
    if values is None:
        raise ValueError(f"configuration {path} holds nothing, not keys with values; see configs/ for examples")
    for override in overrides:
        _override(values, override)
    return validate(values, str(path))


def read_yaml(path: Path, what: str) -> dict[str, Any] | None:
    """The keys of a file, with what stands under them; None for an empty file.

    Args:
        path: the file.
        what: it is, for messages.

    Raises:
        ValueError: if it is not YAML, or holds no keys.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is not valid YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{what} holds {_kind(values)}, not keys with values; see configs/ for examples")
    return values


def validate(values: Mapping[str, Any], where: str) -> Config:
    """Checks raw values.

    Raises:
        ValueError: one line for each fault.
    """
    return checked(Config, values, where)


S = TypeVar("S", bound=Section)


def checked(section: type[S], values: Mapping[str, Any], where: str) -> S:
    """Raw values as a section.

    Raises:
        ValueError: one line for each fault.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}:\n" + "\n".join(f"  {line}" for line in _messages(error, section, values))) from error


def dump_config(config: Config) -> str:
    """The configuration as YAML with overrides applied: what was set, no defaults, so that `load_config` gives the same object back."""
    return yaml.dump(config.model_dump(mode="json", exclude_unset=True), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def hashed(section: BaseModel, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """What of a section changes what a result means: defaults filled in, keys marked `hashed: False` and those in `without` left out."""
    values = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if name in without or (isinstance(extra, dict) and extra.get("hashed") is False):
            continue
        value = getattr(section, name)
        values[name] = hashed(value) if isinstance(value, BaseModel) else value
    return values


def json_schema() -> dict[str, Any]:
    """JSON Schema of the configuration, for editors."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Stepdown configuration"}


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not separator or not all([*parents, last]):
        raise ValueError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML ({error})") from error
    at = values
    for part in parents:
        inner = at.get(part)
        if inner is not None and not isinstance(inner, dict):
            raise ValueError(f"override {override!r}: {part} is {inner!r}, which has no keys below it; override it whole")
        # A copy: a YAML alias (*name) makes two keys one object, and only the one named here is meant.
        at[part] = dict(inner or {})
        at = at[part]
    at[last] = value


def _messages(error: ValidationError, section: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """One line a key: a key that may be of several kinds has a fault for each, and they are joined."""
    lines: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        head, message = _message(dict(fault), section, values)
        lines[head] = (
            f"{lines[head]}, or {message.removeprefix('input should be ')}" if head in lines and message not in lines[head] else message
        )
    return [f"{head}{message}" for head, message in lines.items()]


def _message(fault: dict[str, Any], section: type[BaseModel], values: Mapping[str, Any]) -> tuple[str, str]:
    """The key with what it was, and the bound with the way out."""
    location = _typed(fault["loc"], values, missing=fault["type"] == "missing")
    key = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(section, location[:-1], refused=str(location[-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: ", f"unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{key}: ", "missing; it has no default"
    if fault["type"] == "model_type":
        return f"{key}: ", f"is {fault['input']!r}; keys with values belong here: {', '.join(_known_keys(section, location, refused=''))}"
    if fault["type"] == "invalid_key":
        return f"{key}: ", f"unknown key; known keys here: {', '.join(_known_keys(section, location[:-1], refused=''))}"
    if fault["type"] == "string_type" and isinstance(was := fault["input"], dict) and len(was) == 1 and None in was.values():
        text = f'"{{{next(iter(was))}}}"'
        told = f"is {text[1:-1]} without quotes, which YAML reads as a mapping: write {text}, on the command line '{key}={text}'"
        return f"{key}: ", told
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{key}: " if key else "", message
    return f"{key}: is {fault['input']!r}; ", message


def _typed(location: Sequence[str | int], values: Mapping[str, Any], *, missing: bool) -> list[str | int]:
    """The part of a fault's location that the user typed, or `missing`ly did not: pydantic adds the names of a union's branches."""
    typed: list[str | int] = []
    at: Any = values
    for part in location[:-1] if missing else location:
        inner = dict(enumerate(at)) if isinstance(at, list) else at
        if isinstance(inner, Mapping) and part in inner:
            at = inner[part]
            typed.append(part)
    return [*typed, location[-1]] if missing else typed


def _known_keys(section: type[BaseModel], location: Sequence[str | int], *, refused: str) -> list[str]:
    """The keys that a location within a section knows; of several kinds of section, those of the kinds that refuse a key."""
    classes: list[type[BaseModel]] = [section]
    for part in location:
        classes = [inner for c in classes if part in c.model_fields for inner in _sections(c.model_fields[str(part)].annotation)]
    return sorted({name for c in classes if refused not in c.model_fields for name in c.model_fields})


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
