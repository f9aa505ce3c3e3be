"""The build walk: solves the sites that need data, block by block, on the outputs of what is solved already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from slimwright.calibrate.replay import ReplayStep
from slimwright.calibrate.statistics import Collector
from slimwright.calibrate.walk import Step, walk_units
from slimwright.calibrate.walk import Unit as WalkUnit
from slimwright.checkpoint import Checkpoint, CheckpointWriter
from slimwright.heap import trim
from slimwright.job.build import Calibration, solved_line
from slimwright.job.edits import WrittenCheckpoint
from slimwright.job.ledger import ONLY_ZEROS, Entry
from slimwright.job.parallel import in_order
from slimwright.job.tiles import Tile, TileResult, digest_of
from slimwright.job.token_scores import token_weights
from slimwright.job.units import Unit
from slimwright.job.walked import WalkedModel, WrittenSource
from slimwright.job.weights import plain_rounding, survey, without_data
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Site, Structure

SOLVED_ELEMENTS = 1 << 20
"""Weights of a tile that is solved with data: more than without, since every tile reads its Gram's whole factor."""

TOO_FEW_TOKENS = "on the calibration data too few tokens reached it"

GRAM_BYTES = 256 << 20
"""Grams of a block that are factorized side by side."""


class WalkedBuild:
    """Solves what needs data. Each unit of the walk: collect its inputs' statistics on the compressed prefix, solve its
    sites, write them, run it again as written, and go on with its outputs.

    Args:
        lines: of everything that is built already; those sites stand as written.
    """

    def __init__(
        self,
        source: Checkpoint,
        structure: Structure,
        units: Sequence[Unit],
        writer: CheckpointWriter,
        calibration: Calibration,
        lines: dict[str, Entry],
    ) -> None:
        self.source = source
        self.structure = structure
        self.units = {unit.name: unit for unit in units}
        self.writer = writer
        self.calibration = calibration
        self.lines = lines
        names = [entry.name for unit in units for entry in unit.entries]
        self.written = WrittenCheckpoint(Checkpoint.open(writer.directory), structure, names)
        self.walked = WalkedModel(source, structure, calibration)
        self.sources = self.walked.sources
        for name, unit in self.units.items():
            if unit.activations is not None:
                self.sources[name].activations = unit.activations
        for name in lines:
            self._stands_as_written(name)

    def run(self, finish: Callable[[Unit, Entry], None], commit: Callable[[], None]) -> None:
        """Solve and write.

        Args:
            finish: called with each unit and its line once it is written.
            commit: called when what was finished is to be safe from a crash.
        """
        looked_up = self._looked_up()
        if looked_up:
            self._solve_without_data(looked_up, finish, "looked up, not multiplied")
            commit()
        early = self._solved_early()
        if early:
            statistics = self._collect_early(early)
            self._solve([site for unit in early for site in self._open(unit)], statistics, finish)
            commit()
        for step in self.walked.walk():
            self.walked.hold(step.unit)
            sites = self._open(step.unit)
            if sites:
                collector = Collector(self.sources, sites)
                self._collect(step, collector)
                trim()  # of what the forwards freed
                self._solve(sites, collector.statistics, finish)
                commit()
                del collector
                trim()
                if not self._left():
                    break
                self.walked.hold(step.unit)
            for index in step.indices:
                step.advance(index, step.output(index))
            self.walked.release(step.unit)
            trim()
        for held in self.sources.values():
            held.release()
        self._solve_without_data(self._left(), finish, "no forward on the calibration data reached it")
        commit()
        trim()

    # -- what is where ---------------------------------------------------------------------------------------------

    def _stands_as_written(self, name: str) -> None:
        unit = self.units[name]
        if unit.solved and unit.site is not None and unit.assignment is not None:
            self.sources[name].current = WrittenSource(self.written, unit.site, unit.assignment.parsed_grid())

    def _open(self, unit: WalkUnit) -> list[Site]:
        """Sites of a walk's unit that are still to be solved."""
        names = (site.name for site in unit.sites)
        return [self.structure.sites[n] for n in names if n not in self.lines and self.units[n].needs_data]

    def _left(self) -> list[Unit]:
        """What needs data and is not built yet."""
        return [unit for unit in self.units.values() if unit.needs_data and unit.name not in self.lines]

    def _looked_up(self) -> list[Unit]:
        """Those of them that no unit of the walk multiplies with: embeddings."""
        multiplied = {site.name for unit in walk_units(self.structure).values() for site in unit.sites}
        return [unit for unit in self._left() if unit.name not in multiplied]

    # -- statistics ------------------------------------------------------------------------------------------------

    def _collect(self, step: Step | ReplayStep, collector: Collector) -> None:
        weighting = next((w for site in self._open(step.unit) if (w := self.units[site.name].solver().weighting)), None)
        for index in step.indices:
            weights = token_weights(step, index, weighting) if weighting is not None and step.unit.block else None
            with collector.watching(step.batch(index), weights, whole=False):
                step.show(index)

    def _solved_early(self) -> list[WalkUnit]:
        """Units whose weights are used before their inputs are known: blocks that run again, heads tied to an
        embedding. Their statistics come from a walk of their own, over the model as it stands before."""
        found = walk_units(self.structure).values()
        tied = set(self.structure.ties.values())
        return [
            unit
            for unit in found
            if self._open(unit)
            and (unit.runs > 1 or any(site.kind == "embedding" and site.name in tied for site in unit.sites))
        ]

    def _collect_early(self, early: Sequence[WalkUnit]) -> Callable[[Site], list[SiteStatistics]]:
        modules = {unit.module for unit in early}
        found: dict[str, Collector] = {}
        for sites, collector in self.walked.collected(lambda unit: self._open(unit) if unit.module in modules else []):
            found |= {site.name: collector for site in sites}
        return lambda site: found[site.name].statistics(site)

    # -- solving ---------------------------------------------------------------------------------------------------

    def _solve(
        self,
        sites: Sequence[Site],
        statistics: Callable[[Site], list[SiteStatistics]],
        finish: Callable[[Unit, Entry], None],
    ) -> None:
        """Solve and write sites; those that share a Gram share its factor."""
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(site.gram_group or site.name, []).append(site)
        batch: list[Tile] = []
        size = 0
        for members in groups.values():
            found = statistics(members[0])
            for site in members:
                batch += self._tiles(self.units[site.name], found)
            size += sum(2 * 4 * stats.gram.numel() for stats in found if stats.gram is not None)
            if size > GRAM_BYTES:
                self._write(batch, finish)
                batch, size = [], 0
        self._write(batch, finish)

    def _tiles(self, unit: Unit, found: list[SiteStatistics]) -> list[Tile]:
        """The tiles of one site; ``found`` has statistics for each of its matrices, or one for all."""
        site, solver = unit.site, unit.solver()
        assert site is not None
        tiles = [
            Tile(unit, rows, False, own, plain_rounding(own), stats, digest=True)
            for rows, own, stats in solved_parts(self.source, site, solver, found)
        ]
        tiles[-1] = replace(tiles[-1], last=True)
        return tiles

    def _write(self, tiles: list[Tile], finish: Callable[[Unit, Entry], None], reason: str = "") -> None:
        result, seen = TileResult(), list[Tile]()
        for tile, found in in_order(lambda tile: tile.run(self.source, self.writer), tiles):
            result.merge(found)
            seen.append(tile)
            if tile.last:
                finish(tile.unit, self._line(seen, result, reason))
                self._stands_as_written(tile.unit.name)
                result, seen = TileResult(), list[Tile]()

    def _line(self, tiles: Sequence[Tile], result: TileResult, reason: str) -> Entry:
        """The ledger's line of a site from all its tiles."""
        without = sum(tile.solver is not None and not tile.solver.needs for tile in tiles)
        nbytes = self.source.tensors[tiles[0].unit.name].nbytes
        if without == len(tiles):
            tokens = max(tile.stats.tokens for tile in tiles)
            line = solved_line(tiles[0].unit, tiles[0], result, nbytes, reason or TOO_FEW_TOKENS)
            return replace(line, reason=f"{ONLY_ZEROS} ({tokens} tokens)") if tokens else line
        reason = f"calibrated on {self.calibration.samples.kind}"
        if without:
            reason += f"; {without} of its {len(tiles)} tiles saw too few tokens and were rounded without data"
        solved = next(tile for tile in tiles if tile.solver is not None and tile.solver.needs)
        return solved_line(solved.unit, solved, result, nbytes, reason, max(tile.stats.tokens for tile in tiles))

    def _solve_without_data(self, units: Sequence[Unit], finish: Callable[[Unit, Entry], None], reason: str) -> None:
        """Round sites without data."""
        for unit in units:
            self._write(self._tiles(unit, [SiteStatistics.none()]), finish, reason)


