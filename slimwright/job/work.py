"""The passes of ``fit`` and the state they work on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimwright.calibrate.data import GENERIC, Document
from slimwright.calibrate.tokens import RANDOM
from slimwright.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Claim,
    Journal,
    Lineage,
    copy_side_files,
    environment_key,
    fingerprint,
    job_key,
    weights_hash,
    write_bytes_atomic,
    write_config_atomic,
)
from slimwright.errors import InputError, SlimwrightError
from slimwright.job import verify as verification
from slimwright.job.build import Calibration, Unit, build, grids_written, layout_of, plan_units
from slimwright.job.caching import written_formats
from slimwright.job.calibration import calibrate, notes_on
from slimwright.job.drops import kept_bytes, with_drop_choices, with_drop_losses, with_drops, zeroed_sites
from slimwright.job.edits import dropped_view, dropped_written, folded, original, save_scales
from slimwright.job.evaluator import Evaluator
from slimwright.job.fold_walk import FoldWalk, usual_grid
from slimwright.job.forecast import Forecast
from slimwright.job.ledger import Entry, check_complete, dead_inputs
from slimwright.job.losses import Scoring, loss_estimate
from slimwright.job.memory import MemoryWatch, trim
from slimwright.job.open import model_of
from slimwright.job.passes import Pass, run_passes
from slimwright.job.probe import Probe
from slimwright.job.progress import Reporter
from slimwright.job.ranges import found_scales
from slimwright.job.request import OWN, FitOptions, FitReport
from slimwright.job.result import (
    REPORT_VERSION,
    how_to_load,
    kernel_parts,
    model_facts,
    predicted_parts,
    quality_parts,
    size_parts,
    versions,
    write_papers,
)
from slimwright.job.reuse import Reuse, edits_key
from slimwright.job.seen import sensitivity, single_families
from slimwright.job.targets import TargetOptions
from slimwright.job.targets import chosen as for_others
from slimwright.job.walked import WalkedModel
from slimwright.methods import WeightSolver, solver_for
from slimwright.model.structure import Structure
from slimwright.model.surgery import Droppable
from slimwright.plan import Edit, Plan, group_folds, method_on, rounded_groups
from slimwright.runtime.format import DenseForm, write_config
from slimwright.runtime.kv_format import KvFormat
from slimwright.search import Allocation, Option, Table, search
from slimwright.search.curve import curve, everywhere, smallest_for
from slimwright.search.tree import Node, reduced, search_tree
from slimwright.weights import parse_grid

DATA_FREE_NATS = 6.0
"""Nats of KL that a relative squared error of 1 in every weight is taken for where a loss in nats is asked of a job
without data: a first guess (seen at 4 bits on small models), which the measured candidate then corrects."""

COMMIT_SECONDS = 2.0
"""Scores that a crash may lose."""


@dataclass(frozen=True)
class Target:
    """What the job works towards: bytes, the plan where it is fixed, else the options and the bytes of all that is no
    site, the forecast, the state of the source, the documents to calibrate on, what is done to the model first,
    whether scales of activations are to be found, the plan's cache and its formats by layer, what the search may drop,
    in whose form the result is to be, and the forms of others that are taken where they lose little."""

    budget: int
    fixed: Plan | None
    options: Mapping[str, list[Option]]
    rest: int
    predicted: Forecast
    state: str
    documents: Sequence[Document] = ()
    edits: Sequence[Edit] = ()
    ranges: bool = False
    cache: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[int, KvFormat] = field(default_factory=dict)
    nodes: Sequence[Node] = ()
    droppable: Droppable | None = None
    name: str = OWN
    alternatives: Sequence[TargetOptions] = ()


@dataclass
class _State:
    """What the passes work on."""

    held: Claim
    directory: Path
    source: Checkpoint
    structure: Structure
    target: Target
    journal: Journal
    reporter: Reporter
    plan: Plan | None = None
    units: list[Unit] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    side_files: tuple[str, ...] = ()
    outcome: verification.Outcome | None = None
    data: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    calibrated_on: dict[str, Any] = field(default_factory=dict)
    searched: dict[str, Any] = field(default_factory=dict)
    scales: list[Path] = field(default_factory=list)
    evaluator: Evaluator | None = None

    def planned(self) -> Plan:
        """The plan, which the passes' order guarantees."""
        assert self.plan is not None
        return self.plan


