"""Tasks from every kind of source, and every message that a user's mistake brings up."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.arithmetic import generate
from data.config import ArithmeticConfig, TaskConfig
from data.tasks import RowError, check_template, fingerprint, prepare, read_task, render

Row = dict[str, Any]


def _rows(count: int, offset: int = 0) -> list[Row]:
    return [{"input": f"What is {i} + 1?", "label": str(i + 1)} for i in range(offset, offset + count)]


def _jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _config(folder: Path, train: list[Row] | bytes | None = None, test: list[Row] | bytes | None = None, **values: Any) -> TaskConfig:
    """A task over two files in `folder`; lists of rows or a file's bytes."""
    contents = {"train": _rows(20) if train is None else train, "test": _rows(5, offset=100) if test is None else test}
    for split, content in contents.items():
        (folder / f"{split}.in.jsonl").write_bytes(content if isinstance(content, bytes) else _jsonl(content))
    files = {split: str(folder / f"{split}.in.jsonl") for split in contents}
    return TaskConfig.model_validate({**files, "metric": "number", **values})


def _rejected(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def _message(config: TaskConfig, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        prepare(config, seed=0, folder=folder)
    return str(caught.value)


def _reason(folder: Path, row: Row | bytes, **values: Any) -> str:
    """Why one row among good ones is rejected."""
    line = row if isinstance(row, bytes) else _jsonl([row])
    prepare(_config(folder, train=_jsonl(_rows(3)) + line, max_rejected=1.0, **values), seed=0, folder=folder)
    (rejection,) = _rejected(folder)
    assert (rejection["split"], rejection["line"]) == ("train", 4)
    return str(rejection["reason"])


# --- templates


def test_a_template_is_filled_from_the_row() -> None:
    row = {"q": "2 + 2", "n": 4, "options": ["three", 4], "tags": ["a", "b"]}
    assert render("Q: {q} = {n}?", row) == "Q: 2 + 2 = 4?"
    assert render("{q}\n{options}", row, choices_field="options") == "2 + 2\n(a) three\n(b) 4"
    assert render("{options} {tags}", row, choices_field=None) == "['three', 4] ['a', 'b']"
    assert render("{{q}} {{{q}}}", row) == "{q} {2 + 2}"


def test_a_value_with_braces_is_not_a_template() -> None:
    assert render("{a}{b}", {"a": "{b}", "b": "{a}"}) == "{b}{a}"


@given(st.text())
@settings(deadline=None)
def test_escaped_text_renders_as_itself(text: str) -> None:
    assert render(text.replace("{", "{{").replace("}", "}}"), {}) == text


@given(
    st.lists(st.sampled_from(["{a}", "{b_2}", "{{", "}}", "x: ", "\n", "é"])),
    st.fixed_dictionaries({"a": st.text(), "b_2": st.integers()}),
)
@settings(deadline=None)
def test_plain_templates_agree_with_str_format(pieces: list[str], row: Row) -> None:
    template = "".join(pieces)
    assert render(template, row) == template.format(**row)


@pytest.mark.parametrize("template", ["{a.b}", "{0}", "{}", "{a[0]}", "{a!r}", "{a:>3}", "{ a}", "{__class__.x}"])
def test_only_plain_field_names_are_read(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"^task.input: .* but only \{field\} with a plain field name is read: no dots, indices or formats$"
    ):
        check_template(template, "task.input")


@pytest.mark.parametrize(
    ("template", "brace", "position"), [("a {b", "{", 3), ("b}", "}", 2), ("{{a}", "}", 4), ("{a}}", "}", 4), ("{a{b}", "{", 1)]
)
def test_a_single_brace_is_pointed_at(template: str, brace: str, position: int) -> None:
    with pytest.raises(ValueError) as caught:
        check_template(template, "teacher.label")
    assert (
        str(caught.value) == f"teacher.label: {template!r} has a single {brace!r} at character {position}; write {brace * 2!r} for a brace"
    )


@pytest.mark.parametrize("key", ["input", "label", "rationale"])
def test_a_malformed_template_stops_before_any_data_is_read(key: str, tmp_path: Path) -> None:
    config = TaskConfig.model_validate({"train": "no/such.jsonl", "test": "no/such.jsonl", "metric": "number", key: "{x"})
    assert _message(config, tmp_path / "out").startswith(f"task.{key}: '{{x' has a single '{{'")
    assert not (tmp_path / "out").exists()


def test_render_says_which_field_is_missing_or_null() -> None:
    with pytest.raises(RowError, match=r"^no field 'question' \(has: input, label\)$"):
        render("{question}", {"input": "a", "label": "b"})
    with pytest.raises(RowError, match=r"^field 'input' is null$"):
        render("{input}", {"input": None})


# --- sources


def _write_as(path: Path, rows: list[Row]) -> None:
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(_jsonl(rows)))
    else:
        path.write_bytes(lzma.compress(_jsonl(rows)) if path.name.endswith(".xz") else _jsonl(rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet"])
def test_the_same_rows_give_the_same_task_from_any_file(suffix: str, tmp_path: Path) -> None:
    reference = prepare(_config(tmp_path), seed=3, folder=tmp_path / "reference")
    _write_as(tmp_path / f"rows{suffix}", [dict(reversed(row.items())) for row in _rows(20)])
    config = _config(tmp_path, train=b"").model_copy(update={"train": str(tmp_path / f"rows{suffix}")})
    assert prepare(config, seed=3, folder=tmp_path / "out") == reference
    assert read_task(tmp_path / "out") == read_task(tmp_path / "reference")


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name" / "data").mkdir(parents=True)  # `datasets` prefers a folder of that name to the hub
    for split, rows in (("train", _rows(20)), ("validation", _rows(4, 50)), ("extra", _rows(5, 100))):
        (tmp_path / "owner" / "name" / "data" / f"{split}.jsonl").write_bytes(_jsonl(rows))
    (tmp_path / "owner" / "name" / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  default: true\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: data/{split}.jsonl\n" for split in ("train", "validation", "extra"))
        + "- config_name: other\n  data_files:\n  - split: validation\n    path: data/extra.jsonl\n"
        + "---\n"
    )
    monkeypatch.chdir(tmp_path)
    values = {"train": "hub:owner/name", "validation": "hub:owner/name:other", "test": "hub:owner/name:plain@extra", "metric": "number"}
    summary = prepare(TaskConfig.model_validate(values), seed=0, folder=tmp_path / "out")
    assert summary.rows == {"train": 20, "validation": 5, "test": 5}
    assert [e.fields for e in read_task(tmp_path / "out").test] == _rows(5, 100)
    with pytest.raises(
        RuntimeError, match=r"^task.test: hub:owner/name@nosuch cannot be loaded \(.*check its name, configuration and split \(nosuch\)"
    ):
        prepare(TaskConfig.model_validate({**values, "test": "hub:owner/name@nosuch"}), seed=0, folder=tmp_path / "out")


def test_classes_and_choices_of_a_hub_data_set_are_read_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    pair = datasets.Features({"input": datasets.Value("string"), "label": datasets.ClassLabel(names=["entailment", "neutral"])})
    options = datasets.Features({"text": datasets.List(datasets.Value("string")), "label": datasets.List(datasets.Value("string"))})
    asked = datasets.Features({"input": datasets.Value("string"), "key": datasets.Value("string"), "choices": options})
    texts = {"text": ["park", "zoo"], "label": ["A", "B"]}
    for name, features, rows in (
        ("pairs", pair, [{"input": str(n), "label": n % 2} for n in range(4)] + [{"input": "unlabelled", "label": -1}]),
        ("asked", asked, [{"input": "Where?", "key": "B", "choices": texts}] * 4),
    ):
        (tmp_path / "owner" / name).mkdir(parents=True)
        for split in ("train_r1", "train_r2", "test"):
            datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "owner" / name / f"{split}.parquet")
        splits = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in ("train_r1", "train_r2", "test"))
        (tmp_path / "owner" / name / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    values = {"train": "hub:owner/pairs@train_r1+train_r2", "test": "hub:owner/pairs", "metric": "choice", "max_rejected": 0.2}
    summary = prepare(TaskConfig.model_validate({**values, "choices": ["entailment", "neutral"]}), seed=0, folder=tmp_path / "out")
    assert (summary.rows["test"], summary.rejected) == (4, {"train": 2, "validation": 0, "test": 1})
    assert [(e.input, e.label) for e in read_task(tmp_path / "out").test] == [(str(n), ("entailment", "neutral")[n % 2]) for n in range(4)]
    assert "field 'label' is null" in (tmp_path / "out" / "rejected.jsonl").read_text()
    sources = {"train": "hub:owner/asked@train_r1", "validation": "hub:owner/asked@train_r2", "test": "hub:owner/asked"}
    lettered = {"metric": "choice", "choices": "choices", "input": "{input}\n{choices}", "label": "({key})"}
    prepare(TaskConfig.model_validate({**sources, **lettered}), seed=0, folder=tmp_path / "asked")
    first = read_task(tmp_path / "asked").test[0]
    assert (first.input, first.label, first.choices) == ("Where?\n(a) park\n(b) zoo", "zoo", ("park", "zoo"))


def test_a_hub_that_cannot_be_reached_is_told_without_its_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    client = logging.getLogger("huggingface_hub.utils._http")

    def unreachable(*_: Any, **__: Any) -> None:
        client.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    before = logging.getLogger("huggingface_hub").level
    expected = (
        "task.train: hub:owner/name cannot be loaded (ConnectionError: Couldn't reach 'owner/name' on the Hub); check its name, "
        "configuration and split (train), and the network"
    )
    with pytest.raises(RuntimeError, match=rf"\A{re.escape(expected)}\Z"):
        prepare(TaskConfig.model_validate({"train": "hub:owner/name", "test": "hub:owner/name", "metric": "text"}), seed=0, folder=tmp_path)
    assert caplog.messages == []
    assert logging.getLogger("huggingface_hub").level == before


def test_the_builtin_task_comes_from_its_generator(tmp_path: Path) -> None:
    knobs = {"train_rows": 30, "validation_rows": 6, "test_rows": 7}
    values = dict.fromkeys(("train", "validation", "test"), "builtin:arithmetic")
    config = TaskConfig.model_validate({**values, "metric": "number", "rationale": "{rationale}", "arithmetic": knobs})
    summary = prepare(config, seed=5, folder=tmp_path)
    assert summary.rows == {"train": 30, "validation": 6, "test": 7}
    expected = list(generate(ArithmeticConfig.model_validate(knobs), 5, "test"))
    assert [{"input": e.input, "label": e.label, "rationale": e.rationale} for e in read_task(tmp_path).test] == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "rows.xlsx",
            "task.test: rows.xlsx is not a kind that is read; give a file (.jsonl, .jsonl.gz, .jsonl.xz, .parquet, .csv, .tsv), hub:",
        ),
        ("builtin:poetry", "task.test: builtin:poetry is not known; the built-in task is builtin:arithmetic"),
        ("hub:a/b/c", "task.test: hub:a/b/c is not a hub data set; write hub:OWNER/NAME[:CONFIG][@SPLIT]"),
        ("hub:", "task.test: hub: is not a hub data set"),
    ],
)
def test_an_unknown_kind_of_source_names_the_known_ones(source: str, message: str, tmp_path: Path) -> None:
    assert _message(_config(tmp_path).model_copy(update={"test": source}), tmp_path).startswith(message)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_file_is_named_with_its_key(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config(tmp_path).model_copy(update={split: "gone.jsonl"})
    message = f"task.{split}: {tmp_path / 'gone.jsonl'} does not exist; give the path of a file, absolute or from the current directory"
    assert _message(config, tmp_path / "out") == message
    with pytest.raises(ValueError) as caught:
        fingerprint(config, 0)
    assert str(caught.value) == message


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    config = _config(tmp_path).model_copy(update={"train": str(tmp_path / "rows.jsonl")})
    assert "rows.jsonl is not a file; give the path of a file" in _message(config, tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.xz", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_named(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    _write_as(path, _rows(200))
    path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else b"not what the suffix says, at all")
    config = _config(tmp_path).model_copy(update={"train": str(path)})
    with pytest.raises(RuntimeError) as caught:
        prepare(config, seed=0, folder=tmp_path / "out")
    assert str(caught.value).startswith(f"task.train: {path} is damaged or cut short (")
    assert str(caught.value).endswith("); copy or download it again")


def test_damage_inside_a_file_is_named(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(_jsonl(_rows(200))))
    packed[40:80] = b"\xff" * 40
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    pq.write_table(pa.table({"input": pa.array([b"\xff"]).view(pa.string()), "label": ["1"]}), tmp_path / "rows.parquet")
    for name in ("rows.jsonl.gz", "rows.parquet"):
        config = _config(tmp_path).model_copy(update={"test": str(tmp_path / name)})
        with pytest.raises(RuntimeError, match=rf"^task.test: .*{name} is damaged or cut short \("):
            prepare(config, seed=0, folder=tmp_path / "out")


# --- rows that do not fit


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"input": "a", "label": \n', "is not JSON: Expecting value at column 25"),
        (b"[1, 2]\n", "is a list, not a JSON object"),
        (b"null\n", "is null, not a JSON object"),
        (b'{"input": "\xff", "label": "1"}\n', "is not UTF-8: byte 0xff at byte 12"),
        (b"[" * 100_000 + b"\n", "is not JSON that can be read: "),
        (b'{"input": "a", "label": ' + b"9" * 5000 + b"}\n", "is not JSON that can be read: "),
        (b'{"input": "\\ud800", "label": "1"}\n', "holds half a surrogate pair, which is no text"),
    ],
)
def test_a_line_that_is_no_row_is_rejected(line: bytes, reason: str, tmp_path: Path) -> None:
    assert _reason(tmp_path, line).startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": "1"}, "no field 'input' (has: label)"),
        ({"input": None, "label": "1"}, "field 'input' is null"),
        ({"input": "a", "label": None}, "field 'label' is null"),
        ({"input": " \n", "label": "1"}, "input is empty"),
        ({"input": "a", "label": ""}, "label is empty"),
        ({"input": "a", "label": "many"}, "label 'many' is not a number"),
    ],
)
def test_a_row_that_lacks_something_is_rejected(row: Row, reason: str, tmp_path: Path) -> None:
    assert _reason(tmp_path, row) == reason


