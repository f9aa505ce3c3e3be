"""Plain SVD (card: svd-lowrank)."""

from __future__ import annotations

from dataclasses import dataclass

from slimwright.methods.factorizing import Factorizer
from slimwright.methods.registry import SiteStatistics, knob, register
from slimwright.weights import Float, Grid


@register("factorize/svd", paper="Eckart and Young 1936")
@dataclass(frozen=True)
class SVD(Factorizer):
    """The factors nearest to the weight: its truncated singular value decomposition."""

    rank: int = knob(64, low=1, help="columns of the left factor")
    grid: Grid = knob(Float("bf16"), help="number format of both factors")

    def metric(self, stats: SiteStatistics) -> None:
        return None
