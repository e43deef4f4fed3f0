from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import sealing, store
from data.examples import TaskExample, read_examples, write_examples
from data.packing import pack, unpack
from data.records import SCHEMA, TeacherRecord
from data.soft_labels import AnswerDistribution, SoftLabels, TopK
from data.store import STORE, check_complete, manifest, missing_chunks, read_records, shard_path, sweep, write_shard
from data.store_check import Origin, check_store, content_hash, refuse_bad

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
        votes=1 + n,
        rationalized=n == 4,
        answers=AnswerDistribution(("a", "b"), (0.75, 0.25)) if n == 5 else None,
        label_soft=soft(2) if n % 2 else None,
        rationale_soft=soft(7) if n % 4 == 1 else None,
    )


RECORDS = [record(n) for n in range(11)]


def same(left: TeacherRecord, right: TeacherRecord) -> bool:
    names = [field.name for field in dataclasses.fields(TeacherRecord) if not field.name.endswith("_soft")]
    pairs = [(left.label_soft, right.label_soft), (left.rationale_soft, right.rationale_soft)]
    return all(getattr(left, name) == getattr(right, name) for name in names) and all(same_soft(a, b) for a, b in pairs)


def same_soft(left: SoftLabels | None, right: SoftLabels | None) -> bool:
    """Whether `right` is `left` as its codec gives it back."""
    if left is None or right is None:
        return left is right
    return pack(left) == pack(right) == pack(unpack(pack(left)))


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
def test_soft_labels_come_back_as_they_were_packed(tokens: int, k: int, tmp_path: Path) -> None:
    given = soft(tokens, k)
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
    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_missing(tmp_path, processes=1)
    assert [path.name.startswith(".train-000000.parquet.") for path in tmp_path.iterdir()] == [True]
    assert missing_chunks(tmp_path, "train", len(RECORDS)) == [0, 1, 2]
    assert (read_records(tmp_path, "train"), manifest(tmp_path)) == ([], {"shards": []})
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_missing(tmp_path, processes=1)
    check_complete(read_records(tmp_path, "train"), [r.id for r in RECORDS], tmp_path)
    assert len(manifest(tmp_path)["shards"]) == 3


def test_file_and_folder_are_on_disk_before_a_shard_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        seen.append((Path(f"/proc/self/fd/{handle}").readlink().name, sorted(p.name for p in tmp_path.iterdir())))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_shard(shard_path(tmp_path, "train", 0), RECORDS[:4])
    temporary = f".train-000000.parquet.{platform.node()}.{os.getpid()}"
    assert seen == [(temporary, [temporary]), (tmp_path.name, ["train-000000.parquet"])]


def test_splits_lie_apart_also_in_a_folder_named_like_a_partition(tmp_path: Path) -> None:
    folder = tmp_path / "label=yes"
    folder.mkdir()
    write_shard(shard_path(folder, "train", 0), RECORDS[:2])
    write_shard(shard_path(folder, "test", 0), [record(5, "test")])
    assert [[(r.id, r.split) for r in read_records(folder, split)] for split in ("train", "test")] == [
        [("id-0", "train"), ("id-1", "train")],
        [("id-5", "test")],
    ]


REMEDY = r"`stepdown records repair CONFIG` deletes what is bad, and `stepdown run CONFIG` writes that anew and nothing else$"


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (0, r"is not a Parquet file \(0 bytes\)"),
        (7, r"is not a Parquet file \(7 bytes\)"),
        (200, r"is truncated or damaged at its end \(200 bytes\)"),
    ],
)
def test_a_truncated_shard_is_named_with_the_way_out(keep: int, reason: str, tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 7)
    write_shard(path, RECORDS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match=rf"train-000007\.parquet {reason}: {REMEDY}"):
        read_records(tmp_path, "train")


def test_the_way_out_names_the_configuration_that_the_store_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "shared" / "teach-1"
    folder.mkdir(parents=True)
    (folder / STORE).write_text(json.dumps({"config": "../../tiny/config.yaml"}))
    shard_path(folder, "train", 0).write_bytes(b"PAR1 no more")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"`stepdown records repair runs/tiny/config\.yaml` deletes .* `stepdown run runs/tiny/config\."):
        read_records(folder, "train")