def test_an_expression_label_must_evaluate(tmp_path: Path) -> None:
    assert _reason(tmp_path, {"input": "a", "label": "( 1.0 / 0.0 )"}, metric="expression") == "label '( 1.0 / 0.0 )' does not evaluate"
    assert _reason(tmp_path, {"input": "a", "label": "(" * 200}, metric="expression") == f"label '{'(' * 77}...' does not evaluate"


CHOICE_ROW = {"input": "Where?", "label": "park", "choices": ["park", "zoo"]}
OTHER_CHOICES: dict[str, Any] = {"metric": "choice", "choices": "choices", "input": "{input}\n{choices}"}


def _choice_task(folder: Path, *rows: Row) -> TaskConfig:
    good = [{**CHOICE_ROW, "input": f"Where {i}?"} for i in range(3)]
    return _config(folder, train=[*good, *rows], test=[CHOICE_ROW], max_rejected=1.0, **OTHER_CHOICES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "moon"}, "label 'moon' is not one of the choices: park, zoo"),
        ({"choices": ["park"]}, "field 'choices' holds fewer than 2 different choices: ['park']"),
        ({"choices": ["park", "park"]}, "field 'choices' holds fewer than 2 different choices: ['park', 'park']"),
        ({"choices": "park, zoo"}, "field 'choices' is not a list of choices: park, zoo"),
        ({"choices": ["park", ""]}, "field 'choices' holds a choice that is empty or no text: ['park', '']"),
        ({"choices": ["park", None]}, "field 'choices' holds a choice that is empty or no text: ['park', None]"),
        ({"choices": [f"c{i}" for i in range(27)]}, "field 'choices' holds 27 choices; at most 26 can be lettered"),
    ],
)
def test_a_choice_row_must_have_its_label_among_the_choices(change: Row, reason: str, tmp_path: Path) -> None:
    prepare(_choice_task(tmp_path, {**CHOICE_ROW, **change}), seed=0, folder=tmp_path)
    assert [(r["line"], r["reason"]) for r in _rejected(tmp_path)] == [(4, reason)]


