"""The curve of a table against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from slimwright.search import Option, solve_dp
from slimwright.search.curve import curve, everywhere, smallest_for


def table(seed: int, scopes: int = 4, options: int = 4) -> dict[str, list[Option]]:
    random.seed(seed)
    return {
        str(scope): [
            Option(str(scope), f"int{index}", random.randrange(1, 40), random.random() * 4) for index in range(options)
        ]
        for scope in range(scopes)
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_curve_is_the_lower_hull_of_all_allocations(seed: int) -> None:
    made = table(seed)
    every = [(sum(o.cost for o in chosen), sum(o.loss for o in chosen)) for chosen in itertools.product(*made.values())]
    points = curve(made, rest=7)
    for cost, loss in points:
        assert any(cost - 7 == own and loss == pytest.approx(lost) for own, lost in every)
    assert points[0][0] == min(cost for cost, _ in every) + 7
    assert points[-1][1] == pytest.approx(min(loss for _, loss in every))
    for cost, loss in every:  # no allocation lies below the lines between the points
        for (a, x), (b, y) in itertools.pairwise(points):
            if a <= cost + 7 <= b and b > a:
                assert loss >= x + (y - x) * (cost + 7 - a) / (b - a) - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_allocation_for_a_loss(seed: int) -> None:
    made = table(seed)
    every = [(sum(o.cost for o in chosen), sum(o.loss for o in chosen)) for chosen in itertools.product(*made.values())]
    for limit in (0.0, 1.0, 2.0, 4.0, 8.0, 99.0):
        found = smallest_for(made, limit, solve_dp)
        fits = [cost for cost, loss in every if loss <= limit]
        if fits:
            assert found.loss <= limit
            assert found.cost == min(fits)
        else:
            assert found.loss == pytest.approx(min(loss for _, loss in every))


def test_one_choice_everywhere() -> None:
    made = {
        "a": [Option("a", "int4", 4, 1.0), Option("a", "keep", 16, 0.0)],
        "b": [Option("b", "int4", 5, 2.0), Option("b", "keep", 20, 0.0)],
        "c": [Option("c", "odd", 1, 5.0), Option("c", "keep", 3, 0.0)],
    }
    assert everywhere(made, rest=10) == [("int4", 10 + 4 + 5 + 3, 3.0), ("keep", 49, 0.0)]
