"""What the user asked of ``fit``, and what it gives back."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from slimwright.errors import InputError, NotBuiltError, did_you_mean
from slimwright.evaluate.retrieval import QUERIES
from slimwright.job.caching import parse_policy
from slimwright.job.floors import Floor
from slimwright.job.losses import check_allocator, evaluates
from slimwright.methods import GroupFold, WeightSolver, parse_method
from slimwright.methods.rotation import RotationFold
from slimwright.plan import DEFAULT_METHOD, Edit, Plan, group_folds
from slimwright.rules import Rule
from slimwright.sizes import parse_bytes
from slimwright.weights import Grid, parse_form
from slimwright.weights.activations import Activations

MAX_SHARD_BYTES = 5_000_000_000
DEFAULT_SEARCH = "dp"

FAMILIES = ("quantize", "lowrank")
"""What the search may use unless the user says otherwise."""
NAMED_FAMILIES = ("drop",)
"""What it may use only where it is named."""
LATER_FAMILIES = ("prune", "share")
FINISHED = "is the finished result of this same job."
AUTO = "auto"
OWN = "slimwright"
TARGETS = (AUTO, OWN, "compressed-tensors", "gguf", "safetensors")
"""What ``--target`` may say."""


@dataclass(frozen=True)
class FitOptions:
    """What the user asked. See :func:`fit`."""

    model: str
    out: str | None = None
    size: str | None = None
    memory: str | None = None
    context: int | None = None
    batch: int | None = None
    keep: tuple[str, ...] = ()
    predicted_loss: float | None = None
    """Nats per token to stay under, by the prediction, with the fewest bytes: how a floor's candidates are made."""
    running: tuple[int, int] | None = None
    """(tokens, sequences) that the result will hold when it runs: how a memory's candidates are made. ``size`` then
    counts what :mod:`slimwright.job.beside` says beside the weights."""
    grid: str | None = None
    plan: str | None = None
    rules: tuple[str, ...] = ()
    method: str | None = None
    target: str | None = None
    folds: tuple[str, ...] | None = None
    activations: str | None = None
    cache: str | None = None
    data: str | None = None
    eval_data: str | None = None
    eval_tokens: int | None = None
    eval_queries: int | None = None
    calibration_tokens: int | None = None
    calibration_length: int | None = None
    allow: tuple[str, ...] = ()
    search: str = DEFAULT_SEARCH
    loss: str | None = None
    job_memory: str | None = None
    job_time: float | None = None
    device: str = "auto"
    seed: int = 0
    dry_run: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    statistics_cache: str = "2GB"
    data_digest: str = ""
    published_as: str | None = None
    """Where the result will lie in the end, if not in ``out``: what its papers say."""

    @property
    def solver(self) -> str:
        """Spec of the method: what was asked, else the default."""
        return self.method or DEFAULT_METHOD

    @property
    def families(self) -> frozenset[str]:
        """What the search may use: the default and what ``allow`` names, or only that where it names one of the
        default."""
        named = frozenset(self.allow)
        return named if named & set(FAMILIES) else named | set(FAMILIES)

    @cached_property
    def given_plan(self) -> Plan | None:
        """The plan that was given, read once.

        Raises:
            InputError: it is no plan; NotBuiltError: it asks for something this version does not do.
        """
        return None if self.plan is None else Plan.load(Path(self.plan))

    def edits(self) -> list[Edit]:
        """What is done to the model before its weights are put on grids: the plan's edits, or the folds that were asked
        for, or those that belong to the method.

        Raises:
            InputError: an unknown fold, or a rotation behind another fold, whose factors it would mix.
        """
        if self.given_plan is not None:
            edits = self.given_plan.edits
        else:
            specs = self.folds if self.folds is not None else parse_method(self.solver).before
            edits = [Edit(method=spec, seed=self.seed) for spec in specs if spec != "none"]
        folds = [edit.fold() for edit in edits if not edit.drop]
        if any(isinstance(fold, GroupFold) and isinstance(after, RotationFold) for fold, after in pairwise(folds)):
            raise InputError("A rotation comes before other folds: it would mix the channels that they scaled.")
        return edits

    def needs_scales(self) -> bool:
        """Whether scales of activations are to be found on data."""
        specs = [self.activations] if self.activations is not None else []
        if self.given_plan is not None:
            specs = list(self.given_plan.activations.values())
        return not all(Activations.parse(spec).ready for spec in specs)

    @property
    def statistics_cap(self) -> int:
        """Bytes that what walks found may take in the cache; 0: nothing is kept, nor looked up.

        Raises:
            InputError: neither a size nor ``off``.
        """
        if self.statistics_cache == "off":
            return 0
        try:
            return parse_bytes(self.statistics_cache, "--statistics-cache")
        except InputError as error:
            raise InputError(f"{str(error).rstrip('.')}; or give off.") from None

    def recipe(self) -> dict[str, Any]:
        """What decides the result's bytes beside the source and the machine."""
        plan = Path(self.plan).read_text(encoding="utf-8") if self.plan else None
        return {
            "size": self.size, "memory": self.memory, "context": self.context, "batch": self.batch,
            "keep": list(self.keep), "predicted_loss": self.predicted_loss, "eval_tokens": self.eval_tokens,
            **({} if self.running is None else {"running": list(self.running)}),
            **({} if self.eval_queries is None else {"eval_queries": self.eval_queries}),
            "grid": self.grid, "plan": plan, "rules": list(self.rules), "method": self.method,
            "folds": None if self.folds is None else list(self.folds), "data_digest": self.data_digest,
            "activations": self.activations,
            "data": self.data, "eval_data": self.eval_data, "tokens": self.calibration_tokens,
            "length": self.calibration_length,
            "allow": sorted(self.families), "search": self.search, "loss": self.loss, "cache": self.cache,
            "seed": self.seed, "shard": self.max_shard_bytes,
            **({} if self.target in (None, OWN) else {"target": self.target}),
        }  # fmt: skip

    def command(self) -> str:
        """The command line that does this job again."""
        words = ["slimwright", "fit", self.model]
        for name in (
            "size", "memory", "context", "batch", "grid", "plan", "target", "activations", "cache", "data", "eval_data",
            "out",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        for floor in self.keep:
            words += ["--keep", floor]
        for rule in self.rules:
            words += ["--rule", rule]
        for fold in self.folds if self.folds is not None else ():
            words += ["--fold", fold]
        if self.allow:
            words += ["--allow", ",".join(self.allow)]
        for name in (
            "method", "search", "loss", "seed", "calibration_tokens", "calibration_length", "eval_tokens",
            "eval_queries",
        ):  # fmt: skip
            if getattr(self, name) != FitOptions.__dataclass_fields__[name].default:
                words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        return shlex.join(words)

    def limit(self) -> str:
        """The limits that were asked: a size, a memory, floors, a grid or a plan."""
        words = [self.size] if self.size else []
        words += [f"memory {self.memory}"] if self.memory else []
        words += [f"grid {self.grid}"] if self.grid else []
        words += [f"plan {self.plan}"] if self.plan else []
        words += [f"keep {floor}" for floor in self.keep]
        return ", ".join(words) or f"predicted loss {self.predicted_loss}"

    @property
    def floors(self) -> list[Floor]:
        """The floors on quality.

        Raises:
            InputError: one of them is none.
        """
        return [Floor.parse(text) for text in self.keep]


@dataclass(frozen=True)
class FitReport:
    """The result: ``data`` is report.json, ``out`` the directory (None after a dry run)."""

    data: dict[str, Any]
    out: Path | None

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


def finished_report(out: Path) -> FitReport:
    """The report of a result that this same job has published before, with a note that says so."""
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    data.setdefault("notes", []).append(f"{out} {FINISHED}")
    return FitReport(data, out)


def check_options(asked: FitOptions) -> tuple[WeightSolver, list[Rule]]:
    """Refuse what cannot be before anything is opened.

    Raises:
        InputError: a wrong value; NotBuiltError: designed but not built.
    """
    if asked.device not in ("auto", "cpu"):
        raise NotBuiltError(f"--device {asked.device}: this version computes on the CPU; use auto or cpu.")
    given = [name for name in ("size", "memory", "grid", "plan") if getattr(asked, name) is not None]
    if not given and not asked.keep and asked.predicted_loss is None:
        raise InputError(
            "Give a limit: --size (for instance 4.25bit, 30% or 4.7GB), --memory, --keep, --grid or --plan."
        )
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]} exclude each other: give one of them.")
    _ = asked.floors
    if asked.memory is not None:
        parse_bytes(asked.memory, "--memory")
    for name in ("context", "batch"):
        value = getattr(asked, name)
        if value is not None and asked.memory is None:
            raise InputError(f"--{name} says how the result will be run: give it with --memory.")
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    if asked.eval_tokens is not None and asked.eval_tokens < 64:
        raise InputError(f"--eval-tokens must be at least 64, not {asked.eval_tokens}.")
    if asked.eval_queries is not None and not 2 <= asked.eval_queries <= QUERIES:
        raise InputError(f"--eval-queries must lie between 2 and {QUERIES}, not {asked.eval_queries}.")
    if asked.plan is not None and asked.rules:
        raise InputError("--plan fixes everything: edit the plan instead of giving --rule.")
    if asked.target is not None and asked.target not in TARGETS:
        hint = did_you_mean(asked.target, TARGETS)
        raise InputError(f"Unknown target '{asked.target}'{hint} Known: {', '.join(TARGETS)}.")
    if asked.target not in (None, OWN) and asked.cache is not None:
        raise InputError(f"--cache is packed by slimwright only: leave it out with --target {asked.target}.")
    if asked.target not in (None, OWN) and asked.memory is not None:
        raise InputError(f"--memory is measured in slimwright's own runtime: give --size with --target {asked.target}.")
    if asked.target == AUTO and (asked.keep or asked.predicted_loss is not None):
        raise InputError("--target auto compares plans of one size: give --size instead of --keep, or name the target.")
    if asked.out is None and not asked.dry_run:
        raise InputError("Give --out, the directory to write the result to.")
    if asked.job_time is not None and not asked.job_time > 0:
        raise InputError("--job-time must be more than 0 seconds.")
    solver = parse_method(asked.solver)
    if not isinstance(solver, WeightSolver):
        raise InputError(f"'{asked.solver}' does not put weights on a grid.")
    if asked.size is not None and not isinstance(solver.form, Grid):
        raise InputError(
            f"{solver.name} puts no weight on a grid, so --size has nothing to choose for it: give --grid "
            f"{solver.form}, or a rule such as 'mlp: {solver.form}'."
        )
    if solver.needs and asked.data == "none":
        raise InputError(f"{solver.name} needs data: give --data, or leave it out for generic text.")
    if asked.calibration_tokens is not None and asked.calibration_tokens < 64:
        raise InputError(f"--calibration-tokens must be at least 64, not {asked.calibration_tokens}.")
    if asked.calibration_length is not None and asked.calibration_length < 8:
        raise InputError(f"--calibration-length must be at least 8, not {asked.calibration_length}.")
    _ = asked.statistics_cap
    _check_families(asked)
    check_allocator(asked.search, asked.loss, asked.data)
    if (asked.loss is not None or asked.search != DEFAULT_SEARCH) and {"grid", "plan"} & set(given):
        option = "loss" if asked.loss is not None else "search"
        raise InputError(f"--{given[0]} leaves nothing to choose: --{option} needs a --size, --memory or --keep.")
    if asked.size is None and evaluates(asked.search, asked.loss):
        raise InputError(
            "A search that evaluates models would do so for every candidate of --memory or --keep: give it a --size."
        )
    if "drop" in asked.families and asked.target not in (None, OWN):
        raise InputError(f"--allow drop and --target {asked.target}: only our own format knows dropped parts.")
    if asked.target == AUTO and evaluates(asked.search, asked.loss):
        raise InputError("--target auto searches once for every target: use a search that evaluates nothing.")
    if "drop" in asked.families and (asked.loss not in (None, "sensitivity") or evaluates(asked.search, asked.loss)):
        raise InputError(
            "--allow drop needs --loss sensitivity, which alone says what a drop costs, and a search that evaluates "
            "nothing."
        )
    if asked.plan is not None and (asked.folds is not None or asked.activations is not None):
        option = "--fold" if asked.folds is not None else "--activations"
        raise InputError(f"--plan fixes everything: edit the plan instead of giving {option}.")
    if asked.activations is not None:
        rounding = Activations.parse(asked.activations)
        if not rounding.ready and asked.data == "none":
            raise InputError(
                f"--activations {rounding} needs data for its scales: use {rounding.kind}:token, or give --data."
            )
        if rounding.scale is not None:
            raise InputError(f"--activations {rounding}: one scale does not fit every layer; scales are found on data.")
    if asked.data == "none" and group_folds(asked.edits()):
        raise InputError("Scales are found on data: give --data, or --fold none, or leave --data out for generic text.")
    if asked.cache is not None:
        if asked.plan is not None:
            raise InputError("--plan fixes everything: write the cache into the plan instead of giving --cache.")
        parse_policy(asked.cache)
    if asked.grid is not None:
        parse_form(asked.grid)
    _ = asked.given_plan
    return solver, [Rule.parse(text) for text in asked.rules]


def _check_families(asked: FitOptions) -> None:
    known = (*FAMILIES, *NAMED_FAMILIES)
    for name in asked.allow:
        if name in LATER_FAMILIES:
            raise NotBuiltError(f"--allow {name} is designed but not built in this version of slimwright.")
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"--allow {name}: there is no such family{hint} Known: {', '.join(known)}.")
    if not asked.allow:
        return
    if asked.grid is not None or asked.plan is not None:
        raise InputError("--allow says what a search may use: give --size, or write drops into the plan's edits.")
    if "drop" in asked.allow and asked.data == "none":
        raise InputError("What a drop costs is found on data: give --data, or leave it out for generic text.")