def test_choices_are_lettered_in_the_input_and_the_label_is_written_as_its_choice(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"input": "A", "label": " PARK", "choices": ["park", "park", "zoo"]},
        {"input": "B", "label": "(b)", "choices": [1, 2]},
    ]
    prepare(_choice_task(tmp_path, *rows), seed=0, folder=tmp_path)
    task = read_task(tmp_path)
    examples = {e.fields["input"]: e for e in task.train + task.validation}
    assert (examples["A"].input, examples["A"].label, examples["A"].choices) == (
        "A\n(a) park\n(b) park\n(c) zoo",
        "park",
        ("park", "park", "zoo"),
    )
    assert (examples["B"].label, examples["B"].choices) == ("2", ("1", "2"))


def test_blank_lines_are_not_rows_and_line_numbers_are_the_files(tmp_path: Path) -> None:
    train = b"\xef\xbb\xbf" + _jsonl(_rows(2)) + b"\n  \r\n" + b"{broken}\n" + _jsonl(_rows(3, 50)).rstrip(b"\n")
    summary = prepare(_config(tmp_path, train=train, max_rejected=0.2), seed=0, folder=tmp_path)
    assert summary.rows["train"] + summary.rows["validation"] == 5
    assert summary.rejected == {"train": 1, "validation": 0, "test": 0}
    assert _rejected(tmp_path) == [
        {
            "split": "train",
            "source": str(tmp_path / "train.in.jsonl"),
            "line": 5,
            "reason": "is not JSON: Expecting property name enclosed in double quotes at column 2",
            "row": "{broken}",
        }
    ]


