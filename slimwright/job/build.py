"""The build: executes a plan tensor by tensor, writing tiles into the planned files; a journal unit is one tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.calibrate.tokens import Samples
from slimwright.checkpoint import Checkpoint, CheckpointWriter, Journal
from slimwright.checkpoint.layout import Layout, TensorEntry, plan_layout
from slimwright.errors import InputError
from slimwright.job.edits import dropped_view, with_edits
from slimwright.job.ledger import Entry, block_of, kept_line
from slimwright.job.options import CAST_BYTES, cast_entry, kept_entry, weight_entries
from slimwright.job.parallel import in_order
from slimwright.job.weights import ErrorSum, output_errors, plain_rounding, site_tiles, solve_rows, survey
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Site, Structure
from slimwright.plan import CAST, Assignment, Plan
from slimwright.weights import Compressed, Dense, Form, Grid, matrix_ranges
from slimwright.weights.activations import Activations

COMMIT_BYTES = 256_000_000
"""What is written between two commits (fsync of the files, then of the journal)."""

COPY_BYTES = 16 << 20
"""Bytes of a tile that is copied as it is."""

MEASURED_ROWS = 16
"""Rows of a tile whose outputs' error is measured where the solver had data: all would take as long as solving."""


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


@dataclass(frozen=True)
class Calibration:
    """What the build needs to solve with data.

    Attributes:
        samples: the data as batches.
        hidden_cap: bytes of hidden states kept in memory; more go to files in ``scratch``.
        scratch: directory for them.
        trust_remote_code: load the model with its own code.
        log: told what a user may want to read later.
        apart: whether the model's blocks can be run one by one; else walks are made of whole forwards.
    """

    samples: Samples
    hidden_cap: int
    scratch: Path
    trust_remote_code: bool
    log: Callable[[str], None]
    apart: bool = True


def build(
    source: Checkpoint,
    structure: Structure,
    units: list[Unit],
    writer: CheckpointWriter,
    journal: Journal,
    step: Callable[[int, int], None],
    calibration: Calibration | None = None,
) -> list[Entry]:
    """Execute the plan. Finished units of an earlier run are taken from the journal.

    Tiles of all units that need no data stream through the worker threads; a unit is journaled when its last tile is
    written. Then the walk solves those that do.

    Args:
        step: called with weights done and weights in all.
        calibration: needed if a unit's solver needs data.

    Returns:
        The ledger, one line per tensor of the source.

    Raises:
        InputError: NaN or Inf in the source, named with the tensor.
    """
    total = sum(source.tensors[unit.name].numel for unit in units)
    uncommitted = 0
    lines = {unit.name: Entry(**journal.done[_key(unit)]) for unit in units if _key(unit) in journal.done}
    done = sum(source.tensors[name].numel for name in lines)

    def finish(unit: Unit, line: Entry) -> None:
        nonlocal done, uncommitted
        if unit.activations is not None:
            line = replace(line, activations=unit.activations.spec)
        new = structure.written_name(unit.name)
        if unit.entries and new != unit.name:
            line = replace(line, written=new)
        line = lines[unit.name] = with_edits(line, source)
        journal.append(_key(unit), line.to_json())
        uncommitted += line.bytes
        done += source.tensors[unit.name].numel
        step(done, total)

    def commit() -> None:
        nonlocal uncommitted
        writer.sync()
        journal.commit()
        uncommitted = 0

    work = (tile for unit in units if unit.name not in lines and not unit.needs_data for tile in tiles_of(source, unit))
    result = TileResult()
    for tile, found in in_order(lambda tile: tile.run(source, writer), work):
        result.merge(found)
        if not tile.last:
            continue
        unit = tile.unit
        if unit.dropped:
            line = _dropped_line(source, structure, unit)
        elif unit.solved:
            line = solved_line(unit, tile, result, source.tensors[unit.name].nbytes)
        elif unit.cast:
            line = _cast_line(source, structure, unit, result.after)
        else:
            line = _kept_line(source, structure, unit)
        result = TileResult()
        finish(unit, line)
        if uncommitted >= COMMIT_BYTES:
            commit()
    commit()
    if any(unit.needs_data and unit.name not in lines for unit in units):
        from slimwright.job.walked import WalkedBuild

        assert calibration is not None
        WalkedBuild(source, structure, units, writer, calibration, lines).run(finish, commit)
    return [lines[unit.name] for unit in units]


def _key(unit: Unit) -> str:
    return f"build:{unit.name}"


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


