"""Weight sources for streamed models: the checkpoint as it is, and the plan applied to it by plain-tensor code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.job.weights import site_rows, survey
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Site, Structure
from slimwright.plan import Plan
from slimwright.runtime.streamed import WeightSource


class PlainSource(WeightSource):
    """A site of a checkpoint as it is."""

    def __init__(self, checkpoint: Checkpoint, site: Site) -> None:
        super().__init__(site)
        self._checkpoint = checkpoint

    def rows(self, rows: slice) -> Tensor:
        return site_rows(self._checkpoint, self.site, rows).to(torch.float32)


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
            self._stats = SiteStatistics(survey=survey(self._checkpoint, self.site, self._solver.grid))
        if not self._solver.row_independent:
            whole = site_rows(self._checkpoint, self.site, slice(0, self.site.rows))
            return self._solver.solve(whole, self._stats).dense()[rows]
        multiple = self._solver.grid.row_multiple(self.site.columns)
        first = rows.start // multiple * multiple
        last = min(self.site.rows, -(-rows.stop // multiple) * multiple)
        tile = site_rows(self._checkpoint, self.site, slice(first, last)).to(torch.float32).contiguous()
        return self._solver.solve(tile, self._stats).dense()[rows.start - first : rows.stop - first]


def plain_sources(checkpoint: Checkpoint, structure: Structure) -> dict[str, WeightSource]:
    """Every site as it is."""
    return {name: PlainSource(checkpoint, site) for name, site in structure.sites.items()}


def planned_sources(checkpoint: Checkpoint, structure: Structure, plan: Plan) -> Mapping[str, WeightSource]:
    """Every site as the plan says."""
    found: dict[str, WeightSource] = {}
    for name, assignment in plan.by_site(structure).items():
        site = structure.sites[name]
        if assignment.kept:
            found[name] = PlainSource(checkpoint, site)
        else:
            found[name] = PlannedSource(checkpoint, site, assignment.solver())
    return found
