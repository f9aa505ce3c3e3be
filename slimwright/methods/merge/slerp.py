"""Spherical linear interpolation of two models (card: slerp)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.products import dot_products
from slimwright.methods.registry import knob, register


@register("merge/slerp", paper="Shoemake 1985; for models, folklore")
@dataclass(frozen=True)
class Slerp(MergeMethod):
    """Interpolate each tensor along the great circle between the two models' directions, so the norm does not shrink.

    The base is the model at ``t = 0``; without a base the first of two models is. Tensors that are all but parallel or
    antiparallel (|cosine| above ``dot_threshold``) are interpolated linearly. Of an all-zero tensor the direction is
    zero, so the other is multiplied by a sine (a documented edge case, not a linear interpolation).
    """

    base_model = "optional"
    fewest, most = 1, 2
    t: float = knob(0.5, low=0.0, high=1.0, help="0: the base (the first), 1: the other")
    dot_threshold: float = knob(0.9995, low=0.0, high=1.0, help="|cosine| above which interpolation is linear")
    eps: float = knob(1e-8, low=0.0, high=1.0, help="norms up to this count as zero")

    def check_inputs(self, models: int, base: bool) -> None:
        super().check_inputs(models + base - 1, base)

    @property
    def rounds(self) -> int:
        return 1

    def survey(self, tile: Tile, state: State) -> Sums:
        return {"dots": dot_products(tile.vectors())}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        dots = found["dots"].tolist()
        norms = [math.sqrt(dots[0][0]), math.sqrt(dots[1][1])]
        scale = [norm if norm > self.eps else 1.0 for norm in norms]
        cosine = min(1.0, max(-1.0, dots[0][1] / scale[0] / scale[1]))
        if abs(cosine) > self.dot_threshold:
            return {"first": 1.0 - self.t, "second": self.t}
        angle = math.acos(cosine)
        sine = math.sin(angle)
        return {"first": math.sin((1 - self.t) * angle) / sine, "second": math.sin(self.t * angle) / sine}

    def combine(self, tile: Tile, state: State) -> Tensor:
        first, second = tile.vectors()
        return (first * state["first"]).add_(second * state["second"])

    def blend(self, models: int, base: bool, state: State) -> Blend:
        return Blend((state["first"], state["second"]), base="first" if base else "unused")
