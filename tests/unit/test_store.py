from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import store
from data.examples import TaskExample, read_examples, write_examples
from data.records import SCHEMA, TeacherRecord
from data.soft_labels import TopK
from data.store import check_complete, manifest, missing_chunks, read_records, shard_path, write_shard

RANDOM = np.random.default_rng(0)


def soft(tokens: int, k: int = 5) -> TopK:
    log_probs = -np.sort(RANDOM.exponential(9.0, (tokens, k)).astype(np.float32))
    return TopK(RANDOM.integers(0, 2**31 - 1, (tokens, k), dtype=np.int32), log_probs, log_probs[:, 0].copy())


def record(n: int, split: str = "train") -> TeacherRecord:
    return TeacherRecord(
        id=f"id-{n}",
        split=split,
        text=f"größer\n{n} Answer: {n}",
        rationale=f"größer\n{n}",
        label=str(n) if n % 3 else None,
        parseable=bool(n % 3),
        agrees=n % 2 == 0,
        generated_tokens=n,
        label_soft=soft(2) if n % 2 else None,
        rationale_soft=soft(7) if n % 4 == 1 else None,
    )


RECORDS = [record(n) for n in range(11)]


def same(left: TeacherRecord, right: TeacherRecord) -> bool:
    names = [field.name for field in dataclasses.fields(TeacherRecord) if not field.name.endswith("_soft")]
    pairs = [(left.label_soft, right.label_soft), (left.rationale_soft, right.rationale_soft)]
    return all(getattr(left, name) == getattr(right, name) for name in names) and all(same_soft(a, b) for a, b in pairs)


def same_soft(left: TopK | None, right: TopK | None) -> bool:
    if left is None or right is None:
        return left is right
    names = ("ids", "log_probs", "target_log_probs")
    arrays = [(getattr(left, name), getattr(right, name)) for name in names]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in arrays)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK", 4)


def write_missing(folder: Path, *, processes: int, stop_after: int = 99) -> None:
    """What `processes` do together: each takes every n-th chunk that is missing."""
    missing = missing_chunks(folder, "train", len(RECORDS))
    for rank in range(processes):
        for chunk in missing[rank::processes][:stop_after]:
            write_shard(shard_path(folder, "train", chunk), RECORDS[chunk * 4 : chunk * 4 + 4])


def test_records_come_back_exactly(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, "train", 0), iter(RECORDS))
    found = read_records(tmp_path, "train")
    assert len(found) == len(RECORDS)
    assert all(same(a, b) for a, b in zip(found, RECORDS, strict=True))


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (3, 1), (1, 6), (40, 32)])
def test_soft_labels_come_back_bit_by_bit(tokens: int, k: int, tmp_path: Path) -> None:
    given = soft(tokens, k)
    given.log_probs[0, -1] = np.float32(1e-45)  # the smallest there is
    write_shard(shard_path(tmp_path, "train", 0), [dataclasses.replace(RECORDS[0], label_soft=given)])
    assert same_soft(read_records(tmp_path, "train")[0].label_soft, given)


def test_soft_labels_of_no_token_stay_soft_labels_of_no_token(tmp_path: Path) -> None:
    write_shard(shard_path(tmp_path, "train", 0), [dataclasses.replace(RECORDS[0], label_soft=soft(3).cut(0))])
    found = read_records(tmp_path, "train")[0].label_soft
    assert found is not None
    assert len(found) == 0


def test_soft_labels_are_cut_to_their_first_tokens() -> None:
    whole = soft(5)
    cut = whole.cut(2)
    assert (len(whole), len(cut), len(whole.cut(9))) == (5, 2, 5)
    assert same_soft(cut, TopK(whole.ids[:2], whole.log_probs[:2], whole.target_log_probs[:2]))


def test_soft_labels_of_differing_shapes_are_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        TopK(np.zeros((2, 3), np.int32), np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    with pytest.raises(AssertionError):
        TopK(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32), np.zeros(3, np.float32))


