"""What becomes of every tensor of the source under a plan, and where it will lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimwright.checkpoint import Checkpoint
from slimwright.checkpoint.layout import Layout, TensorEntry, plan_layout
from slimwright.errors import InputError
from slimwright.job.edits import dropped_view
from slimwright.job.options import cast_entry, kept_entry, weight_entries
from slimwright.methods import WeightSolver
from slimwright.model.structure import Site, Structure
from slimwright.plan import KEEP, Assignment, Plan
from slimwright.weights.activations import Activations


@dataclass(frozen=True)
class Unit:
    """One source tensor and what becomes of it; ``assignment`` is None for tensors that are no sites and stay as they
    are. ``activations`` is how what enters a site is rounded when the model runs; None: not. ``dropped`` is why it is
    not written (but for the byte of a mark)."""

    name: str
    site: Site | None
    assignment: Assignment | None
    entries: tuple[TensorEntry, ...]
    activations: Activations | None = None
    dropped: str = ""

    @property
    def solved(self) -> bool:
        """Whether it is a site on a grid."""
        return self.site is not None and self.assignment is not None and not self.assignment.kept

    def solver(self) -> WeightSolver:
        """What puts it on its grid, where it is :attr:`solved`."""
        assert self.site is not None and self.assignment is not None
        return self.assignment.solver().for_role(self.site.role)

    @property
    def needs_data(self) -> bool:
        """Whether its solver needs statistics of its inputs."""
        return self.solved and bool(self.solver().needs)

    @property
    def cast(self) -> bool:
        """Whether it is no site and written in 16 bits."""
        return self.site is None and self.assignment is not None

    @property
    def mark(self) -> bool:
        """Whether it is dropped and leaves one byte behind."""
        return bool(self.dropped and self.entries)


def plan_units(source: Checkpoint, structure: Structure, plan: Plan) -> list[Unit]:
    """Every tensor of the source in checkpoint order; tied duplicates have no entries."""
    by_site, casts, roundings = plan.by_site(structure), plan.casts(structure), plan.roundings(structure)
    units = []
    view = dropped_view(source)
    for name, info in source.tensors.items():
        site, assignment = structure.sites.get(name), by_site.get(name)
        if view is not None and name in view.reasons:
            left = (TensorEntry(name, torch.uint8, (1,)),) if name in view.marks else ()
            units.append(Unit(name, None, None, left, dropped=view.reasons[name]))
            continue
        if name in structure.ties:
            entries: tuple[TensorEntry, ...] = ()
        elif site is not None and assignment is not None and not assignment.kept:
            entries = tuple(weight_entries(site, assignment.parsed_grid(), info.dtype))
        elif name in casts:
            assignment, entries = plan.assignments[name], (cast_entry(source, name, casts[name]),)
        else:
            entries = (kept_entry(source, name),)
        units.append(Unit(name, site, assignment, entries, roundings.get(name)))
    return units


def keep_all(structure: Structure, reason: str) -> Plan:
    """The plan that leaves everything as it is."""
    return Plan(assignments={group: Assignment(grid=KEEP, reason=reason) for group in structure.choice_groups()})


def layout_of(units: list[Unit], structure: Structure, max_shard_bytes: int) -> Layout:
    """Where everything will lie, to the byte.

    Raises:
        InputError: a scale of one tensor would have the name of another tensor.
    """
    entries = [
        replace(entry, name=structure.written_name(entry.name)) for unit in units for entry in unit.entries
    ]  # fmt: skip
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"The tensor name '{twice}' is also needed for a scale: keep that weight with --rule.")
    return plan_layout(entries, max_shard_bytes=max_shard_bytes, total_parameters=structure.parameters)


def grids_written(units: list[Unit]) -> Mapping[str, Any]:
    """Forms by disk name of the weights that are packed (16-bit float casts are plain tensors)."""
    grids = {}
    for unit in units:
        if unit.solved and unit.assignment is not None:
            grid = unit.assignment.parsed_grid()
            if not grid.plain:
                grids[unit.name] = grid
    return grids