def test_no_byte_of_a_shard_changes_unnoticed(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, RECORDS[:2], {"teacher": "t"})
    content = path.read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(sealing.ShardError):
            sealing.opened(bytes(damaged))
    with pytest.raises(sealing.ShardError, match="has no checksum"):
        sealing.opened(content.replace(b"stepdown-sha256=", b"stepdown-sha255="))
    assert sealing.opened(content)[1] == {"teacher": "t"}


def test_damage_is_told_before_arrow_reads_it(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, RECORDS)
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"train-000000\.parquet does not match its checksum \(damaged or edited\): "):
        read_records(tmp_path, "train")


def test_a_text_that_looks_like_a_checksum_does_not_pass_for_one(tmp_path: Path) -> None:
    odd = dataclasses.replace(RECORDS[0], text="stepdown-sha256=" + "0" * 70)
    write_shard(shard_path(tmp_path, "train", 0), [odd])
    assert read_records(tmp_path, "train")[0].text == odd.text


def test_a_file_that_this_program_did_not_seal_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), shard_path(tmp_path, "train", 0))
    with pytest.raises(RuntimeError, match=r"has no checksum: another version wrote it, or its end is damaged: "):
        read_records(tmp_path, "train")


def test_a_shard_with_other_columns_or_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard_path(tmp_path, "train", 0)
    path.write_bytes(sealing.sealed(pa.table({"id": ["a"], "answer": ["b"]}), {}))
    with pytest.raises(RuntimeError, match=r"has the columns \['id', 'answer'\], not \['id', 'split', .*another version wrote it: "):
        read_records(tmp_path, "train")
    with monkeypatch.context() as patch:
        patch.setattr(sealing, "CODEC", 99)
        write_shard(path, RECORDS)
    with pytest.raises(RuntimeError, match=rf"was written by another version \(codec 99; this one reads {sealing.CODEC}\)"):
        read_records(tmp_path, "train")


def test_a_shard_that_the_manifest_names_is_missed(tmp_path: Path) -> None:
    write_missing(tmp_path, processes=1)
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest(tmp_path)))
    assert len(read_records(tmp_path, "train")) == len(RECORDS)
    shard_path(tmp_path, "train", 1).unlink()
    with pytest.raises(RuntimeError, match=rf"record shard .*train-000001\.parquet is missing: {REMEDY}"):
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
    assert re.search(rf"or not in their order: {REMEDY}", str(raised.value))


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


# ----- what a store should hold -----

EXAMPLES = [TaskExample(r.id, f"input of {r.id}", "x") for r in RECORDS]
TESTS = [TaskExample(r.id, f"input of {r.id}", "x") for r in RECORDS[:3]]
SPLITS = {"train": EXAMPLES, "test": TESTS}
ORIGIN = Origin("llama@1", "tokens", "template")


def write_store(folder: Path, origin: Origin = ORIGIN) -> None:
    for split, examples in SPLITS.items():
        for chunk in missing_chunks(folder, split, len(examples)):
            part = slice(chunk * 4, chunk * 4 + 4)
            records = [dataclasses.replace(r, split=split) for r in RECORDS[: len(examples)]][part]
            write_shard(shard_path(folder, split, chunk), records, origin.label(examples[part]))
    (folder / store.MANIFEST).write_text(json.dumps(manifest(folder)))


def faults(folder: Path, origin: Origin = ORIGIN) -> dict[str, str]:
    return {state.file: state.fault for state in check_store(folder, SPLITS, origin) if state.fault is not None}


def test_a_whole_store_has_no_fault(tmp_path: Path) -> None:
    write_store(tmp_path)
    states = check_store(tmp_path, SPLITS, ORIGIN)
    assert [s.file for s in states] == [*(f"train-00000{n}.parquet" for n in range(3)), "test-000000.parquet"]
    assert faults(tmp_path) == {}
    refuse_bad(tmp_path, states)