def solved_parts(
    source: Checkpoint, site: Site, solver: WeightSolver, found: Sequence[SiteStatistics]
) -> Iterator[tuple[slice, WeightSolver, SiteStatistics]]:
    """The tiles that a site is solved in, in order: their rows, what solves them, and what it is told; prepared.

    Args:
        found: statistics of each of the site's matrices, or one for all.
    """
    state = survey(source, site, solver.form)
    places = list(solved_ranges(site, solver))
    if places[-1][0] + 1 != len(found):  # one expert's rows cannot be rounded without the next's
        found = [SiteStatistics.none()] * (places[-1][0] + 1)
    for matrix, rows in places:
        stats = found[matrix]
        own = solver if stats.gram is not None else without_data(solver)
        own.prepare(stats)
        yield rows, own, stats.with_survey(state)


def solved_ranges(site: Site, solver: WeightSolver) -> Iterator[tuple[int, slice]]:
    """(matrix, rows of the site) of the tiles that a site is solved in with data, in order: each lies within one of the
    matrices of fused experts, unless the grid's parameters cross them."""
    count = site.shape[0] if site.kind == "experts" and len(site.shape) == 3 else 1
    out, multiple = site.rows // count, solver.form.row_multiple(site.columns)
    if count > 1 and out % multiple:
        count, out = 1, site.rows
    step = max(1, SOLVED_ELEMENTS // site.columns // multiple) * multiple if solver.row_independent else out
    for matrix in range(count):
        for start in range(0, out, step):
            yield matrix, slice(matrix * out + start, matrix * out + min(start + step, out))


def written_checksum(written: Checkpoint, site: Site, solver: WeightSolver) -> str:
    """The checksum of a site as it lies in the files: its ledger line's, if it is what the solver returned."""
    parts = WrittenSource(written, site, solver.form).matrices
    ranges = (rows for _, rows in solved_ranges(site, solver))
    return TileResult(digests=[digest_of(values) for rows in ranges for values in parts(rows)]).checksum
