"""A quantized weight with a low-rank correction of its error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from slimwright.methods.factorizing import LowRankSolver, damped, low_rank
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register, solver_for
from slimwright.weights import Float, Form, Grid, Int, LowRankForm, Sum


def inner_spec(spec: str) -> str:
    """A solver's spec as the knob ``solver`` takes it."""
    return spec.replace(",", ";")


@register(
    "factorize/corrected",
    paper="Yao et al. 2023, ZeroQuant-V2 (arXiv:2303.08302), section 5; Zhang et al. 2024, QERA (arXiv:2410.06040); "
    "rounds as in Li et al. 2023, LoftQ (arXiv:2310.08659)",
)
@dataclass(frozen=True)
class Corrected(LowRankSolver):
    """``W = B + L R``: another solver puts the weight on a grid, and factors take up what that did to the outputs.

    The factors are SVD-LLM's of the error ``W - B``, the best of their rank for ``tr(Δ H Δᵀ)`` (plain SVD's without
    data). Each further round solves ``W - L R`` again and corrects what is then left; the round that lost least stays.
    """

    of_form = ("rank",)
    rank: int = knob(16, low=1, help="columns of the left factor")
    grid: Grid = knob(Int(4, group=128), help="number format of the quantized weight")
    factors: Grid = knob(Float("bf16"), help="number format of both factors")
    solver: str = knob("quantize/gptq", help="what quantizes; a semicolon stands for the comma between its knobs")
    rounds: int = knob(3, low=1, high=100, help="how often the weight is quantized")
    damp: float = knob(0.001, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", self.base.needs)

    @cached_property
    def base(self) -> WeightSolver:
        """What quantizes.

        Raises:
            InputError: unknown, or not a solver that puts a weight on one grid.
        """
        return solver_for(self.solver.replace(";", ","), self.grid)

    @property
    def form(self) -> LowRankForm:
        return LowRankForm(self.rank, self.factors, self.grid)

    @classmethod
    def knobs_for(cls, form: Form) -> dict[str, Any] | None:
        if not isinstance(form, LowRankForm) or form.base is None:
            return None
        return {"rank": form.rank, "grid": form.base, "factors": form.factors}

    def prepare(self, stats: SiteStatistics) -> None:
        self.base.prepare(stats)

    def expected_gain(self, stats: SiteStatistics, directions: Tensor | None = None) -> float:
        return self.base.expected_gain(stats, directions)

    def for_role(self, role: str) -> WeightSolver:
        own = self.base.for_role(role)
        return self if own is self.base else replace(self, solver=inner_spec(own.spec))

    @property
    def weighting(self) -> Any:
        return self.base.weighting

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Sum:
        weight = self.checked_weight(weight, stats)
        metric = None if stats.gram is None else damped(stats.gram, self.damp)
        best, least = None, float("inf")
        target = weight
        for _ in range(self.rounds):
            base = self.base.solve(target, stats.with_survey(None))
            quantized = base.dense()
            correction = low_rank(weight - quantized, self.rank, self.factors, metric)
            product = correction.dense()
            change = (weight - quantized - product).double()
            lost = float((change * (change if metric is None else change @ metric)).sum())
            if best is None or lost < least:
                best, least = Sum(base, correction), lost
            target = weight - product
        assert best is not None
        return best
