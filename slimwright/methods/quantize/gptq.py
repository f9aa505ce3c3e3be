"""GPTQ: rounding column by column with error feedback (card: gptq; Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.feedback import FeedbackSolver, importance_order
from slimwright.methods.registry import SiteStatistics, knob, register
from slimwright.weights import Grid, Int
from slimwright.weights.feedback import round_with_feedback
from slimwright.weights.grid import Params
from slimwright.weights.ranges import fit_params


@register("quantize/gptq", paper="Frantar et al. 2022, GPTQ (arXiv:2210.17323)")
@dataclass(frozen=True)
class GPTQ(FeedbackSolver):
    """Round the columns one after the other, each time moving the columns still to come so that the layer's output
    changes least: ``tr(ΔW H ΔWᵀ)`` with H the Gram of the layer's inputs.

    The Cholesky form, exact for any ``blocksize``: with ``H + λI = R Rᵀ``, R upper triangular, the columns of a block B
    stand at ``W_B + (W - Q)_before R_before,B R_B,B⁻¹`` when their turn comes. That is the paper's update by the rows
    of ``U = R⁻¹`` with neither the inverse of H nor U itself. Two differences from the reference code: an input that
    the data never used keeps its weights, rounded as they are, instead of losing them; where the factorization fails,
    the damping doubles.

    Works on every grid with parameters. A grid's parameters come from the weight as it was (``static_groups``), or
    group by group from the columns as they have become (not with ``act_order``, whose groups would need an index that
    the format does not store).
    """

    grid: Grid = knob(Int(4, group=128), help="number format")
    damp: float = knob(0.01, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")
    act_order: bool = knob(True, help="columns by falling mean squared input instead of from left to right")
    static_groups: bool = knob(True, help="fit the grid to the weight as it was")
    clip: str = knob(
        "weighted", choices=("none", "mse", "weighted"), help="int: range of a group (weighted: by diag H)"
    )
    blocksize: int = knob(128, low=1, high=4096, help="columns of a block; changes the speed only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_order and not self.static_groups:
            raise InputError(f"{self.name}: act_order needs static_groups: a group's columns are not solved together.")

    def rounded(
        self, weight: Tensor, survey: Any, importance: Tensor, factor: Tensor, order: Tensor | None
    ) -> tuple[Tensor, Params]:
        columns, params = weight.shape[1], None
        if self.static_groups or self.grid.fit_block(columns) >= columns:
            params = fit_params(self.grid, weight, self.clip, importance, survey)

        def fit(block: Tensor, positions: slice) -> Params:
            return fit_params(self.grid, block, self.clip, importance[positions])

        given = fit if params is None else params
        return round_with_feedback(self.grid, weight, factor, given, order=order, blocksize=self.blocksize)

    def column_order(self, stats: SiteStatistics) -> Tensor | None:
        return importance_order(stats) if self.act_order else None
