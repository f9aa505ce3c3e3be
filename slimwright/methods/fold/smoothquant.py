"""SmoothQuant (card: smoothquant; Xiao et al. 2022, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.folding import smoothing_scale
from slimwright.methods.registry import GroupFold, SiteStatistics, WeightSolver, knob, register


@register("fold/smoothquant", paper="Xiao et al. 2022, SmoothQuant (arXiv:2211.10438)")
@dataclass(frozen=True)
class SmoothQuant(GroupFold):
    """Move outliers from the activations into the weights: ``s = absmax^α / wmax^(1 - α)``, so that both can be 8-bit.

    The paper folds norms into the linears that they feed; v → o and up → down work as well. α = 0 is not the identity
    (s = 1 / wmax); ``identity`` is. Inputs that were never seen, or that no weight reads, keep a factor of 1, where the
    reference code's floor would multiply the producer by 1e5.
    """

    alpha: float = knob(0.5, low=0.0, high=1.0, help="strength; 0.75 to 0.9 where outliers are strong")
    identity: bool = knob(False, help="all factors 1")
    needs = ("absmax",)

    def scales(
        self, weights: Sequence[Tensor], stats: SiteStatistics, solver: WeightSolver, channels: Tensor | None = None
    ) -> Tensor:
        weights = self.checked(weights, stats, channels)
        assert stats.absmax is not None
        if self.identity:
            return torch.ones(weights[0].shape[1])
        return smoothing_scale(weights, stats.absmax, self.alpha, channels)