def test_a_rejected_row_is_kept_cut_to_500_characters(tmp_path: Path) -> None:
    assert _reason(tmp_path, {"input": "x" * 2000}) == "no field 'label' (has: input)"
    (rejection,) = _rejected(tmp_path)
    assert rejection["row"] == '{"input": "' + "x" * 489


def test_a_rejected_parquet_row_has_its_number_and_content(tmp_path: Path) -> None:
    _write_as(tmp_path / "rows.parquet", [*_rows(3), {"input": None, "label": "4"}])
    config = _config(tmp_path, max_rejected=0.25).model_copy(update={"train": str(tmp_path / "rows.parquet")})
    prepare(config, seed=0, folder=tmp_path)
    (rejection,) = _rejected(tmp_path)
    assert (rejection["line"], rejection["reason"], rejection["row"]) == (4, "field 'input' is null", '{"input": null, "label": "4"}')


def test_too_many_rejected_rows_stop_the_run_with_the_first_reasons(tmp_path: Path) -> None:
    bad: list[Row] = [{"input": "a"}, {"label": "b"}, {"input": "a", "label": "x"}, {"input": "c"}]
    config = _config(tmp_path, train=bad[:2] + _rows(12) + bad[2:], max_rejected=0.2)
    assert _message(config, tmp_path) == (
        f"task.train: 4 of 16 rows of {tmp_path / 'train.in.jsonl'} are rejected (25.00%), more than task.max_rejected (20.00%): "
        "line 1: no field 'label' (has: input); line 2: no field 'input' (has: label); line 15: label 'x' is not a number. "
        f"All of them are in {tmp_path / 'rejected.jsonl'}: fix the rows or raise task.max_rejected"
    )
    assert [r["line"] for r in _rejected(tmp_path)] == [1, 2, 15, 16]


