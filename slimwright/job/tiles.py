"""Tiles of tensors: some rows are read, solved, cast or copied, and written where they belong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint, CheckpointWriter
from slimwright.errors import InputError
from slimwright.job.options import CAST_BYTES
from slimwright.job.units import Unit
from slimwright.job.weights import ErrorSum, output_errors, plain_rounding, site_tiles, solve_rows, survey
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Site
from slimwright.weights import Compressed, Dense, Form, Grid, matrix_ranges

COPY_BYTES = 16 << 20
"""Bytes of a tile that is copied as it is."""

MEASURED_ROWS = 16
"""Rows of a tile whose outputs' error is measured where the solver had data: all would take as long as solving."""


@dataclass
class TileResult:
    """What writing some rows told: the errors of plain rounding and of what was written, digests of solved values."""

    before: ErrorSum = field(default_factory=ErrorSum)
    after: ErrorSum = field(default_factory=ErrorSum)
    digests: list[bytes] = field(default_factory=list)

    def merge(self, other: TileResult) -> None:
        """Add the rows that follow."""
        self.before.merge(other.before)
        self.after.merge(other.after)
        self.digests += other.digests

    @property
    def checksum(self) -> str:
        """SHA-256 (hex) over the digests in order; empty where there are none."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest() if self.digests else ""


@dataclass(frozen=True)
class Tile:
    """Some rows of a unit; ``solver`` is None where they are copied or cast, ``plain`` where it is plain rounding;
    ``digest``: take a digest of the solved values before they are packed."""

    unit: Unit
    rows: slice
    last: bool
    solver: WeightSolver | None = None
    plain: WeightSolver | None = None
    stats: SiteStatistics = field(default_factory=SiteStatistics.none)
    digest: bool = False

    def run(self, source: Checkpoint, writer: CheckpointWriter) -> TileResult:
        """Read, solve, write."""
        if self.unit.dropped:
            if self.unit.mark:
                writer.write(self.unit.name, torch.zeros(1, dtype=torch.uint8))
            return TileResult()
        if self.unit.cast:
            return TileResult(after=_cast_rows(source, self.unit, self.rows, writer))
        if self.solver is None:
            _copy_rows(source, self.unit, self.rows, writer)
            return TileResult()
        site, form = self.unit.site, self.solver.form
        assert site is not None
        tile, value = solve_rows(source, site, self.solver, self.rows, self.stats)
        if not site.transposed and len(site.shape) == 2 and site.name in source.tensors:
            source.advise_done(site.name, self.rows)  # unmapped pages cost a tight memory cgroup less to take back
        if isinstance(value, Dense):
            _write_rows(writer, site, self.rows, value.weight)
        else:
            _write_parts(writer, site, form, self.rows, value.save())
        dense = value.dense()
        result = TileResult(digests=digests_of(value, dense) if self.digest else [])
        without = SiteStatistics.none().with_survey(self.stats.survey)
        if self.stats.gram is None:
            if self.plain is not None:
                result.before.add(tile, self.plain.solve(tile, without).dense())
            result.after.add(tile, dense)
        else:
            measured = max(MEASURED_ROWS, form.row_multiple(site.columns)) if isinstance(form, Grid) else tile.shape[0]
            some = slice(0, min(tile.shape[0], measured))
            plain = self.plain.solve(tile[some], without).dense() if self.plain is not None else dense[some]
            before, after = output_errors(self.stats.gram, tile[some], plain, dense[some])
            result.before.merge(before)
            result.after.merge(after)
        if not math.isfinite(result.after.error):
            raise InputError(f"'{site.name}' on {form} gives values that are not finite: use another grid for it.")
        return result


def _write_parts(writer: CheckpointWriter, site: Site, form: Form, rows: slice, tensors: Mapping[str, Tensor]) -> None:
    """Write what rows of the logical matrix became, by suffix, where it belongs in the site's tensors."""
    for component in form.components(site.weight_shape):
        own, (count, columns) = component.rows_for(rows, site.weight_shape[-2]), component.matrix_shape
        for suffix, part in component.parts().items():
            cut = component.grid.part_slice(suffix, own, columns)
            per_row = part.nbytes // (count if suffix == "" else max(1, part.shape[0]))
            writer.write(site.name + part.suffix, tensors[part.suffix], cut.start * per_row)


