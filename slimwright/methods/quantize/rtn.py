"""Round to nearest (card: rtn)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Grid, Int, Quantized


@register("quantize/rtn", paper="folklore; range search as in GPTQ (arXiv:2210.17323), appendix")
@dataclass(frozen=True)
class RTN(WeightSolver):
    """Round each group to the nearest point of its grid."""

    grid: Grid = knob(Int(4, group=128), help="number format")

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, survey = self.checked(weight, stats)
        params = self.grid.fit(weight, stats.importance, survey)
        return Quantized(self.grid, self.grid.encode(weight, params), params)
