"""The multiple-choice knapsack as a mixed-integer linear program, solved by HiGHS through scipy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from slimwright.errors import InputError
from slimwright.search.options import Allocation, Option, Table, check_table, prune_dominated
from slimwright.search.relaxation import Fronts, Integers, improve, reduce_table

NODE_LIMIT = 2_000
_ATTEMPTS = 8
_SCALE = 1e5  # HiGHS stops at an absolute gap of 1e-6, so coefficients are scaled to this


def solve_milp(table: Table, budget: int) -> Allocation:
    """One option per scope, least total loss, total cost at most ``budget``; ``requires`` and ``excludes`` are kept.

    Without those two the same bound as in :func:`solve_dp` first closes what cannot be part of a better allocation. The
    search stops after ``NODE_LIMIT`` nodes (a limit in seconds would not be reproducible); the result then says that it
    is not proven (``exact`` is False). Unlike the DP it works in floating point: of allocations whose losses differ by
    less than 1e-9 of the range any may be returned.

    Raises:
        InputError: see :func:`check_table`; or ``requires`` and ``excludes`` leave no allocation within the budget.
    """
    check_table(table, budget)
    if not table:
        return Allocation({}, 0, 0.0, True)
    options = [option for front in table.values() for option in front]
    if any(option.requires or option.excludes for option in options):
        return _solve_bound(table, options, budget)
    fronts = Fronts.of(table)
    if int(fronts.cost[fronts.best].sum()) <= budget:
        return Allocation.of(fronts.chosen(fronts.best), exact=True)
    core = reduce_table(fronts, budget)
    if core.closed:
        return Allocation.of(fronts.chosen(core.picks), exact=True)
    index = np.flatnonzero(core.open)
    found, proven = _program(fronts.cost[index], fronts.loss[index], fronts.scope[index], budget, [])
    picks = core.picks if found is None else improve(fronts, index[found], budget)
    picks = min((picks, core.picks), key=lambda found: float(fronts.loss[found].sum()))
    return Allocation.of(fronts.chosen(picks), proven)


def _solve_bound(table: Table, options: list[Option], budget: int) -> Allocation:
    """The case with ``requires`` and ``excludes``: no dominance, no bound, no exchange afterwards."""
    named = {key for option in options for key in option.requires | option.excludes}
    if not named & {option.key for option in options} and not any(option.requires for option in options):
        table = {scope: prune_dominated(front) for scope, front in table.items()}
        options = [option for front in table.values() for option in front]
    position = {option.key: place for place, option in enumerate(options)}
    rows: list[tuple[dict[int, float], float]] = []  # coefficients, upper limit
    for place, option in enumerate(options):
        for key in sorted(option.requires):  # x <= y; an option that is not there cannot be chosen
            rows.append(({place: 1.0, position[key]: -1.0} if key in position else {place: 1.0}, 0.0))
        for key in sorted(option.excludes):
            if key in position:
                rows.append(({place: 1.0, position[key]: 1.0}, 1.0))
    scope = np.repeat(np.arange(len(table)), [len(front) for front in table.values()])
    cost = np.array([option.cost for option in options], dtype=np.int64)
    loss = np.array([option.loss for option in options])
    found, proven = _program(cost, loss, scope, budget, rows)
    if found is None:
        smallest, _ = _program(cost, cost.astype(float), scope, int(cost.sum()), rows)
        if smallest is None:
            raise InputError("What the options require and exclude leaves no allocation: drop some of the rules.")
        raise InputError(
            f"The budget of {budget} bytes cannot be met with what the options require and exclude: the smallest "
            f"possible total is {int(cost[smallest].sum())} bytes; ask for at least that."
        )
    return Allocation.of([options[place] for place in found], proven)


@contextmanager
def _silence() -> Iterator[None]:
    """Send file descriptor 1 to nowhere: HiGHS writes remarks there whatever its options say, into ``--json``."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _program(
    cost: Integers,
    loss: np.ndarray,
    scope: Integers,
    budget: int,
    rows: list[tuple[dict[int, float], float]],
) -> tuple[Integers | None, bool]:
    """(scopes,) positions of the chosen options, None if none was found; and whether they are proven best."""
    scopes = int(scope[-1]) + 1
    places = np.arange(len(cost))
    start = np.searchsorted(scope, np.arange(scopes))
    one_each = csr_array((np.ones(len(cost)), (scope, places)), shape=(scopes, len(cost)))
    least = np.minimum.reduceat(loss, start)
    above = loss - least[scope]
    objective = above * (_SCALE / (float(above.max()) or 1.0))
    cheapest = np.minimum.reduceat(cost, start)
    extra = (cost - cheapest[scope]).astype(float)
    capacity = float(budget - int(cheapest.sum()))
    if capacity < 0:
        return None, True
    unit = _SCALE / max(float(extra.max()), 1.0)
    limits = [LinearConstraint(one_each, 1, 1)]
    if rows:
        coefficients = [(row, place, value) for row, (entry, _) in enumerate(rows) for place, value in entry.items()]
        row, column, value = zip(*coefficients)
        limits.append(
            LinearConstraint(
                csr_array((value, (row, column)), shape=(len(rows), len(cost))), -np.inf, [r[1] for r in rows]
            )
        )
    for _ in range(_ATTEMPTS):
        with _silence():
            answer = milp(
                objective,
                constraints=[*limits, LinearConstraint(csr_array(extra[None] * unit), -np.inf, capacity * unit)],
                integrality=np.ones(len(cost)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0, "node_limit": NODE_LIMIT},
            )
        if answer.x is None:
            return None, answer.status == 2
        chosen = answer.x > 0.5  # exactly one per scope: the solver's integers are within 1e-6
        found = places[chosen]
        over = float(cost[found].sum()) - budget
        if over <= 0:
            return found, answer.status == 0
        capacity -= over  # the solver's tolerance on the budget row let a few bytes through
    return None, False
