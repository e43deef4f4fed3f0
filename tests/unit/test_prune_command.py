"""`stepdown prune`: a model by itself, pruned or scanned; the process it starts runs in this one here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from launch import pruning
from train import models
from train.config import ScratchModel
from train.pruning import command
from train.tokenization import save_tokenizer, train_tokenizer

TEXTS = ["The door at the bank lets people in and out.", "Rivers carry sand down from the mountains.", "Bread was in the oven."]
SIZES: dict[str, Any] = {"d_model": 32, "layers": 2, "heads": 4, "d_ff": 48}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models that know nothing of Stepdown, and texts."""
    tokenizer = train_tokenizer(TEXTS, 300)
    for family in ("llama", "t5"):
        model = models.load_model(ScratchModel(from_scratch=family, **SIZES), tokenizer, seed=0, dtype=torch.float32)
        model.save_pretrained(tmp_path / family)
        save_tokenizer(tokenizer, tmp_path / family)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "supervise", lambda line, environment: command.main(line[3:]))


def told(folder: Path, model: str, out: str, *, scan: bool = False, texts: bool = True, **settings: Any) -> str:
    said = io.StringIO()
    shown = Console(file=said, width=120)
    pruning.prune(str(folder / model), folder / out, settings, folder / "texts.jsonl" if texts else None, shown, scan=scan)
    return said.getvalue()


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_model_gets_smaller_and_plain_transformers_loads_it(model: str, folder: Path) -> None:
    said = told(folder, model, "out", method="neuron_activity", fraction=0.5, round_to=8)
    auto = AutoModelForCausalLM if model == "llama" else AutoModelForSeq2SeqLM
    small, whole = auto.from_pretrained(folder / "out" / "model"), auto.from_pretrained(folder / model)
    assert AutoTokenizer.from_pretrained(folder / "out" / "model")(TEXTS[0])["input_ids"]
    counts = [sum(p.numel() for p in found.parameters()) for found in (small, whole)]
    assert counts[0] < counts[1]
    assert f"{counts[0]:,} parameters of {counts[1]:,}" in said
    assert "loss on the texts: " in said
    assert "compute zeros" not in said
    assert str(folder / "out" / "model") in said.replace("\n", "")


def test_zeros_are_counted_and_are_said_to_save_nothing(folder: Path) -> None:
    said = told(folder, "llama", "out", method="magnitude", fraction=0.5, texts=False)
    rows = {line.split()[0]: line.split()[-2] for line in said.splitlines() if "%" in line}
    assert (rows["q_proj"], rows["down_proj"]) == ("50.0", "50.0")
    assert float(rows["embed_tokens"]) < 1  # the padding token's row
    assert "runtimes for dense weights compute zeros as they compute any number" in said
    assert "loss on" not in said


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_scan_shows_the_loss_by_kind_and_leaves_the_model_whole(method: str, folder: Path) -> None:
    said = told(folder, "llama", "out", method=method, scan=True, exclude=["*.layers.0.*", "*.o_proj"])
    found = json.loads((folder / "out" / "pruned.json").read_text())
    kinds = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert list(found["losses"]) == kinds
    assert all(len(losses) == len(pruning.FRACTIONS) for losses in found["losses"].values())
    # What one kind lost is back before the next is tried: all lines begin at the whole model's loss.
    dense = found["dense"]
    assert max(abs(losses[0] - dense) for losses in found["losses"].values()) < 0.1
    assert all(losses[-1] != dense for losses in found["losses"].values())
    page = (folder / "out" / "scan.html").read_text()
    assert page.count("<svg") == 1
    assert all(kind in page and kind in said for kind in kinds)
    assert not (folder / "out" / "model").exists()


@pytest.mark.parametrize(
    ("settings", "scan", "texts", "message"),
    [
        ({"method": "wanda", "fraction": 0.5}, False, False, "--method wanda is measured on texts: give a file of some with --texts"),
        ({"method": "magnitude"}, True, False, "--scan is measured on texts"),
        ({"method": "neuron"}, True, True, "--scan goes by kind of matrix, but --method is neuron: use magnitude or wanda"),
        ({"method": "magnitude", "fraction": 0.5}, True, True, r"--scan tries fractions of its own \(0.1, .*\): leave --fraction out"),
        ({"method": "neuron", "fraction": 1.5}, False, True, "--fraction is 1.5: Input should be less than 1"),
        ({"method": "half", "fraction": 0.5}, False, True, "--method is 'half': Input should be 'magnitude', "),
        ({"method": "neuron"}, False, True, "neither fraction nor pattern says how much to take out"),
        ({"method": "neuron", "fraction": 0.5, "exclude": ["x"]}, False, True, "exclude has no effect with method: neuron"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    settings: dict[str, Any], scan: bool, texts: bool, message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        told(folder, "llama", "out", scan=scan, texts=texts, **settings)
    assert not (folder / "out").exists()


def test_an_earlier_result_is_kept_and_a_failure_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(folder, "llama", "out", method="neuron", fraction=0.5)
    with pytest.raises(ValueError, match=r"out holds an earlier result \(pruned\.json\): give another folder"):
        told(folder, "llama", "out", method="neuron", fraction=0.5)
    with pytest.raises(RuntimeError, match="pruning ended with status 1"):
        told(folder, "nothing", "other", method="neuron", fraction=0.5)
    assert "error: MODEL is '" in capsys.readouterr().err
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    assert command.main([]) == 2
