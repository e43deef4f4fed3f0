from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from html import escape as html_escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data.examples import TaskExample, write_examples
from data.records import TeacherRecord
from data.store import shard_path, write_shard
from launch import plots, samples
from launch import report_html as words
from launch.ladder import Paired, Report, ReportInputs, StageCost, StagePeak, _unquantized, build, compare
from launch.report import page, terminal_table, write
from train.artifacts import Checkpoint, DeployedModel, EvalResult, Records, TaskFiles

SCRIPT = "<script>alert(1)</script>"
# One character an item: 1 is right. By hand: int8 gains item 9 and loses items 5 and 8 against float32.
LADDER = {
    "teacher": "1111111110",
    "labels_only": "1111110000",
    "step_by_step": "1111111010",
    "ctranslate2-float32": "1111111010",
    "ctranslate2-int8": "1111101001",
}
WEIGHTS = {
    "teacher": 4_000_000,
    "labels_only": 900_000,
    "step_by_step": 900_000,
    "ctranslate2-float32": 910_000,
    "ctranslate2-int8": 243_000,
}


def evaluation(folder: Path, name: str, right: str, *, first: int = 0, **changes: Any) -> Path:
    """A finished evaluation; of items 0 and 1 the teacher has no answer, on the others right and agreeing coincide."""
    folder.mkdir(parents=True)
    with (folder / "answers.jsonl").open("w") as file:
        for i, mark in enumerate(right):
            agrees = None if i < 2 else mark == "1"
            answer = {
                "id": f"item{i + first}",
                "answer": SCRIPT if i == 0 else None if i == 7 else f"a|{i}" if i < 8 or mark == "1" else f"b|{i}",
                "correct": mark == "1",
                "agrees": agrees,
            }
            file.write(json.dumps(answer) + "\n")
    values: dict[str, Any] = {
        "rung": name,
        "runtime": "ctranslate2" if name.startswith("ctranslate2") else "transformers",
        "num_items": len(right),
        "num_correct": right.count("1"),
        "num_unparseable": 0,
        "num_agreeing_with_teacher": right[2:].count("1"),
        "num_parameters": 225_000,
        "weight_bytes": WEIGHTS.get(name),
        "total_bytes": 1_234_567,
        "examples_per_second": {"1": 31.25, "32": 1234.5},
        "peak_memory_bytes": 612_000_000,
        "device": "cpu",
        "load_seconds": 0.5,
        "first_token_seconds": 0.0123,
    }
    EvalResult(**{**values, **changes}).write(folder)
    return folder


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = [
        {"step": s, "loss": 2.0 / s, "loss_label": 1.5 / s, "loss_rationale": 0.5 / s, "loss_soft": 0.0} for s in (10, 20, 30)
    ]
    lines.append({"step": 20, "validation_exact_match": 0.4, "validation_loss": 0.2})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"label_rows": 3_800, "rationale_rows": 3_391, "inputs_cut": 3}
    Checkpoint("encoder_decoder", 225_000, 900_000, 600, 540, {"exact_match": 0.8125, "loss": 0.25}, counts, 128, 8, 64, 1, 81.0).write(
        folder
    )
    return folder


