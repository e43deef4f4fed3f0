from __future__ import annotations

import json
from pathlib import Path

import pytest

from train import artifacts
from train.artifacts import ARTIFACT, Artifact, Checkpoint, DeployedModel, EvalResult, Records, TaskFiles, write_json

EXAMPLES: list[Artifact] = [
    TaskFiles("abc", {"train": 3}, {"train": 0}, leaked=1, seconds=0.5),
    Checkpoint("decoder_only", 10, 40, 5, 4, {"exact_match": 0.5, "loss": 1.25}, {"label_rows": 3}, 64, 8, 16),
    Records({"train": 3}, {"train": 2}, {"train": 1}, generated_tokens=99),
    DeployedModel("ctranslate2-int8", "ctranslate2", "encoder_decoder", 1, 2, 3, 4, 5, 6),
    EvalResult("teacher", "recorded", 10, 9, 1, None, None, None, None, None, None, "cpu", None, notes=["größer"]),
]
KINDS = pytest.mark.parametrize("artifact", EXAMPLES, ids=lambda a: type(a).__name__)


@KINDS
def test_an_artifact_comes_back(artifact: Artifact, tmp_path: Path) -> None:
    artifact.write(tmp_path / "stage")
    assert type(artifact).read(tmp_path / "stage") == artifact
    assert json.loads((tmp_path / "stage" / ARTIFACT).read_text())["kind"] == type(artifact).__name__


@KINDS
def test_an_artifact_of_another_kind_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    artifact.write(tmp_path)
    name = type(artifact).__name__
    for other in EXAMPLES:
        if type(other) is not type(artifact):
            wanted = rf"artifact\.json holds a {name}, not a {type(other).__name__}: the folder belongs to another stage"
            with pytest.raises(RuntimeError, match=wanted):
                type(other).read(tmp_path)


def test_a_stage_that_has_not_finished_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"has no artifact\.json: that stage has not finished; run it first") as raised:
        Records.read(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_json_makes_its_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "value.json"
    write_json(path, {"x": [1, None]})
    write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}
    assert list(path.parent.iterdir()) == [path]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EXAMPLES[0].write(tmp_path)

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            EXAMPLES[2].write(tmp_path)
    assert TaskFiles.read(tmp_path) == EXAMPLES[0]
    EXAMPLES[2].write(tmp_path)
    assert Records.read(tmp_path) == EXAMPLES[2]
