"""Sums of inputs against closed forms."""

from __future__ import annotations

import pytest
import torch

from slimwright.calibrate.site_statistics import SiteStatistics
from slimwright.calibrate.statistics import InputSums, add_gram


@pytest.mark.parametrize("columns", [3, 511, 512, 700, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gram_is_the_mean_outer_product(columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    parts = [torch.randn(n, columns, generator=generator).to(dtype) for n in (5, 40, 1)]
    whole = torch.cat(parts).double()
    for keep in (False, True):
        sums = InputSums(columns, keep)
        for part in parts:
            sums.add(part)
        found = sums.statistics()
        assert found.gram is not None and found.tokens == 46
        torch.testing.assert_close(found.gram.double(), whole.T @ whole / 46, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.gram, found.gram.T)
        assert found.absmax is not None and torch.equal(found.absmax, whole.abs().amax(0).float())
        torch.testing.assert_close(found.absmean, whole.abs().mean(0).float())
        torch.testing.assert_close(found.mean, whole.mean(0).float())


def test_bfloat16_inputs_are_multiplied_exactly_and_added_in_float32() -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(64, 64)
    add_gram(total, x)
    exact = (x.double().T @ x.double()).tril()
    assert float((total.double().tril() - exact).abs().max()) < 2e-5 * float(exact.abs().max())


def test_no_tokens_is_no_data() -> None:
    sums = InputSums(4)
    sums.add(torch.zeros(0, 4))
    assert sums.statistics().gram is None


@pytest.mark.parametrize("columns", [1, 2, 7, 300, 700])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_a_factor_is_that_of_the_ordered_damped_gram(columns: int, damp: float) -> None:
    """``R Rᵀ`` is the Gram in that order with the damping on its diagonal, R upper triangular; the Gram stays."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(4 * columns + 3, columns, generator=generator, dtype=torch.float64).float()
    x[:, columns // 2] = 0  # never seen: it gets the diagonal's mean
    stats = SiteStatistics.from_inputs(x)
    assert stats.gram is not None
    before = stats.gram.clone()
    order = torch.randperm(columns, generator=generator)
    for own in (None, order):
        factor, damping = stats.factor(damp, own)
        mean = before.diagonal().mean()
        expected = before.double().clone()
        if expected[columns // 2, columns // 2] == 0:
            expected[columns // 2, columns // 2] = mean if mean > 0 else 1.0
        expected += damping * torch.eye(columns, dtype=torch.float64)
        if own is not None:
            expected = expected[own][:, own]
        assert damping == pytest.approx(damp * float(mean if mean > 0 else 1.0))
        assert torch.equal(factor, factor.triu())
        torch.testing.assert_close(factor.double() @ factor.double().T, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(stats.gram, before)


def test_damping_grows_until_the_factorization_succeeds() -> None:
    """A matrix of ones has rank one: without damping it cannot be factorized."""
    stats = SiteStatistics(tokens=1, gram=torch.ones(400, 400))
    factor, damping = stats.factor(0.0)
    assert 0 < damping < 1e-2
    torch.testing.assert_close(factor @ factor.T, torch.ones(400, 400) + damping * torch.eye(400), rtol=1e-3, atol=1e-3)