def deployed(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    held = {"bits_a_parameter": 8.5, "bits_a_weight": 8.25, "error_nats": 0.0123, "fallbacks": ["a", "b"] if "int8" in name else []}
    DeployedModel(name, "ctranslate2", "encoder_decoder", WEIGHTS[name], 300_000, 900_000, 225_000, 128, 8, **held).write(folder)
    return folder


def tiny_run(tmp_path: Path) -> ReportInputs:
    engines = [name for name in LADDER if name.startswith("ctranslate2")]
    test_file = tmp_path / "test.jsonl"
    write_examples(test_file, [TaskExample(f"item{i}", f"How many is <b>{i}</b>?", str(i)) for i in range(10)])
    return ReportInputs(
        name="tiny <run>",
        run_folder=Path("runs/tiny"),
        student="step_by_step",
        rungs=[evaluation(tmp_path / "evaluate" / name, name, right) for name, right in LADDER.items()],
        stages=[
            StageCost("task", 1.25, 1, True, "10 rows"),
            StageCost("train", 100.0, 2, False, "0.90 MB"),
            StageCost("deploy", 25.0, 1, False, "2"),
        ],
        task=TaskFiles("d1", {"train": 4000, "test": 10}, {"train": 7, "test": 0}, leaked=2),
        records=Records({"train": 4000}, {"train": 3980}, {"train": 3000}, generated_tokens=181_250, record_bytes=812_000, seconds=50.0),
        checkpoints={"step_by_step": checkpoint(tmp_path / "train" / "step_by_step")},
        deployed={name: deployed(tmp_path / "deploy" / name, name) for name in engines},
        config={"name": "tiny", "student": {"learning_rate": 0.001}},
        provenance={"command": ["stepdown", "run", "my config.yaml"], "commit": "0f3a9c1", "versions": {"torch": "2.13.0"}},
        test_file=test_file,
        memory=[
            StagePeak("teach", "NVIDIA H200", 2, "tensor over 2, bf16, 64 requests at once", 12_500_000_000, 11_000_000_000, 0.88),
            StagePeak("recover.gguf-q4_0", "NVIDIA H200", 2, "", None, 9_000_000_000, None),
            StagePeak("train.step_by_step", "cpu", 1, "", None, 612_000_000, None),
        ],
    )


@pytest.fixture
def inputs(tmp_path: Path) -> ReportInputs:
    return tiny_run(tmp_path)


Written = tuple[dict[str, Any], str, str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The tiny run's report.json, report.md and report.html; drawn once, because drawing takes most of a test's time."""
    folder = tmp_path_factory.mktemp("tiny")
    return written(build(tiny_run(folder)), folder / "out")


class Tables(HTMLParser):
    """Every table of a page as rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data


def written(report: Report, folder: Path) -> Written:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    write(report, folder)
    values = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return values, (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


def test_figures_of_each_rung_by_hand(inputs: ReportInputs) -> None:
    teacher, labels, student, float32, int8 = build(inputs).rungs
    assert [r.accuracy for r in (teacher, labels, student, float32, int8)] == [0.9, 0.6, 0.8, 0.8, 0.7]
    assert student.interval == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert teacher.before is None
    assert labels.before == Paired("teacher", -0.3, 0, 3, 0.25)
    assert student.before == Paired("labels_only", 0.2, 2, 0, 0.5)
    assert float32.before == Paired("step_by_step", 0.0, 0, 0, 1.0)
    assert int8.before == Paired("ctranslate2-float32", -0.1, 1, 2, 1.0)
    assert int8.student == Paired("step_by_step", -0.1, 1, 2, 1.0)
    assert int8.same_engine == int8.before
    assert (teacher.student, student.student, float32.same_engine) == (None, None, None)
    assert [test.against for test in int8.tests] == ["ctranslate2-float32", "step_by_step"]
    # Items 2 to 9 have an answer of the teacher: five of the eight are right in int8.
    assert (int8.agreement, int8.fp32_ratio) == (5 / 8, 0.27)
    assert teacher.fp32_ratio == 4_000_000 / 900_000


def test_the_unquantized_rung_of_the_same_engine_is_found_wherever_it_stands(inputs: ReportInputs) -> None:
    order = [inputs.rungs[i] for i in (0, 4, 2, 3)]
    int8 = build(dataclasses.replace(inputs, rungs=order)).rungs[1]
    assert int8.before is not None
    assert int8.same_engine is not None
    assert (int8.before.against, int8.same_engine.against, int8.student) == ("teacher", "ctranslate2-float32", None)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("compressed-tensors-w8a8", "compressed-tensors-bf16"),
        ("gguf-tq2_0", "gguf-f16"),
        ("onnx-int4", "onnx-float32"),
        ("ctranslate2-int8", "ctranslate2-float16"),
        ("gguf-f16", None),
        ("step_by_step", None),
    ],
)
def test_each_quantized_file_has_an_unquantized_one_of_its_engine(name: str, plain: str | None) -> None:
    names = ["step_by_step", "ctranslate2-float16", "gguf-f16", "onnx-float32", "compressed-tensors-bf16", name]
    assert _unquantized(name, names) == plain


def test_without_an_unquantized_rung_there_is_no_same_engine_test(inputs: ReportInputs) -> None:
    assert build(dataclasses.replace(inputs, rungs=[inputs.rungs[i] for i in (0, 2, 4)])).rungs[-1].same_engine is None


def test_answers_are_paired_by_id_not_by_line(inputs: ReportInputs) -> None:
    path = inputs.rungs[-1] / "answers.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert build(inputs).rungs[-1].before == Paired("ctranslate2-float32", -0.1, 1, 2, 1.0)


def test_summary_says_the_figures(inputs: ReportInputs) -> None:
    assert build(inputs).summary == [
        "ctranslate2-int8: 7 of 10 right (70.0 %, 95 % interval 39.7 to 89.2 %), 77.8 % of the teacher's accuracy, "
        "in 0.24 MB (27.0 % of the fp32 file).",
        "step_by_step against labels_only: +20.0 points, 2 gained, 0 lost, exact McNemar p = 0.500: not significant at 5 %.",
        "ctranslate2-int8 against step_by_step: -10.0 points, 1 gained, 2 lost, exact McNemar p = 1.000: not significant at 5 %.",
        "ctranslate2-int8 against ctranslate2-float32: -10.0 points, 1 gained, 2 lost, exact McNemar p = 1.000: not significant at 5 %.",
    ]


@pytest.mark.parametrize("student", ["labels_only", "step_by_step", "soft_labels", "step_by_step_soft"])
def test_the_student_is_set_against_each_baseline_whatever_it_is_called(inputs: ReportInputs, tmp_path: Path, student: str) -> None:
    teacher, deployed_rung = inputs.rungs[0], inputs.rungs[4]
    before = [evaluation(tmp_path / "a", "base_a", "1111110000"), evaluation(tmp_path / "b", "base_b", "1111111000")]
    main = evaluation(tmp_path / "c", student, "1111111010", weight_bytes=900_000)
    built = build(dataclasses.replace(inputs, student=student, rungs=[teacher, *before, main, deployed_rung], deployed={}))
    rungs = {rung.name: rung for rung in built.rungs}
    assert rungs[student].baselines == [Paired("base_a", 0.2, 2, 0, 0.5), Paired("base_b", 0.1, 1, 0, 1.0)]
    assert [test.against for test in rungs[student].tests] == ["base_b", "base_a"]
    assert [rung.baselines for name, rung in rungs.items() if name != student] == [[]] * 4
    assert rungs["ctranslate2-int8"].student == Paired(student, -0.1, 1, 2, 1.0)
    assert rungs["base_a"].student is None
    assert built.summary[1:] == [
        f"{student} against base_a: +20.0 points, 2 gained, 0 lost, exact McNemar p = 0.500: not significant at 5 %.",
        f"{student} against base_b: +10.0 points, 1 gained, 0 lost, exact McNemar p = 1.000: not significant at 5 %.",
        f"ctranslate2-int8 against {student}: -10.0 points, 1 gained, 2 lost, exact McNemar p = 1.000: not significant at 5 %.",
    ]


def test_verdict_names_significance_in_both_directions() -> None:
    assert Paired("x", -0.05, 1, 26, 4e-7).verdict == "-5.0 points, 1 gained, 26 lost, exact McNemar p < 0.001: significant at 5 %"
    assert Paired("x", 0.02, 9, 2, 0.0654).verdict == "+2.0 points, 9 gained, 2 lost, exact McNemar p = 0.065: not significant at 5 %"


def test_warnings(inputs: ReportInputs) -> None:
    folder = evaluation(inputs.rungs[0].parent / "x", "x", "1111100000", num_unparseable=3)
    assert build(dataclasses.replace(inputs, rungs=[*inputs.rungs, folder])).warnings == [
        "2 training rows (0.1 %) have the input of a test row: trained rungs may remember its answer.",
        "7 rows of train did not fit the task and were left out; rejected.jsonl says why.",
        "x: 30.0 % of its answers could not be read and count as wrong.",
        "step_by_step: 3 inputs cut in training.",
    ]


def test_a_clean_run_has_no_warning(inputs: ReportInputs) -> None:
    task = dataclasses.replace(inputs.task, rejected={"train": 0}, leaked=0)
    assert build(dataclasses.replace(inputs, task=task, checkpoints={})).warnings == []


def test_figures_agree_in_json_markdown_and_html(tiny: Written) -> None:
    values, markdown, html = tiny
    shown = Tables(html).tables
    ladder = shown[0]
    assert ladder[5][:7] == ["ctranslate2-int8", "70.0 %", "39.7 to 89.2 %", "-10.0", "1.000", "62.5 %", "225.0k"]
    assert ladder[5][7:] == ["0.24 MB", "27.0 %", "1.23 MB", "31.2", "1,234", "612 MB"]
    for row, rung in zip(ladder[1:], values["rungs"], strict=True):
        measured = rung["measured"]
        before = rung["before"] or {"difference": None, "p_value": None}
        assert row[:5] == [
            measured["rung"],
            words.percent(measured["num_correct"] / measured["num_items"]),
            words.percent_range(tuple(rung["interval"])),
            words.points(before["difference"]),
            words.p_value(before["p_value"]),
        ]
        assert row[7:9] == [words.num_bytes(measured["weight_bytes"]), words.percent(rung["fp32_ratio"])]
    in_markdown = [line for line in markdown.splitlines() if line.startswith("|") and "---" not in line]
    assert in_markdown == [words._row(row) for table in shown for row in table]
    assert markdown.startswith("# tiny &lt;run&gt;: the ladder\n")
    assert all(sentence in markdown for sentence in values["summary"])
    assert all(sentence.replace(" %", "\u00a0%").replace("'", "&#39;") in html for sentence in values["summary"])


def test_a_pruned_model_shows_its_zeros_and_that_they_save_nothing(inputs: ReportInputs, tmp_path: Path) -> None:
    plain = Checkpoint.read(inputs.checkpoints["step_by_step"])
    for name, zeros in (("zeros", 500_000), ("smaller", 0)):
        folder = checkpoint(tmp_path / name)
        layers = {"0": [600_000, zeros], "1": [400_000, 0]}
        made = replace(plain, sparsity={"q_proj": [1_000_000, zeros], "embed_tokens": [3_000_000, 0]}, compressed_bytes=700_000)
        replace(made, layer_sparsity=layers).write(folder)
        inputs.checkpoints[name] = folder  # type: ignore[index]
    _, markdown, page = written(build(inputs), tmp_path / "out")
    for name, share, of_all in (("zeros", "50.0 %", "12.5 %"), ("smaller", "0.0 %", "0.0 %")):
        section = markdown.split(f"What was pruned: {name}")[1].split("## ")[0]
        assert "225.0k parameters are left, 0.90 MB on disk, 0.70 MB compressed (zlib)." in section
        assert share in section.split("q_proj")[1].splitlines()[0]
        assert of_all in section.split("all matrices")[1].splitlines()[0]
        assert any(row[0] == "q_proj" and row[-1] == share for table in Tables(page).tables for row in table)
        assert ("these make no file smaller and no answer faster" in section) == (name == "zeros")
    assert "What was pruned: step_by_step" not in markdown
    assert "Zeros by layer of zeros" in page and "Zeros by layer of smaller" not in page, "where there are none there is nothing to draw"


def test_tables_of_teacher_training_and_costs(tiny: Written) -> None:
    _, markdown, html = tiny
    cells = [row for table in Tables(html).tables for row in table]
    for row in (
        ["train", "4,000", "7", "4,000", "3,980 (99.5 %)", "3,000 (75.0 %)"],
        ["test", "10", "0", "-", "-", "-"],
        ["Tokens generated", "181.2k"],
        ["Tokens/s", "3,625"],
        ["Soft-label tokens", "-"],
        ["Records on disk", "0.81 MB"],
        ["Label rows", "3,800"],
        ["Rationale rows", "3,391"],
        ["Validation exact match", "81.2 %"],
        ["Validation loss", "0.2500"],
        ["task", "10 rows", "used again", "1", "1.2 s"],
        ["train", "0.90 MB", "ran", "2", "1 min 40 s"],
        ["ctranslate2-int8", "ctranslate2", "0.24 MB", "0.30 MB", "27.0 %", "8.50", "8.25", "0.012", "20.0 %", "2 matrices"],
        ["ctranslate2-int8", "cpu", "0.5 s", "12.3 ms", "-"],
        ["Stage", "Device", "Layout", "Processes", "Planned", "Measured", "Of the plan"],
        ["teach", "NVIDIA H200", "tensor over 2, bf16, 64 requests at once", "2", "12.5 GB", "11.0 GB", "88.0 %"],
        ["recover.gguf-q4_0", "NVIDIA H200", "-", "2", "-", "9.00 GB", "-"],
        ["train.step_by_step", "cpu", "-", "1", "-", "612 MB", "-"],
        ["versions.torch", "2.13.0"],
        ["How many is <b>0</b>?", "0", *[f"✓ {SCRIPT}"] * 5],
        ["How many is <b>7</b>?", "7", "✓ -", *["✗ -"] * 4],
    ):
        assert row in cells
    assert "The stages that ran this time took 2 min 05 s." in markdown
    assert "stepdown run 'my config.yaml'" in markdown


def test_what_was_planned_and_what_not_is_said_of_the_devices_that_there_were(inputs: ReportInputs, tmp_path: Path) -> None:
    of_gpus = "counts for the layout that ran, every sequence as long as the configuration lets it be; measured is the most that torch"
    of_cpus = "On a CPU there is none to compare: measured is all that the process held, Python and its libraries included."
    for n, (kept, told) in enumerate(
        [(inputs.memory, (True, True)), (inputs.memory[:2], (True, False)), (inputs.memory[2:], (False, True))]
    ):
        values, markdown, _ = written(build(dataclasses.replace(inputs, memory=kept)), tmp_path / str(n))
        assert (of_gpus in markdown, of_cpus in markdown) == told
        assert [peak["measured_bytes"] for peak in values["memory"]] == [peak.measured_bytes for peak in kept]
    _, markdown, _ = written(build(dataclasses.replace(inputs, memory=[])), tmp_path / "none")
    assert "## Memory" not in markdown


def test_what_is_shipped_stands_first(inputs: ReportInputs, tmp_path: Path) -> None:
    assert [(tile.label, tile.value, tile.note) for tile in page(build(inputs)).tiles] == [
        ("Accuracy", "70.0 %", "95 % interval 39.7 to 89.2 %"),
        ("Teacher's accuracy", "90.0 %", "on the same 10 test items"),
        ("Size", "0.24 MB", "27.0 % of the fp32 file"),
        ("One item takes", "32.0 ms", "teacher: 32.0 ms"),
    ]
    bare = evaluation(tmp_path / "bare", "teacher", LADDER["teacher"], weight_bytes=None, examples_per_second=None)
    alone = page(build(dataclasses.replace(inputs, rungs=[bare], deployed={})))
    assert [tile.label for tile in alone.tiles] == ["Accuracy"]
    assert [plot.title for plot in alone.sections[1].plots][:2] == ["Accuracy against size", "Validation while training"]


def test_what_the_teacher_wrote_is_shown_right_and_wrong(inputs: ReportInputs, tmp_path: Path) -> None:
    wrote = [
        samples.Written("1 + 1?", "2", "2", True, "One and one.", 1, False),
        samples.Written("1 + 2?", "3", None, False, SCRIPT, 1, False),
    ]
    _, _, html = written(build(dataclasses.replace(inputs, written=wrote)), tmp_path / "out")
    rows = [row for table in Tables(html).tables for row in table]
    assert ["1 + 1?", "2", "✓ 2", "One and one."] in rows
    assert ["1 + 2?", "3", "✗ -", SCRIPT] in rows


def test_the_first_records_of_each_kind_are_samples(tmp_path: Path) -> None:
    examples = [TaskExample(f"e{i}", f"question {i}", str(i)) for i in range(10)]
    write_examples(tmp_path / "train.jsonl", examples)
    records = [TeacherRecord(e.id, "train", "", "" if i == 1 else "because", e.label, True, i % 3 == 0) for i, e in enumerate(examples)]
    write_shard(shard_path(tmp_path, "train", 0), records)
    found = samples.written(tmp_path, tmp_path, 2)
    assert [(w.input, w.agrees) for w in found] == [
        ("question 0", True),
        ("question 3", True),
        ("question 1", False),
        ("question 2", False),
    ]
    assert samples.first_of_each(((n > 1, n) for n in iter(range(10**9))), 2) == [2, 3, 0, 1]


def test_what_was_not_measured_is_a_dash(inputs: ReportInputs, tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("num_parameters", "weight_bytes", "total_bytes", "examples_per_second", "peak_memory_bytes", "load_seconds")
    )
    recorded = evaluation(tmp_path / "recorded", "teacher", LADDER["teacher"], **nothing, runtime="recorded")
    records = Records({"test": 10}, {"test": 10}, {"test": 9})
    report = build(dataclasses.replace(inputs, rungs=[recorded, *inputs.rungs[1:]], records=records, checkpoints={}))
    _, _, html = written(report, tmp_path / "out")
    tables = Tables(html).tables
    assert tables[0][1] == ["teacher", "90.0 %", "59.6 to 98.2 %", "-", "-", "87.5 %", *["-"] * 7]
    assert [row[1] for row in tables[3][1:5]] == ["-"] * 4
    assert "A dashed line is a rung whose size is not known." in html


def test_what_the_teacher_was_asked_is_counted_on_the_page_and_in_the_terminal(inputs: ReportInputs, tmp_path: Path) -> None:
    records = Records(
        {"train": 4000, "test": 10}, {"train": 3985, "test": 10}, {"train": 3000, "test": 9}, generated_tokens=500_000,
        record_bytes=1_300_000, soft_label_tokens=40_000, sharding="replica", rationalized={"train": 320, "test": 0},
        unparseable={"not a number": 3, "no answer": 12}, mean_votes=3.4167,
    )  # fmt: skip
    config = {"teacher": {"source": "deepspeed", "rationales": {"samples": 5, "rationalize": True}}}
    report = build(dataclasses.replace(inputs, records=records, config=config))
    values, _, html = written(report, tmp_path / "out")
    cells = [row for table in Tables(html).tables for row in table]
    for row in (
        ["Bytes on disk a soft-label token, texts included", "32.5"],
        ["Unusable labels", "15 (12 no answer, 3 not a number)"],
        ["Training rationales written with a hint", "320 (8.0 %)"],
        ["Samples that agree, mean", "3.4 of 5"],
    ):
        assert row in cells
    told = (
        "The teacher's records: labels that could not be used: 15 (12 no answer, 3 not a number), of 4,010; training rationales written "
        "with a hint: 320 (8.0 %); samples that agree: 3.4 of 5 on average; soft labels of 40,000 tokens, 32.5 bytes on disk each with "
        "all texts."
    )
    assert said(report)[-1 - len(report.warnings)] == told
    assert values["records"]["unparseable"] == {"not a number": 3, "no answer": 12}


def test_nothing_is_said_of_records_that_have_nothing_to_tell(inputs: ReportInputs, tmp_path: Path) -> None:
    report = build(dataclasses.replace(inputs, records=Records({"train": 10}, {"train": 10}, {"train": 9})))
    _, _, html = written(report, tmp_path / "out")
    cells = [row for table in Tables(html).tables for row in table]
    assert ["Unusable labels", "0"] in cells
    for fact in ("Bytes on disk a soft-label token, texts included", "Training rationales written with a hint", "Samples that agree, mean"):
        assert [fact, "-"] in cells
    assert not [line for line in said(report) if line.startswith("The teacher")]


def said(report: Report) -> list[str]:
    """What the terminal shows, by line."""
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        terminal_table(report, console)
    return capture.get().splitlines()


def test_the_shortest_ladder_is_one_rung_that_got_nothing_right(inputs: ReportInputs, tmp_path: Path) -> None:
    alone = evaluation(tmp_path / "alone", "teacher", "0", weight_bytes=None)
    bare = dataclasses.replace(inputs, rungs=[alone], records=None, checkpoints={}, deployed={}, provenance={}, test_file=None)
    report = build(bare)
    _, markdown, html = written(report, tmp_path / "out")
    assert report.summary == ["teacher: 0 of 1 right (0.0 %, 95 % interval 0.0 to 79.3 %)."]
    assert f"| item0 | - | ✗ {html_escape(SCRIPT)} |" in markdown
    assert "Paired tests" not in html
    assert "What was trained" not in html


def test_html_reaches_for_nothing_outside(tiny: Written) -> None:
    html = tiny[2]
    targets = re.findall(r"(?:src|href|action|data|srcset|poster)\s*=\s*[\"']([^\"']*)", html)
    assert targets
    assert all(target.startswith("#") for target in targets)
    assert not re.findall(r"@import|url\((?!#)|<link|<iframe|<object|<img|https?://", html)


def test_text_from_data_is_escaped(inputs: ReportInputs, tmp_path: Path) -> None:
    noted = evaluation(tmp_path / "noted", "<i>x</i>", LADDER["teacher"], notes=["a `b` *c*\n| <u>d</u>"])
    report = build(
        dataclasses.replace(inputs, rungs=[*inputs.rungs, noted], checkpoints={}, config={"a": "```\n<b>"}, provenance={"commit": SCRIPT})
    )
    _, markdown, html = written(report, tmp_path / "out")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not re.search(r"<(i|u|b|run)>", html)
    assert not re.search(r"<(script|i|u|run)>", markdown)
    assert r"&lt;i&gt;x&lt;/i&gt;: a \`b\` \*c\* \| &lt;u&gt;d&lt;/u&gt;" in markdown
    assert r"✓ a\|2" in markdown
    assert re.search(r"^````\na: .*^````$", markdown, flags=re.DOTALL | re.MULTILINE)


def test_every_plot_is_drawn_in_the_colours_of_the_page(inputs: ReportInputs) -> None:
    drawn = page(build(inputs)).sections[1].plots
    assert [plot.title for plot in drawn] == [
        "Accuracy against size",
        "Accuracy against latency",
        "Validation while training",
        "Loss of step_by_step",
    ]
    assert [[label for label, _, _ in plot.legend] for plot in drawn[:2]] == [list(LADDER)] * 2
    assert [label for label, _, _ in drawn[3].legend] == ["label", "rationale", "validation"]  # the soft loss has no weight
    # A model keeps its colour from plot to plot.
    assert drawn[2].legend[0] == drawn[0].legend[2]
    for plot in drawn:
        assert not re.search(r"#[0-9a-f]{6}\b", plot.svg)
    ids = [name for plot in drawn for name in re.findall(r'\bid="([^"]+)"', plot.svg)]
    assert len(ids) == len(set(ids))
    used = [name for plot in drawn for name in re.findall(r'(?:href="|url\()#([^")]+)', plot.svg)]
    assert set(used) <= set(ids)


def test_points_of_one_size_are_set_apart_around_it() -> None:
    left, right, alone = plots._side_by_side([1000, 1000, 9000])
    assert left * right == pytest.approx(1.0)
    assert left < 1 < right
    assert alone == 1.0
    assert plots._side_by_side([]) == []


def test_drawing_is_the_same_twice_and_takes_any_label() -> None:
    points = [plots.Point("$a_b$", 0.5, (0.4, 0.6), None), plots.Point("_x & <y>", 0.0, (0.0, 0.1), 10**9)]
    assert plots.accuracy_against_size(points) == plots.accuracy_against_size(points)
    one = plots.curves("Loss of <x>", [plots.Curve("a", 0, [1], [0.0])], "loss", logarithmic=True)
    assert "<x>" not in one.svg


def test_log_keeps_the_later_of_a_step_and_skips_what_is_no_number(inputs: ReportInputs) -> None:
    log = inputs.checkpoints["step_by_step"] / "log.jsonl"
    log.write_text(
        '{"step": 10, "loss": 3.0}\n{"step": 20, "lo\n{"step": 10, "loss": 2.0}\n{"step": 30, "loss": NaN}\n{"step": 20, "loss": 1.0}\n'
    )
    assert build(inputs).logs == {"step_by_step": [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 30}]}
    log.unlink()
    assert build(inputs).logs == {"step_by_step": []}


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("width", "kept", "dropped"),
    [
        (200, ["memory", "batch 1", "batch 32", "files"], []),
        (100, ["interval", "before", "p", "Params", "Weights", "fp32", "batch 1"], ["memory", "batch 32"]),
        (80, ["interval", "before", "Params", "Weights", "batch 1"], ["fp32"]),
        (72, ["before", "Params", "Weights", "batch 1"], ["interval"]),
    ],
)
def test_terminal_table_drops_columns_and_never_cuts_a_number(
    inputs: ReportInputs, width: int, kept: list[str], dropped: list[str], terminal: bool
) -> None:
    console = Console(width=width, force_terminal=terminal, color_system="standard" if terminal else None, record=True, quiet=False)
    with console.capture() as capture:
        terminal_table(build(inputs), console)
    raw = capture.get()
    assert ("\x1b[" in raw) is terminal
    lines = re.sub(r"\x1b\[[\d;]*m", "", raw).splitlines()
    heads, rows = lines[:3], [line for line in lines if re.match(r"[\w-]+ +\d+\.\d %  ", line)]
    assert [row.split()[0] for row in rows] == list(LADDER)
    table = lines[: lines.index("")]
    assert all(len(line) <= width for line in (lines if terminal else table))
    sentences = [line for line in lines if line.startswith("step_by_step against")]
    assert sentences[0].endswith("at 5 %.") is (not terminal or width == 200)
    assert "…" not in raw
    for title in kept:
        assert any(title in head for head in heads)
    for title in dropped:
        assert not any(title in head for head in heads)
    assert "0.24 MB" in rows[-1]
    assert "Warning: 7 rows of train" in " ".join(lines)


