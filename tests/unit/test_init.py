"""A configuration for a file that a user has: what is guessed, what is written, and what is said where nothing can be."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data.guessing import Guess, guess
from data.tables import table_rows
from data.tasks import prepare, read_task
from launch.config import load_config
from launch.init import write_config
from launch.planning import plan_run

Row = dict[str, Any]


def review(n: int) -> Row:
    return {"id": str(n), "title": f"Film {n}", "text": f"It was {n} times as good.", "sentiment": ["good", "bad", "so-so"][n % 3]}


def guessed(rows: list[Row]) -> Guess:
    return guess(rows, "rows.jsonl")


# Columns and metric


def test_a_choice_task_is_told_by_few_labels() -> None:
    found = guessed([review(n) for n in range(60)])
    assert (found.inputs, found.label, found.metric) == (["title", "text"], "sentiment", "choice")
    assert found.choices == ["bad", "good", "so-so"]
    assert found.left_out == ("id",)
    assert found.template == "title: {title}\ntext: {text}"
    assert found.why == "3 different labels in 60 rows"


def test_flags_and_stars_are_choices_and_amounts_are_numbers() -> None:
    stars = guessed([{"text": f"t {n}", "stars": n % 5 + 1} for n in range(60)])
    assert (stars.metric, stars.choices) == ("choice", ["1", "2", "3", "4", "5"])
    amounts = guessed([{"question": f"t {n}", "answer": f"{n}.5", "solution": f"half more than {n}"} for n in range(60)])
    assert (amounts.metric, amounts.choices, amounts.rationale) == ("number", None, "solution")
    assert amounts.template == "{question}"


def test_many_different_texts_are_free_text() -> None:
    found = guessed([{"English": f"word {n}", "German": f"Wort {n}"} for n in range(60)])
    assert (found.inputs, found.label, found.metric) == (["English"], "German", "text")
    long = guessed([{"text": str(n), "label": "a sentence that is much too long to be a class " * (n % 2 + 1)} for n in range(60)])
    assert long.metric == "text"
    few = guessed([{"text": str(n), "label": f"class {n % 20}"} for n in range(60)])
    assert few.metric == "text", "three rows a class teach no class"


@pytest.mark.parametrize("listed", [["x", "y"], "x | y", '["x", "y"]'])
def test_a_column_that_lists_choices_is_found(listed: Any) -> None:
    found = guessed([{"question": f"q {n}", "options": listed, "answer": "xy"[n % 2]} for n in range(20)])
    assert (found.choices, found.metric, found.inputs) == ("options", "choice", ["question", "options"])


def test_columns_that_miss_values_are_nested_or_cannot_be_named_are_left_out() -> None:
    rows = [{"text": f"t {n}", "label": n * 7, "note": "" if n % 2 else "x", "meta": {"a": 1}, "price ($)": 1} for n in range(50)]
    found = guessed(rows)
    assert (found.inputs, found.left_out) == (["text"], ("note", "meta", "price ($)"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows.jsonl has no row that can be read: an input and a label are needed, two columns with a header that names them"),
        (
            [{"text": "a"}] * 9,
            "rows.jsonl has the columns text: an input and a label are needed, two columns with a header that names them",
        ),
        (
            [{"1st": "a", "2nd": "b"}] * 9,
            "rows.jsonl has the columns 1st, 2nd: an input and a label are needed, two columns with a header "
            "that names them; '1st' cannot be used: a field's name has letters, digits, spaces, dashes and underscores, and begins with",
        ),
        ([{"id": n, "text": f"a {n}"} for n in range(9)], "rows.jsonl has the columns id, text, of which none can be the label"),
        ([{"text": f"a {n}", "label": "x"} for n in range(9)], "the label is the same in all rows (x): there is nothing to learn"),
    ],
)
def test_what_cannot_be_guessed_is_said(rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        guessed(rows)
    assert str(caught.value).startswith(message)


def test_a_label_that_some_rows_miss_is_the_label_and_they_may_be_rejected() -> None:
    rows = [{"text": f"t {n}", "label": "" if n % 10 == 0 else ["a", "b"][n % 2], "source": "web"} for n in range(100)]
    path, _ = written("rows.csv", rows)
    task = load_config(path).task
    assert (task.label, task.max_rejected, task.choices) == ("{label}", 0.11, ["a", "b"])


# Tables


def table(folder: Path, text: str, name: str = "rows.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'a,b\n"x, ""y""",1\n'),
        ("a.csv", '\ufeffa;b\r\n"x, ""y""";1\r\n'),
        ("a.csv", 'a\tb\n"x, ""y"""\t1'),
        ("a.tsv", 'a\t b \n"x, ""y"""\t1\n\n'),
    ],
)
def test_tables_are_read_whatever_separates_their_cells(name: str, text: str, tmp_path: Path) -> None:
    [row] = table_rows("FILE", table(tmp_path, text, name))
    assert (row.line, row.values) == (2, {"a": 'x, "y"', "b": "1"})


