"""The rules of the house, read from the syntax trees of data/, train/ and launch/.

Each rule is a function from the modules of a project to the sentences that say what breaks it. The repository must give none, and a small
project that breaks the rule must give some: so a rule that stops looking is noticed.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "train", "launch")
"""From the bottom up: a room may import itself and those before it."""

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "peft", "accelerate", "ctranslate2", "gguf", "scipy"}
LAZY = {("data.tasks", "datasets")}
"""What a torch-free module may import inside a function."""

OWNERS = {
    "deepspeed": {"train.engine"},
    "wandb": {"train.tracking"},
    "datasets": {"data.tasks"},
    "peft": {"train.lora"},
    "ctranslate2": {"train.deploy.ctranslate2"},
    "gguf": {"train.deploy.gguf", "train.deploy.ggml"},
    "onnxruntime": {"train.deploy.onnx_runtime"},
    "onnxruntime_genai": {"train.deploy.onnx_decoder"},
    "llmcompressor": {"train.deploy.compressed_tensors"},
    "compressed_tensors": {"train.deploy.compressed_tensors"},
    "xllamacpp": {"train.deploy.llama_cpp", "train.deploy.ggml"},
    "matplotlib": {"launch.report", "launch.plots"},
}
AUTO_OWNERS = {"train.models", "train.sources", "train.tokenization"}

STAGE_ROOMS = ("train.teacher", "train.student", "train.deploy")
STAGES = {*(f"{room}.stage" for room in STAGE_ROOMS), "train.evaluate"}

VAGUE_NAMES = {"util", "utils", "common", "helper", "helpers", "manager", "managers"}
LENGTHS = {"median": 15, "ninety per cent": 45, "longest": 80}


# ----- reading a project -----


@dataclass(frozen=True)
class Import:
    """One imported module or name."""

    module: str
    name: str | None
    """What `from module import name` takes; None for `import module`."""
    in_function: bool
    for_types: bool
    """Under `if TYPE_CHECKING`: read by the type checker alone."""
    line: int

    @property
    def full(self) -> str:
        return self.module if self.name is None else f"{self.module}.{self.name}"

    @property
    def library(self) -> str:
        return self.module.split(".")[0]


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> list[Import]:
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        return list(_imports(self.tree, package))


def _imports(node: ast.AST, package: str, in_function: bool = False, for_types: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, None, in_function, for_types, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            module = ".".join([*parents, *([child.module] if child.module else [])])
            yield from (Import(module, alias.name, in_function, for_types, child.lineno) for alias in child.names)
        elif isinstance(child, ast.Call) and _called(child) in ("import_module", "__import__") and child.args:
            argument = child.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield Import(argument.value, None, in_function, for_types, child.lineno)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        yield from _imports(child, package, in_function or function, for_types or types)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""


class Project:
    """The modules of data/, train/ and launch/ under a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, Module] = {}
        for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.modules[name] = Module(name, path, path.read_text())

    def target(self, imported: Import) -> str | None:
        """The module of this project that an import reads; None for a library."""
        return next((name for name in (imported.full, imported.module) if name in self.modules), None)


def packages_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


# ----- the rules -----


def layers(project: Project) -> list[str]:
    """launch -> train -> data, never back, inside functions too."""
    return [
        f"{module.name}:{i.line} imports {i.full}: {module.name.split('.')[0]} lies below {i.library}"
        for module in project.modules.values()
        for i in module.imports
        if i.library in ROOMS and ROOMS.index(i.library) > ROOMS.index(module.name.split(".")[0])
    ]


def cycles(project: Project) -> list[str]:
    """No module reaches itself through the imports that run when it is loaded."""
    graph = {
        name: {t for i in module.imports if not i.in_function and (t := project.target(i)) and t != name}
        for name, module in project.modules.items()
    }
    return [f"{name} imports itself through {' -> '.join(trail)}" for name in graph if (trail := _way_back(graph, name))]


def _way_back(graph: dict[str, set[str]], start: str) -> list[str]:
    waiting, seen = [[start]], set()
    while waiting:
        trail = waiting.pop()
        for reached in sorted(graph[trail[-1]]):
            if reached == start:
                return [*trail[1:], start]
            if reached not in seen:
                seen.add(reached)
                waiting.append([*trail, reached])
    return []


