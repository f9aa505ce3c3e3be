"""LDLQ: an independent LDL form written out column by column, and the equivalence to GPTQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimwright.methods import method
from slimwright.weights import parse_grid
from tests.methods.setups import setup


def by_definition(weight: Tensor, gram: Tensor, damp: float, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes of LDLQ from the last column to the first, in float64: H = L D Lᵀ by elimination, one row per scale."""
    size = gram.shape[0]
    rest = gram + damp * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    lower = torch.eye(size, dtype=torch.float64)
    for column in range(size):
        lower[column:, column] = rest[column:, column] / rest[column, column]
        rest = rest - rest[column, column] * torch.outer(lower[:, column], lower[:, column])
    weight = weight.double()
    codes, error = torch.empty_like(weight), torch.zeros_like(weight)
    for column in reversed(range(size)):
        target = weight[:, column] + error[:, column + 1 :] @ lower[column + 1 :, column]
        codes[:, column] = (torch.round(target / scale) + zero).clamp(0, top)
        error[:, column] = weight[:, column] - scale * (codes[:, column] - zero)
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codes_are_those_of_the_definition_and_of_gptq(bits: int) -> None:
    site = setup(outliers=True)
    weight, grid = site.weight[:48], parse_grid(f"int{bits}:row")
    params = grid.fit(weight)
    expected = by_definition(weight, site.gram, 0.01, params["scale"][:, 0].double(), params["zero"][:, 0], 2**bits - 1)
    solver = method("quantize/ldlq", grid=grid, clip="none")
    found = solver.solve(weight, site.stats)
    # A tie decided otherwise in float32 changes every later column of its row, so whole rows are counted.
    assert (found.codes.double() == expected).all(1).float().mean() > 0.95
    for order, act_order in (("columns", False), ("importance", True)):
        ours = method("quantize/ldlq", grid=grid, clip="none", order=order).solve(weight, site.stats)
        theirs = method("quantize/gptq", grid=grid, clip="none", act_order=act_order).solve(weight, site.stats)
        assert torch.equal(ours.codes, theirs.codes)


def test_reversed_inputs_make_it_gptq_from_left_to_right() -> None:
    site = setup()
    flipped = torch.arange(256).flip(0)
    stats = type(site.stats).from_inputs(site.inputs[:, flipped])
    found = method("quantize/ldlq", grid="int3:row", clip="none").solve(site.weight[:48], site.stats)
    other = method("quantize/gptq", grid="int3:row", clip="none", act_order=False)
    same = other.solve(site.weight[:48][:, flipped], stats).codes[:, flipped] == found.codes
    assert same.all(1).float().mean() > 0.95


@pytest.mark.parametrize("outliers", [False, True])
def test_beats_rounding_to_nearest(outliers: bool) -> None:
    site = setup(outliers)
    solved = method("quantize/ldlq", grid="int3:row").solve(site.weight, site.stats).dense()
    rounded = method("quantize/rtn", grid="int3:row").solve(site.weight, site.stats).dense()
    assert site.loss(solved) < 0.6 * site.loss(rounded)


def test_a_diagonal_gram_makes_it_rounding_to_nearest() -> None:
    site = setup()
    stats = type(site.stats)(tokens=1, gram=torch.diag(torch.rand(256, generator=torch.Generator().manual_seed(0))))
    solved = method("quantize/ldlq", grid="int3:g64", clip="none").solve(site.weight, stats)
    rounded = method("quantize/rtn", grid="int3:g64", clip="none").solve(site.weight, stats)
    assert torch.equal(solved.codes, rounded.codes)
