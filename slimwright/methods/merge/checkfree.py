"""CheckFree: a lost stage from its neighbours (card: checkfree, #257, step 7)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.consensus import scaled_sum
from slimwright.methods.merging import MergeMethod, State, Tile
from slimwright.methods.registry import knob, register


@register("merge/checkfree", paper="CheckFree, arXiv:2506.15461")
@dataclass(frozen=True)
class CheckFree(MergeMethod):
    """Rebuild a layer as the average of its two neighbours, weighted by their gradient norms.

    With slices whose two sources are the layers before and behind the lost one. ``gradient_norm`` is that of each
    neighbour in the last training step (the less converged one weighs more); without it both weigh the same.
    """

    base_model = "unused"
    fewest = most = 2
    gradient_norm: float | tuple[float, ...] = knob(1.0, low=0.0, high=1e9, per_model=True, help="of each neighbour")

    def combine(self, tile: Tile, state: State) -> Tensor:
        weights = [norm + 1e-4 for norm in self.each("gradient_norm", 2)]
        return scaled_sum(list(tile.tensors), [weight / sum(weights) for weight in weights])
