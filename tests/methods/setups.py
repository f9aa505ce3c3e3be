"""The synthetic setups of the method cards: S, and S-out with a few inputs that are far larger than the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from slimwright.methods import SiteStatistics


@dataclass(frozen=True, eq=False)
class Setup:
    """A weight (256, 256) and inputs (4096, 256), float32, with their statistics and the Gram in float64."""

    weight: Tensor
    inputs: Tensor
    stats: SiteStatistics
    gram: Tensor

    def loss(self, values: Tensor) -> Tensor:
        """The relative proxy loss tr(Δ H Δᵀ) / tr(W H Wᵀ) of values (256, 256)."""
        return self.row_losses(values).sum() / self.row_losses(torch.zeros_like(self.weight)).sum()

    def row_losses(self, values: Tensor) -> Tensor:
        """δ H δᵀ of every row: (256,) float64."""
        delta = values.double() - self.weight.double()
        return ((delta @ self.gram) * delta).sum(1)

    def output_error(self, values: Tensor, inputs: Tensor | None = None) -> float:
        """‖X' Qᵀ - X Wᵀ‖ / ‖X Wᵀ‖ with X' the inputs as they reach the layer."""
        exact = self.inputs.double() @ self.weight.double().T
        given = (self.inputs if inputs is None else inputs).double() @ values.double().T
        return float((given - exact).norm() / exact.norm())


@cache
def setup(outliers: bool = False, seed: int = 0) -> Setup:
    """S, or S-out where six columns of the inputs are twenty times as large."""
    generator = torch.Generator().manual_seed(seed)
    size, tokens = 256, 4096
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    spread = torch.exp(-torch.arange(size, dtype=torch.float64) / 80)  # standard deviations: variances e^(-i / 40)
    inputs = torch.randn(tokens, size, generator=generator, dtype=torch.float64) * spread @ basis.T
    if outliers:
        inputs[:, torch.randperm(size, generator=generator)[:6]] *= 20
    weight = 0.05 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    weight *= torch.exp(0.3 * torch.randn(size, generator=generator, dtype=torch.float64))
    inputs, weight = inputs.float(), weight.float()
    exact = inputs.double()
    return Setup(weight, inputs, SiteStatistics.from_inputs(inputs), exact.T @ exact / tokens)
