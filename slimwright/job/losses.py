"""Loss estimates by name: what every option of every group would cost the model's output (``--loss``).

With a solver of budgets an estimate makes an allocator. Most are in nats of KL per token; those that only say which
parts of a model matter more are marked, and predict no KL.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.evaluator import Evaluator
from slimwright.job.options import score_options, with_losses
from slimwright.methods.registry import Method
from slimwright.model.structure import Structure
from slimwright.search import Option, Pairs, check_solver, named

Options = Mapping[str, list[Option]]
Losses = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Probed:
    """What the walks find.

    Attributes:
        losses: of every option by group, in nats per token; None for one that cannot hold the values.
        by_batch: of groups, by how much each batch of the data moves their losses, as a part of these
            (:func:`~slimwright.calibrate.sensitivity.moved_by_batch`); empty where it is not known.
    """

    losses: Losses
    by_batch: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """What an estimate works with.

    Attributes:
        source, structure: the model, seen through the job's edits.
        options: of every group and castable tensor, with their costs.
        budget: bytes that they may take together.
        done: losses by group that an earlier, interrupted run has found.
        record: called with each group's new losses.
        calibration: the data; None: there is none.
        probed: what the walks find (:class:`slimwright.job.probe.Probe`).
        evaluator: made when it is first asked for.
    """

    source: Checkpoint
    structure: Structure
    options: Options
    budget: int
    done: Mapping[str, list[float | None]]
    record: Callable[[str, list[float | None]], None]
    calibration: Calibration | None = None
    probed: Callable[[], Probed] | None = None
    evaluator: Callable[[], Evaluator] | None = None

    def rounded(self) -> dict[str, list[Option]]:
        """The options with the error of the weights as their loss."""
        return score_options(self.source, self.structure, self.options, self.done, self.record)


@dataclass(frozen=True)
class Scored:
    """The options with their losses, those that cannot hold the values left out, and what pairs of them add.

    Attributes:
        by_batch: as of :class:`Probed`.
    """

    table: dict[str, list[Option]]
    pairs: Pairs = field(default_factory=dict)
    by_batch: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def error(self, choices: Iterable[Option]) -> float:
        """Standard error of the summed loss of some options. Groups are seen on the same data, so their errors go
        together: as their batches say where these are known, else wholly."""
        chosen = list(choices)
        lengths = {len(own) for own in self.by_batch.values()}
        if len(lengths) != 1:
            return math.fsum(option.error for option in chosen)
        batches = np.zeros(lengths.pop())
        for option in chosen:
            batches += option.loss * np.array(self.by_batch.get(option.scope, 0.0))
        return standard_error(batches) + math.fsum(o.error for o in chosen if o.scope not in self.by_batch)


def standard_error(moved: Sequence[float] | np.ndarray) -> float:
    """Of a mean over batches, from how far each moves it; 0 for fewer than two."""
    count = len(moved)
    return math.sqrt(float(np.square(moved).sum()) * count / (count - 1)) if count > 1 else 0.0


class LossEstimate(Method):
    """Scores options. Subclasses are frozen dataclasses whose fields are knobs."""

    family = "loss"
    needs_data: ClassVar[bool] = True
    needs_walks: ClassVar[bool] = False
    """Whether the model's blocks must run one by one."""
    nats: ClassVar[bool] = True
    """Whether its losses are nats of KL per token: others rank options, and predict no KL."""
    measures: ClassVar[bool] = False
    """Whether it evaluates models."""
    couples: ClassVar[bool] = False
    """Whether it has terms of pairs, which not every solver takes."""

    def evaluations(self, options: Options) -> int:
        """How many times it evaluates a model at most."""
        return 0

    def tokens(self, available: int) -> int:
        """Tokens of each evaluation."""
        return 0

    @abstractmethod
    def score(self, given: Scoring) -> Scored:
        """Score every option.

        Raises:
            InputError: NaN or Inf in the source, named with the tensor.
        """


@dataclass(frozen=True)
class SensitivityLoss(LossEstimate):
    """``½ Σ_r g_r (Δ_r H Δ_rᵀ)`` from the two walks (:mod:`slimwright.job.probe`)."""

    name = "sensitivity"
    paper = "second-order KL with a Fisher diagonal"
    needs_walks = True

    def score(self, given: Scoring) -> Scored:
        assert given.probed is not None
        found = given.probed()
        errors = {group: standard_error(own) for group, own in found.by_batch.items()}
        return Scored(with_losses(given.options, found.losses, errors), by_batch=found.by_batch)


@dataclass(frozen=True)
class WeightErrorLoss(LossEstimate):
    """The relative squared error of the weights times their number: no data, no nats."""

    name = "weight-error"
    paper = "folklore"
    needs_data = False
    nats = False

    def score(self, given: Scoring) -> Scored:
        return Scored(given.rounded())


def estimates() -> dict[str, type[LossEstimate]]:
    """All estimates by name."""
    from slimwright.job.importance import InputModification, ScoreDistribution
    from slimwright.job.measured_losses import MeasuredLoss, PairLoss

    found: tuple[type[LossEstimate], ...] = (
        SensitivityLoss, WeightErrorLoss, InputModification, ScoreDistribution, MeasuredLoss, PairLoss,
    )  # fmt: skip
    return {estimate.name: estimate for estimate in found}


def loss_estimate(spec: str) -> LossEstimate:
    """The estimate that a spec (``measured,levels=3``) names.

    Raises:
        InputError: unknown, with the nearest name, or a knob that is wrong.
    """
    return named(spec, estimates(), "loss estimate")


def evaluates(search: str, loss: str | None) -> bool:
    """Whether a solver or an estimate runs the model on candidates."""
    return check_solver(search).evaluations > 0 or (loss is not None and loss_estimate(loss).measures)


def check_allocator(search: str, loss: str | None, data: str | None) -> None:
    """Refuse what cannot be before anything is opened: a solver and an estimate that do not fit, or no data.

    Raises:
        InputError: in one sentence.
    """
    solver = check_solver(search)
    estimate = loss_estimate(loss) if loss is not None else None
    if data == "none" and solver.evaluations:
        raise InputError(f"--search {solver.name} evaluates candidates on data: give --data, or use dp.")
    if data == "none" and estimate is not None and estimate.needs_data:
        raise InputError(f"--loss {estimate.name} needs data: give --data, or use weight-error or zd.")
    if estimate is not None and estimate.couples and not solver.takes_pairs:
        raise InputError(
            f"--loss {estimate.name} has terms of pairs, which --search {solver.name} cannot weigh: use milp."
        )
