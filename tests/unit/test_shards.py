from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.shards import PARTS, Piece, Shard, fill, moments, read_shards, set_updates, updates_of, write_shard

SIZES = {"matrix": 7, "vector": 3}


def flat(values: list[float]) -> dict[str, Tensor]:
    weight = torch.tensor(values)
    return {"weight": weight, "exp_avg": weight + 100, "exp_avg_sq": weight + 200}


def empty(length: int) -> dict[str, Tensor]:
    return {part: torch.full((length,), torch.nan) for part in PARTS}


def test_what_two_processes_wrote_is_read_by_one_and_by_three(tmp_path: Path) -> None:
    """The matrix holds 0 to 6, the vector 10 to 12."""
    first = Shard([flat([0.0, 1.0, 2.0, 3.0]), flat([10.0])], [Piece("matrix", 0, 4, 0, 0), Piece("vector", 0, 1, 1, 0)], SIZES)
    second = Shard([flat([-1.0, 11.0, 12.0, 4.0, 5.0, 6.0])], [Piece("vector", 1, 2, 0, 1), Piece("matrix", 4, 3, 0, 3)], SIZES)
    for number, shard in enumerate((first, second)):
        write_shard(tmp_path, shard, 9, number=number, of=2)

    whole = Shard([empty(10)], [Piece("matrix", 0, 7, 0, 0), Piece("vector", 0, 3, 0, 7)], SIZES)
    assert read_shards(tmp_path, whole) == 9
    assert whole.flats[0]["weight"].tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11, 12]
    assert whole.flats[0]["exp_avg"].tolist() == [100, 101, 102, 103, 104, 105, 106, 110, 111, 112]
    assert whole.flats[0]["exp_avg_sq"].tolist() == [200, 201, 202, 203, 204, 205, 206, 210, 211, 212]

    middle = Shard([empty(4)], [Piece("matrix", 3, 3, 0, 1)], SIZES)
    read_shards(tmp_path, middle)
    assert middle.flats[0]["weight"][1:].tolist() == [3, 4, 5]
    assert middle.flats[0]["weight"][0].isnan()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_split_is_read_back_by_any_other(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder, size = tmp_path_factory.mktemp("shards"), 20
    values = torch.arange(float(size))

    def split() -> list[Shard]:
        cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4)))
        edges = list(zip([0, *cuts], [*cuts, size], strict=True))
        return [Shard([empty(last - first)], [Piece("p", first, last - first, 0, 0)], {"p": size}) for first, last in edges]

    writers, readers = split(), split()
    for number, writer in enumerate(writers):
        fill(writer, {"p": values.view(4, 5)})
        write_shard(folder, writer, 1, number=number, of=len(writers))
    for reader in readers:
        read_shards(folder, reader)
    assert torch.equal(torch.cat([reader.flats[0]["weight"] for reader in readers]), values)


def test_weights_are_set_from_whole_tensors() -> None:
    shard = Shard([empty(4)], [Piece("matrix", 2, 3, 0, 1)], {"matrix": 6})
    fill(shard, {"matrix": torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]).T})
    assert shard.flats[0]["weight"][1:].tolist() == [1.0, 4.0, 2.0]
    assert shard.flats[0]["exp_avg"].isnan().all()


@pytest.mark.parametrize(
    ("sizes", "written", "message"),
    [
        ({"p": 3}, 1, "{0} holds the weights of another model: delete {1} to train this model from its start"),
        ({"p": 4}, 1, "{0} lacks some of the weights: delete {1} to train this model from its start"),
        ({"p": 4}, 2, "{0}/share-1.pt cannot be read (["),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, sizes: dict[str, int], written: int, message: str) -> None:
    folder = tmp_path / "step-3"
    write_shard(folder, Shard([flat([1.0, 2.0])], [Piece("p", 0, 2, 0, 0)], {"p": 4}), 3, number=0, of=written)
    with pytest.raises(RuntimeError, match=rf"\A{re.escape(message.format(folder, tmp_path))}"):
        read_shards(folder, Shard([empty(sizes["p"])], [Piece("p", 0, sizes["p"], 0, 0)], sizes))


def test_updates_are_counted_on_in_tensors_and_in_integers() -> None:
    """torch counts in a tensor, DeepSpeed's optimizer for the CPU in an integer."""
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([weight], lr=0.1)
    assert updates_of(adam) == 0
    weight.grad = torch.ones(2)
    adam.step()
    assert updates_of(adam) == 1
    set_updates(adam, 7)
    assert torch.equal(adam.state[weight]["step"], torch.tensor(7.0))
    adam.state[weight]["step"] = 1
    set_updates(adam, 8)
    assert adam.state[weight]["step"] == 8 and updates_of(adam) == 8


def test_moments_begin_as_zeros_and_are_those_that_adamw_goes_on_with() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([weight], lr=0.1, fused=True)
    found = moments(adam, weight)
    assert {part: value.tolist() for part, value in found.items()} == {"exp_avg": [0.0, 0.0], "exp_avg_sq": [0.0, 0.0]}
    weight.grad = torch.tensor([1.0, 2.0])
    adam.step()
    assert found["exp_avg"].tolist() == pytest.approx([0.1, 0.2])
    assert moments(adam, weight)["exp_avg"] is found["exp_avg"]
