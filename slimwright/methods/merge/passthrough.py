"""One model's tensors as they are, or scaled (card: passthrough)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.merging import MergeMethod, State, Tile
from slimwright.methods.registry import knob, register


@register("merge/passthrough", paper="depth up-scaling: SOLAR 10.7B, arXiv:2312.15166")
@dataclass(frozen=True)
class Passthrough(MergeMethod):
    """Take each tensor from one model; with slices, stack layer ranges to a deeper or shallower model.

    ``scale`` multiplies: 0 on the output projections of a repeated layer makes that layer an identity.
    """

    base_model = "unused"
    most = 1
    scale: float = knob(1.0, low=-1e6, high=1e6, help="factor")

    def combine(self, tile: Tile, state: State) -> Tensor:
        tensor = tile.tensors[0]
        return tensor if self.scale == 1 else tensor.mul_(self.scale)

    def blend(self, models: int, base: bool, state: State) -> Blend:
        return Blend((self.scale,), base="unused")
