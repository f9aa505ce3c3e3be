"""``fit``: the main job. Checks, forecast, scoring, search, build, verification, publishing; each phase resumes."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slimwright.checkpoint import (
    Checkpoint,
    claim,
    entry_cost,
    job_key,
    overhead_bound,
    source_state,
)
from slimwright.errors import BudgetError, InputError
from slimwright.job.aim import Aim
from slimwright.job.beside import Beside
from slimwright.job.caching import EVERYWHERE, cache_formats
from slimwright.job.calibration import with_data
from slimwright.job.drops import drop_nodes, voided_tensors
from slimwright.job.edits import dropped, rotated
from slimwright.job.fixed import fixed_plan
from slimwright.job.forecast import Evaluations, Forecast, forecast, measure_rates
from slimwright.job.losses import check_allocator, loss_estimate
from slimwright.job.low_rank import scoring_work, solving_work
from slimwright.job.memory import MemoryWatch, memory_cap
from slimwright.job.open import open_source
from slimwright.job.options import option_costs
from slimwright.job.request import (
    AUTO,
    MAX_SHARD_BYTES,
    OWN,
    FitOptions,
    FitReport,
    check_options,
    finished_report,
)
from slimwright.job.result import (
    REPORT_VERSION,
    model_facts,
)
from slimwright.job.state import Target
from slimwright.job.targets import TargetOptions, aim_at, aims_of_auto, fit_for_target, wants_target
from slimwright.job.units import Unit, keep_all, layout_of, plan_units
from slimwright.job.work import Work
from slimwright.methods import WeightSolver, parse_method
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from slimwright.model.surgery import Droppable, droppable
from slimwright.plan import (
    Assignment,
    Plan,
    group_folds,
    method_on,
    parse_size,
)
from slimwright.rules import bind
from slimwright.search import Option, check_solver
from slimwright.search.tree import Node, smallest_tree_cost
from slimwright.weights import Grid

__all__ = ["MAX_SHARD_BYTES", "FitOptions", "FitReport", "fit"]


def fit(model: str, out: str | None = None, **options: Any) -> FitReport:
    """Fit a pretrained model to a size.

    Args:
        model: a directory with config.json and safetensors, a sentence-transformers directory, or a hub id.
        out: directory that the result is written to; it exists only when the result is whole and verified.
        options: fields of :class:`FitOptions`: ``size`` (``4.25bit | 30% | 4.7GB``), ``memory`` (of the running result,
            with ``context`` and ``batch``), ``keep`` (floors on quality: ``kl:0.02``), ``grid`` (``int4:g128``
            everywhere), ``plan`` (a plan.yaml), ``rules`` (``'lm_head: keep'``), ``data`` (what to calibrate on, or
            ``none``), ``eval_data``, ``calibration_tokens``, ``calibration_length``, ``method`` (solver), ``folds``
            (what is done before: ``fold/awq``, ``none``), ``allow`` (``drop``: sublayers and blocks too), ``target``
            (whose form the result has: ``slimwright``, ``compressed-tensors``, ``gguf``, or ``auto``), ``cache``
            (``cache/kivi,bits=4``), ``search`` (``dp | milp | closed-form | rate-distortion | evolutionary``, with
            knobs), ``loss`` (the loss estimate), ``job_memory`` (``2GB``), ``job_time`` (seconds),
            ``statistics_cache`` (bytes of the cache for what walks find, or ``off``), ``seed``, ``dry_run``,
            ``trust_remote_code``, ``quiet``.

    Raises:
        InputError: something about the input cannot work; nothing was written.
        QualityError: a floor cannot be kept; nothing was written.
        SlimwrightError: the job failed; what was finished is kept for the next run of the same call.
    """
    known = {field.name for field in dataclasses.fields(FitOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"fit has no option '{unknown[0]}'; it has: {', '.join(sorted(known))}.")
    if isinstance(options.get("allow"), str):
        options["allow"] = options["allow"].split(",")
    for name in ("rules", "folds", "keep", "allow"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    asked = FitOptions(model=str(model), out=None if out is None else str(out), **options)
    if asked.target is None and asked.given_plan is not None and asked.given_plan.target != OWN:
        asked = dataclasses.replace(asked, target=asked.given_plan.target)
    check_options(asked)
    with MemoryWatch(memory_cap(asked.job_memory)) as watch:

        def run(one: FitOptions) -> FitReport:
            if one.keep or one.memory is not None:
                from slimwright.job.candidates import Confirmed

                return Confirmed(one, watch, lambda other: _Job(other, watch).run()).run()
            return _Job(one, watch).run()

        return fit_for_target(asked, run) if wants_target(asked) else run(asked)


class _Job:
    """One run of ``fit``."""

    def __init__(self, asked: FitOptions, watch: MemoryWatch) -> None:
        self.asked = asked
        self.watch = watch
        self.started = time.monotonic()
        self.notes: list[str] = []

    def run(self) -> FitReport:
        asked = self.asked
        _, rules = check_options(asked)
        source = open_source(asked.model)
        structure = discover(source, trust_remote_code=asked.trust_remote_code)
        if structure.note:
            self.notes.append(structure.note)
        asked, found = with_data(asked, source, structure, self.notes.append)
        check_allocator(asked.search, asked.loss, asked.data)
        self.asked = asked
        edits, ranges, plain = tuple(asked.edits()), asked.needs_scales(), (source, structure)
        source, structure = rotated(source, structure, edits)
        named = asked.given_plan.drops if asked.given_plan is not None else {}
        source, structure = dropped(source, structure, named, trust_remote_code=asked.trust_remote_code)
        solver: WeightSolver = parse_method(asked.solver)
        aim = aim_at(asked.target, source, structure, asked.activations) if asked.target else None
        aims = []
        if asked.target == AUTO:
            aims = aims_of_auto(source, structure, asked.activations, self.notes.append)
        fixed = fixed_plan(asked, structure, rules, aim, aims)
        cached = fixed.cache if fixed is not None and fixed.cache else {EVERYWHERE: asked.cache} if asked.cache else {}
        formats = cache_formats(cached, source, structure, asked.trust_remote_code)
        bound = bind(rules, structure) if rules else {}
        kept = plan_units(source, structure, keep_all(structure, ""))
        beside = Beside.of(source, structure, asked)
        budget, copied = self._budget(source, structure, fixed, kept, beside)
        if copied:
            edits, ranges, (source, structure) = (), False, plain
            fixed = keep_all(structure, "the budget is above the source")
            self.notes.append("The budget is above the size of the source: it was copied as it is.")
        found_drops = None
        if fixed is None and "drop" in asked.families:
            found_drops = droppable(*plain, asked.trust_remote_code)
        options, rest, nodes = (
            self._options(source, structure, kept, bound, budget, found_drops, aim, aims, beside)
            if fixed is None
            else ({}, 0, [])
        )
        others = [self._alternative(source, structure, kept, options, budget, each) for each in aims if not fixed]
        cap = self.watch.cap or 0
        usual = _representative(solver, fixed, structure)
        seen = (asked.calibration_tokens or 0) if asked.data != "none" else 0
        predicted = forecast(
            source,
            structure,
            usual,
            measure_rates(usual),
            budget,
            fixed is None,
            cap,
            seen,
            [fold for _, fold in group_folds(edits)],
            ranges,
            asked.eval_tokens,
            asked.eval_queries,
            scoring_work(structure, options) if fixed is None else solving_work(structure, fixed),
            self._evaluations(options, seen),
        )  # fmt: skip
        if cap < predicted.least_memory_bytes:
            raise InputError(
                f"--job-memory {cap / 1e6:.0f} MB is too little for this model: the least that would do is about "
                f"{predicted.least_memory_bytes / 1e6:.0f} MB."
            )
        if asked.job_time is not None and predicted.seconds > asked.job_time:
            raise InputError(
                f"The job is expected to take {predicted.seconds:.0f} s, more than --job-time {asked.job_time:.0f} s."
            )
        if asked.dry_run:
            return FitReport(self._dry_report(source, structure, predicted, fixed), None)
        assert asked.out is not None
        self._check_disk(Path(asked.out), predicted)
        state = source_state(source)
        with claim(asked.out, job_key(source=state, recipe=asked.recipe())) as held:
            if held.status == "finished":
                return finished_report(held.out)
            work = Work(asked, self.watch, self.started, self.notes)
            target = Target(
                budget, fixed, options, rest, predicted, state, found, edits, ranges, cached, formats, nodes,
                found_drops, beside, aim.profile.name if aim is not None else OWN, others,
            )  # fmt: skip
            try:
                return work.run(held, source, structure, target)
            except InputError:  # what was given cannot work, so nothing of it is worth keeping for another try
                if held.status == "new" and not self.watch.exceeded:
                    shutil.rmtree(held.partial)
                raise

    # -- before work -----------------------------------------------------------------------------------------------

    def _alternative(
        self,
        source: Checkpoint,
        structure: Structure,
        kept: Sequence[Unit],
        options: Mapping[str, list[Option]],
        budget: int,
        aim: Aim,
    ) -> TargetOptions:
        """What a target of ``auto``'s allows of the options of a free search."""
        legal = option_costs(source, structure, {}, self.asked.solver, budget, 0, aim)
        labels = {option.key: option.cost for found in legal.values() for option in found}
        keys = {option.key for found in options.values() for option in found}
        costs = {key: cost for key, cost in labels.items() if key in keys}
        return TargetOptions(aim, costs, self._rest(structure, kept, budget, aim))

    def _rest(
        self, structure: Structure, kept: Sequence[Unit], limit: int, aim: Aim | None, voided: Collection[str] = ()
    ) -> int:
        """Bytes of everything that leaves no choice, headers included, but for what lies in what may be dropped.

        Args:
            kept: every tensor as it is.
            limit: bytes, for the width of offsets in the header.
        """
        others = [unit for unit in kept if unit.site is None and unit.name not in structure.castable]
        others = [unit for unit in others if unit.name not in voided]
        entries = [entry for unit in others for entry in unit.entries]
        if aim is not None:
            return aim.kept_cost(entries, limit) + aim.profile.overhead(limit, self.asked.max_shard_bytes)
        return sum(entry_cost(entry, limit) for entry in entries) + overhead_bound(limit, self.asked.max_shard_bytes)

    def _budget(
        self, source: Checkpoint, structure: Structure, fixed: Plan | None, kept: list[Unit], beside: Beside
    ) -> tuple[int, bool]:
        """Bytes of the weight files, and of what counts beside them, and whether that is at least what the source
        takes."""
        if fixed is not None:
            units = plan_units(source, structure, fixed)
            return layout_of(units, structure, self.asked.max_shard_bytes).total_bytes, False
        whole = layout_of(kept, structure, self.asked.max_shard_bytes).total_bytes
        if self.asked.size is None:  # as few bytes as the loss allows
            return whole, False
        budget = parse_size(self.asked.size, structure.parameters)
        # a checkpoint as it is loads everywhere but where it takes another container
        copies = not self.asked.rules and self.asked.target != "gguf"
        return (whole, True) if budget >= whole + beside.most and copies else (budget, False)

    def _options(
        self,
        source: Checkpoint,
        structure: Structure,
        kept: Sequence[Unit],
        bound: Mapping[str, str],
        budget: int,
        found: Droppable | None,
        aim: Aim | None,
        aims: Sequence[Aim],
        beside: Beside,
    ) -> tuple[dict[str, list[Option]], int, list[Node]]:
        """Options with their costs; the bytes of everything that leaves no choice, headers included; and what may be
        dropped, as ``found`` says.

        Raises:
            BudgetError: the budget is below the smallest possible, which is named.
        """
        if aim is not None:
            groups = structure.choice_groups()
            for group, spec in bound.items():
                if (reason := aim.illegal(groups[group], spec)) is not None:
                    raise InputError(f"A rule puts '{group}' on {spec}, not legal as {aim.profile.name} ({reason}).")

        def costs(limit: int) -> tuple[dict[str, list[Option]], int, list[Node]]:
            trusted = self.asked.trust_remote_code
            nodes = [] if found is None else drop_nodes(source, structure, found, bound, limit, trusted)
            rest = self._rest(structure, kept, limit, aim, voided_tensors(nodes))
            solving = (self.watch.cap or 0) // (4 * torch.get_num_threads())  # each thread may be at a whole matrix
            options = option_costs(source, structure, bound, self.asked.solver, limit, solving, aim, aims)
            return options, rest, nodes

        def least(options: Mapping[str, list[Option]], rest: int, nodes: Sequence[Node]) -> int:
            return smallest_tree_cost(beside.of_table(options), beside.of_nodes(nodes)) + rest + beside.rest(nodes)

        options, rest, nodes = costs(budget)
        smallest = least(options, rest, nodes)
        if smallest <= budget:
            return options, rest, nodes
        while True:  # offsets in the header have more digits in larger files
            options, rest, nodes = costs(smallest)
            needed = least(options, rest, nodes)
            if needed <= smallest:
                break
            smallest = needed
        raise BudgetError(
            f"--size {self.asked.size} is {budget} bytes, but the smallest possible is {smallest} bytes "
            f"({8 * smallest / structure.parameters:.2f}bit): {rest} of them are kept as they are.",
            smallest,
        )

    def _evaluations(self, options: Mapping[str, list[Option]], seen: int) -> Evaluations:
        """What the search and its loss estimate run of the model at most."""
        if not options:
            return Evaluations()
        solver = check_solver(self.asked.search)
        found = Evaluations(solver.evaluations, solver.tokens(seen))
        if self.asked.loss is None:
            return found
        estimate = loss_estimate(self.asked.loss)
        count = estimate.evaluations(options)
        return Evaluations(found.count + count, found.tokens + count * estimate.tokens(seen))

    def _check_disk(self, out: Path, predicted: Forecast) -> None:
        folder = out.absolute().parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        partial = out.absolute().with_name(out.name + ".partial")
        there = sum(f.stat().st_blocks * 512 for f in partial.glob("**/*.safetensors")) if partial.is_dir() else 0
        if free + there < predicted.disk_bytes:
            raise InputError(
                f"The disk of {folder} has {free / 1e9:.2f} GB free, but the result needs "
                f"{predicted.disk_bytes / 1e9:.2f} GB."
            )

    def _dry_report(
        self, source: Checkpoint, structure: Structure, predicted: Forecast, fixed: Plan | None
    ) -> dict[str, Any]:
        return {
            "format_version": REPORT_VERSION,
            "dry_run": True,
            "model": model_facts(self.asked.model, structure),
            "budget": {"asked": self.asked.limit(), "bytes": predicted.bytes},
            "size": {"before": source.total_bytes},
            "forecast": {
                "bytes": predicted.bytes,
                "bytes_exact": fixed is not None,
                "seconds": predicted.seconds,
                "phases": predicted.phases,
                "peak_memory_bytes": predicted.peak_memory_bytes,
                "least_memory_bytes": predicted.least_memory_bytes,
                "disk_bytes": predicted.disk_bytes,
                "evaluations": predicted.evaluations,
            },
            "notes": self.notes,
        }


def _representative(solver: WeightSolver, fixed: Plan | None, structure: Structure) -> WeightSolver:
    """The solver whose speed stands for the job's: on the most frequent grid of a fixed plan. What low-rank forms take
    is forecast apart."""
    counts: dict[tuple[str, str | None], int] = {}
    for name, assignment in fixed.assignments.items() if fixed else ():
        if not assignment.kept and name not in structure.castable and isinstance(assignment.parsed_grid(), Grid):
            key = (assignment.grid, assignment.method)
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return solver if isinstance(solver.form, Grid) else parse_method(str(method_on(_USUAL_GRID, solver.spec)))
    grid, method = max(counts, key=lambda key: counts[key])
    chosen = Assignment(grid=grid, method=method).solver()
    return solver if chosen.form.misfit((512, 1024)) else chosen


_USUAL_GRID = "int4:g128"
"""Of the solver whose speed stands for a job's that has no weight on a grid."""
