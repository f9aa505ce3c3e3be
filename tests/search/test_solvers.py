"""Solvers beyond the exact two: against brute force, the closed form of equal slopes, and an additive fitness."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimwright.errors import InputError
from slimwright.search import SOLVERS, Option, check_solver, search, smallest_cost, solve_dp
from slimwright.search.closed_form import Curve, ideal_costs
from tests.search.test_search import brute_force, model_table, options, small_tables

HEURISTIC = {"closed-form", "evolutionary"}


def summed(choices, tokens, draw):
    return math.fsum(option.loss for option in choices.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(table=small_tables, extra=st.integers(0, 60), solver=st.sampled_from(sorted(SOLVERS)))
def test_every_solver_against_brute_force(table, extra, solver):
    budget = smallest_cost(table) + extra
    found = search(table, budget, solver, evaluate=summed)
    best = brute_force(table, budget)
    assert found.cost == sum(option.cost for option in found.choices.values()) <= budget
    assert (
        all(option in table[scope] for scope, option in found.choices.items()) and found.choices.keys() == table.keys()
    )
    assert found.loss >= best - 1e-9
    if SOLVERS[solver].exact:
        assert found.exact and found.loss == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(table=small_tables, extra=st.integers(0, 60), data=st.data())
def test_milp_weighs_pairs(table, extra, data):
    keys = sorted(option.key for front in table.values() for option in front)
    key = st.sampled_from(keys)
    drawn = data.draw(st.dictionaries(st.tuples(key, key), st.integers(-15, 15).map(float), max_size=8))
    pairs = {(a, b): value for (a, b), value in drawn.items() if a.split("=")[0] != b.split("=")[0]}
    budget = smallest_cost(table) + extra

    def total(chosen):
        names = {option.key for option in chosen}
        return sum(o.loss for o in chosen) + sum(v for (a, b), v in pairs.items() if {a, b} <= names)

    plans = [c for c in itertools.product(*table.values()) if sum(o.cost for o in c) <= budget]
    found = search(table, budget, "milp", pairs=pairs)
    assert found.cost <= budget and found.exact
    assert found.loss == pytest.approx(min(map(total, plans)), abs=1e-6)
    assert found.loss == pytest.approx(total(found.choices.values()), abs=1e-9)


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"milp"}))
def test_others_refuse_pairs_and_rules(solver):
    table = {"a": options("a", [(1, 1)]), "b": options("b", [(1, 1)])}
    with pytest.raises(InputError, match="act together: use 'milp'"):
        search(table, 10, solver, pairs={("a=o0", "b=o0"): 1.0}, evaluate=summed)
    table["a"] = options("a", [(1, 1)], requires=frozenset({"b=o0"}))
    with pytest.raises(InputError, match="requires or excludes others"):
        search(table, 10, solver, evaluate=summed)


def test_closed_form_is_the_cards_formula():
    # R_j = R + ½ log2(c_j / GM(c)) for equal sizes and a loss c 4^-R: the card's step 2.
    rng = np.random.default_rng(0)
    weights = 4096
    c = np.exp(rng.normal(0, 1, 9))
    fronts = [
        [Option(f"s{i}", f"o{bits}", weights * bits // 8, c[i] * 4.0**-bits) for bits in range(1, 16)] for i in range(9)
    ]
    mean = 6.0
    wanted = mean + np.log2(c / np.exp(np.log(c).mean())) / 2
    costs = ideal_costs([Curve.through(front) for front in fronts], int(9 * weights * mean / 8))
    np.testing.assert_allclose(np.array(costs) * 8 / weights, wanted, atol=0.01)


def test_closed_form_fills_what_clipping_leaves():
    # The first scope would want fewer bits than there are: the others share what is left by the same formula.
    c = np.array([1e-6, 1.0, 4.0])
    fronts = [[Option(f"s{i}", f"o{b}", b * 1000, c[i] * 4.0**-b) for b in range(2, 10)] for i in range(3)]
    costs = ideal_costs([Curve.through(front) for front in fronts], 12_000)
    np.testing.assert_allclose(np.array(costs) / 1000, [2, 4.5, 5.5], atol=0.01)


@pytest.mark.parametrize("scopes", [12, 40])
def test_closed_form_is_near_the_optimum(scopes):
    for seed in range(3):
        table = model_table(scopes, 14, seed)
        budget = int(0.25 * sum(front[-1].cost for front in table.values()))
        best, found = solve_dp(table, budget), search(table, budget, "closed-form")
        assert best.loss <= found.loss <= 1.6 * best.loss
        assert 0.98 * budget <= found.cost <= budget


def test_rate_distortion_loses_no_more_than_its_buckets():
    table = model_table(30, 14, 1)
    budget = int(0.25 * sum(front[-1].cost for front in table.values()))
    found = search(table, budget, "rate-distortion,buckets=2000")
    spare = budget - smallest_cost(table)
    assert not found.exact and found.cost <= budget
    assert solve_dp(table, budget).loss <= found.loss
    assert found.loss <= solve_dp(table, budget - len(table) * (spare // 2000 + 1)).loss


def test_evolution_converges_on_an_additive_fitness():
    table = model_table(6, 5, 2)
    budget = int(0.3 * sum(front[-1].cost for front in table.values()))
    best = brute_force(table, budget)
    uniform = search(table, budget, "evolutionary,start=uniform,offspring=0")
    assert uniform.loss > 1.05 * best and uniform.cost <= budget
    found = search(table, budget, "evolutionary,start=uniform,generations=60", evaluate=summed)
    assert found.loss == pytest.approx(best)
    assert search(table, budget, "evolutionary,start=uniform,generations=60", evaluate=summed) == found


def test_evolution_evaluates_no_more_than_it_declares():
    table = model_table(8, 6, 3)
    budget = int(0.3 * sum(front[-1].cost for front in table.values()))
    seen = []

    def evaluate(choices, tokens, draw):
        seen.append((tokens, draw))
        assert sum(option.cost for option in choices.values()) <= budget
        return summed(choices, tokens, draw)

    spec = "evolutionary,generations=5,offspring=7,survivors=2,tokens_first=100,tokens_last=400"
    search(table, budget, spec, evaluate=evaluate)
    solver = check_solver(spec)
    assert len(seen) == solver.evaluations == 5 * (7 + 3)
    assert sum(tokens for tokens, _ in seen) == solver.tokens(10**6)
    assert len({draw for _, draw in seen}) == 10 and solver.tokens(50) == 50 * 50


def test_evolution_follows_what_is_measured_not_the_table():
    # Measured, the first option of `a` is as good as its best: bytes go to `b`, which the table does not say.
    table = {"a": options("a", [(1, 9.0), (5, 0.0)]), "b": options("b", [(1, 3.0), (5, 0.0)])}
    assert solve_dp(table, 6).choices["a"].label == "o1"
    found = search(table, 6, "evolutionary", evaluate=lambda choices, *_: choices["b"].loss)
    assert {scope: option.label for scope, option in found.choices.items()} == {"a": "o0", "b": "o1"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("evolution", "did you mean 'evolutionary'"),
        ("evolutionary,generation=3", "did you mean 'generations'"),
        ("evolutionary,generations=-1", "must lie in"),
        ("dp,buckets=3", "dp has no knob 'buckets'. It has none"),
        ("rate-distortion,buckets", "not of the form knob=value"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(InputError, match=message):
        search({}, 0, spec)


def test_evolution_without_evaluations_is_refused():
    with pytest.raises(InputError, match="evaluates candidates on data"):
        search({"a": options("a", [(1, 2)])}, 2, "evolutionary")
