"""The multiple-choice knapsack by dynamic programming over sparse lists of undominated states."""

from __future__ import annotations

import numpy as np

from slimwright.errors import InputError
from slimwright.search.options import Allocation, Table, check_table
from slimwright.search.relaxation import Core, Fronts, Integers, improve, reduce_table

MAX_STATES = 8192


def solve_dp(table: Table, budget: int, max_states: int = MAX_STATES) -> Allocation:
    """One option per scope, least total loss, total cost at most ``budget``.

    Scopes are added one after another to a list of states (total cost, total loss) from which dominated states, and
    states that the Lagrangian bound rules out, are removed. While the list stays within ``max_states`` the result is
    exact. Above it the costs are divided into ``max_states`` buckets, and each bucket keeps its state of least loss,
    which stands for the others at its own, higher cost: costs are only ever rounded up, so the budget is not exceeded.
    Real costs are kept throughout; a last pass spends the slack that the rounding left (:func:`improve`).

    Bytes are spent only where they lower the loss. If the last percent of the budget cannot do so (every scope is
    at its best option, or no better one fits), it stays unused rather than going to an option that is no better.
    Ties go to the smaller cost, then to the option that comes first in the table.

    Args:
        table: scope → options.
        budget: bytes.
        max_states: memory and time grow with it; about 6 bytes a state and scope.

    Raises:
        InputError: see :func:`check_table`; or an option requires or excludes others, which only the MILP handles.
    """
    check_table(table, budget)
    for options in table.values():
        for option in options:
            if option.requires or option.excludes:
                raise InputError(
                    f"The option '{option.key}' requires or excludes others, which 'dp' cannot solve: use 'milp'."
                )
    if not table:
        return Allocation({}, 0, 0.0, True)
    fronts = Fronts.of(table)
    if int(fronts.cost[fronts.best].sum()) <= budget:
        return Allocation.of(fronts.chosen(fronts.best), exact=True)
    core = reduce_table(fronts, budget)
    if core.closed:
        return Allocation.of(fronts.chosen(core.picks), exact=True)
    picks, exact = _walk(fronts, core, budget, max_states)
    if not exact:
        picks = min((improve(fronts, picks, budget), core.picks), key=lambda found: float(fronts.loss[found].sum()))
    return Allocation.of(fronts.chosen(picks), exact)


def _walk(fronts: Fronts, core: Core, budget: int, max_states: int) -> tuple[Integers, bool]:
    """The best final state, as picks, and whether no state was merged into another on the way."""
    scopes = len(fronts.start) - 1
    still_open = [np.flatnonzero(core.open[a:b]) + a for a, b in zip(fronts.start[:-1], fronts.start[1:])]
    low = np.array([fronts.cost[options[0]] for options in still_open])
    high = np.array([fronts.cost[options[-1]] for options in still_open])
    order = np.argsort(low - high, kind="stable")  # wide scopes first: the fine ones fill what they leave
    rest_low = np.append(np.cumsum(low[order][::-1])[::-1], 0)
    rest_high = np.append(np.cumsum(high[order][::-1])[::-1], 0)

    cost, excess = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    exact = True
    for step, scope in enumerate(order):
        options = still_open[scope]
        states = len(cost)
        # Option-major: one ascending run of costs per option, which the stable sort merges.
        new_cost = (fronts.cost[options][:, None] + cost[None]).ravel()
        new_excess = (core.excess[options][:, None] + excess[None]).ravel()
        unused = np.maximum(budget - new_cost - rest_high[step + 1], 0)
        keep = new_cost + rest_low[step + 1] <= budget
        keep &= new_excess + core.multiplier * unused <= core.gap
        kept = np.flatnonzero(keep)
        kept = kept[np.argsort(new_cost[kept], kind="stable")]
        loss = new_excess[kept] - core.multiplier * new_cost[kept]
        front = np.ones(len(kept), bool)
        front[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
        kept = kept[front]
        last = np.ones(len(kept), bool)  # of equal costs the last kept has the least loss
        last[:-1] = new_cost[kept][1:] != new_cost[kept][:-1]
        kept = kept[last]
        if len(kept) > max_states:
            exact = False
            first = new_cost[kept[0]]
            width = (new_cost[kept[-1]] - first) // max_states + 1
            bucket = (new_cost[kept] - first) // width
            kept = kept[np.append(bucket[1:] != bucket[:-1], True)]  # within a bucket the last has the least loss
        cost, excess = new_cost[kept], new_excess[kept]
        steps.append(((kept % states).astype(np.int32), (kept // states).astype(np.int16)))
    if not len(cost):  # every state was merged into one that no longer fits
        return core.picks, exact
    state = int(np.argmin(excess - core.multiplier * cost))
    picks = np.zeros(scopes, np.int64)
    for scope, (parent, option) in zip(order[::-1], reversed(steps)):
        picks[scope] = still_open[scope][option[state]]
        state = parent[state]
    return picks, exact
