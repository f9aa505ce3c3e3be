"""SmoothQuant+ (card: smoothquant_plus; Pan et al. 2023, arXiv:2312.03788)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.folding import SmoothingFold, folded_loss, smoothing_scale
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register


@register("fold/smoothquant_plus", paper="Pan et al. 2023, SmoothQuant+ (arXiv:2312.03788)")
@dataclass(frozen=True)
class SmoothQuantPlus(SmoothingFold):
    """SmoothQuant's scale before weight-only rounding, with one strength α for the whole model.

    :meth:`score` is what one fold group loses at one α; whoever has all groups sums the scores over them and gives
    them to :meth:`choose`, then folds with that α. The sum of the groups' output errors stands for the card's loss of
    the whole quantized model: it does not see how errors add up from block to block. ``identity`` is no scale at all;
    α = 0 is not (s = 1 / wmax).
    """

    alpha: float = knob(0.5, low=0.0, high=1.0, help="strength, the one for the whole model")
    identity: bool = knob(False, help="all factors 1")
    steps: int = knob(20, low=1, high=1000, help="the search tries 0, 1/steps, ..., 1")

    @property
    def alphas(self) -> tuple[float, ...]:
        """The strengths that are tried, ascending."""
        return tuple(index / self.steps for index in range(self.steps + 1))

    def score(
        self,
        alpha: float,
        weights: Sequence[Tensor],
        stats: SiteStatistics,
        solver: WeightSolver,
        channels: Tensor | None = None,
    ) -> float:
        """The squared output error per token of one fold group's consumers, smoothed with ``alpha`` and rounded.

        Raises:
            InputError: as :meth:`scales`, or there is no Gram.
        """
        weights = self.checked(weights, stats, channels)
        if stats.gram is None:
            raise InputError(f"{self.name}: scoring a strength needs the statistic 'gram': give data.")
        assert stats.absmax is not None
        return folded_loss(weights, stats, solver, smoothing_scale(weights, stats.absmax, alpha, channels))

    @staticmethod
    def choose(scores: Iterable[Mapping[float, float]]) -> tuple[float, dict[float, float]]:
        """The α with the least sum of scores, the smaller of equals, and the curve of sums that decided.

        Args:
            scores: one map from α to score per fold group, all over the same strengths.
        """
        curve: dict[float, float] = {}
        for group in scores:
            for alpha, score in group.items():
                curve[alpha] = curve.get(alpha, 0.0) + score
        curve = dict(sorted(curve.items()))
        return min(curve, key=curve.__getitem__), curve