def test_chunks_count_up_to_a_short_last_one(tmp_path: Path) -> None:
    assert [missing_chunks(tmp_path, "train", n) for n in (0, 1, 4, 5, 11)] == [[], [0], [0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shards_do_not_depend_on_the_number_of_processes(processes: int, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder, number in ((alone, 1), (together, processes)):
        folder.mkdir()
        write_missing(folder, processes=number)
    assert manifest(alone) == manifest(together)
    assert [r.id for r in read_records(together, "train")] == [r.id for r in RECORDS]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_a_killed_store_goes_on_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    write_missing(tmp_path, processes=before, stop_after=1)
    assert len(missing_chunks(tmp_path, "train", len(RECORDS))) == 3 - before
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    write_missing(tmp_path, processes=after)
    assert {path: path.stat().st_mtime_ns for path in done} == done  # what is done is not written again
    check_complete(read_records(tmp_path, "train"), [r.id for r in RECORDS], tmp_path)


def test_a_file_that_a_killed_process_left_half_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table = pq.write_table

    def killed(table: pa.Table, path: Path, **arguments: str) -> None:
        write_table(table, path, **arguments)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            write_missing(tmp_path, processes=1)
    assert [path.name.startswith(".train-000000.parquet.") for path in tmp_path.iterdir()] == [True]
    assert missing_chunks(tmp_path, "train", len(RECORDS)) == [0, 1, 2]
    assert (read_records(tmp_path, "train"), manifest(tmp_path)) == ([], {"shards": []})
    write_missing(tmp_path, processes=1)
    check_complete(read_records(tmp_path, "train"), [r.id for r in RECORDS], tmp_path)
    assert len(manifest(tmp_path)["shards"]) == 3


def test_splits_lie_apart_also_in_a_folder_named_like_a_partition(tmp_path: Path) -> None:
    folder = tmp_path / "label=yes"
    folder.mkdir()
    write_shard(shard_path(folder, "train", 0), RECORDS[:2])
    write_shard(shard_path(folder, "test", 0), [record(5, "test")])
    assert [[(r.id, r.split) for r in read_records(folder, split)] for split in ("train", "test")] == [
        [("id-0", "train"), ("id-1", "train")],
        [("id-5", "test")],
    ]


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_truncated_shard_is_named_with_the_way_out(keep: int, tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 7)
    write_shard(path, RECORDS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match=r"train-000007\.parquet cannot be read \(.*\): delete it and run again; only its chunk is"):
        read_records(tmp_path, "train")


def test_a_shard_with_damaged_bytes_is_named(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, RECORDS)
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"train-000000\.parquet cannot be read"):
        read_records(tmp_path, "train")


def test_a_shard_with_other_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "answer": ["b"]}), shard_path(tmp_path, "train", 0))
    with pytest.raises(RuntimeError, match=r"has the columns \['id', 'answer'\], not \['id', 'split', .*another version wrote it; delete"):
        read_records(tmp_path, "train")


def test_the_schema_has_a_column_for_each_field_of_a_record() -> None:
    assert SCHEMA.names == [field.name for field in dataclasses.fields(TeacherRecord)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([0, 1], "2 records for 3 examples (1 missing, 0 of other examples)"),
        ([0, 1, 2, 2], "4 records for 3 examples (0 missing, 0 of other examples)"),
        ([0, 1, 9], "3 records for 3 examples (1 missing, 1 of other examples)"),
        ([0, 2, 1], "3 records for 3 examples (0 missing, 0 of other examples), or not in their order"),
    ],
)
def test_a_store_that_is_not_complete_is_told_apart(found: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        check_complete([RECORDS[n] for n in found], ["id-0", "id-1", "id-2"], tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: {message}")
    assert str(raised.value).endswith("or not in their order: delete the folder and run again")


def test_a_complete_store_passes_and_one_record_less_does_not(tmp_path: Path) -> None:
    ids = ["id-0", "id-1", "id-2"]
    check_complete(RECORDS[:3], ids, tmp_path)
    with pytest.raises(RuntimeError, match="1 missing"):
        check_complete(RECORDS[:2], ids, tmp_path)


def test_the_manifest_names_every_shard_with_its_hash(tmp_path: Path) -> None:
    write_missing(tmp_path, processes=1)
    paths = [shard_path(tmp_path, "train", n) for n in range(3)]
    assert manifest(tmp_path)["shards"] == [
        {"file": p.name, "bytes": len(p.read_bytes()), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths
    ]


def test_examples_come_back_from_their_file(tmp_path: Path) -> None:
    examples = [
        TaskExample("a", "größer?\nno", "x", ("x", "y"), "weil", {"n": 1, "list": [1.5, None], "é": {"deep": True}}),
        TaskExample("b", "line\u2028break", "2"),
    ]
    write_examples(tmp_path / "train.jsonl", examples)
    assert list(read_examples(tmp_path / "train.jsonl")) == examples
