"""The passes of ``fit`` and the state they work on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from slimwright.calibrate.data import GENERIC
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
from slimwright.errors import SlimwrightError
from slimwright.heap import trim
from slimwright.job import verify as verification
from slimwright.job.build import Calibration, build
from slimwright.job.caching import written_formats
from slimwright.job.calibration import calibrate, notes_on
from slimwright.job.choosing import Choosing
from slimwright.job.edits import dropped_view, dropped_written, folded, original, save_scales
from slimwright.job.fold_walk import FoldWalk, usual_grid
from slimwright.job.ledger import dead_inputs
from slimwright.job.memory import MemoryWatch
from slimwright.job.open import model_of
from slimwright.job.passes import Pass, run_passes
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
from slimwright.job.seen import scale
from slimwright.job.state import CHECKS, State, Target
from slimwright.job.units import Unit, grids_written, layout_of, plan_units
from slimwright.job.walked import WalkedModel
from slimwright.methods import WeightSolver, solver_for
from slimwright.model.structure import Structure
from slimwright.plan import Plan, group_folds, method_on
from slimwright.runtime.format import DenseForm, write_config
from slimwright.runtime.kv_format import KvFormat
from slimwright.weights import parse_grid


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
            state = State(held, directory, source, structure, target, journal, reporter, target.fixed)
            holding = frozenset({"dense", "ties"} | ({"plan"} if state.plan else set()))
            run_passes(self._passes(target), state, holding, CHECKS, reporter.begin)
            reporter.step(1, 1)
        return FitReport(state.data, held.out)

    def _passes(self, target: Target) -> list[Pass[State]]:
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

    def _step(self, state: State) -> Callable[[int, int], None]:
        """Reports progress, and stops a job that passes its memory or its time."""

        def step(done: int, total: int) -> None:
            self.watch.check()
            limit = self.asked.job_time
            if limit is not None and time.monotonic() - self.started > limit:
                raise SlimwrightError(f"--job-time {limit:.0f} s is over; run the same command again to continue.")
            state.reporter.step(done, total)

        return step

    def _fold(self, state: State) -> None:
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

    def _ranges(self, state: State) -> None:
        """Find the scales of activations that have one for all tokens."""
        plan, journal = state.planned(), state.journal
        if "ranges" not in journal.done:
            found = found_scales(state.source, state.structure, self._calibration(state), plan, self._step(state))
            journal.append("ranges", found)
            journal.commit()
        plan.activations = dict(journal.done["ranges"])

    def _solvers(self, state: State) -> dict[str, WeightSolver]:
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

    def _search(self, state: State) -> None:
        """Score every option on the weights and choose the best that fits."""
        chosen = Choosing(
            self.asked, state, lambda: self._calibration(state), self.watch.cap or (1 << 30), self._step(state),
            self.notes.append,
        ).run()  # fmt: skip
        state.plan, state.source, state.structure = chosen.plan, chosen.source, chosen.structure
        state.searched = chosen.searched

    def _build(self, state: State) -> None:
        """Solve and write every tensor; then everything else that belongs into the directory."""
        plan, source, held = state.planned(), state.source, state.held
        plan.source, plan.fingerprint = self.asked.model, fingerprint(original(source))
        plan.cache = dict(state.target.cache)
        plan.low_memory = plan.low_memory or self.asked.running is not None
        state.units = plan_units(source, state.structure, plan)
        layout = layout_of(state.units, state.structure, self.asked.max_shard_bytes)
        taken = layout.total_bytes + state.searched.get("beside_bytes", 0)
        if state.target.fixed is None and plan.target == OWN and taken > state.target.budget:
            raise SlimwrightError(
                f"The plan takes {taken} bytes, more than the {state.target.budget} asked: this is a "
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

    def _calibration(self, state: State) -> Calibration:
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

    def _formats(self, state: State) -> dict[int, KvFormat]:
        """Format of the keys and values by layer of the result."""
        return written_formats(state.target.formats, state.source, state.structure, self.asked.trust_remote_code)

    def _write_config(self, state: State, source: Checkpoint, units: list[Unit], plan: Plan) -> None:
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
                formats, left, plan.low_memory,
            )  # fmt: skip
        if all(config.get(key) is None for key in ("dtype", "torch_dtype")) and any(u.solved or u.cast for u in units):
            # where the config has none, transformers takes that of the first tensor, which may be 16 bits only here
            first = next(i.dtype for _, i in sorted(source.tensors.items()) if i.dtype.is_floating_point)
            config["dtype"] = str(first).removeprefix("torch.")
        write_config_atomic(state.directory / "config.json", config)

    def _verify(self, state: State) -> None:
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
            queries=self.asked.eval_queries,
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

    def _publish(self, state: State) -> None:
        """Write the report and the card, and let the result appear under its name."""
        held, source, outcome, plan = state.held, state.source, state.outcome, state.planned()
        assert outcome is not None
        searched, written = state.searched, Checkpoint.open(held.partial)
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
            **({"search": searched | {"scale": scale(searched, outcome.quality)}} if searched else {}),
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
                "evaluations": outcome.evaluations + searched.get("evaluations", 0),
                "predicted": predicted_parts(state.target.predicted),
            },
        }  # fmt: skip
        write_papers(held, state.data, source, state.side_files, final.name)
        held.publish()
