"""What the solvers share: fronts as arrays, the Lagrangian bound, and local improvement with exact costs.

The multiple-choice knapsack asks for one option per scope, least total loss, total cost within the budget. Its linear
relaxation has a closed form (Sinha and Zoltners 1979, "The multiple-choice knapsack problem"): walk the segments of all
convex hulls in the order of loss saved per byte. The slope at which the budget is reached is the multiplier λ of the
Lagrangian bound, and any option whose reduced loss exceeds the gap between that bound and a known allocation cannot
be part of a better one (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimwright.search.options import Option, Table, prune_dominated

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_SWAPS = 200  # local improvement stops after so many moves; each lowers the loss


@dataclass(frozen=True, eq=False)
class Fronts:
    """Dominance-pruned options, scope after scope, as flat arrays.

    Attributes:
        options: in the order of the arrays.
        scope: (options,) index of each option's scope.
        start: (scopes + 1,) where each scope's options begin; within a scope cost rises and loss falls.
        cost: (options,) bytes.
        loss: (options,).
    """

    options: list[Option]
    scope: Integers
    start: Integers
    cost: Integers
    loss: Floats

    @classmethod
    def of(cls, table: Table) -> Fronts:
        fronts = [prune_dominated(options) for options in table.values()]
        options = [option for front in fronts for option in front]
        sizes = np.array([len(front) for front in fronts], dtype=np.int64)
        return cls(
            options,
            np.repeat(np.arange(len(fronts), dtype=np.int64), sizes),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
            np.array([option.cost for option in options], dtype=np.int64),
            np.array([option.loss for option in options], dtype=np.float64),
        )

    @property
    def best(self) -> Integers:
        """(scopes,) the option of least loss of each scope."""
        return self.start[1:] - 1

    def chosen(self, picks: Integers) -> list[Option]:
        return [self.options[pick] for pick in picks]


def _hull(cost: Integers, loss: Floats) -> list[int]:
    """Indices of the lower convex hull of a front."""
    hull: list[int] = []
    for point in range(len(cost)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (cost[point] - cost[b]) > (loss[b] - loss[point]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(point)
    return hull


def hull_steps(fronts: Fronts) -> tuple[Integers, Integers, Floats]:
    """The segments of all scopes' lower convex hulls: (segments,) indices of the options at their ends, and (segments,)
    the loss that a byte saves there."""
    lower: list[int] = []
    upper: list[int] = []
    for first, end in zip(fronts.start[:-1], fronts.start[1:]):
        hull = [int(first) + point for point in _hull(fronts.cost[first:end], fronts.loss[first:end])]
        lower += hull[:-1]
        upper += hull[1:]
    ends = np.array(lower, np.int64), np.array(upper, np.int64)
    saved = fronts.loss[ends[0]] - fronts.loss[ends[1]]
    return *ends, saved / np.maximum(fronts.cost[ends[1]] - fronts.cost[ends[0]], 1)


def relax(fronts: Fronts, budget: int) -> tuple[float, Integers]:
    """Solve the linear relaxation.

    Returns:
        λ, the loss that one more byte saves at the budget; and (scopes,) picks of the allocation that takes every
        segment which still fits, in the order of loss saved per byte. The budget must hold the cheapest options.
    """
    lower, upper, slope = hull_steps(fronts)
    picks = fronts.start[:-1].copy()
    left = budget - int(fronts.cost[picks].sum())
    extra = fronts.cost[upper] - fronts.cost[lower]
    multiplier = 0.0
    for segment in np.argsort(-slope, kind="stable"):
        scope = fronts.scope[lower[segment]]
        if picks[scope] == lower[segment] and extra[segment] <= left:
            picks[scope] = upper[segment]
            left -= int(extra[segment])
        elif not multiplier:
            multiplier = float(slope[segment])
    return multiplier, picks


def improve(fronts: Fronts, picks: Integers, budget: int) -> Integers:
    """Lower the loss by exchanging one option, or two of different scopes, as long as the total stays in the budget.

    What comes back has no single exchange left that fits the budget and lowers the loss, so slack that could be used
    is used.
    """
    picks = picks.copy()
    moves = 0
    while True:
        slack = budget - int(fronts.cost[picks].sum())
        more = fronts.cost - fronts.cost[picks][fronts.scope]
        gain = fronts.loss[picks][fronts.scope] - fronts.loss
        single = np.where(more <= slack, gain, 0.0)
        move = int(single.argmax())
        if single[move] > 0:
            picks[fronts.scope[move]] = move
            continue
        # Pay for an upgrade that does not fit with the cheapest sufficient downgrade elsewhere.
        down = np.flatnonzero(more < 0)
        down = down[np.argsort(more[down], kind="stable")]  # most bytes freed first
        up = np.flatnonzero(gain > 0)
        if moves == _SWAPS or not len(down) or not len(up):
            return picks
        lead = np.maximum.accumulate(gain[down])  # gain of a downgrade is negative
        winner = np.maximum.accumulate(np.where(gain[down] >= lead, np.arange(len(down)), 0))
        reach = np.searchsorted(more[down], slack - more[up], side="right") - 1
        up, reach = up[reach >= 0], reach[reach >= 0]
        partner = down[winner[reach]]
        total = np.where(fronts.scope[up] != fronts.scope[partner], gain[up] + gain[partner], 0.0)
        scale = float(np.abs(fronts.loss[picks]).max())
        if not len(total) or total.max() <= 1e-12 * scale:
            return picks
        move = int(total.argmax())
        picks[fronts.scope[up[move]]] = up[move]
        picks[fronts.scope[partner[move]]] = partner[move]
        moves += 1


@dataclass(frozen=True, eq=False)
class Core:
    """What is left to decide once the bound has spoken.

    Attributes:
        picks: (scopes,) a good allocation within the budget.
        multiplier: λ.
        gap: how much lower than that of ``picks`` the loss of any allocation can be, at most; rounding included.
        closed: whether that is nothing but rounding, so that ``picks`` is proven best.
        excess: (options,) reduced loss: how far ``loss + λ cost`` lies above the least of its scope.
        open: (options,) whether the option can be part of an allocation at least as good as ``picks``.
    """

    picks: Integers
    multiplier: float
    gap: float
    closed: bool
    excess: Floats
    open: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def reduce_table(fronts: Fronts, budget: int) -> Core:
    """Bound the problem, find a good allocation and close every option that cannot be part of a better one."""
    multiplier, picks = relax(fronts, budget)
    picks = improve(fronts, picks, budget)
    lagrangian = fronts.loss + multiplier * fronts.cost
    least = np.minimum.reduceat(lagrangian, fronts.start[:-1])
    excess = lagrangian - least[fronts.scope]
    slack = budget - int(fronts.cost[picks].sum())
    # loss(picks) - bound, summed from small terms rather than as the difference of two large sums
    gap = float(excess[picks].sum()) + multiplier * slack
    rounding = 1e-11 * float(np.abs(lagrangian).max())  # of the sums above
    return Core(picks, multiplier, gap + rounding, gap <= rounding, excess, excess <= gap + rounding)
