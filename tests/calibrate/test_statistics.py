"""Sums of inputs against closed forms."""

from __future__ import annotations

import pytest
import torch

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
