"""The plan: what is done to which group of weights. Printed, edited, run again (``--plan FILE``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimwright.errors import InputError, NotBuiltError, did_you_mean
from slimwright.methods import GroupFold, ModelFold, WeightSolver, parse_method, solver_for
from slimwright.model.structure import Site, Structure
from slimwright.sizes import parse_bytes
from slimwright.weights import Float, Form, Grid, LowRankForm, parse_form
from slimwright.weights.activations import Activations

PLAN_VERSION = 1
KEEP = "keep"
ZERO = "zero"
"""Of no plan: stands in the table of options for weights at zero, which is what a drop loses."""
DEFAULT_METHOD = "quantize/rtn"
CALIBRATED_METHOD = "quantize/gptq"
FACTORIZED_METHOD = "factorize/svd_llm"
CORRECTED_METHOD = "factorize/corrected"
"""What solves where there is no data, and where there is, unless the user says."""
TARGETS = ("slimwright", "compressed-tensors", "gguf", "safetensors")
"""In whose form a result may be."""
CAST = "cast"
CAST_GRIDS = ("fp16", "bf16")
"""What a tensor that is no site may be stored as, beside ``keep``."""


class Assignment(BaseModel):
    """What is done to one choice group, or to one tensor that is no site but may be cast to 16 bits.

    Attributes:
        grid: a grid's spec or another form's (``lowrank:r64``, ``int3:g64+lowrank:r16``), or ``keep`` for the weights
            as they are.
        method: the solver's spec (``quantize/rtn,clip=none``); ``cast`` of a tensor that is no site; None where kept.
        reason: why, for the ledger.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    grid: str
    method: str | None = None
    reason: str = ""

    @property
    def kept(self) -> bool:
        return self.grid == KEEP

    @property
    def solved(self) -> bool:
        """Whether a solver puts the weights into another form: they are neither kept nor at zero."""
        return self.grid not in (KEEP, ZERO)

    def parsed_grid(self) -> Form:
        return parse_form(self.grid)

    def solver(self) -> WeightSolver:
        """The solver with its form.

        Raises:
            InputError: the method is unknown or does not give this form.
        """
        return solver_for(self.method or str(method_on(self.grid, DEFAULT_METHOD)), self.parsed_grid())


