"""What a job aims at: the target's profile, and how the inputs of linear layers are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slimwright.checkpoint import TensorEntry
from slimwright.formats.target import TargetProfile
from slimwright.model.structure import Site
from slimwright.weights import Grid
from slimwright.weights.activations import Activations


@dataclass(frozen=True)
class Aim:
    """A target as a search needs it.

    Attributes:
        profile: what the target takes.
        rounding: how what enters packed linear layers inside blocks is rounded; None: not.
    """

    profile: TargetProfile
    rounding: Activations | None = None

    def rounding_of(self, site: Site) -> Activations | None:
        """How what enters a site on a packed grid is rounded."""
        return self.rounding if site.block is not None and site.kind in ("linear", "conv1d") else None

    def grids(self, sites: Sequence[Site]) -> list[Grid]:
        """The packed grids that all weights of a group may be on."""
        each = [self.profile.grids(site, self.rounding_of(site)) for site in sites]
        return [grid for grid in each[0] if all(grid in others for others in each[1:])]

    def illegal(self, sites: Sequence[Site], spec: str) -> str | None:
        """Why a group cannot be on a grid, with what would be legal; None if it can."""
        reasons = (self.profile.illegal(site, spec, self.rounding_of(site)) for site in sites)
        return next((reason for reason in reasons if reason is not None), None)

    def packed_cost(self, sites: Sequence[Site], grid: Grid, budget: int) -> int:
        """Bytes of a group on a packed grid in the target's files, at most."""
        entries = [e for site in sites for e in self.profile.entries(site, grid, self.rounding_of(site))]
        return self.profile.cost(entries, budget)

    def kept_cost(self, entries: Iterable[TensorEntry], budget: int) -> int:
        """Bytes of tensors that are not packed, given as they lie in a checkpoint."""
        found = [self.profile.kept(entry) for entry in entries]
        return self.profile.cost([entry for entry in found if entry is not None], budget)

    def outside(self, sites: Sequence[Site], grid: Grid) -> bool:
        """Whether a group stays dense in the target, which has the grid for other weights."""
        return not grid.plain and not self.grids(sites)


def substitute(aim: Aim | None, sites: Sequence[Site], grid: Grid) -> Grid | None:
    """What a group gets instead of a grid that cannot hold one of its weights; None where nothing does, or it can."""
    if aim is None or all(grid.illegal(site.rows, site.columns) is None for site in sites):
        return None
    other = aim.profile.substitute(sites[0], grid)
    return other if other is not None and other in aim.grids(sites) else None
