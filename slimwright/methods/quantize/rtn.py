"""Round to nearest (card: rtn)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Compressed, Grid, Int, quantize
from slimwright.weights.grid import row_blocks
from slimwright.weights.ranges import shrink_ranges, whole_groups


@register("quantize/rtn", paper="folklore; range search as in GPTQ (arXiv:2210.17323), appendix")
@dataclass(frozen=True)
class RTN(WeightSolver):
    """Round each group to the nearest point of its grid, after choosing the group's range.

    ``clip`` chooses the range of ``int`` grids; the other formats define their scales themselves and are rounded by
    their own rule whatever ``clip`` says.

    - ``none``: the group's minimum and maximum.
    - ``mse``: both shrunk by the factor ``1 - i / steps``, ``i = 0 .. maxshrink * steps - 1``, that has the least
      ``sum |Q(w) - w| ** norm``; the first of equals. ``search = exhaustive`` tries every factor; ``coarse`` tries
      every eighth until two in a row are no better, then the neighbours at distance 4, 2 and 1 of the best, with the
      power computed to 1 % (squared error within 0.5 % of the exhaustive search's: docs/formats.md).
    - ``percentile``: the group's quantiles ``1 - percentile`` and ``percentile``.
    """

    grid: Grid = knob(Int(4, group=128), help="number format")
    clip: str = knob("mse", choices=("none", "mse", "percentile"), help="how the range of a group is chosen")
    search: str = knob("coarse", choices=("coarse", "exhaustive"), help="mse: which shrink factors are tried")
    steps: int = knob(100, low=2, high=1000, help="mse: factors are multiples of 1 / steps")
    maxshrink: float = knob(0.8, low=0.0, high=0.99, help="mse: shrink by less than this")
    norm: float = knob(2.4, low=0.5, high=8.0, help="mse: power of the error")
    percentile: float = knob(0.999, low=0.5, high=1.0, help="percentile: the upper quantile")

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Compressed:
        weight, survey = self.checked(weight, stats)
        if not isinstance(self.grid, Int) or self.clip == "none":
            return quantize(self.grid, weight, self.grid.fit(weight, stats.importance, survey))
        if self.clip == "mse":
            low, high = shrink_ranges(
                self.grid, weight, steps=self.steps, maxshrink=self.maxshrink, norm=self.norm,
                exhaustive=self.search == "exhaustive",
            )  # fmt: skip
        else:
            low, high = self._quantiles(self.grid, weight)
        return quantize(self.grid, weight, self.grid.from_range(low, high))

    def _quantiles(self, grid: Int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The groups' lower and upper quantile, 0 included: (rows, groups) twice."""
        low, high = grid.extent(weight)
        quantiles = torch.tensor([1 - self.percentile, self.percentile], device=weight.device)
        for columns, groups, size in whole_groups(grid, weight.shape[1]):
            for rows in row_blocks(weight.shape[0], columns.stop - columns.start):
                part = weight[rows, columns].unflatten(1, (-1, size))
                least, most = torch.quantile(part, quantiles, dim=2)
                low[rows, groups], high[rows, groups] = least.clamp_(max=0), most.clamp_(min=0)
        return low, high
