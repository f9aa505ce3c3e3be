"""Nearswap: towards the other model where the two are close (mergekit's definition)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.merging import MergeMethod, State, Tile
from slimwright.methods.registry import knob, register


@register("merge/nearswap", paper="alchemonaut, QuartetAnemoi (community method); mergekit's definition")
@dataclass(frozen=True)
class NearSwap(MergeMethod):
    """Move each entry of the base towards the model by the share ``t / |difference|``, at most all the way.

    Differences below 1e-6 count as 1e-6.
    """

    fewest = most = 1
    t: float = knob(1e-4, low=0.0, high=1e3, help="differences up to this are taken over whole")

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        (model,) = tile.tensors
        share = (tile.base - model).abs_().clamp_(min=1e-6).reciprocal_().mul_(self.t).clamp_(0, 1)
        return (model * share).add_((1 - share) * tile.base)
