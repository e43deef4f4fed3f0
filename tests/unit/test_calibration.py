"""Rounding on training rows: by hand, against rounding to nearest and least squares, and through a whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from train import calibration
from train.calibration import put_on_grids_by, rounded_by
from train.grids import Grid, matrices

GRID = Grid("signed", 4, 32)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, rows: int = 400) -> Tensor:
    """Inputs [rows, columns] of few directions, and some noise."""
    return drawn(rows, columns // 8, seed=1) @ drawn(columns // 8, columns, seed=2) + 0.1 * drawn(rows, columns, seed=3)


def test_the_second_weight_makes_up_for_the_first_ones_error() -> None:
    """The scale is 0.8 / -8, and 0.33 becomes 0.3. Least squares adds 0.03 x 2 / 4 to 0.24: 0.255 becomes 0.3 where the nearest is 0.2."""
    grid = Grid("signed", 4, 3)
    moments = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [2.0, 0.0, 4.0]]) + 1e-3 * torch.eye(3)
    weight = torch.tensor([[0.33, 0.8, 0.2]])
    assert torch.allclose(rounded_by(1e6 * torch.eye(3), weight, grid)[0], torch.tensor([[0.3, 0.8, 0.2]]), atol=1e-3)
    found, headers = rounded_by(moments, weight + torch.tensor([[0.0, 0.0, 0.04]]), grid)
    assert torch.allclose(found, torch.tensor([[0.3, 0.8, 0.3]]), atol=1e-3)
    assert headers is None


@pytest.mark.parametrize("columns", [96, 80])
def test_inputs_without_correlation_round_to_nearest(columns: int) -> None:
    weight = drawn(7, columns)
    assert torch.equal(rounded_by(3.0 * torch.eye(columns), weight, GRID)[0], GRID.rounded(weight))


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("columns", [128, 112])
def test_what_comes_out_stands_on_its_grid_and_zeros_stay(columns: int, bits: int) -> None:
    grid, fed, weight = Grid("signed", bits, 32), correlated(columns), drawn(9, columns)
    weight[:, ::3] = 0.0
    weight[4, 32:64] = 0.0
    weight[5] = 0.0
    found, _ = rounded_by(fed.T @ fed, weight, grid)
    assert torch.equal(grid.rounded(found), found)
    assert not found[weight == 0].any()
    assert found[weight != 0].count_nonzero() > 0.8 * (weight != 0).sum()


def test_outputs_change_less_than_by_rounding_to_nearest() -> None:
    fed, weight = correlated(256), drawn(64, 256)
    found, nearest = rounded_by(fed.T @ fed, weight, GRID)[0], GRID.rounded(weight)
    lost, before = ((fed @ (weight - of).T).norm() for of in (found, nearest))
    assert lost < 0.6 * before


def test_a_column_that_is_never_fed_is_rounded_to_nearest() -> None:
    fed, weight = correlated(64), drawn(5, 64)
    fed[:, 10] = 0.0
    found, _ = rounded_by(fed.T @ fed, weight, GRID)
    assert found.isfinite().all()
    assert torch.equal(GRID.rounded(found), found)
    assert torch.allclose(found[:, 10], GRID.rounded(weight)[:, 10], atol=0.3)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=200)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=200, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("build", [llama, t5])
@pytest.mark.parametrize("held", [2**32, 1])
def test_a_model_of_either_family_keeps_its_numbers(build: type, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows are read again for every matrix."""
    monkeypatch.setattr(calibration, "_HELD_BYTES", held)
    rows = [([3 + n, 5, 7 + 2 * n, 11], [13, 17 + n, 1]) for n in range(40)]
    model = build()
    grids = dict.fromkeys(matrices(model), GRID)

    def logits() -> Tensor:
        with torch.no_grad():
            found = [model(**calibration.inputs_of(*row, model.config.is_encoder_decoder)).logits.flatten() for row in rows]
        return torch.cat(found)

    whole, weights = logits(), {name: layer.weight.detach().clone() for name, layer in matrices(model).items()}
    put_on_grids_by(rows, model, grids)
    calibrated = (logits() - whole).norm()
    for name, layer in matrices(model).items():
        assert torch.equal(GRID.rounded(layer.weight), layer.weight), name
        with torch.no_grad():
            layer.weight.copy_(GRID.rounded(weights[name]))
    assert 0 < calibrated < 0.8 * (logits() - whole).norm()


def test_matrices_without_a_grid_are_left_alone() -> None:
    model = llama()
    first, *others = matrices(model)
    before = {name: matrices(model)[name].weight.detach().clone() for name in others}
    put_on_grids_by([([3, 4], [5])], model, {first: GRID})
    assert all(torch.equal(matrices(model)[name].weight, weight) for name, weight in before.items())
