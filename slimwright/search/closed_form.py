"""Bits in closed form (BAQ, card #275, across sites): every scope ends with the same loss for one more bit."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from slimwright.search.options import Allocation, Option, check_table, prune_dominated, smallest_cost
from slimwright.search.solver import BudgetSolver, Problem

_HALVINGS = 200


@dataclass(frozen=True)
class Curve:
    """``loss = a exp(-b cost)``: a scope's front as a line through the logarithms of its losses.

    With bits R = 8 cost / weights and uniform noise, ``a 2^(-2R)`` is the card's; its θ of 1.95 instead of 2, fitted to
    realised losses, is the slope here.
    """

    log_a: float
    b: float
    low: int
    high: int

    @classmethod
    def through(cls, front: list[Option]) -> Curve:
        """Fitted by least squares to the options that lose something; flat where fewer than two do."""
        points = [(option.cost, math.log(option.loss)) for option in front if option.loss > 0]
        low, high = front[0].cost, front[-1].cost
        if len(points) < 2:
            return cls(points[0][1] if points else -math.inf, 0.0, low, high)
        cost, logarithm = np.array(points, dtype=np.float64).T
        slope, height = np.polyfit(cost, logarithm, 1)
        return cls(float(height), max(-float(slope), 0.0), low, high)

    def cost(self, log_rate: float) -> float:
        """Where one more byte saves ``exp(log_rate)``: a b exp(-b cost) = rate; within the scope's options."""
        if not self.b or not math.isfinite(self.log_a):
            return float(self.low)
        return min(max((self.log_a + math.log(self.b) - log_rate) / self.b, float(self.low)), float(self.high))


@dataclass(frozen=True)
class ClosedForm(BudgetSolver):
    """Give every scope the bits at which one more byte saves as much as anywhere else, then round to its options.

    The card's ``R_j = R̄ + ½ log2(c_j / GM(c))`` is the unclipped solution for scopes of equal sizes and a loss that
    falls by four per bit; clipping to what there is and solving again on the rest (its water filling) is a bisection
    over the common rate. Rounding takes each scope's nearest option in cost, then gives back or spends bytes where the
    table says that it costs least or saves most per byte (the card's greedy repair).
    """

    name = "closed-form"
    paper = "BAQ (#275)"

    def allocate(self, problem: Problem) -> Allocation:
        table, budget = problem.table, problem.budget
        check_table(table, budget)
        if not table:
            return Allocation({}, 0, 0.0, True)
        fronts = [prune_dominated(options) for options in table.values()]
        wanted = ideal_costs([Curve.through(front) for front in fronts], budget)
        picks = [
            min(range(len(front)), key=lambda index: abs(front[index].cost - cost))
            for front, cost in zip(fronts, wanted, strict=True)
        ]
        _give_back(fronts, picks, budget)
        _spend(fronts, picks, budget)
        return Allocation.of(
            [front[pick] for front, pick in zip(fronts, picks, strict=True)], smallest_cost(table) == budget
        )


def ideal_costs(curves: list[Curve], budget: int) -> list[float]:
    """Bytes of every scope, not rounded to options: all at one rate, together within the budget."""
    falling = [curve for curve in curves if curve.b and math.isfinite(curve.log_a)]
    found = [c.log_a + math.log(c.b) - c.b * cost for c in falling for cost in (c.low, c.high)]
    low, high = (min(found), max(found)) if found else (0.0, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(curve.cost(middle) for curve in curves) > budget:
            low = middle
        else:
            high = middle
    return [curve.cost(high) for curve in curves]


def _give_back(fronts: list[list[Option]], picks: list[int], budget: int) -> None:
    """Step down where a byte costs least until the budget holds."""

    def step(scope: int) -> tuple[float, int]:
        here, below = fronts[scope][picks[scope]], fronts[scope][picks[scope] - 1]
        return (below.loss - here.loss) / (here.cost - below.cost), scope

    over = sum(front[pick].cost for front, pick in zip(fronts, picks, strict=True)) - budget
    steps = [step(scope) for scope, pick in enumerate(picks) if pick]
    heapq.heapify(steps)
    while over > 0:
        _, scope = heapq.heappop(steps)
        over -= fronts[scope][picks[scope]].cost - fronts[scope][picks[scope] - 1].cost
        picks[scope] -= 1
        if picks[scope]:
            heapq.heappush(steps, step(scope))


def _spend(fronts: list[list[Option]], picks: list[int], budget: int) -> None:
    """Step up where a byte saves most, as long as something fits."""
    slack = budget - sum(front[pick].cost for front, pick in zip(fronts, picks, strict=True))
    while True:
        steps = [
            ((here.loss - above.loss) / (above.cost - here.cost), -scope)
            for scope, (front, pick) in enumerate(zip(fronts, picks, strict=True))
            if pick + 1 < len(front)
            for here, above in [(front[pick], front[pick + 1])]
            if above.cost - here.cost <= slack
        ]
        if not steps:
            return
        scope = -max(steps)[1]
        slack -= fronts[scope][picks[scope] + 1].cost - fronts[scope][picks[scope]].cost
        picks[scope] += 1