def test_the_bound_itself_is_allowed(tmp_path: Path) -> None:
    config = _config(tmp_path, test=[*_rows(3, 100), {"input": "a"}], max_rejected=0.25)
    assert prepare(config, seed=0, folder=tmp_path).rejected["test"] == 1
    assert "task.test: 1 of 4 rows" in _message(config.model_copy(update={"max_rejected": 0.24}), tmp_path)


@pytest.mark.parametrize(
    ("content", "counts"), [(b"", "0 read, 0 rejected"), (b"\n\n", "0 read, 0 rejected"), (b"{}\n", "1 read, 1 rejected")]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_data_set_stops_the_run(split: str, content: bytes, counts: str, tmp_path: Path) -> None:
    config = _config(tmp_path, max_rejected=1.0, **{split: content})
    path = tmp_path / f"{split}.in.jsonl"
    assert _message(config, tmp_path) == f"task.{split}: {path} holds no usable row ({counts}); give a source with rows that fit"


# --- examples


def test_ids_are_the_hash_of_the_content_and_repeats_are_numbered(tmp_path: Path) -> None:
    test = [
        {"input": "a", "label": "1"},
        {"input": "b", "label": "1"},
        {"input": "a", "label": "1", "note": "again"},
        {"input": "a", "label": "1"},
    ]
    prepare(_config(tmp_path, test=test), seed=0, folder=tmp_path)
    first = hashlib.sha256(b'["a", "1", []]').hexdigest()[:16]
    second = hashlib.sha256(b'["b", "1", []]').hexdigest()[:16]
    assert [e.id for e in read_task(tmp_path).test] == [first, second, f"{first}-2", f"{first}-3"]


def test_a_human_rationale_may_be_null_but_not_missing(tmp_path: Path) -> None:
    test: list[Row] = [
        {"input": "a", "label": "1", "why": " because "},
        {"input": "b", "label": "1", "why": None},
        {"input": "c", "label": "1", "why": ""},
    ]
    train = [{**row, "why": "x"} for row in _rows(5)]
    prepare(
        _config(tmp_path, train=train, test=[*test, {"input": "d", "label": "1"}], rationale="{why}", max_rejected=0.25),
        seed=0,
        folder=tmp_path,
    )
    assert [e.rationale for e in read_task(tmp_path).test] == ["because", None, None]
    assert _rejected(tmp_path)[0]["reason"] == "no field 'why' (has: input, label)"


def test_values_that_json_lacks_are_kept_as_text(tmp_path: Path) -> None:
    from datetime import date

    _write_as(tmp_path / "rows.parquet", [{**row, "day": date(2024, 2, 29)} for row in _rows(3)])
    config = _config(tmp_path).model_copy(
        update={"test": str(tmp_path / "rows.parquet"), "input": "{input}", "train": str(tmp_path / "rows.parquet")}
    )
    prepare(config, seed=0, folder=tmp_path)
    assert read_task(tmp_path).test[0].fields["day"] == "2024-02-29"


# --- splits


def test_validation_is_set_aside_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = _rows(50)
    shuffled = random.Random(0).sample(rows, len(rows))
    chosen = []
    for train in (rows, shuffled):
        prepare(_config(tmp_path, train=train, validation_fraction=0.2), seed=1, folder=tmp_path)
        task = read_task(tmp_path)
        assert [e.fields for e in task.train] == [row for row in train if row not in [e.fields for e in task.validation]]
        chosen.append({e.id for e in task.validation})
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 10
    prepare(_config(tmp_path, train=rows, validation_fraction=0.2), seed=2, folder=tmp_path)
    assert {e.id for e in read_task(tmp_path).validation} != chosen[0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=30).filter(lambda n: len(set(n)) > 1), st.integers(0, 5))