def stages_apart(project: Project) -> list[str]:
    """The rooms of teacher, student and deploy import nothing of one another; only launch imports a stage.

    `train.evaluate` may import what a room offers beside its stage: the runtime that serves a rung.
    """
    found = []
    for module in project.modules.values():
        room = _stage_room(module.name)
        for i in module.imports:
            target = project.target(i) or ""
            other_room = _stage_room(target) not in (room, None)
            stage = target in STAGES and not module.name.startswith("launch")
            if (room and other_room) or (stage and _stage_room(target) != room) or (target == "train.evaluate" and stage):
                found.append(f"{module.name}:{i.line} imports {i.full}: stages meet through files in the run folder")
    return found


def _stage_room(name: str) -> str | None:
    return next((room for room in STAGE_ROOMS if name == room or name.startswith(f"{room}.")), None)


WORKER_SIDE = {"launch.worker", "launch.sweep_worker", "launch.agent", "data.batches"}
"""What runs under torchrun, torchrun itself, and the tensors of a batch; `agent` imports torch where it starts torchrun only."""


def submit_side(project: Project) -> set[str]:
    """The modules that a login node loads, with every package on the way."""
    files = {"train.artifacts", "train.tracking", "train.significance", "train.scoring"}
    named = {
        name
        for name in project.modules
        if (name.split(".")[0] in ("launch", "data") and name not in WORKER_SIDE) or name in files or name.split(".")[-1] == "config"
    }
    return named | {package for name in named for package in packages_above(name) if package in project.modules}


def torch_free(project: Project) -> list[str]:
    """Nothing on the submit side imports a heavy library, by itself or through what it imports.

    Functions of the submit side count, since they run there; functions of a module that it merely loads do not.
    """
    first = {
        (name, library): trail for name in sorted(submit_side(project)) for library, trail in reversed(list(_heavy_imports(project, name)))
    }
    return [
        f"{name} imports {library}{f' through {trail}' if trail else ''}: the submit side runs without it"
        for (name, library), trail in first.items()
    ]


def _heavy_imports(project: Project, start: str) -> Iterator[tuple[str, str]]:
    waiting, seen, inside = [[start]], {start}, submit_side(project)
    while waiting:
        trail = waiting.pop(0)
        module = project.modules[trail[-1]]
        for i in module.imports:
            if i.for_types or (i.in_function and module.name not in inside):
                continue
            if i.library in HEAVY and not (i.in_function and (module.name, i.library) in LAZY):
                yield i.library, " -> ".join(trail[1:])
            target = project.target(i)
            for reached in [target, *packages_above(target)] if target else []:
                if reached in project.modules and reached not in seen:
                    seen.add(reached)
                    waiting.append([*trail, reached])


def one_owner(project: Project) -> list[str]:
    """Each heavy library is imported in one place; transformers' Auto classes where models are made."""
    found = []
    for module in project.modules.values():
        for i in module.imports:
            owners = OWNERS.get(i.library)
            if i.library == "transformers" and i.full.split(".")[-1].startswith("Auto"):
                owners = AUTO_OWNERS
            if owners and module.name not in owners:
                found.append(f"{module.name}:{i.line} imports {i.full}, which belongs to {' and '.join(sorted(owners))}")
        if module.name not in AUTO_OWNERS:
            found += [
                f"{module.name}:{node.lineno} uses transformers.{node.attr}, which belongs to {' and '.join(sorted(AUTO_OWNERS))}"
                for node in ast.walk(module.tree)
                if isinstance(node, ast.Attribute) and node.attr.startswith("Auto")
                if isinstance(node.value, ast.Name) and node.value.id == "transformers"
            ]
    return found


def no_evaluation_of_text(project: Project) -> list[str]:
    """No text becomes code."""
    return [
        f"{module.name}:{node.lineno} calls {_called(node)}()"
        for module in project.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and _called(node) in ("eval", "exec")
        and (isinstance(node.func, ast.Name) or (isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "builtins"))
    ]


