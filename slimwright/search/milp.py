"""The multiple-choice knapsack as a mixed-integer linear program, solved by HiGHS through scipy."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from slimwright.errors import InputError
from slimwright.search.options import Allocation, Option, Table, check_table, prune_dominated
from slimwright.search.relaxation import Fronts, Integers, improve, reduce_table
from slimwright.search.solver import Pairs

NODE_LIMIT = 2_000
PAIR_NODE_LIMIT = 100
_EXCHANGES = 500
_ATTEMPTS = 8
_SCALE = 1e5  # HiGHS stops at an absolute gap of 1e-6, so coefficients are scaled to this


def solve_milp(table: Table, budget: int, pairs: Pairs | None = None) -> Allocation:
    """One option per scope, least total loss, total cost at most ``budget``; ``requires`` and ``excludes`` are kept.

    ``pairs`` add to the loss where two options are chosen together. Each interacting pair of scopes gets a variable for
    every two options, whose sums over either scope are the other's choices: exact at whole numbers, and the tightest
    linear relaxation of one pair.

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
    if pairs or any(option.requires or option.excludes for option in options):
        return _solve_bound(table, options, budget, pairs or {})
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


def _solve_bound(table: Table, options: list[Option], budget: int, pairs: Pairs) -> Allocation:
    """The case with ``requires`` and ``excludes`` or pairs: no dominance, no bound, no exchange afterwards."""
    named = {key for option in options for key in option.requires | option.excludes}
    if not pairs and not named & {option.key for option in options} and not any(option.requires for option in options):
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
    terms = {
        (position[a], position[b]): value
        for (a, b), value in pairs.items()
        if a in position and b in position and value
    }
    found, proven = _program(cost, loss, scope, budget, rows, terms)
    if found is None and terms:  # the node limit came before a first allocation
        found, _ = _program(cost, loss, scope, budget, rows, {})
        proven = False
    if found is None:
        smallest, _ = _program(cost, cost.astype(float), scope, int(cost.sum()), rows, {})
        if smallest is None:
            raise InputError("What the options require and exclude leaves no allocation: drop some of the rules.")
        raise InputError(
            f"The budget of {budget} bytes cannot be met with what the options require and exclude: the smallest "
            f"possible total is {int(cost[smallest].sum())} bytes; ask for at least that."
        )
    if terms and not rows:
        found = _exchanged(found, cost, loss, scope, budget, terms)
    chosen = Allocation.of([options[place] for place in found], proven)
    return replace(chosen, loss=chosen.loss + pair_loss(chosen.choices, pairs))


def pair_loss(choices: Mapping[str, Option], pairs: Pairs) -> float:
    """What the pairs add to the loss of an allocation."""
    keys = {option.key for option in choices.values()}
    return math.fsum(value for (a, b), value in pairs.items() if a in keys and b in keys)


def _exchanged(
    found: Integers, cost: Integers, loss: np.ndarray, scope: Integers, budget: int, terms: dict[tuple[int, int], float]
) -> Integers:
    """Exchange single options while that lowers the loss within the budget: where the node limit stopped the search."""
    coupled = np.zeros((len(cost), len(cost)))
    for (a, b), value in terms.items():
        coupled[a, b] += value
        coupled[b, a] += value
    found = found.copy()
    for _ in range(_EXCHANGES):
        slack = budget - int(cost[found].sum())
        field = loss + coupled[:, found].sum(1) - coupled[np.arange(len(cost)), found[scope]]
        gain = np.where(cost - cost[found][scope] <= slack, field[found][scope] - field, 0.0)
        best = int(gain.argmax())
        if gain[best] <= 1e-12 * float(np.abs(loss).max()):
            break
        found[scope[best]] = best
    return found


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
    terms: Mapping[tuple[int, int], float] | None = None,
) -> tuple[Integers | None, bool]:
    """(scopes,) positions of the chosen options, None if none was found; and whether they are proven best.

    Args:
        rows: further constraints: coefficients by option, and what their sum is at most.
        terms: what two options add to the loss together.
    """
    scopes = int(scope[-1]) + 1
    places = np.arange(len(cost))
    start = np.searchsorted(scope, np.arange(scopes))
    together = _together(scope, start, terms or {})
    size = len(cost) + len(together)
    one_each = csr_array((np.ones(len(cost)), (scope, places)), shape=(scopes, size))
    least = np.minimum.reduceat(loss, start)
    above = loss - least[scope]
    objective = np.concatenate([above, [value for _, _, value in together]])
    objective *= _SCALE / (float(np.abs(objective).max()) or 1.0)
    cheapest = np.minimum.reduceat(cost, start)
    extra = np.append((cost - cheapest[scope]).astype(float), np.zeros(len(together)))
    capacity = float(budget - int(cheapest.sum()))
    if capacity < 0:
        return None, True
    unit = _SCALE / max(float(extra.max()), 1.0)
    limits = [LinearConstraint(one_each, 1, 1)]
    if rows:
        coefficients = [(row, place, value) for row, (entry, _) in enumerate(rows) for place, value in entry.items()]
        row, column, value = zip(*coefficients)
        limits.append(
            LinearConstraint(csr_array((value, (row, column)), shape=(len(rows), size)), -np.inf, [r[1] for r in rows])
        )
    if together:
        limits.append(LinearConstraint(_marginals(scope, together, size), 0, 0))
    for _ in range(_ATTEMPTS):
        with _silence():
            answer = milp(
                objective,
                constraints=[*limits, LinearConstraint(csr_array(extra[None] * unit), -np.inf, capacity * unit)],
                integrality=np.append(np.ones(len(cost)), np.zeros(len(together))),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0, "node_limit": PAIR_NODE_LIMIT if together else NODE_LIMIT},
            )
        if answer.x is None:
            return None, answer.status == 2
        chosen = answer.x[: len(cost)] > 0.5  # exactly one per scope: the solver's integers are within 1e-6
        found = places[chosen]
        over = float(cost[found].sum()) - budget
        if over <= 0:
            return found, answer.status == 0
        capacity -= over  # the solver's tolerance on the budget row let a few bytes through
    return None, False


def _together(scope: Integers, start: Integers, terms: Mapping[tuple[int, int], float]) -> list[tuple[int, int, float]]:
    """A variable for every two options of every two scopes that interact: their places and what they add."""
    ends = np.append(start[1:], len(scope))
    values: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for (a, b), value in terms.items():
        if scope[a] == scope[b]:
            continue  # never chosen together
        a, b = (a, b) if scope[a] < scope[b] else (b, a)
        found = values.setdefault((int(scope[a]), int(scope[b])), {})
        found[a, b] = found.get((a, b), 0.0) + value
    return [
        (a, b, found.get((a, b), 0.0))
        for (first, second), found in sorted(values.items())
        for a in range(start[first], ends[first])
        for b in range(start[second], ends[second])
    ]


def _marginals(scope: Integers, together: list[tuple[int, int, float]], size: int) -> csr_array:
    """Rows that are 0 where the pairs of an option with all of another scope's sum to the option's own variable."""
    index: dict[tuple[int, int], int] = {}
    entries: list[tuple[int, int, float]] = []
    for number, (a, b, _) in enumerate(together):
        for place, other in ((a, b), (b, a)):
            key = (place, int(scope[other]))
            if key not in index:
                index[key] = len(index)
                entries.append((index[key], place, -1.0))
            entries.append((index[key], len(scope) + number, 1.0))
    row, column, value = zip(*entries)
    return csr_array((value, (row, column)), shape=(len(index), size))
