"""What a search saw: the least loss at every size, one choice everywhere, and the smallest total for a given loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from slimwright.search.options import Allocation, Table
from slimwright.search.relaxation import Fronts, hull_steps

POINTS = 64
"""Points of a curve at most."""

HALVINGS = 12


def curve(table: Table, rest: int = 0) -> list[tuple[int, float]]:
    """Points (bytes, least loss) of the lower convex hull of all allocations, ascending in bytes: where the table's
    linear relaxation has whole options, so each is an allocation that exists.

    Args:
        rest: bytes that every allocation takes beside its options.
    """
    fronts = Fronts.of(table)
    cheapest = fronts.start[:-1]
    cost, loss = int(fronts.cost[cheapest].sum()) + rest, float(fronts.loss[cheapest].sum())
    lower, upper, slope = hull_steps(fronts)
    order = np.argsort(-slope, kind="stable")
    costs = np.concatenate([[cost], cost + np.cumsum((fronts.cost[upper] - fronts.cost[lower])[order])])
    losses = np.concatenate([[loss], loss + np.cumsum((fronts.loss[upper] - fronts.loss[lower])[order])])
    chosen = np.unique(np.linspace(0, len(costs) - 1, POINTS).round().astype(int))
    return [(int(costs[index]), max(0.0, float(losses[index]))) for index in chosen]


def everywhere(table: Table, rest: int = 0) -> list[tuple[str, int, float]]:
    """(label, bytes, loss) of one choice in every scope that can have it, the dearest in the others; only labels that
    most of the cost can have."""
    dearest = {scope: max(options, key=lambda option: (option.cost, -option.loss)) for scope, options in table.items()}
    whole = sum(option.cost for option in dearest.values())
    found = []
    for label in dict.fromkeys(option.label for options in table.values() for option in options):
        own = {scope: option for scope, options in table.items() for option in options if option.label == label}
        if 2 * sum(dearest[scope].cost for scope in own) < whole:
            continue
        chosen = {**dearest, **own}.values()
        found.append((label, sum(option.cost for option in chosen) + rest, sum(option.loss for option in chosen)))
    return sorted(found, key=lambda point: point[1])


def smallest_for(table: Table, loss: float, solve: Callable[[Table, int], Allocation]) -> Allocation:
    """The allocation of least cost whose loss is at most ``loss``, to within a share of 2^-12 of the range of costs;
    that of least loss where none is.

    Args:
        solve: table and budget in bytes → the allocation of least loss.
    """
    points = curve(table)
    best = solve(table, points[-1][0])
    if best.loss > loss:
        return best
    # the hull's points are allocations: one of them bounds the cost from above, its neighbour from below
    low, high = points[0][0], next(cost for cost, lost in points if lost <= loss or cost == points[-1][0])
    cheapest = solve(table, low)
    if cheapest.loss <= loss:
        return cheapest
    low = max((cost for cost, lost in points if cost < high and lost > loss), default=low)
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        found = solve(table, middle)
        if found.loss <= loss:
            best, high = found, found.cost
        else:
            low = middle
    return best if best.cost <= high else solve(table, high)