def test_a_row_of_another_length_is_told_with_its_line(tmp_path: Path) -> None:
    rows = list(table_rows("FILE", table(tmp_path, 'a,b\n"two\nlines",1\nx\n')))
    assert [(row.line, row.problem) for row in rows] == [(3, ""), (4, "has 1 cells, the header 2")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header: its first line must name the columns"),
        ("a,,c\n1,2,3\n", "column 2 has no name in the header: name it, or delete the column"),
        ("a,a\n1,2\n", "the header names 'a' 2 times: give each column a name of its own"),
        ('a,b\n"x"y,1\n', "line 2: ',' expected after '\"': mend the quotes there"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        list(table_rows("task.train", table(tmp_path, text)))
    assert str(caught.value).startswith(f"task.train: {tmp_path / 'rows.csv'}")
    assert message in str(caught.value)


def test_a_table_of_another_encoding_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("a,b\nstraße,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 0xdf\): save it as UTF-8"):
        list(table_rows("FILE", tmp_path / "rows.csv"))


# The configuration


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(file: str, rows: list[Row], out: Path | None = None) -> tuple[Path, str]:
    """Writes the rows to a file and a configuration for it; what it told."""
    if file.endswith(".csv"):
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        Path(file).write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines))
    else:
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(file=io.StringIO(), width=200)
    path = write_config(file, out, console)
    assert isinstance(console.file, io.StringIO)
    return path, console.file.getvalue()


