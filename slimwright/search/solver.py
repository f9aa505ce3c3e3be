"""What solvers of budgets share: the problem that they are given, their knobs, what some of them refuse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from slimwright.errors import InputError, did_you_mean
from slimwright.methods.registry import Method, split_spec, with_knobs
from slimwright.search.options import Allocation, Option, Table

Pairs = Mapping[tuple[str, str], float]
"""What is added to the loss where two options, named by their keys, are chosen together."""

Evaluate = Callable[[Mapping[str, Option], int, int], float]
"""The measured loss of an allocation: ``evaluate(choices, tokens, draw)``, on the ``draw``-th random choice of about
that many tokens."""

N = TypeVar("N", bound=Method)


@dataclass(frozen=True)
class Problem:
    """One option per scope, total cost within the budget, as little loss as possible.

    Attributes:
        table: scope → options.
        budget: bytes.
        pairs: what two options cost together beyond the sum of both.
        evaluate: measures an allocation; None: there is nothing to measure with.
        seed: of what is random.
    """

    table: Table
    budget: int
    pairs: Pairs = field(default_factory=dict)
    evaluate: Evaluate | None = None
    seed: int = 0


class BudgetSolver(Method):
    """Chooses one option per scope. Subclasses are frozen dataclasses whose fields are knobs."""

    family = "search"
    exact: ClassVar[bool] = False
    """Whether it finds the best allocation of a small table, proven."""
    takes_pairs: ClassVar[bool] = False
    takes_rules: ClassVar[bool] = False
    """Whether options may require or exclude each other."""

    @property
    def evaluations(self) -> int:
        """How many times it evaluates an allocation at most."""
        return 0

    def tokens(self, available: int) -> int:
        """Tokens of all its evaluations together at most, where ``available`` tokens are there."""
        return 0

    @abstractmethod
    def allocate(self, problem: Problem) -> Allocation:
        """Solve a problem that was checked."""

    def solve(self, problem: Problem) -> Allocation:
        """Solve a problem.

        Raises:
            InputError: the budget is too small, or the problem has what this solver does not take.
        """
        if problem.pairs and not self.takes_pairs:
            raise InputError(f"The search '{self.name}' cannot weigh how options act together: use 'milp'.")
        bound = next((o for options in problem.table.values() for o in options if o.requires or o.excludes), None)
        if bound is not None and not self.takes_rules:
            raise InputError(
                f"The option '{bound.key}' requires or excludes others, which '{self.name}' cannot solve: use 'milp'."
            )
        if self.evaluations and problem.evaluate is None:
            raise InputError(f"The search '{self.name}' evaluates candidates on data: give --data, or use 'dp'.")
        return self.allocate(problem)


def named(spec: str, known: Mapping[str, type[N]], what: str) -> N:
    """Make what ``name,knob=value,...`` names.

    Args:
        known: classes by name.
        what: the kind of thing, for messages.

    Raises:
        InputError: an unknown name or knob (with the nearest), or a knob out of its range.
    """
    name, knobs = split_spec(spec)
    if name not in known:
        raise InputError(f"Unknown {what} '{name}'{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return with_knobs(known[name], knobs)
