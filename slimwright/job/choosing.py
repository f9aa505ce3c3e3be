"""The pass that scores every option and chooses the best plan that fits: a loss estimate and a solver of budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.drops import kept_bytes, with_drop_choices, with_drop_losses, with_drops, zeroed_sites
from slimwright.job.evaluator import Evaluator
from slimwright.job.losses import LossEstimate, Probed, Scored, Scoring, loss_estimate
from slimwright.job.probe import Probe
from slimwright.job.request import FitOptions
from slimwright.job.reuse import Reuse, edits_key
from slimwright.job.seen import NATS, sensitivity, single_families
from slimwright.job.state import State
from slimwright.job.targets import chosen as for_others
from slimwright.model.structure import Structure
from slimwright.plan import Edit, Plan, rounded_groups
from slimwright.search import Allocation, Option, Table, search
from slimwright.search.curve import curve, everywhere, smallest_for
from slimwright.search.tree import Node, reduced, search_tree

DATA_FREE_NATS = 6.0
"""Nats of KL that a relative squared error of 1 in every weight is taken for where a loss in nats is asked of a job
without data: a first guess (seen at 4 bits on small models), which the measured candidate then corrects."""

BY_BATCH = "losses by batch"
"""The journal's entry of what :class:`slimwright.job.losses.Probed` has."""

COMMIT_SECONDS = 2.0
"""Scores that a crash may lose."""


@dataclass(frozen=True)
class Chosen:
    """What the search found.

    Attributes:
        plan: without the paths and fingerprints that the build adds.
        source, structure: the model without what was dropped.
        searched: facts for the report.
    """

    plan: Plan
    source: Checkpoint
    structure: Structure
    searched: dict[str, Any]


