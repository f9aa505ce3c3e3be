"""Weight sources for streamed models: the checkpoint as it is, and the plan applied to it by plain-tensor code."""

from __future__ import annotations

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.job.edits import EditedCheckpoint
from slimwright.job.open import derived
from slimwright.job.parallel import in_order
from slimwright.job.weights import TILE_ELEMENTS, site_rows, survey
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Site, Structure
from slimwright.plan import Assignment, Plan
from slimwright.runtime.streamed import WeightSource


class PlainSource(WeightSource):
    """A site of a checkpoint as it is."""

    def __init__(self, checkpoint: Checkpoint, site: Site) -> None:
        super().__init__(site)
        self._checkpoint = checkpoint

    def rows(self, rows: slice) -> Tensor:
        return site_rows(self._checkpoint, self.site, rows).to(torch.float32)

    def stored(self) -> Tensor | None:
        """(rows, columns) in the stored dtype, a view of the mapped file; None where the layout does not allow one."""
        if self.site.transposed or derived(self._checkpoint, self.site.name):
            return None
        return site_rows(self._checkpoint, self.site, slice(0, self.site.rows))


class ZeroSource(WeightSource):
    """A dropped site: zeros, which a linear layer need not multiply with."""

    empty = True

    def rows(self, rows: slice) -> Tensor:
        return torch.zeros(rows.stop - rows.start, self.site.columns)


class PlannedSource(WeightSource):
    """A site of the source with a solver applied: recomputed from the source, never read from what was written.

    The values come from the grid's plain-tensor ``decode``; packing, files and loading have no part in it.
    """

    def __init__(self, checkpoint: Checkpoint, site: Site, solver: WeightSolver) -> None:
        super().__init__(site)
        self._checkpoint = checkpoint
        self._solver = solver
        self._stats: SiteStatistics | None = None

    def rows(self, rows: slice) -> Tensor:
        if self._stats is None:
            self._stats = SiteStatistics(survey=survey(self._checkpoint, self.site, self._solver.form))
        if not self._solver.row_independent:
            whole = site_rows(self._checkpoint, self.site, slice(0, self.site.rows))
            return self._solver.solve(whole, self._stats).dense()[rows]
        multiple = self._solver.form.row_multiple(self.site.columns)
        first = rows.start // multiple * multiple
        last = min(self.site.rows, -(-rows.stop // multiple) * multiple)
        tile = site_rows(self._checkpoint, self.site, slice(first, last)).to(torch.float32).contiguous()
        return self._solver.solve(tile, self._stats).dense()[rows.start - first : rows.stop - first]


class ParallelSource(WeightSource):
    """Another source whose rows are made in tiles by the worker threads."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source.site)
        self._source = source

    def rows(self, rows: slice) -> Tensor:
        columns = self.site.columns
        step = max(1, TILE_ELEMENTS // max(1, columns))
        if rows.stop - rows.start <= step:
            return self._source.rows(rows)
        step = -(-step // 512) * 512 if step > 512 else step
        with torch.inference_mode(False):  # workers, which are in no such mode, may not write into a tensor made in one
            out = torch.empty(rows.stop - rows.start, columns)
        tiles = (slice(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step))

        def fill(tile: slice) -> None:
            out[tile.start - rows.start : tile.stop - rows.start] = self._source.rows(tile)

        for _ in in_order(fill, tiles):
            pass
        return out

    def gather(self, index: Tensor) -> Tensor:
        with torch.inference_mode(False):
            out = torch.empty(len(index), self.site.columns)

        def fill(part: Tensor) -> None:
            first = int(part[0])
            out[first : first + len(part)] = self._source.gather(index[part])

        for _ in in_order(fill, torch.arange(len(index)).split(64)):
            pass
        return out


def plain_sources(checkpoint: Checkpoint, structure: Structure) -> dict[str, WeightSource]:
    """Every site as it is; of what was dropped, output projections of zeros, and the rest as it was."""
    sites = structure.sites | structure.dropped
    return {name: ParallelSource(PlainSource(checkpoint, site)) for name, site in sites.items()}


def planned_source(checkpoint: Checkpoint, site: Site, assignment: Assignment) -> WeightSource:
    """One site as the plan says."""
    if assignment.kept:
        return PlainSource(checkpoint, site)
    return PlannedSource(checkpoint, site, assignment.solver().for_role(site.role))


def planned_tensors(checkpoint: Checkpoint, structure: Structure, plan: Plan) -> dict[str, Tensor]:
    """Every tensor that is no site as the plan says, by disk name, recomputed from the source; ties left out."""
    casts = plan.casts(structure)
    elsewhere = structure.sites.keys() | structure.ties.keys() | structure.dropped.keys()
    names = [name for name in checkpoint.tensors if name not in elsewhere]
    return {
        name: checkpoint.read(name).to(casts[name]).to(torch.float32)
        if name in casts
        else checkpoint.read(name).clone()
        for name in names
    }


def edited_tensors(checkpoint: Checkpoint, structure: Structure) -> dict[str, Tensor] | None:
    """Every tensor that is no site where edits changed some, by disk name; None where all lie in the files."""
    return planned_tensors(checkpoint, structure, Plan()) if isinstance(checkpoint, EditedCheckpoint) else None


def planned_sources(checkpoint: Checkpoint, structure: Structure, plan: Plan) -> dict[str, WeightSource]:
    """Every site as the plan says; of what was dropped, output projections of zeros, and the rest as it was."""
    found: dict[str, WeightSource] = {
        name: ParallelSource(PlainSource(checkpoint, site)) for name, site in structure.dropped.items()
    }
    return found | {
        name: ParallelSource(planned_source(checkpoint, structure.sites[name], assignment))
        for name, assignment in plan.by_site(structure).items()
    }
