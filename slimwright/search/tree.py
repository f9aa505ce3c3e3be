"""Options that void others: the table as a tree of blocks, sublayers and groups, of which each node may be dropped.

A node's options are those of everything in it together, or its drop. Their fronts are joined from the leaves up, so
that any solver of plain tables can choose among them; with what it dropped fixed, the groups that are left are then
solved once more by themselves. Exact where no joined front is thinned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimwright.search.options import Allocation, Option, Table, prune_dominated

JOINED = 512
"""Points of a joined front; a larger one is thinned to evenly spaced ones."""

DROP = "drop"
"""Label of the option that voids everything inside a node."""


@dataclass(frozen=True)
class Node:
    """A part of a model that may be dropped as a whole.

    Attributes:
        drop: the option to drop it, whose scope is the node's name; its cost is what stays of it.
        scopes: scopes of the table that lie in it, but in none of its children.
        children: parts of it that may be dropped by themselves.
        kept: bytes of what leaves no choice in it, but in none of its children.
    """

    drop: Option
    scopes: tuple[str, ...]
    children: tuple[Node, ...] = ()
    kept: int = 0

    def inside(self) -> tuple[str, ...]:
        """All scopes in it."""
        return (*self.scopes, *(scope for child in self.children for scope in child.inside()))


def all_nodes(nodes: Sequence[Node]) -> list[Node]:
    """The nodes and everything in them, outermost first."""
    return [inner for node in nodes for inner in (node, *all_nodes(node.children))]


@dataclass(frozen=True, eq=False)
class _Front:
    """A Pareto front: costs rise, losses fall; ``options`` gives what a point is made of."""

    cost: np.ndarray
    loss: np.ndarray
    options: Callable[[int], tuple[Option, ...]]

    @classmethod
    def of(cls, options: Sequence[Option]) -> _Front:
        front = prune_dominated(options)
        return cls(
            np.array([o.cost for o in front], dtype=np.int64),
            np.array([o.loss for o in front]),
            lambda point: (front[point],),
        )

    def joined(self, other: _Front) -> _Front:
        """Every pair of points, pruned."""
        cost = (self.cost[:, None] + other.cost).ravel()
        loss = (self.loss[:, None] + other.loss).ravel()
        order, width = _undominated(cost, loss), len(other.cost)
        return _Front(
            cost[order],
            loss[order],
            lambda point: (*self.options(order[point] // width), *other.options(order[point] % width)),
        )

    def beside(self, other: _Front) -> _Front:
        """The points of both, pruned."""
        cost, loss = np.append(self.cost, other.cost), np.append(self.loss, other.loss)
        order, mine = _undominated(cost, loss), len(self.cost)
        return _Front(
            cost[order],
            loss[order],
            lambda point: self.options(order[point]) if order[point] < mine else other.options(order[point] - mine),
        )


def _undominated(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the front, thinned where it is long; its ends stay."""
    order = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[order])
    first = np.append(True, loss[order][1:] < least[:-1])
    order = order[first]
    if len(order) > JOINED:
        order = order[np.unique(np.linspace(0, len(order) - 1, JOINED).round().astype(np.int64))]
    return order


def _front(node: Node, table: Table) -> _Front:
    whole = _Front(np.array([node.kept], dtype=np.int64), np.zeros(1), lambda point: ())
    for scope in node.scopes:
        whole = whole.joined(_Front.of(table[scope]))
    for child in node.children:
        whole = whole.joined(_front(child, table))
    return _Front.of([node.drop]).beside(whole)  # of equals the drop: it leaves a model of less parts


def reduced(table: Table, nodes: Sequence[Node]) -> dict[str, list[Option]]:
    """A plain table with one scope for each node; ``choice`` of its options is the options that they stand for."""
    inside = {scope for node in nodes for scope in node.inside()}
    found = {scope: options for scope, options in table.items() if scope not in inside}
    for node in nodes:
        front = _front(node, table)
        found[node.drop.scope] = [
            Option(node.drop.scope, str(point), int(cost), float(loss), choice=front.options(point))
            for point, (cost, loss) in enumerate(zip(front.cost, front.loss))
        ]
    return found


def smallest_tree_cost(table: Table, nodes: Sequence[Node]) -> int:
    """The least total cost of any allocation, in bytes."""

    def least(scopes: Sequence[str], children: Sequence[Node], kept: int) -> int:
        whole = kept + sum(min(option.cost for option in table[scope]) for scope in scopes)
        return whole + sum(min(least(n.scopes, n.children, n.kept), n.drop.cost) for n in children)

    inside = {scope for node in nodes for scope in node.inside()}
    return least([scope for scope in table if scope not in inside], nodes, 0)


def search_tree(
    table: Table, nodes: Sequence[Node], budget: int, solve: Callable[[Table, int], Allocation]
) -> Allocation:
    """Choose what is dropped and one option for every scope that is left: least total loss, total cost at most
    ``budget`` bytes.

    Args:
        table: scope → options, those inside nodes too.
        nodes: what may be dropped, outermost first.
        solve: of plain tables.

    Returns:
        Its ``choices`` have the drops under the names of their nodes, and no voided scope.

    Raises:
        InputError: what ``solve`` refuses.
    """
    if not nodes:
        return solve(table, budget)
    joined = reduced(table, nodes)
    first = solve(joined, budget)
    names = {node.drop.scope for node in nodes}
    chosen: list[Option] = []
    for scope, option in first.choices.items():
        chosen += option.choice if scope in names else [option]
    drops = [option for option in chosen if option.label == DROP and option.scope not in table]
    left = {option.scope for option in chosen} & table.keys()
    kept = first.cost - sum(option.cost for option in chosen)
    again = solve(
        {scope: options for scope, options in table.items() if scope in left},
        budget - kept - sum(option.cost for option in drops),
    )
    before = math.fsum(option.loss for option in chosen if option.scope in left)
    if again.loss < before:
        chosen = [*drops, *again.choices.values()]
    order: Mapping[str, int] = {scope: place for place, scope in enumerate(table)}
    chosen.sort(key=lambda option: order.get(option.scope, len(order)))
    return Allocation(
        {option.scope: option for option in chosen},
        kept + sum(option.cost for option in chosen),
        math.fsum(option.loss for option in chosen),
        first.exact and all(len(options) < JOINED for options in joined.values()),
    )
