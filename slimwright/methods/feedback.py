"""The base of solvers that round column by column with error feedback."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import SiteStatistics, WeightSolver
from slimwright.weights import Quantized
from slimwright.weights.feedback import feedback_gain, held_out_gain, round_with_feedback
from slimwright.weights.grid import Params
from slimwright.weights.ranges import fit_params


class FeedbackSolver(WeightSolver):
    """Solvers that work with a factor of the damped Gram, in an order of their own; :meth:`rounded` fits the grid to
    the weight as it was.

    Subclasses have the knobs ``damp`` (a fraction of the mean of H's diagonal) and ``clip`` (:func:`fit_params`).
    """

    damp: float
    clip: str
    needs = ("gram",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.plain:
            raise InputError(f"{self.name}: {self.grid} is a plain float; use quantize/rtn for it.")

    def column_order(self, stats: SiteStatistics) -> Tensor | None:
        """(in,) the order in which the columns are rounded; None is from left to right."""
        return None

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        return self._solve(weight, stats)

    def solve_apart(self, weight: Tensor, stats: SiteStatistics) -> Quantized | None:
        return self._solve(weight, stats, rest=True)

    def _solve(self, weight: Tensor, stats: SiteStatistics, rest: bool = False) -> Quantized:
        """One pass of rounding.

        Args:
            rest: with the factor of what is not apart.
        """
        weight, survey = self.checked(weight, stats)
        assert stats.importance is not None
        order = self.column_order(stats)
        factor, _ = stats.factor(self.damp, order, rest)
        values, params = self.rounded(weight, survey, stats.importance, factor, order)
        return Quantized(self.grid, self.grid.encode(values, params), params)

    def rounded(
        self, weight: Tensor, survey: Any, importance: Tensor, factor: Tensor, order: Tensor | None
    ) -> tuple[Tensor, Params]:
        """The grid's values (rows, columns) float32, and their parameters."""
        params = fit_params(self.grid, weight, self.clip, importance, survey)
        return round_with_feedback(self.grid, weight, factor, params, order=order)

    def prepare(self, stats: SiteStatistics) -> None:
        if stats.gram is not None:
            stats.factor(self.damp, self.column_order(stats))

    def expected_gain(self, stats: SiteStatistics, directions: Tensor | None = None) -> float:
        if stats.gram is None:
            return 1.0
        order = self.column_order(stats)
        if directions is None and stats.apart is not None:
            directions = stats.apart.inputs
        factor, damping = stats.factor(self.damp, order, rest=True)
        if directions is None:
            return feedback_gain(stats.gram, factor, damping)
        return held_out_gain(factor, directions if order is None else directions[:, order])


def importance_order(stats: SiteStatistics) -> Tensor:
    """(in,) the inputs by falling mean square, the first of equals first."""
    assert stats.importance is not None
    return stats.importance.argsort(descending=True, stable=True)