def test_compare(inputs: ReportInputs) -> None:
    a, b = inputs.rungs[1], inputs.rungs[2]
    comparison = compare(a, b)
    assert comparison.paired == Paired("labels_only", 0.2, 2, 0, 0.5)
    assert (comparison.num_items, comparison.num_correct_a, comparison.num_correct_b) == (10, 6, 8)
    assert comparison.interval_b == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert str(comparison).splitlines() == [
        f"a: 6 of 10 right (60.0 %, 95 % interval 31.3 to 83.2 %): labels_only in {a}",
        f"b: 8 of 10 right (80.0 %, 95 % interval 49.0 to 94.3 %): step_by_step in {b}",
        "b against a: +20.0 points, 2 gained, 0 lost, exact McNemar p = 0.500: not significant at 5 %",
    ]


def test_compare_refuses_other_items(inputs: ReportInputs, tmp_path: Path) -> None:
    other = evaluation(tmp_path / "other", "x", "110", first=8)
    with pytest.raises(ValueError, match="were scored on different items: they share 2 of 10 and 3; compare evaluations of one test split"):
        compare(inputs.rungs[0], other)


def test_build_refuses_rungs_of_other_items(inputs: ReportInputs, tmp_path: Path) -> None:
    other = evaluation(tmp_path / "other", "x", LADDER["teacher"], first=5)
    with pytest.raises(
        RuntimeError, match="rungs teacher and x were scored on different items: they share 5 of 10 and 10; run the evaluation again"
    ):
        build(dataclasses.replace(inputs, rungs=[*inputs.rungs, other]))


