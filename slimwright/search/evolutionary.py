"""Evolutionary search on measured losses (EvoPress, card #253): no loss is assumed to add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimwright.methods.registry import knob
from slimwright.search.dp import solve_dp
from slimwright.search.options import Allocation, Option, check_table, prune_dominated
from slimwright.search.solver import BudgetSolver, Problem

_TRIES = 40
"""Mutations that are drawn for one offspring that is not known yet."""

State = tuple[int, ...]
"""The place of each scope's option on its front."""


@dataclass(frozen=True)
class Evolutionary(BudgetSolver):
    """A (1 + λ) search: offspring by level switches within the budget, selected in two stages on measured loss.

    A switch raises one scope by one option of its front and lowers others until the budget holds, up to
    ``max_mutations`` times (the smaller of two draws); what bytes are left then raise scopes that were not lowered.
    Offspring are ranked on few tokens, the survivors and the parent on more, all drawn anew in every generation. Where
    the card starts from uniform levels, this starts from the best allocation of the loss estimate unless asked.
    """

    name = "evolutionary"
    paper = "EvoPress (#253)"
    generations: int = knob(20, low=0, high=10_000, help="rounds of selection")
    offspring: int = knob(16, low=0, high=4_096, help="candidates of a generation")
    survivors: int = knob(3, low=1, high=256, help="candidates that reach the second stage")
    tokens_first: int = knob(2_048, low=1, help="tokens of the first stage")
    tokens_last: int = knob(8_192, low=1, help="tokens of the second stage")
    max_mutations: int = knob(3, low=1, high=64, help="level switches of an offspring at most")
    start: str = knob("estimate", choices=("estimate", "uniform"), help="the first parent")

    @property
    def evaluations(self) -> int:
        return self.generations * (self.offspring + self._finalists) if self.offspring else 0

    @property
    def _finalists(self) -> int:
        return min(self.survivors, self.offspring) + 1

    def tokens(self, available: int) -> int:
        if not self.offspring:
            return 0
        first, last = min(self.tokens_first, available), min(self.tokens_last, available)
        return self.generations * (self.offspring * first + self._finalists * last)

    def allocate(self, problem: Problem) -> Allocation:
        table, budget = problem.table, problem.budget
        check_table(table, budget)
        fronts = [prune_dominated(options) for options in table.values()]
        parent = self._first(problem, fronts)
        if self.evaluations:
            evaluate = problem.evaluate
            assert evaluate is not None
            rng = np.random.default_rng(problem.seed)
            for generation in range(self.generations):
                offspring = self._offspring(parent, fronts, budget, rng)
                if not offspring:
                    break
                first, last = 2 * generation + 1, 2 * generation + 2
                losses = [evaluate(_choices(fronts, state), self.tokens_first, first) for state in offspring]
                best = [offspring[index] for index in np.argsort(losses, kind="stable")[: self.survivors]]
                finalists = [parent, *best]  # of equals the parent stays
                losses = [evaluate(_choices(fronts, state), self.tokens_last, last) for state in finalists]
                parent = finalists[int(np.argmin(losses))]
        return Allocation.of(_choices(fronts, parent).values(), exact=False)

    def _first(self, problem: Problem, fronts: Sequence[Sequence[Option]]) -> State:
        if self.start == "estimate":
            chosen = solve_dp(problem.table, problem.budget).choices
            return tuple(
                next(place for place, option in enumerate(front) if option.label == chosen[front[0].scope].label)
                for front in fronts
            )
        shares = sorted({option.cost / max(1, front[-1].cost) for front in fronts for option in front})
        state = tuple(0 for _ in fronts)
        for share in shares:
            found = tuple(
                max((i for i, option in enumerate(front) if option.cost <= share * front[-1].cost), default=0)
                for front in fronts
            )
            if _cost(fronts, found) > problem.budget:
                break
            state = found
        return state

    def _offspring(
        self, parent: State, fronts: Sequence[Sequence[Option]], budget: int, rng: np.random.Generator
    ) -> list[State]:
        """States that differ from the parent and each other, all within the budget; fewer where few are found."""
        found: dict[State, None] = {}
        for _ in range(_TRIES * self.offspring):
            if len(found) == self.offspring:
                break
            switches = int(rng.integers(1, self.max_mutations + 1, 2).min())
            state = parent
            for _ in range(switches):
                state = _switched(state, fronts, budget, rng)
            if state != parent:
                found[state] = None
        return list(found)


def _choices(fronts: Sequence[Sequence[Option]], state: State) -> dict[str, Option]:
    return {front[place].scope: front[place] for front, place in zip(fronts, state, strict=True)}


def _cost(fronts: Sequence[Sequence[Option]], state: Sequence[int]) -> int:
    return sum(front[place].cost for front, place in zip(fronts, state, strict=True))


def _switched(state: State, fronts: Sequence[Sequence[Option]], budget: int, rng: np.random.Generator) -> State:
    """One scope raised, others lowered until the budget holds, and what bytes are left spent."""
    places = list(state)
    up = [scope for scope, place in enumerate(places) if place + 1 < len(fronts[scope])]
    if not up:
        return state
    raised = up[int(rng.integers(len(up)))]
    places[raised] += 1
    cost = _cost(fronts, places)
    lowered = set()
    while cost > budget:
        down = [scope for scope, place in enumerate(places) if place and scope != raised]
        if not down:
            return state
        scope = down[int(rng.integers(len(down)))]
        cost -= fronts[scope][places[scope]].cost - fronts[scope][places[scope] - 1].cost
        places[scope] -= 1
        lowered.add(scope)
    for scope in rng.permutation(len(places)).tolist():
        if scope in lowered or places[scope] + 1 == len(fronts[scope]):
            continue
        more = fronts[scope][places[scope] + 1].cost - fronts[scope][places[scope]].cost
        if cost + more <= budget:
            places[scope] += 1
            cost += more
    return tuple(places)