def test_no_validation_input_is_trained_on(tmp_path_factory: pytest.TempPathFactory, inputs: list[int], seed: int) -> None:
    folder = tmp_path_factory.mktemp("task")
    train = [{"input": f"q{n}", "label": str(i % 2)} for i, n in enumerate(inputs)]
    prepare(_config(folder, train=train, validation_fraction=0.01), seed=seed, folder=folder)
    task = read_task(folder)
    assert len({e.input for e in task.validation}) == 1
    assert not {e.input for e in task.train} & {e.input for e in task.validation}
    assert len({e.id for e in task.train + task.validation}) == len(train)


@pytest.mark.parametrize(("rows", "fraction"), [(1, 0.1), (3, 0.99)])
def test_validation_must_leave_something_to_train_on(rows: int, fraction: float, tmp_path: Path) -> None:
    config = _config(tmp_path, train=_rows(rows), validation_fraction=fraction)
    assert _message(config, tmp_path) == (
        f"task.validation_fraction is {fraction}: of {rows} training rows ({rows} different inputs) none would be left to train on; "
        "give more rows, a smaller fraction or task.validation"
    )


def test_max_rows_cuts_train_after_validation_was_set_aside(tmp_path: Path) -> None:
    prepare(_config(tmp_path), seed=0, folder=tmp_path / "all")
    summary = prepare(_config(tmp_path, max_rows=7), seed=0, folder=tmp_path / "cut")
    whole, cut = read_task(tmp_path / "all"), read_task(tmp_path / "cut")
    assert cut.validation == whole.validation
    assert cut.train == whole.train[:7]
    assert summary.rows == {"train": 7, "validation": 2, "test": 5}


