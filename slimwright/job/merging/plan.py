"""What a merge will write: one unit a tensor, with its inputs, its method and its dtype; all checks before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimwright.checkpoint import TensorEntry
from slimwright.checkpoint.files import shown
from slimwright.errors import InputError
from slimwright.job.merging.config import MergeConfig, SliceSource
from slimwright.job.merging.dialect import REQUIRED, own_knobs
from slimwright.job.merging.parameters import Settings, lookup
from slimwright.job.merging.sources import ModelReference, Origin
from slimwright.job.merging.targets import Inputs, Layers, Target, like, targets_of, tied_heads
from slimwright.methods.merging import MergeMethod, MergeSite
from slimwright.methods.registry import knob_name, method

LEFT_OUT = "in no module of the configuration: taken from the base (the first)"
"""Why a tensor is copied that modules leave out."""


@dataclass(frozen=True, eq=False)
class Unit:
    """One tensor of the result.

    Attributes:
        entry: its name, dtype and shape.
        site: the same for the method, with its layer.
        origins: one a model.
        base: or None.
        method: None where the first origin is copied.
        models: which models the origins are of; the base last.
        names: of the tensors that are read, in the same order.
        reason: why it is copied; empty where it is merged.
    """

    entry: TensorEntry
    site: MergeSite
    origins: tuple[Origin, ...]
    base: Origin | None
    method: MergeMethod | None
    models: tuple[ModelReference, ...]
    names: tuple[str, ...]
    reason: str = ""

    @property
    def read_bytes(self) -> int:
        """Bytes that reading its inputs once takes."""
        parts = [*self.origins, *([self.base] if self.base is not None else [])]
        return sum(origin.numel * origin.dtype.itemsize for origin in parts)


@dataclass(frozen=True)
class MergePlan:
    """All units in the order of the result, the tensors of inputs that no unit reads (with the reason), the layers of
    each module where they were chosen, and notes for the user."""

    units: list[Unit]
    unread: dict[str, str]
    layers: tuple[Layers, ...]
    notes: tuple[str, ...] = ()


def plan_units(config: MergeConfig, inputs: Inputs, replaced: Mapping[tuple[ModelReference, str], Origin]) -> MergePlan:
    """Resolve every tensor of the result.

    Args:
        config: what is asked.
        inputs: every model that it names, opened.
        replaced: tensors that are read otherwise than as stored (aligned vocabularies).

    Raises:
        InputError: a model lacks a tensor, shapes differ, a layer that does not exist, a parameter without a value.
    """
    leader = inputs[like(config)]
    tied = tied_heads(config, inputs)
    targets, layers = targets_of(config, inputs, leader, tied)
    units = [_unit(target, config, inputs, replaced) for target in targets]
    read = {(model, name) for unit in units for model, name in zip(unit.models, unit.names)}
    unread = {}
    for part in config.slices:
        for reference in [source.model for source in part.sources] + ([part.base] if part.base else []):
            for name in inputs[reference].names:
                if (reference, name) not in read:
                    reason = "a tied copy" if name in tied else "not part of the result"
                    unread[f"{reference}: {name}"] = reason
    left = [unit.entry.name for unit in units if unit.reason == LEFT_OUT]
    notes = [f"{name} is in no module of the configuration: it is that of {leader.reference}." for name in left[:1]]
    if len(left) > 1:
        notes = [f"{len(left)} tensors, {left[0]} first, are in no module: they are those of {leader.reference}."]
    return MergePlan(units, unread, layers, tuple(notes))


def _unit(
    target: Target, config: MergeConfig, inputs: Inputs, replaced: Mapping[tuple[ModelReference, str], Origin]
) -> Unit:
    def origin(reference: ModelReference, name: str) -> Origin:
        if (reference, name) in replaced:
            return replaced[reference, name]
        if name not in inputs[reference].checkpoint.tensors:
            raise InputError(
                f"{reference} lacks the tensor '{shown(name)}': the models must have the same architecture."
            )
        return inputs[reference].origin(name)

    if target.part is None:
        return _left_out(target.name, config, inputs)
    chosen, base = _roles(target, config)
    origins = tuple(origin(source.model, name) for source, name in chosen)
    base_origin = origin(*base) if base else None
    models = tuple(source.model for source, _ in chosen) + ((base[0],) if base else ())
    names = tuple(name for _, name in chosen) + ((base[1],) if base else ())
    everything = [*origins, *([base_origin] if base_origin is not None else [])]
    first = base_origin if base_origin is not None else origins[0]
    leader, leader_name = (models[-1], names[-1]) if base else (models[0], names[0])
    for other, model in zip(everything, models):
        if other.shape != first.shape:
            vocabulary = other.shape[1:] == first.shape[1:] and len(first.shape) == 2
            hint = ", or set tokenizer_source if their vocabularies differ" if vocabulary else ""
            raise InputError(
                f"The tensor '{shown(target.name)}' is {other.shape} in {model} but {first.shape} in {leader}: merge "
                f"models of one architecture{hint}."
            )
    for other, model in zip(everything, models):
        if other.dtype.is_floating_point and other.dtype.itemsize == 1:
            raise InputError(
                f"The tensor '{shown(target.name)}' of {model} is stored in 8-bit floats, whose scales are unknown: "
                "start from the model before quantization."
            )
    site = MergeSite(target.name, first.shape, target.block, target.blocks)
    if not first.numel or not all(other.dtype.is_floating_point for other in everything):
        reason = "empty" if not first.numel else "no floats: taken from the base (the first)"
        entry = TensorEntry(target.name, first.dtype, first.shape)
        return Unit(entry, site, (first,), None, None, (leader,), (leader_name,), reason)
    dtype = getattr(torch, config.dtype) if config.dtype else first.dtype
    made = _method(target, config, chosen, base is not None)
    made.check_inputs(len(origins), base is not None)
    return Unit(TensorEntry(target.name, dtype, first.shape), site, origins, base_origin, made, models, names)


def _left_out(name: str, config: MergeConfig, inputs: Inputs) -> Unit:
    """A tensor that modules leave out, from the model that the result is like; cast where a dtype is asked for."""
    leader = like(config)
    found = inputs[leader].origin(name)
    cast = config.dtype is not None and found.dtype.is_floating_point
    dtype = getattr(torch, str(config.dtype)) if cast else found.dtype
    made = _made("merge/passthrough", ()) if dtype != found.dtype else None
    site = MergeSite(name, found.shape)
    return Unit(TensorEntry(name, dtype, found.shape), site, (found,), None, made, (leader,), (name,), LEFT_OUT)


def _roles(
    target: Target, config: MergeConfig
) -> tuple[list[tuple[SliceSource, str]], tuple[ModelReference, str] | None]:
    """The sources that are merged, and the base beside them: a base that is listed among the models is not counted
    twice."""
    assert target.part is not None
    sources = list(target.sources)
    method_type = config.method_type()
    base = target.base
    if method_type.base_model == "unused" or (config.dialect is not None and config.dialect.base_is_input):
        adds_base = config.dialect is not None and target.part.whole and config.method != "merge/passthrough"
        if base and adds_base and all(source.model != base[0] for source, _ in sources):
            sources.append((SliceSource(base[0]), base[1]))
        return sources, None
    if base is None:
        return sources, None
    return [(source, name) for source, name in sources if source.model != base[0]], base


def _method(
    target: Target, config: MergeConfig, chosen: Sequence[tuple[SliceSource, str]], has_base: bool
) -> MergeMethod:
    """The method with its knobs for this tensor."""
    method_type = config.method_type()
    fields = {knob_name(field): field for field in dataclasses.fields(method_type)}  # type: ignore[arg-type]
    assert target.part is not None
    shared: list[Settings] = [target.part.parameters, target.part.module_parameters, config.parameters]
    if config.dialect is None and len(chosen) == 1:
        shared.insert(0, chosen[0][0].parameters)
    per_model = {name.rstrip("_") for name in method_type.per_model_knobs()}
    dialect = config.dialect
    if dialect is None and len(chosen) > 1:
        misplaced = [name for source, _ in chosen for name in source.parameters if name not in per_model]
        if misplaced:
            raise InputError(
                f"{config.method} has one '{misplaced[0]}' for all models: write it under the parameters of the whole "
                "merge (or of the slice)."
            )
    values: dict[str, Any] = {}
    names = list(dialect.parameters) if dialect else list(fields)
    for name in names:
        each = name in (dialect.per_model if dialect else per_model)
        default = dialect.parameters[name] if dialect else None
        if not each:
            values[name] = _given(name, shared, target.name, target.depth, default)
            continue
        found = [_given(name, [s.parameters, *shared], own, target.depth, default) for s, own in chosen]
        if dialect is None and all(value is None for value in found):
            continue
        if any(value is None for value in found):
            plain = fields[name].default
            found = [plain if value is None else value for value in found]
        values[name] = tuple(found) if len(set(map(str, found))) > 1 else found[0]
    knobs = own_knobs(dialect, values, set(fields)) if dialect else {k: v for k, v in values.items() if v is not None}
    return _made(config.method, tuple(sorted(knobs.items())))


def _given(name: str, sources: Sequence[Settings], tensor: str, depth: float, default: Any) -> Any:
    value = lookup(name, sources, tensor, depth)
    if value is None:
        if default is REQUIRED:
            raise InputError(f"The parameter '{name}' has no value for the tensor '{shown(tensor)}': give it one.")
        return default
    return value


_cache: dict[tuple[str, tuple[tuple[str, Any], ...]], MergeMethod] = {}


def _made(name: str, knobs: tuple[tuple[str, Any], ...]) -> MergeMethod:
    key = (name, knobs)
    if key not in _cache:
        made = method(name, **dict(knobs))
        assert isinstance(made, MergeMethod)
        _cache[key] = made
    return _cache[key]


def survey_groups(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """The units whose methods survey the whole model together: those whose knobs differ in weights alone."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.method is not None and unit.method.scope == "model":
            neutral = {name: 1.0 for name in ("weight", "lambda_") if hasattr(unit.method, name)}
            groups.setdefault(replace(unit.method, **neutral).spec, []).append(unit)  # type: ignore[type-var]
    for group in groups.values():
        yield sorted(group, key=lambda unit: unit.entry.name)