def test_build_refuses_a_rung_twice_and_an_empty_ladder(inputs: ReportInputs) -> None:
    with pytest.raises(RuntimeError, match="rung teacher stands 2 times on the ladder"):
        build(dataclasses.replace(inputs, rungs=[*inputs.rungs, inputs.rungs[0]]))
    with pytest.raises(RuntimeError, match="no rung was evaluated: run the evaluation first"):
        build(dataclasses.replace(inputs, rungs=[]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no answers.jsonl: run the evaluation again"),
        ("", "artifact.json says 9 of 10 right, answers.jsonl 0 of 0"),
        ('{"id": "a", "answer": "1", "correct": true, "agrees": null}\n', "artifact.json says 9 of 10 right, answers.jsonl 1 of 1"),
        ('{"id": "a", "answer": "1", "correct": true, "agrees": null}\n{"id": ', "answers.jsonl, line 2 is not an answer"),
        ('{"id": "a", "answer": "1", "agrees": null}\n', "answers.jsonl, line 1 is not an answer .KeyError..correct"),
        ('{"id": "a", "answer": "1", "correct": true, "agrees": null}\n' * 2, "line 2: item a stands twice: run the evaluation again"),
    ],
)
def test_build_refuses_broken_answers(inputs: ReportInputs, text: str | None, message: str) -> None:
    path = inputs.rungs[0] / "answers.jsonl"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(RuntimeError, match=message):
        build(inputs)