def solved_line(
    unit: Unit, tile: Tile, result: TileResult, bytes_before: int, reason: str = "no calibration data", tokens: int = 0
) -> Entry:
    """The ledger's line of a solved site.

    Args:
        tile: any of its tiles, for the solver.
        result: of all its tiles.
        reason: why it is in its state, unless the plan says.
        tokens: tokens that its solver saw; 0: it is data-free.
    """
    site, assignment, solver = unit.site, unit.assignment, tile.solver
    assert site is not None and assignment is not None and solver is not None
    nbytes = sum(entry.nbytes for entry in unit.entries)
    return Entry(
        site=site.name,
        group=site.choice_group,
        role=site.role,
        state="calibrated" if tokens else "data-free",
        reason=assignment.reason or reason,
        method=solver.spec,
        grid=solver.form.spec,
        bits=8 * nbytes / site.numel,
        bytes=nbytes,
        error_before=(result.after if tile.plain is None else result.before).relative,
        error_after=result.after.relative,
        tokens=tokens,
        parameters=site.numel,
        block=site.block,
        bytes_before=bytes_before,
        checksum=result.checksum,
    )


def _cast_line(source: Checkpoint, structure: Structure, unit: Unit, error: ErrorSum) -> Entry:
    assignment, info = unit.assignment, source.tensors[unit.name]
    assert assignment is not None
    nbytes = sum(entry.nbytes for entry in unit.entries)
    return Entry(
        site=unit.name,
        group=unit.name,
        role=structure.roles.get(unit.name, "other"),
        state="data-free",
        reason=assignment.reason or f"only cast, not packed: {structure.kept[unit.name]}",
        method=CAST,
        grid=assignment.grid,
        bits=8 * nbytes / info.numel,
        bytes=nbytes,
        error_before=error.relative,
        error_after=error.relative,
        tokens=0,
        parameters=info.numel,
        block=block_of(unit.name, structure),
        bytes_before=info.nbytes,
    )


def _write_rows(writer: CheckpointWriter, site: Site, rows: slice, tile: Tensor) -> None:
    """Write rows of the logical matrix as a plain tensor in the disk's own orientation."""
    size = tile.element_size()
    if not site.transposed:
        writer.write(site.name, tile, rows.start * site.columns * size)
        return
    out, columns = site.weight_shape[-2], site.columns
    stored = tile.t().contiguous()
    for start, stop in _within_experts(rows, out):
        expert, first = divmod(start, out)
        piece = stored[:, start - rows.start : stop - rows.start]
        for column in range(columns):
            writer.write(site.name, piece[column], ((expert * columns + column) * out + first) * size)


def _within_experts(rows: slice, out: int) -> Iterator[tuple[int, int]]:
    """Cut a range of stacked rows at the experts' borders."""
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // out + 1) * out)
        yield start, stop
        start = stop


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


def _dropped_line(source: Checkpoint, structure: Structure, unit: Unit) -> Entry:
    info, site = source.tensors[unit.name], structure.dropped.get(unit.name)
    nbytes = sum(entry.nbytes for entry in unit.entries)
    return Entry(
        site=unit.name,
        group=site.choice_group if site else unit.name,
        role=structure.roles.get(unit.name, "other"),
        state="dropped",
        reason=unit.dropped,
        method=None,
        grid=None,
        bits=8 * nbytes / max(1, info.numel),
        bytes=nbytes,
        error_before=1.0,
        error_after=1.0,
        tokens=0,
        parameters=info.numel,
        block=site.block if site else block_of(unit.name, structure),
        bytes_before=info.nbytes,
    )


def _kept_line(source: Checkpoint, structure: Structure, unit: Unit) -> Entry:
    info = source.tensors[unit.name]
    if not unit.entries:
        return kept_line(unit.name, structure, f"tied to {structure.ties[unit.name]}", info, written=False)
    if unit.assignment is not None:
        reasons = {"rule": "asked by a rule", "": "the budget allows it as it is"}
        reason = reasons.get(unit.assignment.reason, unit.assignment.reason)
    else:
        reason = structure.kept[unit.name]
    return kept_line(unit.name, structure, reason, info, written=True)


def grids_written(units: list[Unit]) -> Mapping[str, Any]:
    """Forms by disk name of the weights that are packed (16-bit float casts are plain tensors)."""
    grids = {}
    for unit in units:
        if unit.solved and unit.assignment is not None:
            grid = unit.assignment.parsed_grid()
            if not grid.plain:
                grids[unit.name] = grid
    return grids
