"""What a search saw, against brute force."""

from __future__ import annotations

from itertools import product

import pytest

from slimwright.job.seen import scale, sensitivity, single_families
from slimwright.plan import Assignment
from slimwright.search import Option

SPECS = {"int4:g64": (40, 0.2), "int2:g64": (20, 1.0), "int2:g64+lowrank:r8:int4:g64": (30, 0.5), "keep": (160, 0.0)}


def options(scope: str, size: float, hurts: float) -> list[Option]:
    return [
        Option(scope, spec, int(cost * size), loss * hurts, choice=Assignment(grid=spec))
        for spec, (cost, loss) in SPECS.items()
    ]


TABLE = {"a": options("a", 1, 3.0), "b": options("b", 2, 1.0), "c": options("c", 1.5, 0.1)}


@pytest.mark.parametrize("budget", [140, 200, 400])
def test_best_of_each_family(budget: int) -> None:
    found = {name: (cost, loss) for name, cost, loss in single_families(TABLE, (), budget, rest=7)}
    for name, ranked in (("quantization alone", False), ("low rank alone", True)):
        own = [[o for o in every if o.label == "keep" or ("lowrank" in o.label) == ranked] for every in TABLE.values()]
        plans = [(sum(o.cost for o in plan), sum(o.loss for o in plan)) for plan in product(*own)]
        loss = min(loss for cost, loss in plans if cost <= budget)
        cost = min(cost for cost, lost in plans if lost == pytest.approx(loss) and cost <= budget)
        assert found[name] == (pytest.approx(cost + 7), pytest.approx(loss))


def test_a_family_that_does_not_fit_is_at_its_smallest() -> None:
    found = dict((name, (cost, loss)) for name, cost, loss in single_families(TABLE, (), 100))
    assert found["low rank alone"] == (30 + 60 + 45, pytest.approx(0.5 * 4.1))
    assert found["quantization alone"][0] <= 100
    only = {scope: [o for o in every if "lowrank" not in o.label] for scope, every in TABLE.items()}
    assert single_families(only, (), 100) == []  # nothing to compare


def test_sensitivities_are_on_one_option_near_the_budget() -> None:
    assert sensitivity(TABLE, 170) == {
        "option": "int4:g64",
        "loss": {"a": pytest.approx(0.6), "b": pytest.approx(0.2), "c": pytest.approx(0.02)},
    }
    assert sensitivity(TABLE, 95)["option"] == "int2:g64"
    assert sensitivity({"a": [o for o in TABLE["a"] if o.label == "keep"]}, 95) == {}


def test_the_scale_is_what_was_measured_over_what_was_predicted() -> None:
    searched = {"unit": "nats per token", "predicted": 0.02}
    kl = {"kl": {"value": 0.03, "low": 0.02, "high": 0.05}}
    assert scale(searched, kl) == pytest.approx({"value": 1.5, "low": 1.0, "high": 2.5})
    cosine = {"cosine_mean": {"value": 0.97, "low": 0.95, "high": 0.98}}
    assert scale(searched, cosine) == pytest.approx({"value": 1.5, "low": 1.0, "high": 2.5})
    assert scale({**searched, "unit": "relative squared error × parameters"}, kl) is None
    assert scale({**searched, "predicted": 0.0}, kl) is None
    assert scale(searched, {"accuracy": kl["kl"]}) is None and scale({}, kl) is None