def function_lengths(project: Project) -> list[str]:
    """Median, ninetieth percentile and longest function, in lines from `def` to the end without the docstring."""
    lengths = [
        (f"{module.name}.{node.name}", _lines(node))
        for module in project.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    if not lengths:
        return []
    values = sorted(lines for _, lines in lengths)
    ninetieth = values[int(0.9 * (len(values) - 1))]
    found = [f"{name} has {lines} lines: cut it under {LENGTHS['longest']}" for name, lines in lengths if lines > LENGTHS["longest"]]
    if statistics.median(values) > LENGTHS["median"]:
        found.append(f"the median function has {statistics.median(values)} lines, more than {LENGTHS['median']}")
    if ninetieth >= LENGTHS["ninety per cent"]:
        found.append(f"one function in ten has {ninetieth} lines or more: {LENGTHS['ninety per cent']} is the bound")
    return found


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def names(project: Project) -> list[str]:
    """No module is named for nothing in particular, or like one of the standard library."""
    found = []
    for name in project.modules:
        last = name.split(".")[-1]
        if VAGUE_NAMES & set(last.split("_")):
            found.append(f"{name}: name it for what it does")
        if last in sys.stdlib_module_names:
            found.append(f"{name} is named like the standard library's {last}")
    return found


def no_notes_to_self(project: Project) -> list[str]:
    """What is left to do stands in the issues."""
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    return [
        f"{module.name}:{number} says {mark}"
        for module in project.modules.values()
        for number, line in enumerate(module.text.splitlines(), 1)
        for mark in marks
        if mark in line
    ]


Rule = Callable[[Project], list[str]]
RULES: list[Rule] = [
    layers,
    cycles,
    stages_apart,
    torch_free,
    one_owner,
    no_evaluation_of_text,
    function_lengths,
    names,
    no_notes_to_self,
]


# ----- the repository keeps them -----


@pytest.fixture(scope="module")
def repository() -> Project:
    return Project(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule, repository: Project) -> None:
    assert rule(repository) == []


def test_the_rules_read_the_whole_repository(repository: Project) -> None:
    assert {"data", "train", "launch", "data.config", "train.config", "train.artifacts", "train.deploy", "launch.plan"} <= set(
        repository.modules
    )
    owners = (
        {owner for names_ in OWNERS.values() for owner in names_ if owner != "launch.report"} | STAGES | {"launch.worker", "launch.cli"}
    )
    assert owners <= set(repository.modules), "a rule names a module that is not there"
    assert {"launch.cli", "launch.plan", "data.config", "train.artifacts", "train", "launch"} <= submit_side(repository)
    assert "launch.worker" not in submit_side(repository)


@pytest.mark.parametrize("module", ["launch.cli", "launch.plan", "launch.doctor", "data.tasks", "train.artifacts", "train.scoring"])
def test_the_submit_side_loads_no_heavy_library(module: str) -> None:
    unwanted = ", ".join(sorted(HEAVY | {"matplotlib", "wandb"}))
    code = f"import sys, {module}; print(*sorted(set('{unwanted}'.split(', ')) & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# ----- and each rule catches what breaks it -----


def project_of(folder: Path, files: dict[str, str]) -> Project:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Project(folder)


LONG = "def long():\n" + "    x = 1\n" * 81
MIDDLING = "".join(f"def f{n}():\n" + "    x = 1\n" * 15 for n in range(3))
TENTH = "".join(f"def f{n}():\n    x = 1\n" for n in range(8)) + "".join(f"def g{n}():\n" + "    x = 1\n" * 44 for n in range(2))

BROKEN: list[tuple[Rule, dict[str, str], str]] = [
    (layers, {"data/a.py": "import train.b", "train/b.py": ""}, "data lies below train"),
    (layers, {"train/a.py": "def f():\n    from launch import b"}, "train lies below launch"),
    (layers, {"train/a.py": "from importlib import import_module\nimport_module('launch.b')"}, "train lies below launch"),
    (
        cycles,
        {"train/a.py": "import train.b", "train/b.py": "from train import c", "train/c.py": "from .a import x"},
        "train.b -> train.c -> train.a",
    ),
    (stages_apart, {"train/teacher/a.py": "from train.student import b", "train/student/b.py": ""}, "train.teacher.a:1"),
    (stages_apart, {"train/student/a.py": "def f():\n    import train.deploy.b", "train/deploy/b.py": ""}, "train.student.a:2"),
    (stages_apart, {"train/loop.py": "import train.student.stage", "train/student/stage.py": ""}, "train.loop:1"),
    (stages_apart, {"train/evaluate.py": "import train.deploy.stage", "train/deploy/stage.py": ""}, "train.evaluate:1"),
    (stages_apart, {"train/deploy/stage.py": "from train.evaluate import run", "train/evaluate.py": ""}, "train.deploy.stage:1"),
    (stages_apart, {"train/loop.py": "from train.evaluate import run", "train/evaluate.py": ""}, "train.loop:1"),
    (torch_free, {"launch/a.py": "import torch.nn"}, "launch.a imports torch:"),
    (torch_free, {"launch/a.py": "def f():\n    import transformers"}, "launch.a imports transformers:"),
    (torch_free, {"launch/a.py": "import train.b", "train/b.py": "from torch import nn"}, "launch.a imports torch through train.b"),
    (torch_free, {"launch/a.py": "import train.b", "train/b.py": "", "train/__init__.py": "import deepspeed"}, "deepspeed through train:"),
    (torch_free, {"launch/a.py": "def f():\n    import train.b", "train/b.py": "import torch"}, "launch.a imports torch through train.b"),
    (torch_free, {"train/teacher/config.py": "", "train/teacher/__init__.py": "import torch"}, "train.teacher imports torch"),
    (torch_free, {"data/tasks.py": "import datasets"}, "data.tasks imports datasets"),
    (torch_free, {"data/rows.py": "def f():\n    import datasets"}, "data.rows imports datasets"),
    (torch_free, {"train/scoring.py": "import torch"}, "train.scoring imports torch"),
    (one_owner, {"train/a.py": "import deepspeed.comm"}, "belongs to train.engine"),
    (one_owner, {"train/a.py": "def f():\n    import wandb"}, "belongs to train.tracking"),
    (
        one_owner,
        {"train/a.py": "from transformers import PreTrainedModel, AutoConfig"},
        "transformers.AutoConfig, which belongs to train.models",
    ),
    (one_owner, {"train/a.py": "import transformers\nx = transformers.AutoModel"}, "uses transformers.AutoModel"),
    (one_owner, {"train/evaluate.py": "import ctranslate2"}, "belongs to train.deploy.ctranslate2"),
    (one_owner, {"launch/cli.py": "from matplotlib import pyplot"}, "belongs to launch.plots"),
    (no_evaluation_of_text, {"train/a.py": "x = eval('1')"}, "calls eval()"),
    (no_evaluation_of_text, {"train/a.py": "import builtins\nbuiltins.exec('1')"}, "calls exec()"),
    (function_lengths, {"train/a.py": LONG}, "train.a.long has 82 lines"),
    (function_lengths, {"train/a.py": MIDDLING}, "the median function has 16 lines"),
    (function_lengths, {"train/a.py": TENTH}, "one function in ten has 45 lines or more"),
    (names, {"train/model_utils.py": ""}, "name it for what it does"),
    (names, {"train/common/a.py": "", "train/common/__init__.py": ""}, "train.common: name it"),
    (names, {"train/statistics.py": ""}, "like the standard library's statistics"),
    (no_notes_to_self, {"data/a.py": "x = 1  # TO" + "DO later"}, "data.a:1 says"),
]


@pytest.mark.parametrize(("rule", "files", "sentence"), BROKEN, ids=[f"{rule.__name__}-{n}" for n, (rule, _, _) in enumerate(BROKEN)])
def test_a_project_that_breaks_a_rule_is_caught(rule: Rule, files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    found = rule(project_of(tmp_path, files))
    assert any(sentence in line for line in found), found


KEPT: list[tuple[Rule, dict[str, str]]] = [
    (layers, {"launch/a.py": "import train.b\nfrom data import c", "train/b.py": "import data.c", "data/c.py": ""}),
    (cycles, {"train/a.py": "import train.b", "train/b.py": "def f():\n    import train.a"}),
    (stages_apart, {"train/evaluate.py": "from train.deploy import ctranslate2", "train/deploy/ctranslate2.py": ""}),
    (
        stages_apart,
        {"launch/worker.py": "import train.deploy.stage", "train/deploy/stage.py": "from train.deploy import b", "train/deploy/b.py": ""},
    ),
    (torch_free, {"launch/worker.py": "import torch", "train/engine.py": "import torch", "data/tasks.py": "def f():\n    import datasets"}),
    (
        one_owner,
        {
            "train/a.py": "from transformers import PreTrainedModel",
            "train/models.py": "from transformers import AutoModel",
            "train/lora.py": "def f():\n    import peft",
        },
    ),
    (no_evaluation_of_text, {"train/a.py": "model.eval()"}),
    (function_lengths, {"train/a.py": "def f():\n    '''Many\n" + "    lines\n" * 90 + "    '''\n    return 1\n"}),
]


@pytest.mark.parametrize(("rule", "files"), KEPT, ids=[f"{rule.__name__}-{n}" for n, (rule, _) in enumerate(KEPT)])
def test_a_project_that_keeps_a_rule_passes(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    assert rule(project_of(tmp_path, files)) == []


def test_every_rule_is_tried_on_a_project_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)
