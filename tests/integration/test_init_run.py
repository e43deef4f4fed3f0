"""What `stepdown init` writes for three kinds of file becomes a deployed model, with nothing changed but for fewer epochs.

One kind goes the whole way; the others end before the evaluations, which take most of the time and are the same for all.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., subprocess.Popen[str]]
pytestmark = pytest.mark.slow
FILES: dict[str, list[dict[str, Any]]] = {
    "choice": [{"text": f"The {a} is {b}.", "label": "yes" if b == "good" else "no"} for a in "abcdefghij" for b in ("good", "bad") * 3],
    "number": [{"question": f"{a} + {b}?", "why": f"{a} + {b} is {a + b}.", "answer": a + b} for a in range(8) for b in range(8)],
    "text": [{"word": f"{a}{b}", "answer": f"{b}{a}"} for a in "abcdefgh" for b in "klmnopqr"],
}


@pytest.mark.parametrize(("kind", "command"), [("choice", "run"), ("number", "deploy"), ("text", "deploy")])
def test_a_file_becomes_a_deployed_model(kind: str, command: str, tmp_path: Path, start: Start) -> None:
    rows = FILES[kind]
    lines = [",".join(row) for row in ([*rows[0]], *(map(str, row.values()) for row in rows))]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    told, _ = start(tmp_path, "init", "mine.csv").communicate(timeout=60)
    assert f"compared as {kind}" in told
    fewer = ["teacher.tune.epochs=2", "student.epochs=2", "student.baselines=[]", "evaluate.timed_examples=2", "tracking.wandb=disabled"]
    process = start(tmp_path, command, "mine.yaml", *fewer)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    [made] = (tmp_path / "runs" / "mine").glob("deploy.ctranslate2-int8-*/model/model.bin")
    assert made.stat().st_size > 50_000
    answer, _ = start(tmp_path, "predict", "mine", json.dumps(rows[0])).communicate(timeout=120)
    assert "error" not in answer
