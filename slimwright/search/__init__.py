"""Choosing one option per scope within a budget. Solvers are interchangeable: table and budget in, allocation out."""

from __future__ import annotations

from slimwright.search.closed_form import ClosedForm
from slimwright.search.dp import solve_dp
from slimwright.search.evolutionary import Evolutionary
from slimwright.search.exact import DP, MILP
from slimwright.search.milp import pair_loss, solve_milp
from slimwright.search.options import Allocation, Option, Table, prune_dominated, smallest_cost
from slimwright.search.rate_distortion import RateDistortion
from slimwright.search.solver import BudgetSolver, Evaluate, Pairs, Problem, named

SOLVERS: dict[str, type[BudgetSolver]] = {
    solver.name: solver for solver in (DP, MILP, ClosedForm, RateDistortion, Evolutionary)
}

__all__ = [
    "SOLVERS",
    "Allocation",
    "BudgetSolver",
    "Evaluate",
    "Option",
    "Pairs",
    "Problem",
    "Table",
    "check_solver",
    "named",
    "pair_loss",
    "prune_dominated",
    "search",
    "smallest_cost",
    "solve_dp",
    "solve_milp",
]


def search(
    table: Table,
    budget: int,
    solver: str = "dp",
    pairs: Pairs | None = None,
    evaluate: Evaluate | None = None,
    seed: int = 0,
) -> Allocation:
    """Choose one option per scope: least total loss, total cost at most ``budget`` bytes.

    Args:
        solver: its spec: ``dp``, ``evolutionary,generations=40``.
        pairs: what two options cost together beyond the sum of both.
        evaluate: measures an allocation, for solvers that need it.
        seed: of what is random in a solver.

    Raises:
        InputError: an unknown solver (with the nearest name), or what the solver refuses.
    """
    return check_solver(solver).solve(Problem(table, budget, pairs or {}, evaluate, seed))


def check_solver(solver: str) -> BudgetSolver:
    """The solver that a spec names.

    Raises:
        InputError: unknown, with the nearest name, or a knob that is wrong.
    """
    return named(solver, SOLVERS, "solver")