class Edit(BaseModel):
    """What is done to a model before its weights are put on grids: a fold, which leaves its function as it is, or a
    drop.

    Attributes:
        method: a fold's spec (``fold/rotation``, ``fold/awq,n_grid=10``).
        seed: of what is random in it.
        drop: what is dropped, by its disk name: a block (``model.layers.7``) or an attention or MLP sublayer of one
            (``model.layers.3.self_attn``).
        reason: why, for the ledger.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str = ""
    seed: int = 0
    drop: str = ""
    reason: str = ""

    @model_validator(mode="after")
    def _one_of_two(self) -> Edit:
        if bool(self.method) == bool(self.drop):
            raise ValueError("an edit has either 'method' or 'drop'")
        return self

    def written(self) -> dict[str, Any]:
        """As plan.yaml has it."""
        if self.drop:
            return {"drop": self.drop, **({"reason": self.reason} if self.reason else {})}
        return {"method": self.method, "seed": self.seed}

    def fold(self) -> ModelFold:
        """The method.

        Raises:
            InputError: unknown, or it is no fold.
        """
        fold = parse_method(self.method)
        if not isinstance(fold, ModelFold):
            raise InputError(f"'{self.method}' does not change a model before its weights are put on grids.")
        return fold


class Plan(BaseModel):
    """Everything that is done to a model. Fields that later versions fill are present and must be empty today."""

    model_config = ConfigDict(extra="forbid")
    version: int = PLAN_VERSION
    source: str = ""
    fingerprint: str = ""
    target: str = "slimwright"
    assignments: dict[str, Assignment] = Field(default_factory=dict)
    edits: list[Edit] = Field(default_factory=list)
    activations: dict[str, str] = Field(default_factory=dict)
    cache: dict[str, str] = Field(default_factory=dict)
    low_memory: bool = False
    adapters: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, Any] = Field(default_factory=dict)
    heal: list[Any] = Field(default_factory=list)

    def to_yaml(self) -> str:
        empty = ("edits", "activations", "cache", "low_memory", "adapters", "variants", "heal")
        data = {key: value for key, value in self.model_dump().items() if key not in empty or value}
        if self.edits:
            data["edits"] = [edit.written() for edit in self.edits]
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=200)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read plan.yaml.

        Raises:
            InputError: not a plan; NotBuiltError: it asks for something this version does not do.
        """
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise InputError(f"The plan {path} cannot be read: {_first_line(error)}.") from None
        if not isinstance(data, dict):
            raise InputError(f"The plan {path} is not a mapping of keys to values.")
        version = data.get("version")
        if isinstance(version, int) and version > PLAN_VERSION:
            raise InputError(f"The plan {path} is of version {version}; this slimwright reads up to {PLAN_VERSION}.")
        try:
            plan = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"The plan {path} is wrong at '{where}': {first['msg']}.") from None
        for edit in plan.folds:
            edit.fold()
        for spec in plan.activations.values():
            Activations.parse(spec)
        for name in ("adapters", "variants", "heal"):
            if getattr(plan, name):
                raise NotBuiltError(
                    f"The plan {path} has '{name}', which this version of slimwright does not build yet."
                )
        if plan.target not in TARGETS:
            raise NotBuiltError(f"The plan {path} has target '{plan.target}', which this version does not write yet.")
        return plan

    @property
    def folds(self) -> list[Edit]:
        """The edits that leave the model's function as it is."""
        return [edit for edit in self.edits if not edit.drop]

    @property
    def drops(self) -> dict[str, str]:
        """What is dropped → why."""
        return {edit.drop: edit.reason for edit in self.edits if edit.drop}

    def without_dropped(self, structure: Structure) -> Plan:
        """The plan without what it says of weights that it drops, which is void."""
        void = {site.choice_group for site in structure.dropped.values()} | structure.dropped_tensors
        void -= structure.choice_groups().keys()
        assignments = {name: own for name, own in self.assignments.items() if name not in void}
        activations = {name: own for name, own in self.activations.items() if name not in void}
        return self.model_copy(update={"assignments": assignments, "activations": activations}, deep=True)

    def check(self, structure: Structure) -> None:
        """Refuse a plan that does not fit the model.

        Raises:
            InputError: an unknown group (with the nearest name), an illegal grid, or a missing group. Tensors that are
                no sites may be missing: they are kept.
        """
        groups = structure.choice_groups()
        for name, assignment in self.assignments.items():
            if name in structure.castable:
                _check_cast(name, assignment)
                continue
            if name in structure.kept and name not in groups:
                raise InputError(f"The plan assigns '{name}', which has no choice ({structure.kept[name]}): remove it.")
            if name not in groups:
                hint = did_you_mean(name, [*groups, *structure.castable])
                raise InputError(f"The plan assigns the group '{name}', which this model does not have{hint}")
            if not assignment.kept:
                try:
                    solver = assignment.solver()
                except InputError as error:
                    raise InputError(f"The plan's assignment of '{name}' is wrong: {error}") from None
                for site in groups[name]:
                    reason = cannot_hold(solver.form, site)
                    if reason:
                        raise InputError(
                            f"The plan puts '{site.name}' on {assignment.grid}, which cannot be: {reason}."
                        )
        for name in self.activations:
            reason = self._unrounded(groups, name)
            if reason:
                raise InputError(f"The plan's activations name '{name}', {reason}")
        missing = [name for name in groups if name not in self.assignments]
        if missing:
            raise InputError(f"The plan says nothing of the group '{missing[0]}'; write '{KEEP}' to leave it as it is.")

    def _unrounded(self, groups: Mapping[str, Sequence[Site]], group: str) -> str | None:
        """Why what enters a group's weights cannot be rounded."""
        if group not in groups:
            return "which this model does not have" + did_you_mean(group, groups)
        other = next((site for site in groups[group] if site.kind not in ("linear", "conv1d")), None)
        if other is not None:
            return f"but '{other.name}' is of kind {other.kind}: only what enters linear layers is rounded."
        assignment = self.assignments.get(group)
        if assignment is None or assignment.kept or assignment.parsed_grid().plain:
            return "but its weights are not packed."
        return None

    def roundings(self, structure: Structure) -> dict[str, Activations]:
        """How what enters a site is rounded, by disk name."""
        groups = structure.choice_groups()
        return {
            site.name: Activations.parse(spec) for group, spec in self.activations.items() for site in groups[group]
        }

    def by_site(self, structure: Structure) -> dict[str, Assignment]:
        """Assignment of every site."""
        return {
            site.name: self.assignments[group] for group, sites in structure.choice_groups().items() for site in sites
        }

    def casts(self, structure: Structure) -> dict[str, torch.dtype]:
        """16-bit dtype of every tensor that is no site and does not stay as it is, by disk name."""
        found = {name: self.assignments[name] for name in structure.castable if name in self.assignments}
        return {name: cast_dtype(assignment.grid) for name, assignment in found.items() if not assignment.kept}


