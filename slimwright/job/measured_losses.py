"""Losses that are measured: one group at a time (cards #286 and #288), and two at a time (card #44)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimwright.job.evaluator import Evaluator
from slimwright.job.gains import walked_gains
from slimwright.job.losses import LossEstimate, Options, Scored, Scoring
from slimwright.job.options import with_losses
from slimwright.job.walked import WalkedModel
from slimwright.methods.registry import knob
from slimwright.plan import Assignment
from slimwright.search import solve_dp
from slimwright.search.options import Option, prune_dominated

LEAST = 1e-12
"""Nats below which a measured loss counts as this: rounding that changes nothing has a loss of 0, and no logarithm."""

FINEST = 0.7
"""Part of a front, from its smallest option on, in which options are measured: the finest lose next to nothing."""


@dataclass(frozen=True)
class MeasuredLoss(LossEstimate):
    """Each group alone at a few of its options, the others as they are: the measured KL, taken to add up over groups.

    Between the measured options the logarithm of the loss follows that of the error of the weights; beyond them it has
    the slope 1. Weights are solved as the evaluator does; of a model that it rounds plainly, what a solver with data
    gains over that is a factor from a walk's statistics.
    """

    name = "measured"
    paper = "rate-distortion curves (#286), integer-programmed bits (#288)"
    measures = True
    levels: int = knob(2, low=1, high=16, help="options of each group that are measured")
    evaluated: int = knob(4_096, low=64, help="tokens of an evaluation")

    def evaluations(self, options: Options) -> int:
        return sum(min(self.levels, _lossy(own)) for own in options.values() if len(own) > 1)

    def tokens(self, available: int) -> int:
        return min(self.evaluated, available)

    def score(self, given: Scoring) -> Scored:
        assert given.evaluator is not None
        evaluator = given.evaluator()
        curves, errors = self.curves(given, evaluator)
        return Scored(with_losses(given.options, gained(curves, gains_of(given, evaluator)), errors))

    def curves(self, given: Scoring, evaluator: Evaluator) -> tuple[dict[str, list[float | None]], dict[str, float]]:
        """Losses of every option by group, in nats, None for one that cannot hold the values; and the standard error
        of each group's as a part of them."""
        table = given.rounded()
        groups = given.structure.choice_groups()
        found: dict[str, list[float | None]] = {}
        errors: dict[str, float] = {}
        rates = []
        for group, options in table.items():
            if group not in groups or len(options) < 2:
                continue
            chosen = spread([option for option in prune_dominated(options) if option.loss > 0], self.levels)
            points = {}
            for option in chosen:
                measured = evaluator({group: option.choice}, self.evaluated)
                if math.isfinite(measured.loss):
                    points[option.loss] = max(measured.loss, LEAST)
                    errors[group] = max(errors.get(group, 0.0), measured.error / points[option.loss])
            by_label = {option.label: interpolated(option.loss, points) for option in options}
            found[group] = [by_label.get(option.label) for option in given.options[group]]
            rates += [loss / error for error, loss in points.items()]
        rate = float(np.median(rates)) if rates else 1.0
        for group, options in table.items():
            if group not in found:  # casts, or nothing to choose: what the same error costs the median group
                by_label = {option.label: option.loss * rate for option in options}
                found[group] = [by_label.get(option.label) for option in given.options[group]]
        return found, errors


def gains_of(given: Scoring, evaluator: Evaluator) -> dict[str, list[float]]:
    """What the solver of every option is expected to leave of the error that was measured, by group; nothing is in it
    where solved weights were measured."""
    assert given.calibration is not None
    if evaluator.solves:
        return {}
    groups = given.structure.choice_groups()
    choices = {group: [o.choice for o in own] for group, own in given.options.items() if group in groups}
    return walked_gains(WalkedModel(given.source, given.structure, given.calibration), groups, choices)


def gained(
    losses: Mapping[str, Sequence[float | None]], gains: Mapping[str, Sequence[float]]
) -> dict[str, list[float | None]]:
    """Measured losses as those of solvers; of groups without gains as they are."""
    return {
        group: [None if loss is None else loss * gain for loss, gain in zip(own, gains[group], strict=True)]
        if group in gains
        else list(own)
        for group, own in losses.items()
    }


def _lossy(options: Sequence[Option]) -> int:
    """Options of a group that change something; casts are not measured."""
    kinds = {option.choice.method for option in options if option.choice is not None}
    return 0 if "cast" in kinds else sum(not option.choice.kept for option in options)