KINDS: dict[str, tuple[str, list[Row]]] = {
    "choice": ("film reviews.csv", [review(n) for n in range(60)]),
    "number": ("sums.jsonl", [{"question": f"{n} + 1?", "explanation": f"{n} + 1 is {n + 1}.", "answer": n + 1} for n in range(60)]),
    "text": ("words.csv", [{"English": f"word {n}", "German": f"Wort {n}"} for n in range(60)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_loads_plans_and_reads_its_rows(kind: str, tmp_path: Path) -> None:
    path, told = written(*KINDS[kind])
    config = load_config(path)
    assert config.task.metric == kind
    made = prepare(config.task, seed=0, folder=tmp_path / "task")
    assert (sum(made.rows.values()), made.rows["test"], made.leaked) == (60, 12, 0)
    assert plan_run(config, gpu=None, gpus=None, params=None) is not None
    assert f"stepdown run {path}" in told and f"compared as {kind}" in told
    example = read_task(tmp_path / "task").train[0]
    assert example.choices == (("bad", "good", "so-so") if kind == "choice" else ())


def test_a_file_of_test_rows_beside_it_is_used() -> None:
    for split in ("test", "dev"):
        Path(f"my_{split}.jsonl").write_text(json.dumps(review(1)) + "\n")
    path, _ = written("my_train.jsonl", [review(n) for n in range(60)])
    task = load_config(path).task
    assert (task.test, task.validation, task.test_fraction) == ("my_test.jsonl", "my_dev.jsonl", None)


def test_names_and_labels_that_yaml_would_take_for_something_else_stay_text() -> None:
    rows = [{"text": f'say "{n}": # {{x}} \\', "label": ["no", "1e3", "null: #"][n % 3]} for n in range(60)]
    path, _ = written("shared.jsonl", rows)
    config = load_config(path)
    assert config.task.choices == ["1e3", "no", "null: #"]
    assert config.name == "my-task", "shared is the folder that runs share"


def test_a_configuration_that_is_there_is_kept() -> None:
    path, _ = written("rows.jsonl", [review(n) for n in range(60)])
    with pytest.raises(ValueError, match=r"rows\.yaml is there already: give another file with --out, or delete it"):
        write_config("rows.jsonl", None, Console(file=io.StringIO()))
    assert written("rows.jsonl", [review(n) for n in range(60)], Path("deep/other.yaml"))[0] == Path("deep/other.yaml")
    assert path.is_file()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("gone.csv", "FILE: {here}/gone.csv does not exist"),
        ("hub:owner/name", "FILE is hub:owner/name: give a file (.jsonl, .jsonl.gz, .jsonl.xz, .parquet, .csv, .tsv)"),
        ("rows.xlsx", "FILE: rows.xlsx is not a kind that is read; give a file (.jsonl, .jsonl.gz, .jsonl.xz, .parquet, .csv, .tsv)"),
    ],
)
def test_a_file_that_cannot_be_used_is_told(file: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        write_config(file, None, Console(file=io.StringIO()))
    assert str(caught.value).startswith(message.format(here=tmp_path))


# Keys of the task that it writes


def test_a_share_of_the_rows_is_the_test_split_and_no_input_is_in_two(tmp_path: Path) -> None:
    rows = [{"text": f"t {n % 50}", "label": ["a", "b"][n % 2]} for n in range(100)]
    path, _ = written("rows.jsonl", rows)
    made = prepare(load_config(path).task, seed=0, folder=tmp_path / "task")
    task = read_task(tmp_path / "task")
    inputs = [{example.input for example in split} for split in (task.train, task.validation, task.test)]
    assert made.rows == {"train": 72, "validation": 8, "test": 20}
    assert not inputs[0] & inputs[1] and not inputs[0] & inputs[2] and not inputs[1] & inputs[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test": "a.jsonl", "test_fraction": 0.2}, "test and test_fraction both say where the test rows come from"),
        ({}, "neither test nor test_fraction says where the test rows come from"),
        (
            {"train": "builtin:arithmetic", "test_fraction": 0.2},
            "test_fraction is for a file or a data set: write test: builtin:arithmetic",
        ),
        ({"test": "a.jsonl", "metric": "choice", "choices": ["x", "x"]}, "choices is ['x', 'x']: list 2 to 26 different ones"),
        ({"test": "a.jsonl", "metric": "choice", "choices": ["x", " "]}, "choices is ['x', ' ']: list 2 to 26 different ones"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(values: Row, message: str) -> None:
    from data.config import TaskConfig

    with pytest.raises(ValueError) as caught:
        TaskConfig.model_validate({"train": "b.jsonl", "metric": "text", **values})
    assert message in str(caught.value)


def test_choices_of_all_rows_stand_in_the_template_and_in_no_field(tmp_path: Path) -> None:
    rows = [{"text": f"t {n}", "label": "yes"} for n in range(9)]
    path, _ = written("rows.jsonl", [*rows, {"text": "u", "label": "no"}])
    config = load_config(path, ["task.metric=choice", 'task.choices=["yes", "no"]', 'task.input="{text} {choices}"'])
    prepare(config.task, seed=0, folder=tmp_path / "task")
    assert read_task(tmp_path / "task").train[0].input.endswith(" (a) yes\n(b) no")
    Path("rows.jsonl").write_text(json.dumps({"text": "t", "label": "yes", "choices": ["x", "y"]}) + "\n")
    with pytest.raises(ValueError, match=r"has a field 'choices' of its own, but task\.choices lists the choices of all rows"):
        prepare(config.task, seed=0, folder=tmp_path / "task")
