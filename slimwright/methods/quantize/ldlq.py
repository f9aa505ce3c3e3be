"""LDLQ: rounding with linear feedback (card: vq; Chee et al. 2023, arXiv:2307.13304; Tseng et al. 2024, QuIP#)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.feedback import FeedbackSolver, importance_order
from slimwright.methods.registry import SiteStatistics, knob, register
from slimwright.weights import Grid, Int


@register("quantize/ldlq", paper="Chee et al. 2023, QuIP (arXiv:2307.13304), section 3.2")
@dataclass(frozen=True)
class LDLQ(FeedbackSolver):
    """Round column k at ``w_k`` plus the errors of the columns already rounded, times a column of H's LDL factor.

    With ``H + λI = L D Lᵀ``, L unit lower triangular, from the last column to the first:
    ``q_k = Q(w_k + Σ_j>k (w_j - q_j) L_jk)``, which leaves ``tr(Δ (H + λI) Δᵀ) = Σ_k D_kk ‖error of rounding k‖²``.

    That is GPTQ's arithmetic, and shares its code: GPTQ's upper factor R of the columns in the opposite order is
    ``L D^½`` turned round. What LDLQ is beside ``quantize/gptq`` are the source's choices: ranges fitted to the weight
    as it was, without looking at the data, and this order. ``order=columns`` goes from left to right and
    ``order=importance`` by falling mean squared input: with the same damping and ranges GPTQ's codes, up to ties.
    """

    grid: Grid = knob(Int(4, group=128), help="number format")
    damp: float = knob(0.01, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")
    order: str = knob(
        "reversed", choices=("reversed", "columns", "importance"), help="in which the columns are rounded"
    )
    clip: str = knob("mse", choices=("none", "mse", "weighted"), help="int: range of a group (weighted: by diag H)")

    def column_order(self, stats: SiteStatistics) -> Tensor | None:
        if self.order == "reversed":
            assert stats.gram is not None
            return torch.arange(stats.gram.shape[0]).flip(0)
        return importance_order(stats) if self.order == "importance" else None
