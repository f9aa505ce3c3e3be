"""Passes: an illegal order is refused before work, and a pass that breaks what it promised to keep is found."""

from __future__ import annotations

import pytest

from slimwright.errors import InputError, SlimwrightError
from slimwright.job.passes import Pass, check_order, run_passes

State = dict[str, bool]
CHECKS = {name: (lambda state, name=name: None if state[name] else f"no {name}") for name in ("dense", "ties", "files")}


def quantize(state: State) -> None:
    state["dense"], state["files"] = False, True


def one(name: str = "quantize", run=quantize) -> Pass[State]:  # type: ignore[no-untyped-def]
    return Pass(name, run, requires=frozenset({"dense"}), gives=frozenset({"files"}), breaks=frozenset({"dense"}))


def ready() -> State:
    return {"dense": True, "ties": True, "files": False}


def test_a_legal_order_runs_and_keeps_what_it_does_not_break() -> None:
    state, seen = ready(), []
    run_passes([one()], state, frozenset({"dense", "ties"}), CHECKS, seen.append)
    assert seen == ["quantize"] and state["files"]
    assert check_order([one()], frozenset({"dense", "ties"})) == {"ties", "files"}


def test_what_an_earlier_pass_breaks_is_named_before_any_work() -> None:
    state, seen = ready(), []
    with pytest.raises(InputError, match="'prune' requires 'dense', but 'quantize' breaks it"):
        run_passes([one(), one("prune")], state, frozenset({"dense", "ties"}), CHECKS, seen.append)
    assert seen == [] and state == ready()


def test_what_no_pass_gives_is_named() -> None:
    publish = Pass("publish", quantize, requires=frozenset({"verified"}))
    with pytest.raises(InputError, match="'publish' requires 'verified', but no pass before it gives it"):
        check_order([publish], frozenset({"dense"}))


def test_a_pass_that_breaks_what_it_keeps_fails_the_job() -> None:
    def untie(state: State) -> None:
        quantize(state)
        state["ties"] = False

    with pytest.raises(SlimwrightError, match="After the pass 'quantize', 'ties' no longer holds: no ties"):
        run_passes([one(run=untie)], ready(), frozenset({"dense", "ties"}), CHECKS, lambda name: None)


def test_a_pass_that_does_not_give_what_it_promised_fails_the_job() -> None:
    with pytest.raises(SlimwrightError, match="'files' no longer holds"):
        run_passes([one(run=lambda state: None)], ready(), frozenset({"dense", "ties"}), CHECKS, lambda name: None)