@pytest.mark.parametrize(
    ("written_by", "fault"),
    [
        (Origin("llama@2", "tokens", "template"), "was written by another teacher ('llama@2'; here it is 'llama@1')"),
        (Origin("llama@1", "other", "template"), "was written with another tokenizer"),
        (Origin("llama@1", "tokens", "other"), "was written with another prompt template"),
    ],
)
def test_a_shard_of_another_origin_is_told(written_by: Origin, fault: str, tmp_path: Path) -> None:
    write_store(tmp_path)
    shard_path(tmp_path, "train", 1).unlink()
    write_store(tmp_path, written_by)
    assert faults(tmp_path) == {"train-000001.parquet": fault}
    with pytest.raises(RuntimeError, match=r"1 of 4 shards cannot be used: train-000001\.parquet was written .*`stepdown records repair"):
        refuse_bad(tmp_path, check_store(tmp_path, SPLITS, ORIGIN))


def damage(folder: Path, kind: str) -> None:
    path = shard_path(folder, "train", 1)
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        path.write_bytes(content[:100] + bytes([content[100] ^ 4]) + content[101:])
    elif kind == "moved":
        path.write_bytes(shard_path(folder, "train", 0).read_bytes())
    elif kind == "records":
        write_shard(path, RECORDS[:4], ORIGIN.label(EXAMPLES[4:8]))
    elif kind == "edited":
        write_shard(path, [dataclasses.replace(r, label="9") for r in RECORDS[4:8]], ORIGIN.label(EXAMPLES[4:8]))


DAMAGE = {
    "missing": "is missing",
    "truncated": "is truncated or damaged at its end",
    "flipped": "does not match its checksum (damaged or edited)",
    "moved": "holds records of other examples",
    "records": "holds records of other examples",
    "edited": "is not the file that the manifest names",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_told_and_only_the_bad_shard_is_written_again(kind: str, tmp_path: Path) -> None:
    write_store(tmp_path)
    whole = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("*.parquet")}
    damage(tmp_path, kind)
    ((file, fault),) = faults(tmp_path).items()
    assert file == "train-000001.parquet"
    assert fault.startswith(DAMAGE[kind])
    shard_path(tmp_path, "train", 1).unlink(missing_ok=True)
    write_store(tmp_path)
    assert faults(tmp_path) == {}
    for path in tmp_path.glob("*.parquet"):
        content, written = whole[path.name]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == written) == (path.name != "train-000001.parquet")


def test_a_shard_that_is_not_written_yet_is_no_reason_to_refuse(tmp_path: Path) -> None:
    write_store(tmp_path)
    damage(tmp_path, "missing")
    states = check_store(tmp_path, SPLITS, ORIGIN)
    assert [state.fault for state in states if state.fault] == ["is missing"]
    refuse_bad(tmp_path, states)


def test_of_many_bad_shards_the_first_three_are_named(tmp_path: Path) -> None:
    write_store(tmp_path, Origin("other", "tokens", "template"))
    write_shard(shard_path(tmp_path, "train", 9), RECORDS[:1])
    states = check_store(tmp_path, SPLITS, ORIGIN)
    assert (states[-1].file, states[-1].fault) == ("train-000009.parquet", "belongs to no chunk of this task")
    with pytest.raises(RuntimeError, match=r"5 of 5 shards cannot be used: .*train-000002\.parquet was .*; and 2 more\. `stepdown"):
        refuse_bad(tmp_path, states)


def test_the_content_hash_is_of_ids_and_inputs_in_order() -> None:
    first, second = TaskExample("a", "bc", "1"), TaskExample("d", "e", "2")
    expected = hashlib.sha256(b"1:a2:bc1:d1:e").hexdigest()
    assert content_hash([first, second]) == expected
    others = [[second, first], [first], [TaskExample("ab", "c", "1"), second], [dataclasses.replace(first, input="bd"), second]]
    assert all(content_hash(other) != expected for other in others)
