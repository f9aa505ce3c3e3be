"""The default solvers by name: the DP and the integer program."""

from __future__ import annotations

from dataclasses import dataclass

from slimwright.search.dp import solve_dp
from slimwright.search.milp import solve_milp
from slimwright.search.options import Allocation
from slimwright.search.solver import BudgetSolver, Problem


@dataclass(frozen=True)
class DP(BudgetSolver):
    """Dynamic programming over undominated states; see :func:`slimwright.search.dp.solve_dp`."""

    name = "dp"
    paper = "the multiple-choice knapsack"
    exact = True

    def allocate(self, problem: Problem) -> Allocation:
        return solve_dp(problem.table, problem.budget)


@dataclass(frozen=True)
class MILP(BudgetSolver):
    """A mixed-integer linear program (HiGHS), as in AdaQuant's bit allocation (#288) and Puzzle (#4); takes pairs and
    options that require or exclude others; see :func:`slimwright.search.milp.solve_milp`."""

    name = "milp"
    paper = "integer program of Puzzle (#4) and AdaQuant (#288)"
    exact = True
    takes_pairs = True
    takes_rules = True

    def allocate(self, problem: Problem) -> Allocation:
        return solve_milp(problem.table, problem.budget, problem.pairs)