def test_build_refuses_an_unfinished_evaluation(inputs: ReportInputs) -> None:
    (inputs.rungs[2] / "artifact.json").unlink()
    with pytest.raises(RuntimeError, match="that stage has not finished"):
        build(inputs)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.whole(9741), "9,741"),
        (words.count(512), "512"),
        (words.count(210_300), "210.3k"),
        (words.count(999_949), "999.9k"),
        (words.count(999_951), "1.0M"),
        (words.count(1_240_000), "1.2M"),
        (words.count(70_600_000_000), "70.6B"),
        (words.num_bytes(512), "0.51 kB"),
        (words.num_bytes(9_300), "9.30 kB"),
        (words.num_bytes(812_345), "0.81 MB"),
        (words.num_bytes(9_996_000), "10.0 MB"),
        (words.num_bytes(538_000_000), "538 MB"),
        (words.num_bytes(999_600_000), "1.00 GB"),
        (words.percent(0.8125), "81.2 %"),
        (words.points(0.0344), "+3.4"),
        (words.points(-0.0002), "0.0"),
        (words.p_value(0.0004), "< 0.001"),
        (words.p_equals(0.0004), "p < 0.001"),
        (words.p_equals(0.0834), "p = 0.083"),
        (words.rate(0.456), "0.46"),
        (words.rate(31.24), "31.2"),
        (words.rate(1234.5), "1,234"),
        (words.duration(59.96), "1 min 00 s"),
        (words.duration(3599.6), "1 h 00 min"),
        (words.duration(7500), "2 h 05 min"),
    ],
)
def test_numbers_in_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_importing_the_report_loads_no_heavy_library() -> None:
    code = "import sys, launch.report; print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