def digests_of(value: Compressed, dense: Tensor) -> list[bytes]:
    """Digests of a solved value: of its ``dense`` values on a grid, of each of its matrices in another form, since a
    product's last digits depend on how it is computed."""
    matrices = value.matrices()
    return [digest_of(dense)] if matrices == (value,) else [digest_of(matrix.dense()) for matrix in matrices]


def digest_of(values: Tensor) -> bytes:
    """SHA-256 of a tile's values as float32."""
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).digest()


def tiles_of(source: Checkpoint, unit: Unit) -> Iterator[Tile]:
    """The tiles of a unit that needs no data, in order; one empty tile for a tied duplicate."""
    site, assignment = unit.site, unit.assignment
    if site is None or assignment is None or not unit.solved:
        size = CAST_BYTES if unit.cast else COPY_BYTES
        ranges = list(source.tiles(unit.name, size)) if unit.entries and not unit.dropped else []
        ranges = ranges or [slice(0, 0)]
        yield from (Tile(unit, rows, rows is ranges[-1]) for rows in ranges)
        return
    solver = unit.solver()
    stats = SiteStatistics(survey=survey(source, site, solver.form))
    ranges = list(site_tiles(site, solver.form))
    if not isinstance(solver.form, Grid):
        ranges = list(matrix_ranges(slice(0, site.rows), site.weight_shape[-2]))
    elif not solver.row_independent:
        ranges = [slice(0, site.rows)]
    plain = plain_rounding(solver)
    for rows in ranges:
        yield Tile(unit, rows, rows is ranges[-1], solver, plain, stats)


def _write_rows(writer: CheckpointWriter, site: Site, rows: slice, tile: Tensor) -> None:
    """Write rows of the logical matrix as a plain tensor in the disk's own orientation."""
    size = tile.element_size()
    if not site.transposed:
        writer.write(site.name, tile, rows.start * site.columns * size)
        return
    out, columns = site.weight_shape[-2], site.columns
    stored = tile.t().contiguous()
    for own in matrix_ranges(rows, out):
        expert, first = divmod(own.start, out)
        piece = stored[:, own.start - rows.start : own.stop - rows.start]
        for column in range(columns):
            writer.write(site.name, piece[column], ((expert * columns + column) * out + first) * size)


def _copy_rows(source: Checkpoint, unit: Unit, rows: slice, writer: CheckpointWriter) -> None:
    """Copy rows as they are; a tied duplicate has nothing to copy."""
    if not unit.entries:
        return
    info = source.tensors[unit.name]
    tile = _finite_rows(source, unit.name, rows)
    per_row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
    writer.write(unit.name, tile, rows.start * per_row if info.shape else 0)


def _cast_rows(source: Checkpoint, unit: Unit, rows: slice, writer: CheckpointWriter) -> ErrorSum:
    """Write rows in the 16-bit dtype of the plan; returns the error."""
    entry = unit.entries[0]
    tile = _finite_rows(source, unit.name, rows)
    cast = tile.to(entry.dtype)
    if not torch.isfinite(cast).all():
        raise InputError(
            f"The tensor '{unit.name}' holds values beyond the range of {entry.dtype}: write 'keep' or 'bf16' for it."
        )
    writer.write(unit.name, cast, rows.start * (entry.nbytes // entry.shape[0]))
    error = ErrorSum()
    error.add(tile, cast.to(tile.dtype))
    return error


def _finite_rows(source: Checkpoint, name: str, rows: slice) -> Tensor:
    """Rows of a tensor in its own dtype.

    Raises:
        InputError: NaN or Inf, named with the tensor.
    """
    tile = source.read(name, rows)
    if tile.is_floating_point() and tile.element_size() > 1 and not torch.isfinite(tile).all():
        raise InputError(f"The tensor '{name}' of {source.path} holds NaN or Inf: repair or replace the checkpoint.")
    return tile
