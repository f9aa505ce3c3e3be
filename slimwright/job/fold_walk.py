"""Finding the scales of a fold: one walk over the model as it stands, with every fold group's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from slimwright.calibrate.walk import Unit
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.options import chosen_rows, evenly_spaced
from slimwright.job.parallel import in_order
from slimwright.job.walked import WalkedModel
from slimwright.job.weights import plain_rounding, site_rows
from slimwright.methods import GroupFold, SiteStatistics, WeightSolver
from slimwright.methods.folding import candidate_losses, chosen, input_channels, storable_scale
from slimwright.model.structure import FoldGroup, Site, Structure

SCORED_PRODUCTS = 2e10
"""Multiply-adds of one trial over the whole model: of larger models a share of every matrix's rows is rounded."""

LEAST_ROWS = 64
"""Rows of a matrix that are rounded at least."""


@dataclass(frozen=True)
class _Found:
    """What is kept of a fold group until the fold is chosen for the whole model."""

    fold: FoldGroup
    stats: SiteStatistics
    losses: list[float]


class FoldWalk:
    """Scales of a fold's groups.

    Args:
        source: the model as it stands, edits before this one included.
        fold: the method.
        solvers: what will put each site on a grid, by disk name; sites without stay as they are.
        step: called with groups done and in all.
    """

    def __init__(
        self,
        source: Checkpoint,
        structure: Structure,
        calibration: Calibration,
        fold: GroupFold,
        solvers: Mapping[str, WeightSolver],
        step: Callable[[int, int], None],
    ) -> None:
        self.source = source
        self.structure = structure
        self.calibration = calibration
        self.fold = fold
        self.solvers = solvers
        self.step = step
        folds = [f for f in structure.folds if f.kind in fold.kinds and any(n in solvers for n in f.consumers)]
        self.folds = {group.consumers[0]: group for group in folds}
        products = sum(structure.sites[n].numel * structure.sites[n].columns for f in folds for n in f.consumers)
        self.share = min(1.0, SCORED_PRODUCTS / max(1, products))

    def run(self) -> dict[str, Tensor]:
        """Factors of every fold group, (in,) float32, by the disk name of its producer; groups that no token reached
        are left out.

        Raises:
            InputError: the model has nothing that this fold could work on.
        """
        if not self.folds:
            kinds = " or ".join(self.fold.kinds)
            raise InputError(
                f"{self.fold.name} finds nothing to fold in this {self.structure.family} model (no {kinds} pair whose "
                "scales cancel): leave it out, or give --fold none."
            )
        walked = WalkedModel(self.source, self.structure, self.calibration)
        candidates = self.fold.candidates()
        scales: dict[str, Tensor] = {}
        kept: list[_Found] = []
        done = 0
        for sites, collector in walked.collected(self._watched):
            given = [(self.folds[site.name], collector.statistics(site)[0]) for site in sites]
            given = [(group, stats) for group, stats in given if stats.gram is not None]
            if len(candidates) == 1:
                for (group, _), scale in in_order(lambda item: self._scale(self.fold, *item), given):
                    scales[group.producer] = scale
            else:
                for (group, stats), losses in in_order(lambda item: self._losses(*item), given):
                    kept.append(_Found(group, _small(stats), losses))
            done += len(sites)
            self.step(done, len(self.folds))
        if kept:
            best = chosen(self.fold, [found.losses for found in kept])
            self.calibration.log(f"{self.fold.name}: of {len(candidates)} candidates {best.spec} loses least.")
            scales = {found.fold.producer: self._scale(best, found.fold, found.stats) for found in kept}
        return scales

    def _watched(self, unit: Unit) -> list[Site]:
        """One site of each fold group in a unit: its consumers are all fed alike."""
        return [site for site in unit.sites if site.name in self.folds]

    def _losses(self, group: FoldGroup, stats: SiteStatistics) -> list[float]:
        weights, solver, channels = self._given(group, sampled=True)
        return candidate_losses(self.fold, weights, stats, solver, channels)

    def _scale(self, fold: GroupFold, group: FoldGroup, stats: SiteStatistics) -> Tensor:
        weights, solver, channels = self._given(group, sampled="gram" in fold.needs)
        scale = fold.scales(weights, stats, solver, channels)
        if group.producer in self.structure.sites:
            return scale
        return storable_scale(self.source.read(group.producer), group.offset, scale)

    def _given(self, group: FoldGroup, sampled: bool) -> tuple[list[Tensor], WeightSolver, Tensor | None]:
        """The consumers' weights (of large ones some rows, where ``sampled``), plain rounding on the grid that the
        first of them will be put on, and the channels that they read."""
        sites = [self.structure.sites[name] for name in group.consumers]
        solver = next(self.solvers[site.name] for site in sites if site.name in self.solvers)
        rows = [max(LEAST_ROWS, int(site.rows * self.share)) if sampled else site.rows for site in sites]
        weights = [
            site_rows(self.source, site, slice(0, site.rows)).float()
            if count >= site.rows
            else chosen_rows(self.source, site, evenly_spaced(site.rows, count))
            for site, count in zip(sites, rows, strict=True)
        ]
        return weights, plain_rounding(solver) or solver, input_channels(self.structure, group)


def _small(stats: SiteStatistics) -> SiteStatistics:
    """The statistics without the Gram, which lives only while its block does."""
    return SiteStatistics(stats.tokens, absmax=stats.absmax, absmean=stats.absmean, mean=stats.mean)


def usual_grid(columns: int, bits: float) -> str:
    """A grid of about so many bits a weight, on which folds are tried where the plan is still to be searched."""
    group = next((size for size in (64, 32, 128) if columns % size == 0), None)
    return f"int{min(8, max(2, int(bits)))}" + (f":g{group}" if group else "")