def group_folds(edits: Sequence[Edit]) -> list[tuple[Edit, GroupFold]]:
    """The edits whose scales are found on data, in order, with their methods."""
    return [(edit, fold) for edit in edits if not edit.drop and isinstance(fold := edit.fold(), GroupFold)]


def method_on(grid: str, method: str) -> str | None:
    """The method for a weight on ``grid`` where ``method`` was asked for: a plain float is only rounded to, and what is
    kept has none. A low-rank form for which that is no method gets one that uses data if that does, and so does a grid
    for which it is none."""
    if grid == KEEP:
        return None
    form = parse_form(grid)
    if form.plain:
        return DEFAULT_METHOD
    asked = parse_method(method)
    if not isinstance(asked, WeightSolver) or asked.knobs_for(form) is not None:
        return method
    calibrated = bool(asked.needs)
    if isinstance(form, LowRankForm) and form.base is None:
        return FACTORIZED_METHOD if calibrated else "factorize/svd"
    if isinstance(form, Grid) or asked.knobs_for(form.base) is None:  # type: ignore[attr-defined]
        method = CALIBRATED_METHOD if calibrated else DEFAULT_METHOD
    return method if isinstance(form, Grid) else corrected_method(method)


def corrected_method(solver: str) -> str:
    """The method that corrects what a solver, given by its spec, leaves behind."""
    return parse_method(CORRECTED_METHOD, solver=solver.replace(",", ";")).spec


def cannot_hold(form: Form, site: Site) -> str | None:
    """Why a site cannot be held in a form; None: it can."""
    if site.kind == "embedding" and not isinstance(form, Grid):
        return "it is an embedding, whose rows are looked up: only a grid can hold it"
    return form.misfit(site.weight_shape)


def cast_dtype(grid: str) -> torch.dtype:
    """The dtype of one of :data:`CAST_GRIDS`."""
    return Float(grid).dtype


def _check_cast(name: str, assignment: Assignment) -> None:
    """Refuse what a tensor that is no site cannot be."""
    if assignment.grid not in (KEEP, *CAST_GRIDS):
        raise InputError(
            f"The plan puts '{name}' on {assignment.grid}, but it is no matrix of a linear or embedding: write one of "
            f"{KEEP}, {', '.join(CAST_GRIDS)}."
        )
    if assignment.method not in (None, CAST):
        raise InputError(f"The plan's assignment of '{name}' is wrong: its method can only be '{CAST}'.")


def parse_size(text: str, parameters: int) -> int:
    """``4.7GB | 4.25bit | 30%`` → bytes of the weight files.

    Args:
        text: what the user wrote; % is of 2 bytes per unique parameter, bit is per unique parameter.
        parameters: unique parameters of the model.

    Raises:
        InputError: not a size, or not more than 0.
    """
    lowered = text.strip().lower()
    for suffix, scale in (("bits", 1 / 8), ("bit", 1 / 8), ("%", 2 / 100)):
        if lowered.endswith(suffix):
            try:
                value = float(lowered.removesuffix(suffix))
            except ValueError:
                break
            if not math.isfinite(value) or value <= 0:
                raise InputError(f"--size '{text}' must be more than 0.")
            return int(value * scale * parameters)
    try:
        return parse_bytes(text, "--size")
    except InputError as error:
        raise InputError(str(error).replace("a size such as", "a size such as 4.25bit, 30%,")) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def rounded_groups(spec: str, plan: Plan, structure: Structure) -> dict[str, str]:
    """The plan's ``activations`` that round what enters every group of packed linear layers inside blocks.

    Raises:
        InputError: the plan packs none.
    """
    groups = structure.choice_groups()
    found = {
        name: spec
        for name, sites in groups.items()
        if all(site.block is not None for site in sites) and plan._unrounded(groups, name) is None
    }
    if not found:
        raise InputError(f"--activations {spec} has nothing to round: the plan packs no linear layer inside a block.")
    return found
