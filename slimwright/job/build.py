"""The build: executes a plan tensor by tensor, writing tiles into the planned files; a journal unit is one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from slimwright.calibrate.tokens import Samples
from slimwright.checkpoint import Checkpoint, CheckpointWriter, Journal
from slimwright.job.edits import with_edits
from slimwright.job.ledger import Entry, block_of, kept_line
from slimwright.job.parallel import in_order
from slimwright.job.tiles import Tile, TileResult, tiles_of
from slimwright.job.units import Unit
from slimwright.job.weights import ErrorSum
from slimwright.model.structure import Structure
from slimwright.plan import CAST

COMMIT_BYTES = 256_000_000
"""What is written between two commits (fsync of the files, then of the journal)."""


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
        from slimwright.job.walked_build import WalkedBuild

        assert calibration is not None
        WalkedBuild(source, structure, units, writer, calibration, lines).run(finish, commit)
    return [lines[unit.name] for unit in units]


def _key(unit: Unit) -> str:
    return f"build:{unit.name}"


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
