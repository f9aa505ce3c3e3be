"""``fit``: the main job. Checks, forecast, scoring, search, build, verification, publishing; each phase resumes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import slimwright
from slimwright.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Claim,
    Journal,
    Lineage,
    claim,
    copy_side_files,
    entry_cost,
    environment_key,
    fingerprint,
    job_key,
    model_card,
    overhead_bound,
    read_card_metadata,
    source_state,
    weights_hash,
    write_bytes_atomic,
    write_json_atomic,
)
from slimwright.errors import InputError, NotBuiltError, SlimwrightError
from slimwright.job import verify as verification
from slimwright.job.build import Unit, build, grids_written, layout_of, plan_units
from slimwright.job.forecast import Forecast, forecast, measure_rates
from slimwright.job.ledger import Entry, check_complete
from slimwright.job.memory import MemoryWatch, memory_cap, trim
from slimwright.job.open import model_of, open_source
from slimwright.job.options import option_costs, score_options
from slimwright.job.progress import Reporter
from slimwright.methods import WeightSolver, parse_method
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from slimwright.plan import DEFAULT_METHOD, KEEP, Assignment, Plan, Rule, bind, parse_size
from slimwright.report import render_report
from slimwright.runtime.format import DenseForm, write_config
from slimwright.search import Option, check_solver, search, smallest_cost
from slimwright.weights import parse_grid

REPORT_VERSION = 1
MAX_SHARD_BYTES = 5_000_000_000
COMMIT_SECONDS = 2.0
"""Scores that a crash may lose."""


@dataclass(frozen=True)
class FitOptions:
    """What the user asked. See :func:`fit`."""

    model: str
    out: str | None = None
    size: str | None = None
    grid: str | None = None
    plan: str | None = None
    rules: tuple[str, ...] = ()
    method: str = DEFAULT_METHOD
    data: str = "none"
    search: str = "dp"
    job_memory: str | None = None
    job_time: float | None = None
    device: str = "auto"
    seed: int = 0
    dry_run: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES

    def recipe(self) -> dict[str, Any]:
        """What decides the result's bytes beside the source and the machine."""
        plan = Path(self.plan).read_text(encoding="utf-8") if self.plan else None
        return {
            "size": self.size, "grid": self.grid, "plan": plan, "rules": list(self.rules), "method": self.method,
            "data": self.data, "search": self.search, "seed": self.seed, "shard": self.max_shard_bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class FitReport:
    """The result: ``data`` is report.json, ``out`` the directory (None after a dry run)."""

    data: dict[str, Any]
    out: Path | None

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


def fit(model: str, out: str | None = None, **options: Any) -> FitReport:
    """Fit a pretrained model to a size.

    Args:
        model: a directory with config.json and safetensors, a sentence-transformers directory, or a hub id.
        out: directory that the result is written to; it exists only when the result is whole and verified.
        options: fields of :class:`FitOptions`: ``size`` (``4.25bit | 30% | 4.7GB``), ``grid`` (``int4:g128``
            everywhere), ``plan`` (a plan.yaml), ``rules`` (``'lm_head: keep'``), ``method`` (the solver), ``search``
            (``dp | milp``), ``job_memory`` (``2GB``), ``job_time`` (seconds), ``seed``, ``dry_run``,
            ``trust_remote_code``, ``quiet``.

    Raises:
        InputError: something about the input cannot work; nothing was written.
        SlimwrightError: the job failed; what was finished is kept for the next run of the same call.
    """
    known = {field.name for field in dataclasses.fields(FitOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"fit has no option '{unknown[0]}'; it has: {', '.join(sorted(known))}.")
    if "rules" in options:
        options["rules"] = tuple(options["rules"])
    asked = FitOptions(model=str(model), out=None if out is None else str(out), **options)
    with MemoryWatch(memory_cap(asked.job_memory)) as watch:
        return _Job(asked, watch).run()


def check_options(asked: FitOptions) -> tuple[WeightSolver, list[Rule]]:
    """Refuse what cannot be before anything is opened.

    Raises:
        InputError: a wrong value; NotBuiltError: designed but not built.
    """
    if asked.data != "none":
        raise NotBuiltError(
            f"--data {asked.data}: calibration on data is not built in this version; only --data none (the default) is."
        )
    if asked.device not in ("auto", "cpu"):
        raise NotBuiltError(f"--device {asked.device}: this version computes on the CPU; use auto or cpu.")
    given = [name for name in ("size", "grid", "plan") if getattr(asked, name) is not None]
    if not given:
        raise InputError("Give a limit: --size (for instance 4.25bit, 30% or 4.7GB), --grid or --plan.")
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]} exclude each other: give one of them.")
    if asked.plan is not None and asked.rules:
        raise InputError("--plan fixes everything: edit the plan instead of giving --rule.")
    if asked.out is None and not asked.dry_run:
        raise InputError("Give --out, the directory to write the result to.")
    if asked.job_time is not None and not asked.job_time > 0:
        raise InputError("--job-time must be more than 0 seconds.")
    solver = parse_method(asked.method)
    if not isinstance(solver, WeightSolver):
        raise InputError(f"'{asked.method}' does not put weights on a grid.")
    check_solver(asked.search)
    if asked.grid is not None:
        parse_grid(asked.grid)
    if asked.plan is not None:
        Plan.load(Path(asked.plan))
    return solver, [Rule.parse(text) for text in asked.rules]


