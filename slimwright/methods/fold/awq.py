"""AWQ's scale search (card: awq; Lin et al. 2023, arXiv:2306.00978); its clip search is ``quantize/awq``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.folding import folded_loss, tied
from slimwright.methods.registry import SITES, GroupFold, SiteStatistics, WeightSolver, knob, register


@register("fold/awq", paper="Lin et al. 2023, AWQ (arXiv:2306.00978)")
@dataclass(frozen=True)
class AWQ(GroupFold):
    """Scale up the inputs that are large on average: ``s = absmean^r``, for the r with the least loss after rounding.

    Ratios ``0, 1/n, ..., (n - 1)/n`` are tried, with ``s`` divided by ``sqrt(max(s) min(s))``; the first of equals, so
    that r = 0, which is no scale at all, stays unless another is better. Each trial's loss is ``tr(Δ H Δᵀ)`` summed
    over the consumers, rounded by the solver that will be used. For o and down that is the card's loss, the mean
    squared error of the linear's own output. For q/k/v and gate/up it stands for the card's, the error of the whole
    attention's or MLP's output, which would need the module and its inputs.

    Inputs that were never seen keep a factor of 1.
    """

    n_grid: int = knob(20, low=1, high=1000, help="how many ratios are tried")
    sites: str = knob("all", choices=tuple(SITES), help="fold groups")
    needs = ("gram", "absmean")

    @property
    def trials(self) -> int:
        return self.n_grid

    def scales(
        self, weights: Sequence[Tensor], stats: SiteStatistics, solver: WeightSolver, channels: Tensor | None = None
    ) -> Tensor:
        weights = self.checked(weights, stats, channels)
        best = self.trial(stats, 0.0, channels)
        best_loss = folded_loss(weights, stats, solver, best)
        for index in range(1, self.n_grid):
            scale = self.trial(stats, index / self.n_grid, channels)
            loss = folded_loss(weights, stats, solver, scale)
            if loss < best_loss:
                best, best_loss = scale, loss
        return best

    @staticmethod
    def trial(stats: SiteStatistics, ratio: float, channels: Tensor | None = None) -> Tensor:
        """The factors of one ratio: (in,) float32."""
        assert stats.absmean is not None
        size = tied(stats.absmean, channels)
        scale = size.pow(ratio).clamp(min=1e-4)
        seen = scale[size > 0]
        if not len(seen):
            return torch.ones_like(size)
        return torch.where(size > 0, scale / (seen.max() * seen.min()).sqrt(), 1.0)