def spread(front: Sequence[Option], levels: int) -> list[Option]:
    """Options of a front, the smallest and others at even distances."""
    if not front:
        return []
    places = np.linspace(0, FINEST * (len(front) - 1), min(levels, len(front))).round().astype(int)
    return [front[place] for place in dict.fromkeys(places.tolist())]


def interpolated(error: float, points: Mapping[float, float]) -> float | None:
    """The loss at an error of the weights from measured (error, loss) points; None without any."""
    if error <= 0:
        return 0.0
    if not points:
        return None
    errors = sorted(points)
    x, y = (np.log(np.array(values)) for values in (errors, [points[e] for e in errors]))
    at = math.log(error)
    if at <= x[0]:
        return math.exp(y[0] + at - x[0])
    if at >= x[-1]:
        return math.exp(y[-1] + at - x[-1])
    return math.exp(float(np.interp(at, x, y)))


@dataclass(frozen=True)
class PairLoss(LossEstimate):
    """The measured curves, and what two groups cost together beyond the sum of both: ``D_ij = L_ij - L_i - L_j``.

    Each group is taken once alone and once with every other (of blocks at most ``window`` apart, where that is given)
    at the coarsest option that stays in the table. What options at other losses add follows
    ``D_ij (l_i l_j / L_i L_j)^½``: the cross term of a quadratic form. The table is cut to ``options_kept`` options a
    group around the best allocation without pairs, which a milp of pairs can still solve.
    """

    name = "pairs"
    paper = "Hessians augmented with inter-layer dependencies (#44)"
    measures = True
    couples = True
    levels: int = knob(2, low=1, high=16, help="options of each group that are measured alone")
    window: int = knob(0, low=0, help="blocks that two groups are apart at most; 0: all pairs")
    evaluated: int = knob(2_048, low=64, help="tokens of an evaluation")
    options_kept: int = knob(4, low=2, high=64, help="options of a group that stay in the table")

    def evaluations(self, options: Options) -> int:
        own = [group for group, choices in options.items() if len(choices) > 1 and _lossy(choices)]
        curves = MeasuredLoss(levels=self.levels).evaluations(options)
        return curves + len(own) + len(own) * (len(own) - 1) // 2

    def tokens(self, available: int) -> int:
        return min(self.evaluated, available)

    def score(self, given: Scoring) -> Scored:
        assert given.evaluator is not None
        evaluator = given.evaluator()
        curves, errors = MeasuredLoss(levels=self.levels, evaluated=self.evaluated).curves(given, evaluator)
        table = with_losses(given.options, gained(curves, gains_of(given, evaluator)), errors)
        groups = given.structure.choice_groups()
        places = {
            block.module: place
            for place, block in enumerate(b for stack in given.structure.stacks for b in stack.blocks)
        }
        table = narrowed(table, solve_dp(table, given.budget).choices, self.options_kept)
        coarse = {
            group: front[0]
            for group, options in table.items()
            if group in groups and (front := [o for o in options if o.loss > 0]) and len(options) > 1
        }
        names = list(coarse)
        alone = {group: evaluator({group: option.choice}, self.evaluated).loss for group, option in coarse.items()}
        pairs: dict[tuple[str, str], float] = {}
        for place, first in enumerate(names):
            for second in names[place + 1 :]:
                if self.window and _apart(groups[first][0].block, groups[second][0].block, places) > self.window:
                    continue
                both: dict[str, Assignment] = {first: coarse[first].choice, second: coarse[second].choice}
                loss = evaluator(both, self.evaluated).loss
                apart = alone[first], alone[second]
                if all(map(math.isfinite, (loss, *apart))) and min(apart) > LEAST:
                    strength = (loss - sum(apart)) / math.sqrt(apart[0] * apart[1])
                    for a in table[first]:
                        for b in table[second]:
                            pairs[a.key, b.key] = strength * math.sqrt(a.loss * b.loss)
        return Scored(table, {pair: value for pair, value in pairs.items() if value})


def _apart(first: str | None, second: str | None, places: Mapping[str, int]) -> int:
    """Blocks that two groups are apart; what lies outside blocks is next to all."""
    if first is None or second is None or first not in places or second not in places:
        return 0
    return abs(places[first] - places[second])


def narrowed(table: Mapping[str, list[Option]], chosen: Mapping[str, Option], kept: int) -> dict[str, list[Option]]:
    """The options of each front nearest to the chosen one, ``kept`` of them."""
    found = {}
    for group, options in table.items():
        front = prune_dominated(options)
        here = next((i for i, option in enumerate(front) if option.label == chosen[group].label), 0)
        start = max(0, min(here - (kept - 1) // 2, len(front) - kept))
        found[group] = front[start : start + kept]
    return found