def test_training_rows_with_a_test_input_are_counted_and_kept(tmp_path: Path) -> None:
    train = [*_rows(10), {"input": "What is 100 + 1?", "label": "0"}, {"input": "what is 101 + 1?", "label": "0"}]
    config = _config(tmp_path, train=train)
    (tmp_path / "own.jsonl").write_bytes(_jsonl(_rows(2, 200)))
    summary = prepare(config.model_copy(update={"validation": str(tmp_path / "own.jsonl")}), seed=0, folder=tmp_path)
    assert summary.leaked == 1
    assert summary.rows == {"train": 12, "validation": 2, "test": 5}


def test_the_digest_is_that_of_the_examples(tmp_path: Path) -> None:
    first = prepare(_config(tmp_path), seed=0, folder=tmp_path / "a").digest
    assert prepare(_config(tmp_path, max_rejected=0.5), seed=0, folder=tmp_path / "b").digest == first
    assert prepare(_config(tmp_path, input="{input}!"), seed=0, folder=tmp_path / "b").digest != first
    assert len(first) == 64


def test_an_unprepared_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"has no train.jsonl: the task is not prepared; run it first$"):
        read_task(tmp_path)


# --- fingerprint


def test_the_fingerprint_follows_what_decides_the_examples(tmp_path: Path) -> None:
    config = _config(tmp_path)
    first = fingerprint(config, 0)
    assert len(first) == 64
    assert fingerprint(_config(tmp_path), 0) == first
    assert fingerprint(_config(tmp_path, max_rejected=0.5), 0) == first
    assert fingerprint(config, 1) != first
    assert fingerprint(_config(tmp_path, label="{label}0"), 0) != first
    assert fingerprint(_config(tmp_path, train=_rows(21)), 0) != first


def test_the_fingerprint_follows_content_not_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = _config(tmp_path / "here"), _config(tmp_path / "there")
    assert fingerprint(here, 0) == fingerprint(there, 0)
    monkeypatch.chdir(tmp_path / "here")
    assert fingerprint(here.model_copy(update={"train": "train.in.jsonl"}), 0) == fingerprint(here, 0)
    assert fingerprint(here.model_copy(update={"train": here.test, "test": here.train}), 0) != fingerprint(here, 0)


def test_the_fingerprint_of_hub_and_builtin_is_their_name(tmp_path: Path) -> None:
    values = {"train": "builtin:arithmetic", "test": "hub:owner/name", "metric": "number"}
    first = fingerprint(TaskConfig.model_validate(values), 0)
    assert fingerprint(TaskConfig.model_validate({**values, "test": "hub:owner/name@extra"}), 0) != first
    assert fingerprint(TaskConfig.model_validate({**values, "arithmetic": {"max_number": 20}}), 0) != first