class _Job:
    """One run of ``fit``."""

    def __init__(self, asked: FitOptions, watch: MemoryWatch) -> None:
        self.asked = asked
        self.watch = watch
        self.started = time.monotonic()
        self.notes: list[str] = []

    def run(self) -> FitReport:
        asked = self.asked
        solver, rules = check_options(asked)
        source = open_source(asked.model)
        structure = discover(source, trust_remote_code=asked.trust_remote_code)
        if structure.note:
            self.notes.append(structure.note)
        fixed = self._fixed_plan(source, structure, rules)
        bound = bind(rules, structure) if rules else {}
        budget, copied = self._budget(source, structure, fixed)
        if copied:
            fixed = _keep_all(structure, "the budget is above the source")
            self.notes.append("The budget is above the size of the source: it was copied as it is.")
        options, rest = self._options(source, structure, bound, budget) if fixed is None else ({}, 0)
        cap = self.watch.cap or 0
        predicted = forecast(
            source, structure, _representative(solver, fixed), measure_rates(_representative(solver, fixed)),
            budget, fixed is None, cap,
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
                data = json.loads((held.out / "report.json").read_text(encoding="utf-8"))
                data.setdefault("notes", []).append(f"{held.out} is the finished result of this same job.")
                return FitReport(data, held.out)
            try:
                return self._work(held, source, structure, _Target(budget, fixed, options, rest, predicted, state))
            except InputError:  # what was given cannot work, so nothing of it is worth keeping for another try
                if held.status == "new" and not self.watch.exceeded:
                    shutil.rmtree(held.partial)
                raise

    # -- before work -----------------------------------------------------------------------------------------------

    def _fixed_plan(self, source: Checkpoint, structure: Structure, rules: list[Rule]) -> Plan | None:
        """The plan where nothing is left to search."""
        asked = self.asked
        if asked.plan is not None:
            plan = Plan.load(Path(asked.plan))
            plan.check(structure)
            return plan
        if asked.grid is None:
            return None
        grid = parse_grid(asked.grid)
        bound = bind(rules, structure) if rules else {}
        assignments = {}
        for group, sites in structure.choice_groups().items():
            illegal = next((r for s in sites if (r := grid.illegal(s.rows, s.columns))), None)
            if group in bound:
                kept = bound[group] == KEEP
                assignments[group] = Assignment(
                    grid=bound[group], method=None if kept else asked.method, reason="rule"
                )  # fmt: skip
            elif illegal:
                assignments[group] = Assignment(grid=KEEP, reason=f"{grid} cannot hold it: {illegal}")
            else:
                assignments[group] = Assignment(grid=grid.spec, method=asked.method)
        return Plan(assignments=assignments)

    def _budget(self, source: Checkpoint, structure: Structure, fixed: Plan | None) -> tuple[int, bool]:
        """Bytes of the weight files, and whether that is at least what the source takes."""
        if fixed is not None:
            units = plan_units(source, structure, fixed)
            return layout_of(units, structure, self.asked.max_shard_bytes).total_bytes, False
        assert self.asked.size is not None
        budget = parse_size(self.asked.size, structure.parameters)
        whole = layout_of(
            plan_units(source, structure, _keep_all(structure, "")), structure, self.asked.max_shard_bytes
        ).total_bytes  # fmt: skip
        return (whole, True) if budget >= whole and not self.asked.rules else (budget, False)

    def _options(
        self, source: Checkpoint, structure: Structure, bound: Mapping[str, str], budget: int
    ) -> tuple[dict[str, list[Option]], int]:
        """Options with their costs, and the bytes of everything that is not a site, headers included.

        Raises:
            InputError: the budget is below the smallest possible, which is named.
        """
        kept = plan_units(source, structure, _keep_all(structure, ""))

        def costs(limit: int) -> tuple[dict[str, list[Option]], int]:
            rest = sum(entry_cost(entry, limit) for unit in kept if unit.site is None for entry in unit.entries)
            rest += overhead_bound(limit, self.asked.max_shard_bytes)
            return option_costs(source, structure, bound, self.asked.method, limit), rest

        options, rest = costs(budget)
        smallest = smallest_cost(options) + rest
        if smallest <= budget:
            return options, rest
        while True:  # offsets in the header have more digits in larger files
            options, rest = costs(smallest)
            needed = smallest_cost(options) + rest
            if needed <= smallest:
                break
            smallest = needed
        raise InputError(
            f"--size {self.asked.size} is {budget} bytes, but the smallest possible is {smallest} bytes "
            f"({8 * smallest / structure.parameters:.2f}bit): {rest} of them are kept as they are."
        )

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
            "model": _model_facts(self.asked.model, source, structure),
            "budget": {"asked": self._asked_budget(), "bytes": predicted.bytes},
            "size": {"before": source.total_bytes},
            "forecast": {
                "bytes": predicted.bytes,
                "bytes_exact": fixed is not None,
                "seconds": predicted.seconds,
                "phases": predicted.phases,
                "peak_memory_bytes": predicted.peak_memory_bytes,
                "least_memory_bytes": predicted.least_memory_bytes,
                "disk_bytes": predicted.disk_bytes,
            },
            "notes": self.notes,
        }

    def _command(self) -> str:
        """The command line that does this job again."""
        asked = self.asked
        words = ["slimwright", "fit", asked.model]
        for name in ("size", "grid", "plan", "out"):
            if getattr(asked, name) is not None:
                words += [f"--{name}", str(getattr(asked, name))]
        for rule in asked.rules:
            words += ["--rule", rule]
        for name in ("method", "search", "seed"):
            if getattr(asked, name) != FitOptions.__dataclass_fields__[name].default:
                words += [f"--{name}", str(getattr(asked, name))]
        return shlex.join(words)

    def _asked_budget(self) -> str:
        asked = self.asked
        return asked.size or (f"grid {asked.grid}" if asked.grid else f"plan {asked.plan}")

    # -- work ------------------------------------------------------------------------------------------------------

    def _work(self, held: Claim, source: Checkpoint, structure: Structure, target: _Target) -> FitReport:
        asked = self.asked
        key = job_key(source=target.state, recipe=asked.recipe(), environment=environment_key())
        directory = held.partial / source.model_path.relative_to(source.path)
        with (
            Journal.open(held.scratch / "journal", key, reset=True) as journal,
            Reporter(target.predicted.phases, held.partial / "events.jsonl", asked.quiet) as reporter,
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

            def step(done: int, total: int) -> None:
                self.watch.check()
                if asked.job_time is not None and time.monotonic() - self.started > asked.job_time:
                    raise SlimwrightError(
                        f"--job-time {asked.job_time:.0f} s is over; run the same command again to continue."
                    )
                reporter.step(done, total)

            plan = target.fixed or self._search(source, structure, target, journal, step, reporter)
            plan.source, plan.fingerprint = asked.model, fingerprint(source)
            units = plan_units(source, structure, plan)
            layout = layout_of(units, structure, asked.max_shard_bytes)
            if target.fixed is None and layout.total_bytes > target.budget:
                raise SlimwrightError(
                    f"The plan takes {layout.total_bytes} bytes, more than the {target.budget} asked: this is a defect "
                    "of slimwright; nothing was published."
                )
            reporter.begin("build")
            entries = self._build(directory, source, structure, units, layout, journal, step)
            check_complete(entries, source, sum(e.nbytes for u in units for e in u.entries))
            write_bytes_atomic(held.partial / "plan.yaml", plan.to_yaml().encode())
            self._write_config(directory, source, units, plan)
            copied = copy_side_files(source, held.partial, trust_remote_code=asked.trust_remote_code)
            for name, reason in copied.skipped:
                if reason.startswith("python"):
                    self.notes.append(f"Not copied: {name} ({reason}).")
            trim()
            reporter.begin("verify")
            outcome = self._verify(held, structure, source, step)
            reporter.begin("publish")
            data = self._report(held, source, structure, plan, units, entries, outcome, target, directory)
            self._publish(held, data, source, copied.copied)
            reporter.step(1, 1)
        return FitReport(data, held.out)

    def _search(
        self,
        source: Checkpoint,
        structure: Structure,
        target: _Target,
        journal: Journal,
        step: Callable[[int, int], None],
        reporter: Reporter,
    ) -> Plan:
        reporter.begin("score")
        groups = len(structure.choice_groups())
        found = {k.removeprefix("score:"): v for k, v in journal.done.items() if k.startswith("score:")}
        last = time.monotonic()

        def record(group: str, losses: list[float]) -> None:
            nonlocal last
            journal.append(f"score:{group}", losses)
            found[group] = losses
            if time.monotonic() - last > COMMIT_SECONDS:
                journal.commit()
                last = time.monotonic()
            step(len(found), groups)

        table = score_options(source, structure, target.options, dict(found), record)
        journal.commit()
        allocation = search(table, target.budget - target.rest, solver=self.asked.search)
        return Plan(assignments={group: option.choice for group, option in allocation.choices.items()})

    def _build(
        self,
        directory: Path,
        source: Checkpoint,
        structure: Structure,
        units: list[Unit],
        layout: Any,
        journal: Journal,
        step: Callable[[int, int], None],
    ) -> list[Entry]:
        with CheckpointWriter(directory, layout) as writer:
            if writer.fresh:  # shards made anew hold nothing yet
                for unit in [unit for unit in journal.done if unit.startswith("build:")]:
                    del journal.done[unit]
            return build(source, structure, units, writer, journal, step)

    def _write_config(self, directory: Path, source: Checkpoint, units: list[Unit], plan: Plan) -> None:
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        grids = grids_written(units)
        if grids:
            dense = {}
            for unit in units:
                if unit.site is not None and unit.name in grids:
                    dtype = str(source.tensors[unit.name].dtype).removeprefix("torch.")
                    dense[unit.name] = DenseForm(dtype, unit.site.shape, unit.site.transposed)
            config["quantization_config"] = write_config(grids, plan.fingerprint, dense)
        write_json_atomic(directory / "config.json", config)

    def _verify(
        self, held: Claim, structure: Structure, source: Checkpoint, step: Callable[[int, int], None]
    ) -> verification.Outcome:
        spare = max(64 << 20, min((self.watch.cap or 0) // 4, 1 << 30))
        vocabulary = verification.logits_width(structure)
        tokens, batch = verification.tokens_for(structure.parameters, vocabulary, spare)
        spec = verification.Spec(
            source=self.asked.model, written=str(held.partial), result=str(held.scratch / "verified.json"),
            tokens=tokens, batch_tokens=batch, threads=torch.get_num_threads(), seed=self.asked.seed,
            sample=structure.parameters < verification.SAMPLED_BELOW,
            trust_remote_code=self.asked.trust_remote_code, progress=True,
        )  # fmt: skip
        own = model_of(source, self.asked.trust_remote_code)[0].__module__
        if not own.startswith("transformers."):
            how = f"this process, from disk (the class {own} is registered in this process only)"
            outcome = verification.verify(spec, step, how)
        else:
            outcome = self._verify_in_fresh_process(held, spec, step)
        if not outcome.ok:
            raise SlimwrightError(
                f"The written model is not what was planned and was not published: {outcome.problems[0]}. "
                f"It is left in {held.partial}."
            )
        return outcome

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
            self.watch.check()
            if child.returncode != 0 or not Path(spec.result).exists():
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise SlimwrightError(f"The verifying process failed (exit {child.returncode}): {last}")
        found = json.loads(Path(spec.result).read_text())
        found.pop("ok")
        return verification.Outcome(**found)

    # -- after work ------------------------------------------------------------------------------------------------

    def _report(
        self,
        held: Claim,
        source: Checkpoint,
        structure: Structure,
        plan: Plan,
        units: list[Unit],
        entries: list[Entry],
        outcome: verification.Outcome,
        target: _Target,
        directory: Path,
    ) -> dict[str, Any]:
        written = Checkpoint.open(held.partial)
        packed = bool(grids_written(units))
        lineage = Lineage(fingerprint(written), (Lineage(plan.fingerprint),), ({"edit": "quantize"},))
        predicted = target.predicted
        return {
            "format_version": REPORT_VERSION,
            "model": _model_facts(self.asked.model, source, structure) | {"fingerprint": plan.fingerprint},
            "budget": {"asked": self._asked_budget(), "bytes": target.budget},
            "size": {
                "before": source.total_bytes,
                "after": written.total_bytes,
                "bits_per_weight": 8 * written.total_bytes / structure.parameters,
            },
            "quality": outcome.quality,
            "job": {
                "seconds": time.monotonic() - self.started,
                "peak_memory_bytes": self.watch.peak,
                "evaluations": outcome.evaluations,
                "predicted": {
                    "seconds": predicted.seconds,
                    "peak_memory_bytes": predicted.peak_memory_bytes,
                    "bytes": predicted.bytes,
                },
            },
            "ledger": [entry.to_json() for entry in entries],
            "verified": {
                "how": f"reloaded from disk by transformers in a {outcome.how}; reference recomputed from the source, "
                "streamed in row tiles" if outcome.how == "fresh process" else f"reloaded from disk in {outcome.how}",
                "ok": outcome.ok,
                "logits_error": outcome.logits_error,
                "tensors_compared": outcome.tensors_compared,
                "inputs": outcome.inputs,
            },
            "measured_on": {"inputs": outcome.inputs, **outcome.measured_on},
            "samples": outcome.samples,
            "calibration": "none (data-free)",
            "lineage": lineage.to_json(),
            "hash": weights_hash(held.partial),
            "versions": {
                "slimwright": slimwright.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "reproduce": self._command(),
            "how_to_load": how_to_load(held.out, directory.relative_to(held.partial), source, packed),
            "notes": self.notes,
        }  # fmt: skip

    def _publish(self, held: Claim, data: dict[str, Any], source: Checkpoint, side_files: Sequence[str]) -> None:
        metadata = read_card_metadata(source.path)
        quality = data["quality"]
        facts = [
            ("Base model", self.asked.model),
            ("Size", f"{data['size']['before'] / 1e6:.1f} MB → {data['size']['after'] / 1e6:.1f} MB"),
            ("Bits per weight", f"{data['size']['bits_per_weight']:.2f}"),
            *((name, f"{q['value']:.4g} ({q['low']:.4g} to {q['high']:.4g})") for name, q in quality.items()),
            ("Weights hash", data["hash"]),
        ]
        card = model_card(
            held.out.name,
            facts=facts,
            load=data["how_to_load"],
            base_models=[self.asked.model] if not Path(self.asked.model).exists() else [],
            source_metadata=metadata,
            licence_files=[name for name in side_files if "licen" in name.lower()],
            library_name="sentence-transformers" if (held.partial / "modules.json").exists() else "transformers",
            warnings=self.notes,
        )
        write_bytes_atomic(held.partial / "README.md", card.encode())
        data["job"]["seconds"] = time.monotonic() - self.started
        data["job"]["peak_memory_bytes"] = self.watch.peak
        write_json_atomic(held.partial / "report.json", data)
        write_bytes_atomic(held.partial / "report.html", render_report(data).encode())
        held.publish()


@dataclass(frozen=True)
class _Target:
    """What the job works towards: bytes, the plan where it is fixed, else the options and the bytes of all that is no
    site, the forecast, the state of the source."""

    budget: int
    fixed: Plan | None
    options: Mapping[str, list[Option]]
    rest: int
    predicted: Forecast
    state: str


def how_to_load(out: Path, inner: Path, source: Checkpoint, packed: bool) -> str:
    """The lines that load the result."""
    first = "import slimwright  # registers the packed format\n" if packed else ""
    if (source.path / "modules.json").exists():
        return (
            f"{first}from sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer({str(out)!r})"
        )
    cls = (source.config.get("architectures") or ["AutoModel"])[0]
    auto = next(
        (
            a
            for a in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
            if cls.endswith(_TAILS[a])
        ),
        cls if hasattr(transformers, cls) else "AutoModel",
    )
    return f"{first}from transformers import {auto}\nmodel = {auto}.from_pretrained({str(out / inner)!r})"


_TAILS: dict[str, tuple[str, ...]] = {
    "AutoModelForCausalLM": ("ForCausalLM", "LMHeadModel"),
    "AutoModelForSeq2SeqLM": ("ForConditionalGeneration",),
    "AutoModelForMaskedLM": ("ForMaskedLM",),
}


def _representative(solver: WeightSolver, fixed: Plan | None) -> WeightSolver:
    """The solver whose speed stands for the job's: on the most frequent grid of a fixed plan."""
    counts: dict[tuple[str, str | None], int] = {}
    for assignment in fixed.assignments.values() if fixed else ():
        if not assignment.kept:
            key = (assignment.grid, assignment.method)
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return solver
    grid, method = max(counts, key=lambda key: counts[key])
    chosen = Assignment(grid=grid, method=method).solver()
    return solver if chosen.grid.illegal(512, 1024) else chosen


def _keep_all(structure: Structure, reason: str) -> Plan:
    return Plan(assignments={group: Assignment(grid=KEEP, reason=reason) for group in structure.choice_groups()})


def _model_facts(path: str, source: Checkpoint, structure: Structure) -> dict[str, Any]:
    return {
        "path": path,
        "family": structure.family,
        "architecture": structure.architecture,
        "parameters": structure.parameters,
        "blocks": sum(len(stack.blocks) for stack in structure.stacks),
    }