class Choosing:
    """Scores and chooses.

    Args:
        asked: the request.
        state: of the job, which is read, and whose journal is added to.
        calibration: the data as batches, made when it is first asked for.
        cap: bytes of the job's memory.
        step: told of groups and evaluations done and in all.
        note: told remarks for the user.
    """

    def __init__(
        self,
        asked: FitOptions,
        state: State,
        calibration: Callable[[], Calibration],
        cap: int,
        step: Callable[[int, int], None],
        note: Callable[[str], None],
    ) -> None:
        self.asked, self.state, self.cap, self.step, self.note = asked, state, cap, step, note
        self.source, self.structure, self.journal, self.target = (
            state.source, state.structure, state.journal, state.target,
        )  # fmt: skip
        self.nodes: Sequence[Node] = self.target.nodes
        self.rest = self.target.rest
        wanted = asked.data != "none" or bool(self.nodes)
        self.calibration = calibration() if wanted else None
        self.found = {k.removeprefix("score:"): v for k, v in self.journal.done.items() if k.startswith("score:")}
        self._committed = time.monotonic()
        self._evaluator: Evaluator | None = None

    @property
    def evaluations(self) -> int:
        """That were run so far."""
        return 0 if self._evaluator is None else self._evaluator.evaluations

    def run(self) -> Chosen:
        """Score every option and choose the best that fits.

        Raises:
            InputError: an estimate that this model cannot have, or what the estimate and the solver refuse.
        """
        estimate = self._estimate()
        scored = self._scored(estimate)
        self.journal.commit()
        table, nodes = with_drop_losses(scored.table, self.nodes)
        nats = 1.0 if estimate.nats else DATA_FREE_NATS / self.structure.parameters
        allocation, target = self._allocation(table, nodes, scored, nats)
        self.journal.commit()
        beside = self.target.beside.of_choices(allocation.choices, nodes)
        limit = self.target.budget - self.rest - beside if self.asked.predicted_loss is None else allocation.cost
        searched = {
            "solver": self.asked.search,
            "loss": estimate.spec,
            "unit": NATS if estimate.nats else "relative squared error × parameters",
            "predicted": allocation.loss,
            "nats": allocation.loss * nats,
            "error": scored.error(allocation.choices.values()),
            "exact": allocation.exact,
            "evaluations": self.evaluations,
            **({} if self.asked.running is None else {"beside_bytes": beside}),
            "curve": [list(point) for point in curve(reduced(table, nodes), self.rest)],
            "everywhere": [list(point) for point in everywhere(table, self.rest + kept_bytes(nodes))],
            "families": [list(point) for point in single_families(table, nodes, limit, self.rest)],
            "sensitivity": sensitivity(table, limit),
        }
        return self._planned(allocation, table, target, searched)

    def _estimate(self) -> LossEstimate:
        """The loss estimate; what may be dropped is given up where its loss cannot be found."""
        apart = self.calibration is not None and self.calibration.apart
        estimate = loss_estimate(self.asked.loss or ("sensitivity" if apart else "weight-error"))
        if estimate.needs_walks and not apart:
            raise InputError(
                f"--loss {estimate.name} walks over the blocks, and those of this model give other outputs when they "
                "are run apart: use measured or weight-error."
            )
        if self.nodes and not apart:
            self.rest += kept_bytes(self.nodes)
            self.nodes = ()
            self.note("Nothing was dropped: what a drop costs is found block by block, and this model runs whole.")
        return estimate

    # -- losses ----------------------------------------------------------------------------------------------------

    def _scored(self, estimate: LossEstimate) -> Scored:
        options = with_drop_choices(self.target.options, self.structure, self.nodes)
        return estimate.score(
            Scoring(
                self.source, self.structure, options, self.target.budget - self.rest, dict(self.found), self._record,
                self.calibration, lambda: self._probed(options), self._evaluates,
            )
        )  # fmt: skip

    def _probed(self, options: Mapping[str, list[Option]]) -> Probed:
        """Losses of every option, from the walks or from those of an earlier job on the same data."""
        assert self.calibration is not None
        edits = edits_key(self.target.edits, self.state.scales)
        reuse = Reuse(self.source, self.calibration, self.asked.statistics_cap, self.asked.model, edits)
        kept = {group: losses for group, losses in reuse.losses(options).items() if group not in self.found}
        if kept:
            self.state.reporter.log(
                f"Losses of {len(kept)} groups are known from an earlier job on this model and data."
            )  # fmt: skip
        probe = Probe(
            self.source, self.structure, self.calibration, options, {**self.found, **kept}, self._record, reuse,
            zeroed_sites(self.nodes),
        )  # fmt: skip
        losses = probe.run()
        if probe.by_batch and BY_BATCH not in self.journal.done:
            self.journal.append(BY_BATCH, probe.by_batch)
        groups = [group for group in self.structure.choice_groups() if len(options[group]) > 1]
        reuse.keep_losses(options, {group: losses[group] for group in groups})
        return Probed(losses, probe.by_batch or self.journal.done.get(BY_BATCH, {}))

    def _record(self, group: str, losses: list[float | None]) -> None:
        self.journal.append(f"score:{group}", losses)
        self.found[group] = losses
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.journal.commit()
            self._committed = time.monotonic()
        self._told()

    def _told(self) -> None:
        total = len(self.target.options) + self.target.predicted.evaluations
        self.step(min(len(self.found) + self.evaluations, total), total)

    def _evaluates(self) -> Evaluator:
        if self._evaluator is None:
            assert self.calibration is not None
            self._evaluator = Evaluator(
                self.source, self.structure, self.calibration, self.cap // 4, self.journal, self._told, self.asked.seed
            )  # fmt: skip
        return self._evaluator

    # -- the choice ------------------------------------------------------------------------------------------------

    def _allocation(
        self, table: Mapping[str, list[Option]], nodes: Sequence[Node], scored: Scored, nats: float
    ) -> tuple[Allocation, str]:
        """What is chosen, and in whose form the result is to be.

        Args:
            nats: what one unit of loss is.
        """

        def evaluate(choices: Mapping[str, Option], tokens: int, draw: int) -> float:
            made = {group: option.choice for group, option in choices.items()}
            return self._evaluates()(made, tokens, draw).loss

        def allocated(some: Table, limit: int) -> Allocation:
            return search(
                some, limit, self.asked.search, scored.pairs, None if self.calibration is None else evaluate,
                self.asked.seed,
            )  # fmt: skip

        target = self.target
        if self.asked.predicted_loss is not None:
            allocation = smallest_for(reduced(table, nodes), self.asked.predicted_loss / nats, allocated)
            return search_tree(table, nodes, allocation.cost, allocated) if nodes else allocation, target.name
        beside = target.beside
        left = target.budget - self.rest - beside.rest(nodes)
        allocation = search_tree(beside.of_table(table), beside.of_nodes(nodes), left, allocated)
        if not target.alternatives:
            return allocation, target.name
        return for_others(allocation, table, target.budget, target.alternatives, self.asked.search, self.note)

    def _planned(
        self, allocation: Allocation, table: Mapping[str, list[Option]], target: str, searched: dict[str, Any]
    ) -> Chosen:
        """The allocation as a plan, and the model without what it drops."""
        source, structure = self.source, self.structure
        drops = {
            name: f"predicted loss {option.loss:.3g} nats per token"
            for name, option in allocation.choices.items()
            if name not in table
        }
        if drops:
            assert self.target.droppable is not None
            source, structure, drops = with_drops(
                source, structure, self.target.droppable, drops, self.asked.trust_remote_code
            )
        castable = set(structure.castable)
        plan = Plan(
            target=target,
            edits=[*self.target.edits, *(Edit(drop=part, reason=why) for part, why in drops.items())],
            assignments={
                name: option.choice
                for name, option in allocation.choices.items()
                if name in table
                and not (name in castable and option.choice.kept)  # a plan need not speak of what is no site and stays
            },
        )
        if self.asked.activations is not None:
            plan.activations = rounded_groups(self.asked.activations, plan, structure)
        return Chosen(plan, source, structure, searched)
