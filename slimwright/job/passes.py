"""Passes and what they may do to each other (DESIGN §1.4): each declares what it requires, gives, and breaks; the job
refuses an illegal order before work starts and checks, after every pass, all that still holds.

A *property* is a fact about the model that later passes rely on, with a check that can fail. A pass keeps every
property that it does not break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from slimwright.errors import InputError, SlimwrightError

State = TypeVar("State")


@dataclass(frozen=True)
class Pass(Generic[State]):
    """One step of a job.

    Attributes:
        name: as the user sees it.
        run: does the work on the job's state.
        requires: properties that must hold before.
        gives: properties that hold after.
        breaks: properties that no longer hold after; all others are kept.
    """

    name: str
    run: Callable[[State], None]
    requires: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()
    breaks: frozenset[str] = frozenset()


def check_order(passes: Sequence[Pass[State]], holding: frozenset[str]) -> frozenset[str]:
    """The properties that hold at the end.

    Raises:
        InputError: a pass requires what an earlier one breaks or none gives.
    """
    broken: dict[str, str] = {}
    for step in passes:
        for need in sorted(step.requires - holding):
            why = f"'{broken[need]}' breaks it" if need in broken else "no pass before it gives it"
            raise InputError(f"The pass '{step.name}' requires '{need}', but {why}: change the order.")
        broken |= dict.fromkeys(step.breaks & holding, step.name)
        holding = (holding - step.breaks) | step.gives
    return holding


def run_passes(
    passes: Sequence[Pass[State]],
    state: State,
    holding: frozenset[str],
    checks: Mapping[str, Callable[[State], str | None]],
    begin: Callable[[str], None],
) -> None:
    """Run passes in order; after each, check every property that holds.

    Args:
        holding: properties that hold at the start.
        checks: by property, a function that says what is wrong or gives None. Every property must have one.
        begin: called with the name of a pass before it runs.

    Raises:
        InputError: the order is illegal; nothing was done.
        SlimwrightError: a pass broke what it promised to keep, or did not give what it promised.
    """
    check_order(passes, holding)
    for step in passes:
        begin(step.name)
        step.run(state)
        holding = (holding - step.breaks) | step.gives
        for name in sorted(holding):
            problem = checks[name](state)
            if problem is not None:
                raise SlimwrightError(
                    f"After the pass '{step.name}', '{name}' no longer holds: {problem}. Nothing was published."
                )
