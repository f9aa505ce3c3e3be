"""The first comparison of the proof: the written tensors against the plan applied to the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from slimwright.checkpoint import Checkpoint, TensorEntry
from slimwright.job.edits import WrittenCheckpoint
from slimwright.job.parallel import in_order
from slimwright.job.source import (
    planned_source,
)
from slimwright.job.units import Unit
from slimwright.job.walked import WrittenSource
from slimwright.job.walked_build import written_checksum
from slimwright.job.weights import site_rows, site_tiles, solve_rows
from slimwright.methods import SiteStatistics
from slimwright.model.structure import Structure
from slimwright.runtime.streamed import WeightSource
from slimwright.weights import Grid, disk_shapes, matrix_ranges, unpack_rows

SAMPLED_TILES = 2
"""Tiles of a tensor that are compared one by one (tensors of up to this many tiles are compared whole)."""


def compare_files(
    source: Checkpoint,
    written: WrittenCheckpoint,
    structure: Structure,
    units: list[Unit],
    checksums: Mapping[str, str],
    step: Callable[[int, int], None],
) -> tuple[int, str | None]:
    """The files hold exactly the planned tensors, under their new names; sampled tiles equal what plain-tensor code
    makes of the source, and every value of what was solved with data is what the solver returned.

    Args:
        checksums: of what solvers with data returned, by disk name.
        step: called with steps done and in all, of which comparing files is the first half.

    Returns:
        (tensors compared, what is wrong with the first that is not what was planned; None: nothing).
    """
    planned = {entry.name: entry for unit in units for entry in unit.entries}
    found = {name: TensorEntry(name, info.dtype, info.shape) for name, info in written.tensors.items()}
    strangers = Checkpoint.open(written.path).tensors.keys() - {structure.written_name(name) for name in planned}
    if strangers:
        return 0, f"'{min(strangers)}' is in the files but not in the plan"
    for name in sorted(planned.keys() | found.keys()):
        if planned.get(name) != found.get(name):
            return 0, f"'{name}' is {found.get(name)} in the files but {planned.get(name)} in the plan"

    def compare(unit: Unit) -> str | None:
        if unit.solved:
            assert unit.site is not None and unit.assignment is not None
            if unit.name in checksums:
                return _compare_checksum(written, unit, checksums[unit.name])
            if not isinstance(unit.assignment.parsed_grid(), Grid):
                return _compare_factors(source, written, unit)
            return _compare_site(written, unit, planned_source(source, unit.site, unit.assignment))
        if unit.dropped:
            return None
        return _compare_cast(source, written, unit) if unit.cast else _compare_kept(source, written, unit)

    compared = 0
    for _, problem in in_order(compare, units):
        if problem:
            return compared, problem
        compared += 1
        step(compared, 2 * len(units))
    return compared, None


def _sampled(tiles: list[slice]) -> list[slice]:
    """Evenly spaced tiles, the first and the last among them."""
    if len(tiles) <= SAMPLED_TILES:
        return tiles
    return [tiles[round(i * (len(tiles) - 1) / (SAMPLED_TILES - 1))] for i in range(SAMPLED_TILES)]


def _compare_site(written: Checkpoint, unit: Unit, expected: WeightSource) -> str | None:
    site, assignment = unit.site, unit.assignment
    assert site is not None and assignment is not None
    grid = assignment.parsed_grid()
    assert isinstance(grid, Grid)
    plain = grid.plain
    parts = {} if plain else {s: written.read(site.name + s) for s in disk_shapes(grid, site.weight_shape)}
    for suffix, part in parts.items():
        if part.is_floating_point() and not torch.isfinite(part.float()).all():
            return f"'{site.name}{suffix}' holds NaN or Inf"
    for rows in _sampled(list(site_tiles(site, grid))):
        if plain:
            values = site_rows(written, site, rows).float()
        else:
            values = grid.decode(*unpack_rows(grid, parts, site.weight_shape, rows))
        if not torch.equal(values, expected.rows(rows).to(values.dtype)):
            return f"'{site.name}' in the files differs from the plan applied to the source (rows {rows.start}...)"
    return None


def _compare_factors(source: Checkpoint, written: Checkpoint, unit: Unit) -> str | None:
    """Every value of every matrix of a low-rank form, against a solution of the source made again."""
    site, solver = unit.site, unit.solver()
    assert site is not None
    found = WrittenSource(written, site, solver.form)
    for rows in matrix_ranges(slice(0, site.rows), site.weight_shape[-2]):
        _, value = solve_rows(source, site, solver, rows, SiteStatistics.none())
        for expected, values in zip(value.matrices(), found.matrices(rows), strict=True):
            if not torch.equal(expected.dense(), values):
                return f"'{site.name}' in the files differs from the plan applied to the source (rows {rows.start}...)"
    return None


def _compare_checksum(written: Checkpoint, unit: Unit, checksum: str) -> str | None:
    """Every value, as the grid's reference code reads it, against the digest that was taken before packing."""
    assert unit.site is not None
    if written_checksum(written, unit.site, unit.solver()) != checksum:
        return f"'{unit.name}' in the files differs from what its solver returned"
    return None


def _compare_kept(source: Checkpoint, written: Checkpoint, unit: Unit) -> str | None:
    for entry in unit.entries:
        for rows in _sampled(list(source.tiles(entry.name))):
            old, new = source.read(entry.name, rows), written.read(entry.name, rows)
            if not torch.equal(old.reshape(-1).view(torch.uint8), new.reshape(-1).view(torch.uint8)):
                return f"'{entry.name}' was to be kept but differs from the source"
    return None


def _compare_cast(source: Checkpoint, written: Checkpoint, unit: Unit) -> str | None:
    entry = unit.entries[0]
    for rows in _sampled(list(source.tiles(unit.name))):
        expected, new = source.read(unit.name, rows).to(entry.dtype), written.read(unit.name, rows)
        if not torch.equal(expected.reshape(-1).view(torch.uint8), new.reshape(-1).view(torch.uint8)):
            return f"'{unit.name}' was to be cast to {entry.dtype} but differs from the source so cast"
    return None
