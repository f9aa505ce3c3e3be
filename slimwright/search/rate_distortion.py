"""Dynamic programming over buckets of the budget (card #286): plain, and bounded in time by their number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimwright.methods.registry import knob
from slimwright.search.options import Allocation, check_table, prune_dominated
from slimwright.search.solver import BudgetSolver, Problem


@dataclass(frozen=True)
class RateDistortion(BudgetSolver):
    """``g_l(j) = min over options of their distortion + g_(l-1)(j - cost)``, with costs above each scope's smallest in
    buckets of bytes, rounded up: the budget is never exceeded, and the result is exact where a bucket is one byte."""

    name = "rate-distortion"
    paper = "layer-adaptive pruning by DP on rate-distortion (#286)"
    exact = True
    buckets: int = knob(10_000, low=1, high=1_000_000, help="buckets that the budget is divided into at most")

    def allocate(self, problem: Problem) -> Allocation:
        table, budget = problem.table, problem.budget
        check_table(table, budget)
        fronts = [prune_dominated(options) for options in table.values()]
        spare = budget - sum(front[0].cost for front in fronts)
        spare = min(spare, sum(front[-1].cost - front[0].cost for front in fronts))
        width = max(1, -(-spare // self.buckets))
        size = spare // width + 1
        least = np.zeros(size)  # with at most so many buckets spent on the scopes so far
        steps = []
        for front in fronts:
            spent = [-(-(option.cost - front[0].cost) // width) for option in front]
            found = np.full((len(front), size), np.inf)
            for row, (option, buckets) in enumerate(zip(front, spent, strict=True)):
                if buckets < size:
                    found[row, buckets:] = least[: size - buckets] + option.loss
            choice = found.argmin(0)  # of equals the cheapest
            least = found[choice, np.arange(size)]
            steps.append((spent, choice))
        left, picks = size - 1, []
        for spent, choice in reversed(steps):
            picks.append(int(choice[left]))
            left -= spent[picks[-1]]
        chosen = [front[pick] for front, pick in zip(fronts, reversed(picks), strict=True)]
        return Allocation.of(chosen, exact=width == 1)
