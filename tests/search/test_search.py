"""The solvers against brute force, their bounds, and the use of the budget."""

import itertools
import math
import os
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimwright.errors import InputError
from slimwright.search import Option, prune_dominated, search, smallest_cost, solve_dp, solve_milp

SOLVERS = pytest.mark.parametrize("solve", [solve_dp, solve_milp])


def options(scope, pairs, **more):
    return [Option(scope, f"o{i}", cost, float(loss), **more) for i, (cost, loss) in enumerate(pairs)]


def brute_force(table, budget):
    """The least loss of all allocations within the budget, honouring requires and excludes; None if there is none."""
    best = None
    for chosen in itertools.product(*table.values()):
        keys = {option.key for option in chosen}
        if sum(option.cost for option in chosen) > budget:
            continue
        if any(not option.requires <= keys or option.excludes & keys for option in chosen):
            continue
        loss = math.fsum(option.loss for option in chosen)
        best = loss if best is None else min(best, loss)
    return best


def model_table(scopes, grids, seed):
    """Options like those of a quantized model: a few shapes, losses that fall by four per bit, and `keep`."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(1, 40, 6) * 2**18
    table = {}
    for index in range(scopes):
        parameters = int(rng.choice(shapes))
        weight = parameters * math.exp(rng.normal())
        bits = 2 + 6.5 * np.arange(grids) / (grids - 1)
        pairs = [(parameters * round(16 * b) // 128, weight * 4**-b * math.exp(0.3 * rng.normal())) for b in bits]
        table[f"s{index}"] = options(f"s{index}", [*pairs, (2 * parameters, 0.0)])
    return table


small_tables = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=1, max_size=4), min_size=1, max_size=5
).map(lambda rows: {f"s{i}": options(f"s{i}", pairs) for i, pairs in enumerate(rows)})


@SOLVERS
@settings(max_examples=100, deadline=None, derandomize=True)
@given(table=small_tables, extra=st.integers(0, 60))
def test_equals_brute_force(solve, table, extra):
    budget = smallest_cost(table) + extra
    found = solve(table, budget)
    assert found.exact
    assert list(found.choices) == list(table)
    assert all(option in table[scope] for scope, option in found.choices.items())
    assert found.cost == sum(option.cost for option in found.choices.values()) <= budget
    assert found.loss == pytest.approx(brute_force(table, budget), abs=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(table=small_tables, extra=st.integers(0, 60), states=st.integers(1, 4))
def test_buckets_never_exceed_the_budget_and_leave_no_single_upgrade(table, extra, states):
    budget = smallest_cost(table) + extra
    found = solve_dp(table, budget, max_states=states)
    assert found.cost <= budget
    best = brute_force(table, budget)
    assert found.loss >= best - 1e-9
    assert not found.exact or found.loss == pytest.approx(best, abs=1e-9)
    for scope, chosen in found.choices.items():
        for option in table[scope]:
            assert option.loss >= chosen.loss or found.cost - chosen.cost + option.cost > budget


def test_buckets_lose_no_more_than_the_rounding():
    # Losses nearly linear in cost: the bound rules little out, so that few states really lose exactness.
    rng = np.random.default_rng(3)
    table = {}
    for index in range(30):
        cost = np.sort(rng.integers(10**5, 10**8, 12))
        table[f"s{index}"] = options(f"s{index}", zip(cost.tolist(), 1e9 - cost * (1 + 0.01 * rng.random(12))))
    spread = sum(front[-1].cost - front[0].cost for front in table.values())
    budget = smallest_cost(table) + spread * 2 // 5
    exact = solve_dp(table, budget, max_states=200_000)
    assert exact.exact
    for states in (256, 4096):
        rough = solve_dp(table, budget, max_states=states)
        assert not rough.exact and rough.cost <= budget
        # Rounding each of 30 sums up by at most one bucket is the same as a budget that much smaller.
        rounded = solve_dp(table, budget - len(table) * (spread // states + 1), max_states=200_000)
        assert rounded.exact and exact.loss <= rough.loss <= rounded.loss


@settings(max_examples=60, deadline=None, derandomize=True)
@given(table=small_tables, extra=st.integers(0, 60), data=st.data())
def test_milp_honours_requires_and_excludes(table, extra, data):
    keys = sorted(option.key for front in table.values() for option in front)
    others = st.frozensets(st.sampled_from(keys), max_size=1)
    table = {
        scope: [
            Option(scope, o.label, o.cost, o.loss, requires=data.draw(others), excludes=data.draw(others) - {o.key})
            for o in front
        ]
        for scope, front in table.items()
    }
    budget = smallest_cost(table) + extra
    expected = brute_force(table, budget)
    if expected is None:
        with pytest.raises(InputError, match="require"):
            solve_milp(table, budget)
    else:
        found = solve_milp(table, budget)
        assert found.exact and found.cost <= budget
        assert found.loss == pytest.approx(expected, abs=1e-9)


def test_dp_refuses_requires():
    table = {"a": options("a", [(1, 1)], requires=frozenset({"b=o0"})), "b": options("b", [(1, 1)])}
    with pytest.raises(InputError, match=r"'a=o0' requires or excludes .* use 'milp'"):
        solve_dp(table, 10)


def test_milp_names_the_smallest_total_that_the_requirements_leave():
    table = {
        "a": [Option("a", "small", 1, 5.0, excludes=frozenset({"b=small"})), Option("a", "big", 7, 1.0)],
        "b": [Option("b", "small", 2, 5.0), Option("b", "big", 20, 1.0)],
    }
    with pytest.raises(InputError, match="smallest possible total is 9 bytes"):
        solve_milp(table, 8)
    assert solve_milp(table, 9).cost == 9


@SOLVERS
def test_infeasible_budget_names_the_smallest(solve):
    table = {"a": options("a", [(100, 1), (20, 3)]), "b": options("b", [(7, 1)])}
    with pytest.raises(InputError, match="smallest possible total is 27 bytes"):
        solve(table, 26)
    assert solve(table, 27).cost == 27


@SOLVERS
def test_best_everywhere_spends_no_more_than_it_needs(solve):
    table = {"a": options("a", [(1, 4), (5, 0), (9, 0)]), "b": options("b", [(2, 1)])}
    found = solve(table, 10**6)
    assert (found.cost, found.loss, found.exact) == (7, 1.0, True)


@SOLVERS
def test_bytes_are_not_spent_on_a_worse_option(solve):
    table = {"a": options("a", [(50, 1.0), (99, 1.5)])}
    assert solve(table, 100).cost == 50


@SOLVERS
def test_ties_go_to_the_first(solve):
    table = {"a": options("a", [(3, 1), (3, 1), (4, 1)])}
    assert solve(table, 4).choices["a"].label == "o0"


@SOLVERS
@pytest.mark.parametrize("scopes", [12, 25, 40])
@pytest.mark.parametrize("share", [0.15, 0.25, 0.4])
def test_small_models_use_99_percent(solve, scopes, share):
    for seed in range(3):
        table = model_table(scopes, 14, seed)
        budget = int(share * sum(front[-1].cost for front in table.values()))
        found = solve(table, budget)
        assert found.exact and 0.99 * budget <= found.cost <= budget


def test_large_tables_agree_and_repeat():
    table = model_table(1000, 25, 0)
    budget = int(0.2 * sum(front[-1].cost for front in table.values()))
    dp, milp = solve_dp(table, budget), solve_milp(table, budget)
    assert dp.exact and milp.exact
    assert milp.loss == pytest.approx(dp.loss, rel=1e-9)
    assert 0.9999 * budget < dp.cost <= budget
    assert solve_dp(table, budget) == dp
    assert solve_milp(table, budget) == milp


def test_milp_writes_nothing_to_stdout():
    table = model_table(200, 25, 1)
    budget = int(0.16 * sum(front[-1].cost for front in table.values()))
    saved = os.dup(1)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 1)
        try:
            solve_milp(table, budget)
            os.write(1, b"after")
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        output.seek(0)
        assert output.read() == b"after"


@pytest.mark.parametrize("big", [10**10, 10**13])
@SOLVERS
def test_huge_costs_stay_exact(solve, big):
    table = {f"s{i}": options(f"s{i}", [(big + i, 3.0), (2 * big + 7 * i, 1.0 + i / 8)]) for i in range(8)}
    budget = smallest_cost(table) + 4 * big + 60
    found = solve(table, budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(brute_force(table, budget))


def test_prune_dominated():
    front = prune_dominated(options("a", [(5, 2), (1, 9), (5, 2), (3, 9), (7, 2), (8, 1), (4, 3)]))
    assert [(option.label, option.cost) for option in front] == [("o1", 1), ("o6", 4), ("o0", 5), ("o5", 8)]


@SOLVERS
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": []}, "Nothing may be done with 'a'"),
        ({"a": options("a", [(1, math.nan)])}, "loss of nan"),
        ({"a": options("a", [(1, math.inf)])}, "loss of inf"),
        ({"a": options("a", [(-1, 0)])}, "cost of -1"),
        ({"a": options("b", [(1, 0)])}, "under the scope 'a'"),
        ({"a": options("a", [(1, 0)]) * 2}, "twice"),
    ],
)
def test_bad_tables(solve, table, message):
    with pytest.raises(InputError, match=message):
        solve(table, 100)


def test_search_by_name():
    table = {"a": options("a", [(1, 2), (2, 1)])}
    assert search(table, 2) == search(table, 2, solver="milp")
    assert search({}, 0).choices == {}
    with pytest.raises(InputError, match="did you mean 'milp'"):
        search(table, 2, solver="mlip")