def _plan_fits(state: _State) -> str | None:
    """The plan says something legal of every group, and the same of weights that runtimes fuse."""
    try:
        state.planned().check(state.structure)
    except InputError as error:
        return str(error)
    return None


def _ties_hold(state: _State) -> str | None:
    """A tied weight owns no bytes."""
    owners = [unit.name for unit in state.units if unit.name in state.structure.ties and unit.entries]
    return f"the tied weight '{owners[0]}' was written a second time" if owners else None


def _files_whole(state: _State) -> str | None:
    """The weight files hold the planned tensors under the source's names."""
    planned = {state.structure.written_name(entry.name) for unit in state.units for entry in unit.entries}
    found = set(Checkpoint.open(state.held.partial).tensors)
    return None if planned == found else f"the files' tensors differ from the plan: {sorted(planned ^ found)[:3]}"


def _ledger_complete(state: _State) -> str | None:
    """Every tensor of the source is accounted for, and so is every byte."""
    try:
        check_complete(state.entries, state.source, sum(e.nbytes for u in state.units for e in u.entries))
    except SlimwrightError as error:
        return str(error).rstrip(".")
    return None


_CHECKS: dict[str, Callable[[_State], str | None]] = {
    "dense": lambda state: "weights are packed already" if state.entries else None,
    "ties": _ties_hold,
    "plan": _plan_fits,
    "files": _files_whole,
    "ledger": _ledger_complete,
    "verified": lambda state: None if state.outcome is not None and state.outcome.ok else "it was not verified",
}
"""What must hold for each property that the passes name."""


