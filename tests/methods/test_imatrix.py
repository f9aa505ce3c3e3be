"""Rounding with the Gram's diagonal as importance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method
from slimwright.weights import parse_grid
from tests.methods.setups import setup


@pytest.mark.parametrize("spec", ["q4_0", "q4_k", "q6_k", "int3:g64", "int4:row:sym"])
def test_large_inputs_decide(spec: str) -> None:
    site = setup(outliers=True)
    aware = method("quantize/imatrix", grid=spec).solve(site.weight, site.stats).dense()
    blind = parse_grid(spec)
    unaware = blind.round(site.weight, blind.fit(site.weight))
    assert site.loss(aware) < 0.7 * site.loss(unaware)


def test_q4_0_finds_the_best_of_its_trials() -> None:
    """Brute force over the 19 trials of one block, in double precision."""
    generator = torch.Generator().manual_seed(5)
    w, importance = torch.randn(40, 32, generator=generator), torch.rand(32, generator=generator) ** 4
    found = parse_grid("q4_0").fit(w, importance)["exact"][:, 0]
    for row, scale in zip(w.double().numpy(), found.numpy(), strict=True):
        weight = (importance / importance.max()).numpy() * np.sqrt((row**2).mean() + row**2)
        extreme = row[np.abs(row).argmax()]
        gains = {}
        for index in range(-9, 10):
            code = np.clip(np.round(-(8 + 0.1 * index) / extreme * row), -8, 7)
            best = (weight * code * row).sum() / (weight * code * code).sum()
            gains[best] = (weight * (row - best * code) ** 2).sum()
        assert scale == pytest.approx(min(gains, key=gains.__getitem__), rel=1e-5)


@pytest.mark.parametrize("spec", ["q4_0", "q4_k", "q6_k", "int4:g128"])
def test_inputs_that_were_never_seen_keep_their_weights(spec: str) -> None:
    generator = torch.Generator().manual_seed(2)
    w, inputs = torch.randn(16, 512, generator=generator), torch.randn(300, 512, generator=generator)
    inputs[:, :256] = 0
    values = method("quantize/imatrix", grid=spec).solve(w, SiteStatistics.from_inputs(inputs)).dense()
    for half in (slice(0, 256), slice(256, 512)):
        assert (values - w)[:, half].square().sum() < 0.02 * w[:, half].square().sum()


@pytest.mark.parametrize("spec", ["q8_0", "nf4", "fp8:tensor", "bf16"])
def test_formats_whose_scales_do_not_follow_data_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="do not depend on data"):
        method("quantize/imatrix", grid=spec)


@pytest.mark.parametrize("spec", ["q4_0", "q4_k", "q6_k"])
def test_blocks_are_fitted_apart(spec: str) -> None:
    """Fitting block by block, as error feedback does, is fitting the whole: importance included."""
    grid, w = parse_grid(spec), torch.randn(8, 512, generator=torch.Generator().manual_seed(2))
    importance = torch.exp(3 * torch.randn(512, generator=torch.Generator().manual_seed(3)))
    block = grid.fit_block(512)
    whole = grid.fit(w, importance)
    parts = [grid.fit(w[:, at : at + block], importance[at : at + block]) for at in range(0, 512, block)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), value), name
