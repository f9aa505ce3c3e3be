"""Choosing one option per scope within a budget. Solvers are interchangeable: table and budget in, allocation out."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from slimwright.errors import InputError
from slimwright.search.dp import solve_dp
from slimwright.search.milp import solve_milp
from slimwright.search.options import Allocation, Option, Table, prune_dominated, smallest_cost

SOLVERS: dict[str, Callable[[Table, int], Allocation]] = {"dp": solve_dp, "milp": solve_milp}

__all__ = [
    "SOLVERS",
    "Allocation",
    "Option",
    "Table",
    "check_solver",
    "prune_dominated",
    "search",
    "smallest_cost",
    "solve_dp",
    "solve_milp",
]


def search(table: Table, budget: int, solver: str = "dp") -> Allocation:
    """Choose one option per scope: least total loss, total cost at most ``budget`` bytes.

    Raises:
        InputError: an unknown solver (with the nearest name), or what the solver refuses.
    """
    check_solver(solver)
    return SOLVERS[solver](table, budget)


def check_solver(solver: str) -> None:
    """Refuse an unknown solver.

    Raises:
        InputError: with the nearest name.
    """
    if solver not in SOLVERS:
        near = difflib.get_close_matches(solver, list(SOLVERS), n=1, cutoff=0.3)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise InputError(f"Unknown solver '{solver}'{hint} Known: {', '.join(SOLVERS)}.")