class Work:
    """The passes of a data-free fit: score, build, verify, publish. Each continues what an earlier run began.

    Args:
        asked: the request.
        watch: memory of the process tree, with the cap.
        started: ``time.monotonic()`` of the job's start.
        notes: remarks for the user, added to.
    """

    def __init__(self, asked: FitOptions, watch: MemoryWatch, started: float, notes: list[str]) -> None:
        self.asked = asked
        self.watch = watch
        self.started = started
        self.notes = notes

    def run(self, held: Claim, source: Checkpoint, structure: Structure, target: Target) -> FitReport:
        """Do what is left to do in the claimed directory, and publish it."""
        key = job_key(source=target.state, recipe=self.asked.recipe(), environment=environment_key())
        directory = held.partial / source.model_path.relative_to(source.path)
        with (
            Journal.open(held.scratch / "journal", key, reset=True) as journal,
            Reporter(target.predicted.phases, held.partial / "events.jsonl", self.asked.quiet) as reporter,
        ):
            if held.status == "resumed":
                if journal.done:
                    reporter.log(f"Resuming: {len(journal.done)} finished units are kept.")
                else:
                    reporter.log(
                        "Starting over what an earlier run began: nothing was finished, or threads, instruction set, "
                        "torch or slimwright differ."
                    )  # fmt: skip
                    for file in directory.glob("*.safetensors"):
                        file.unlink()
            state = _State(held, directory, source, structure, target, journal, reporter, target.fixed)
            holding = frozenset({"dense", "ties"} | ({"plan"} if state.plan else set()))
            run_passes(self._passes(target), state, holding, _CHECKS, reporter.begin)
            reporter.step(1, 1)
        return FitReport(state.data, held.out)

    def _passes(self, target: Target) -> list[Pass[_State]]:
        """The passes of a data-free fit in the default order; a given plan leaves nothing to score."""
        score = Pass("score", self._search, gives=frozenset({"plan"}))
        passes = [
            Pass(
                "build", self._build, requires=frozenset({"dense", "plan"}), gives=frozenset({"files", "ledger"}),
                breaks=frozenset({"dense"}),
            ),
            Pass("verify", self._verify, requires=frozenset({"files", "ledger"}), gives=frozenset({"verified"})),
            Pass("publish", self._publish, requires=frozenset({"verified"}), breaks=frozenset({"files"})),
        ]  # fmt: skip
        passes = passes if target.fixed is not None else [score, *passes]
        if group_folds(target.edits):
            passes.insert(0, Pass("fold", self._fold, requires=frozenset({"dense"})))
        if target.ranges:
            build = next(index for index, step in enumerate(passes) if step.name == "build")
            passes.insert(build, Pass("ranges", self._ranges, requires=frozenset({"dense", "plan"})))
        return passes

    def _step(self, state: _State) -> Callable[[int, int], None]:
        """Reports progress, and stops a job that passes its memory or its time."""

        def step(done: int, total: int) -> None:
            self.watch.check()
            limit = self.asked.job_time
            if limit is not None and time.monotonic() - self.started > limit:
                raise SlimwrightError(f"--job-time {limit:.0f} s is over; run the same command again to continue.")
            state.reporter.step(done, total)

        return step

    def _fold(self, state: _State) -> None:
        """Find the scales of each fold in turn, on the model that those before it left."""
        for index, (edit, fold) in enumerate(group_folds(state.target.edits)):
            path = state.held.scratch / f"scales-{index}.safetensors"
            if f"fold:{index}" not in state.journal.done:
                calibration = self._calibration(state)
                scales = FoldWalk(
                    state.source, state.structure, calibration, fold, self._solvers(state), self._step(state)
                ).run()
                save_scales(path, scales, calibration.samples.tokens)
                state.journal.append(f"fold:{index}", len(scales))
                state.journal.commit()
            state.scales.append(path)
            state.source = folded(state.source, state.structure, [edit], [path])

    def _ranges(self, state: _State) -> None:
        """Find the scales of activations that have one for all tokens."""
        plan, journal = state.planned(), state.journal
        if "ranges" not in journal.done:
            found = found_scales(state.source, state.structure, self._calibration(state), plan, self._step(state))
            journal.append("ranges", found)
            journal.commit()
        plan.activations = dict(journal.done["ranges"])

    def _solvers(self, state: _State) -> dict[str, WeightSolver]:
        """What will put each site on a grid; where that is still to be searched, the method on a grid of about as many
        bits as the budget has."""
        sites = state.structure.sites
        if state.plan is not None:
            by_site = state.plan.by_site(state.structure)
            return {name: a.solver() for name, a in by_site.items() if not a.kept}
        bits = 8 * state.target.budget / max(1, state.structure.parameters)
        return {
            name: solver_for(str(method_on(grid, self.asked.solver)), parse_grid(grid))
            for name, site in sites.items()
            for grid in [usual_grid(site.columns, bits)]
        }

    def _search(self, state: _State) -> None:
        """Score every option on the weights and choose the best that fits."""
        journal, target = state.journal, state.target
        total = len(target.options) + target.predicted.evaluations
        found = {k.removeprefix("score:"): v for k, v in journal.done.items() if k.startswith("score:")}
        last, step = time.monotonic(), self._step(state)

        def told() -> None:
            done = len(found) + (state.evaluator.evaluations if state.evaluator is not None else 0)
            step(min(done, total), total)

        def record(group: str, losses: list[float | None]) -> None:
            nonlocal last
            journal.append(f"score:{group}", losses)
            found[group] = losses
            if time.monotonic() - last > COMMIT_SECONDS:
                journal.commit()
                last = time.monotonic()
            told()

        target, nodes, rest = state.target, state.target.nodes, state.target.rest
        structure = state.structure
        calibration = None if self.asked.data == "none" and not nodes else self._calibration(state)
        apart = calibration is not None and calibration.apart
        estimate = loss_estimate(self.asked.loss or ("sensitivity" if apart else "weight-error"))
        if estimate.needs_walks and not apart:
            raise InputError(
                f"--loss {estimate.name} walks over the blocks, and those of this model give other outputs when they "
                "are run apart: use measured or weight-error."
            )
        if nodes and not apart:
            nodes, rest = (), rest + kept_bytes(nodes)
            self.notes.append(
                "Nothing was dropped: what a drop costs is found block by block, and this model runs whole."
            )
        budget = target.budget - rest
        options = with_drop_choices(target.options, structure, nodes)

        def evaluator() -> Evaluator:
            if state.evaluator is None:
                assert calibration is not None
                cap = (self.watch.cap or (1 << 30)) // 4
                state.evaluator = Evaluator(
                    state.source, state.structure, calibration, cap, journal, told, self.asked.seed
                )  # fmt: skip
            return state.evaluator

        def evaluate(choices: Mapping[str, Option], tokens: int, draw: int) -> float:
            return evaluator()({group: option.choice for group, option in choices.items()}, tokens, draw).loss

        scored = estimate.score(
            Scoring(
                state.source, structure, options, budget, dict(found), record, calibration,
                lambda: self._probed(state, options, found, record, zeroed_sites(nodes)), evaluator,
            )
        )  # fmt: skip
        journal.commit()
        table, nodes = with_drop_losses(scored.table, nodes)
        joined = reduced(table, nodes)

        def allocated(some: Table, limit: int) -> Allocation:
            return search(
                some, limit, self.asked.search, scored.pairs, None if calibration is None else evaluate,
                self.asked.seed,
            )  # fmt: skip

        name = target.name
        nats = 1.0 if estimate.nats else DATA_FREE_NATS / structure.parameters
        if self.asked.predicted_loss is None:
            allocation = search_tree(table, nodes, budget, allocated)
            if target.alternatives:
                allocation, name = for_others(
                    allocation, table, target.budget, target.alternatives, self.asked.search, self.notes.append
                )
        else:
            allocation = smallest_for(joined, self.asked.predicted_loss / nats, allocated)
            if nodes:
                allocation = search_tree(table, nodes, allocation.cost, allocated)
        journal.commit()
        limit = budget if self.asked.predicted_loss is None else allocation.cost
        state.searched = {
            "solver": self.asked.search,
            "loss": estimate.spec,
            "unit": "nats per token" if estimate.nats else "relative squared error × parameters",
            "predicted": allocation.loss,
            "nats": allocation.loss * nats,
            "exact": allocation.exact,
            "evaluations": 0 if state.evaluator is None else state.evaluator.evaluations,
            "curve": [list(point) for point in curve(joined, rest)],
            "everywhere": [list(point) for point in everywhere(table, rest + kept_bytes(nodes))],
            "families": [list(point) for point in single_families(table, nodes, limit, rest)],
            "sensitivity": sensitivity(table, limit),
        }
        chosen = {
            name: f"predicted loss {option.loss:.3g} nats per token"
            for name, option in allocation.choices.items()
            if name not in table
        }
        if chosen:
            assert target.droppable is not None
            state.source, state.structure, chosen = with_drops(
                state.source, state.structure, target.droppable, chosen, self.asked.trust_remote_code
            )
        castable = set(state.structure.castable)
        state.plan = Plan(
            target=name,
            edits=[*target.edits, *(Edit(drop=part, reason=why) for part, why in chosen.items())],
            assignments={
                name: option.choice
                for name, option in allocation.choices.items()
                if name in table
                and not (name in castable and option.choice.kept)  # a plan need not speak of what is no site and stays
            },
        )
        if self.asked.activations is not None:
            state.plan.activations = rounded_groups(self.asked.activations, state.plan, state.structure)

    def _probed(
        self,
        state: _State,
        options: Mapping[str, list[Option]],
        found: Mapping[str, list[float | None]],
        record: Callable[[str, list[float | None]], None],
        zeroed: Collection[str] = (),
    ) -> Mapping[str, Sequence[float | None]]:
        """Losses of every option, from the walks or from those of an earlier job on the same data."""
        calibration = self._calibration(state)
        edits = edits_key(state.target.edits, state.scales)
        reuse = Reuse(state.source, calibration, self.asked.statistics_cap, self.asked.model, edits)
        kept = {group: losses for group, losses in reuse.losses(options).items() if group not in found}
        if kept:
            state.reporter.log(f"Losses of {len(kept)} groups are known from an earlier job on this model and data.")
        done = {**found, **kept}
        losses = Probe(state.source, state.structure, calibration, options, done, record, reuse, zeroed).run()
        groups = [group for group in state.structure.choice_groups() if len(options[group]) > 1]
        reuse.keep_losses(options, {group: losses[group] for group in groups})
        return losses

    def _build(self, state: _State) -> None:
        """Solve and write every tensor; then everything else that belongs into the directory."""
        plan, source, held = state.planned(), state.source, state.held
        plan.source, plan.fingerprint = self.asked.model, fingerprint(original(source))
        plan.cache = dict(state.target.cache)
        state.units = plan_units(source, state.structure, plan)
        layout = layout_of(state.units, state.structure, self.asked.max_shard_bytes)
        if state.target.fixed is None and plan.target == OWN and layout.total_bytes > state.target.budget:
            raise SlimwrightError(
                f"The plan takes {layout.total_bytes} bytes, more than the {state.target.budget} asked: this is a "
                "defect of slimwright; nothing was published."
            )
        renamed = {
            entry.name: state.structure.written_name(entry.name) for unit in state.units for entry in unit.entries
        }  # fmt: skip
        with CheckpointWriter(state.directory, layout, renamed) as writer:
            if writer.fresh:  # shards made anew hold nothing yet
                for unit in [unit for unit in state.journal.done if unit.startswith("build:")]:
                    del state.journal.done[unit]
            self._write_config(state, source, state.units, plan)
            calibration = self._calibration(state) if any(unit.needs_data for unit in state.units) else None
            state.entries = build(
                source, state.structure, state.units, writer, state.journal, self._step(state), calibration
            )  # fmt: skip
            if calibration is not None:
                names = [name for batch in calibration.samples.batches for name in batch.documents]
                self.notes += dead_inputs(state.entries, list(dict.fromkeys(names)))
        write_bytes_atomic(held.partial / "plan.yaml", plan.to_yaml().encode())
        copied = copy_side_files(source, held.partial, trust_remote_code=self.asked.trust_remote_code)
        state.side_files = copied.copied
        for name, reason in copied.skipped:
            if reason.startswith("python"):
                self.notes.append(f"Not copied: {name} ({reason}).")
        trim()

    def _calibration(self, state: _State) -> Calibration:
        """The data as batches, made once."""
        if state.calibration is None:
            state.calibration, facts = calibrate(
                self.asked, state.source, state.structure, state.target.documents, self.watch.cap or (1 << 30),
                state.held.scratch, state.reporter.log,
            )  # fmt: skip
            state.calibrated_on = facts
            self.notes += notes_on(facts)
            if not WalkedModel(state.source, state.structure, state.calibration).runs_apart():
                state.calibration = dataclasses.replace(state.calibration, apart=False)
                self.notes.append(
                    "The blocks of this model give other outputs when they are run apart, so it was calibrated by "
                    "whole forwards; options were scored by the error of the weights."
                )
        return state.calibration

    def _formats(self, state: _State) -> dict[int, KvFormat]:
        """Format of the keys and values by layer of the result."""
        return written_formats(state.target.formats, state.source, state.structure, self.asked.trust_remote_code)

    def _write_config(self, state: _State, source: Checkpoint, units: list[Unit], plan: Plan) -> None:
        view = dropped_view(source)
        base = source.config if view is None else view.written
        config = {key: value for key, value in base.items() if key != "quantization_config"}
        grids, left = grids_written(units), dropped_written(source)
        formats = self._formats(state)
        if grids or formats or left.forms:
            name = state.structure.written_name
            dense = {}
            for unit in units:
                if unit.site is not None and unit.name in grids:
                    dtype = str(source.tensors[unit.name].dtype).removeprefix("torch.")
                    dense[name(unit.name)] = DenseForm(dtype, unit.site.shape, unit.site.transposed)
            roundings = {name(unit.name): unit.activations for unit in units if unit.activations is not None}
            config["quantization_config"] = write_config(
                {name(own): grid for own, grid in grids.items()}, plan.fingerprint, dense, roundings,
                formats, left,
            )  # fmt: skip
        if all(config.get(key) is None for key in ("dtype", "torch_dtype")) and any(u.solved or u.cast for u in units):
            # where the config has none, transformers takes that of the first tensor, which may be 16 bits only here
            first = next(i.dtype for _, i in sorted(source.tensors.items()) if i.dtype.is_floating_point)
            config["dtype"] = str(first).removeprefix("torch.")
        write_config_atomic(state.directory / "config.json", config)

    def _verify(self, state: _State) -> None:
        """Prove what was written; a fresh process reads it back wherever the model's class can be imported."""
        structure = state.structure
        spare = verification.spare_bytes(self.watch.cap)
        vocabulary = verification.logits_width(structure)
        tokens, batch = verification.tokens_for(structure.parameters, vocabulary, spare, self.asked.eval_tokens)
        spec = verification.Spec(
            source=self.asked.model, written=str(state.held.partial),
            result=str(state.held.scratch / f"verified-{uuid.uuid4().hex}.json"),
            tokens=tokens, batch_tokens=batch, threads=torch.get_num_threads(), seed=self.asked.seed,
            sample=structure.parameters < verification.SAMPLED_BELOW,
            trust_remote_code=self.asked.trust_remote_code, progress=True,
            data="" if self.asked.data in (None, "none", GENERIC, RANDOM) else str(self.asked.data),
            eval_data=self.asked.eval_data or "",
            checksums={entry.site: entry.checksum for entry in state.entries if entry.checksum},
            scales=[str(path) for path in state.scales],
            cache={str(index): format.spec for index, format in self._formats(state).items()},
        )  # fmt: skip
        own = model_of(state.source, self.asked.trust_remote_code)[0].__module__
        step = self._step(state)
        if not own.startswith("transformers."):
            how = f"this process, from disk (the class {own} is registered in this process only)"
            outcome = verification.verify(spec, step, how)
        else:
            outcome = self._verify_in_fresh_process(state.held, spec, step)
        if not outcome.ok:
            raise SlimwrightError(
                f"The written model is not what was planned and was not published: {outcome.problems[0]}. "
                f"It is left in {state.held.partial}."
            )
        state.outcome = outcome

    def _verify_in_fresh_process(
        self, held: Claim, spec: verification.Spec, step: Callable[[int, int], None]
    ) -> verification.Outcome:
        path = held.scratch / "verify.json"
        path.write_text(json.dumps(dataclasses.asdict(spec)))
        Path(spec.result).unlink(missing_ok=True)
        environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "TOKENIZERS_PARALLELISM": "false"}
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see cli.py
        environment.pop("SLIMWRIGHT_CRASH_AT", None)
        with open(held.scratch / "verify.log", "w+", encoding="utf-8") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "slimwright.job.verify", str(path)],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
            self.watch.children.add(child.pid)
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    progress = json.loads(line)
                    step(progress["done"], progress["total"])
                child.wait()
            except BaseException:
                child.kill()
                child.wait()
                raise
            finally:
                self.watch.children.discard(child.pid)
            self.watch.check()
            if child.returncode != 0 or not Path(spec.result).exists():
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise SlimwrightError(f"The verifying process failed (exit {child.returncode}): {last}")
        found = json.loads(Path(spec.result).read_text())
        found.pop("ok")
        return verification.Outcome(**found)

    def _publish(self, state: _State) -> None:
        """Write the report and the card, and let the result appear under its name."""
        held, source, outcome, plan = state.held, state.source, state.outcome, state.planned()
        assert outcome is not None
        written = Checkpoint.open(held.partial)
        final = Path(self.asked.published_as or held.out)
        done = [{"edit": "drop", "name": name} for name in plan.drops] + [{"edit": "quantize"}]
        lineage = Lineage(fingerprint(written), (Lineage(plan.fingerprint),), tuple(done))
        state.data = {
            "format_version": REPORT_VERSION,
            "model": model_facts(self.asked.model, state.structure) | {"fingerprint": plan.fingerprint},
            "budget": {"asked": self.asked.limit(), "bytes": state.target.budget},
            **size_parts(source, written, state.structure, state.entries),
            **kernel_parts(state.structure, state.entries),
            **quality_parts(outcome),
            **({"search": state.searched} if state.searched else {}),
            **({"cache": outcome.cache} if outcome.cache else {}),
            "calibration": state.calibrated_on or "none (data-free)",
            "lineage": lineage.to_json(),
            "hash": weights_hash(held.partial),
            "versions": versions(),
            "reproduce": self.asked.command(),
            "how_to_load": how_to_load(
                final, state.directory.relative_to(held.partial), source,
                bool(grids_written(state.units) or self._formats(state) or dropped_written(source).forms),
            ),
            "notes": self.notes,
            "job": {
                "seconds": time.monotonic() - self.started,
                "peak_memory_bytes": self.watch.peak,
                "evaluations": outcome.evaluations + state.searched.get("evaluations", 0),
                "predicted": predicted_parts(state.target.predicted),
            },
        }  # fmt: skip
        write_papers(held, state.data, source, state.side_files, final.name)
        held.publish()
