"""ASVD (card: asvd; Yuan et al. 2023, arXiv:2312.05821)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.factorizing import Factorizer
from slimwright.methods.registry import SiteStatistics, knob, register
from slimwright.weights import Float, Grid

_FLOOR = 1e-6  # of an input that was never seen, relative to the mean


@register("factorize/asvd", paper="Yuan et al. 2023, ASVD (arXiv:2312.05821)")
@dataclass(frozen=True)
class ASVD(Factorizer):
    """Truncate the SVD of ``W diag(s)`` with ``s = absmean ** alpha``, so that large inputs' weights are kept better.

    ``alpha`` 0 is plain SVD. The reference adds 1e-6 to s whatever its size; here it is relative to its mean. Ranks
    that follow from sensitivities are the search's matter.
    """

    needs = ("gram", "absmean")
    rank: int = knob(64, low=1, help="columns of the left factor")
    grid: Grid = knob(Float("bf16"), help="number format of both factors")
    alpha: float = knob(0.5, low=0.0, high=4.0, help="power of an input's mean magnitude")

    def metric(self, stats: SiteStatistics) -> Tensor:
        assert stats.absmean is not None
        scale = stats.absmean.double() ** self.alpha
        return (scale / scale.mean().clamp_min(1e-300) + _FLOOR).square()
