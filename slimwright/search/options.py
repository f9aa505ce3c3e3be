"""Options: the ways to treat one scope, each with its cost and its loss (DESIGN §5)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slimwright.errors import InputError


@dataclass(frozen=True)
class Option:
    """One way to treat one scope.

    Attributes:
        scope: what it treats: the name of a choice group.
        label: which way, unique within the scope, e.g. ``int4:g128`` or ``keep``.
        cost: bytes on disk; exact, and additive over scopes.
        loss: what it costs in quality, additive over scopes. Without data: relative squared weight error × parameters.
        error: standard error of ``loss`` (0: exact).
        requires: keys of options of other scopes that must be chosen with it.
        excludes: keys of options of other scopes that must not be chosen with it.
        choice: what carries the option out; the search only hands it on.
    """

    scope: str
    label: str
    cost: int
    loss: float
    error: float = 0.0
    requires: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset()
    choice: Any = None

    @property
    def key(self) -> str:
        """How other options name this one in ``requires`` and ``excludes``: ``scope=label``."""
        return f"{self.scope}={self.label}"


Table = Mapping[str, list[Option]]
"""Scope → its options."""


@dataclass(frozen=True)
class Allocation:
    """One option per scope.

    Attributes:
        choices: scope → the option chosen, in the order of the table.
        cost: their summed cost in bytes.
        loss: their summed loss.
        exact: whether no other allocation within the budget is proven to have a lower loss.
    """

    choices: dict[str, Option]
    cost: int
    loss: float
    exact: bool

    @classmethod
    def of(cls, options: Iterable[Option], exact: bool) -> Allocation:
        choices = {option.scope: option for option in options}
        return cls(
            choices,
            sum(option.cost for option in choices.values()),
            math.fsum(option.loss for option in choices.values()),
            exact,
        )


def prune_dominated(options: Iterable[Option]) -> list[Option]:
    """The Pareto front: ascending cost, strictly descending loss.

    An option goes if another one costs no more and loses no more; of equal ones the first stays.
    """
    front: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.loss)):  # sorted() is stable
        if not front or option.loss < front[-1].loss:
            front.append(option)
    return front


def smallest_cost(table: Table) -> int:
    """The least total cost of any allocation, in bytes (``requires`` and ``excludes`` left aside)."""
    return sum(min(option.cost for option in options) for options in table.values())


def check_table(table: Table, budget: int) -> None:
    """Refuse what no solver can work with.

    Raises:
        InputError: a scope without options, a cost below 0, a loss that is NaN or Inf, two options of one key, or a
            budget below the smallest possible total, which is named.
    """
    for scope, options in table.items():
        if not options:
            raise InputError(f"Nothing may be done with '{scope}': the rules leave it no option.")
        labels = set()
        for option in options:
            if option.scope != scope:
                raise InputError(f"The option '{option.key}' stands in the table under the scope '{scope}'.")
            if option.label in labels:
                raise InputError(f"The option '{option.key}' stands in the table twice.")
            if option.cost < 0 or not math.isfinite(option.loss):
                raise InputError(f"The option '{option.key}' has a cost of {option.cost} and a loss of {option.loss}.")
            labels.add(option.label)
    smallest = smallest_cost(table)
    if budget < smallest:
        raise InputError(
            f"The budget of {budget} bytes cannot be met: the smallest possible total is {smallest} bytes; "
            "ask for at least that, or allow smaller options."
        )
