"""Trees of options against brute force over every way to drop and choose."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from slimwright.search import search
from slimwright.search.options import Option
from slimwright.search.tree import DROP, Node, search_tree, smallest_tree_cost


def random_table(chance: random.Random, scopes: int) -> dict[str, list[Option]]:
    table = {}
    for number in range(scopes):
        count = chance.randint(1, 3)
        table[f"g{number}"] = [
            Option(f"g{number}", str(i), chance.randint(1, 40), round(chance.uniform(0, 9), 3)) for i in range(count)
        ]
    return table


def drop(chance: random.Random, name: str) -> Option:
    return Option(name, DROP, chance.randint(0, 3), round(chance.uniform(2, 25), 3))


def ways(table: dict[str, list[Option]], node: Node) -> Iterator[tuple[int, float]]:
    """(cost, loss) of every way to treat a node."""
    yield node.drop.cost, node.drop.loss
    parts = [[(o.cost, o.loss) for o in table[scope]] for scope in node.scopes]
    parts += [list(ways(table, child)) for child in node.children]
    for picks in itertools.product(*parts):
        yield node.kept + sum(cost for cost, _ in picks), sum(loss for _, loss in picks)


@pytest.mark.parametrize("solver", ["dp", "milp"])
@pytest.mark.parametrize("seed", range(12))
def test_finds_the_best_of_all_ways(seed: int, solver: str) -> None:
    chance = random.Random(seed)
    table = random_table(chance, 6)
    nodes = [
        Node(
            drop(chance, "block"), ("g0",),
            (Node(drop(chance, "attention"), ("g1",), kept=2), Node(drop(chance, "mlp"), ("g2", "g3"), kept=1)), kept=3,
        ),
        Node(drop(chance, "other"), ("g4",), kept=2),
    ]  # fmt: skip
    outside = [(o.cost, o.loss) for o in table["g5"]]
    every = [
        (a[0] + b[0] + c[0], a[1] + b[1] + c[1])
        for a, b, c in itertools.product(ways(table, nodes[0]), ways(table, nodes[1]), outside)
    ]
    smallest = min(cost for cost, _ in every)
    assert smallest_tree_cost(table, nodes) == smallest
    for budget in (smallest, smallest + 15, smallest + 60):
        best = min(loss for cost, loss in every if cost <= budget)
        found = search_tree(table, nodes, budget, lambda plain, limit: search(plain, limit, solver))
        assert found.cost <= budget and found.loss == pytest.approx(best, abs=1e-6) and found.exact
        assert found.loss == pytest.approx(sum(option.loss for option in found.choices.values()))
        if "block" in found.choices:
            assert not {"g0", "g1", "g2", "g3", "attention", "mlp"} & found.choices.keys()
        else:
            assert ("mlp" in found.choices) != ({"g2", "g3"} <= found.choices.keys())


def test_a_whole_part_goes_before_its_halves() -> None:
    """At the same cost and loss."""
    halves = tuple(Node(Option(name, DROP, 2, 0.5), (name[0],)) for name in ("attention", "mlp"))
    table = {scope: [Option(scope, "int4", 50, 0.1)] for scope in ("a", "m")}
    found = search_tree(table, [Node(Option("block", DROP, 4, 1.0), (), halves)], 4, search)
    assert {name: option.label for name, option in found.choices.items()} == {"block": DROP}


def test_without_nodes_it_is_the_solver() -> None:
    table = random_table(random.Random(3), 4)
    assert search_tree(table, [], 200, search) == search(table, 200)
