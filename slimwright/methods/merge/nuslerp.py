"""NuSLERP: SLERP with weights, of task vectors or of rows (card: nuslerp)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.products import dot_products
from slimwright.methods.registry import knob, register


@register("merge/nuslerp", paper="mergekit (community method)")
@dataclass(frozen=True)
class NuSlerp(MergeMethod):
    """Interpolate two models along a great circle by their weights; with a base, their task vectors.

    ``t`` is the second weight's share (0.5 where they cancel). ``flatten`` takes each tensor as one vector; without it
    each row is one (along the last dimension), or with ``row_wise`` each column (along the first; a whole tensor is
    then in memory). Vectors whose sine is below 1e-8 are interpolated linearly.
    """

    base_model = "optional"
    fewest = most = 2
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    flatten: bool = knob(True, help="a tensor is one vector")
    row_wise: bool = knob(False, help="without flatten: along the first dimension")

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        if self.flatten:
            return "element"
        return "tensor" if self.row_wise else "row"

    @property
    def rounds(self) -> int:
        return int(self.flatten)

    def _share(self) -> float:
        first, second = self.each("weight", 2)
        return 0.5 if abs(first + second) < 1e-6 else second / (first + second)

    def survey(self, tile: Tile, state: State) -> Sums:
        return {"dots": dot_products(tile.deltas())}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        dots = found["dots"].tolist()
        norms = [max(math.sqrt(dots[i][i]), 1e-7) for i in (0, 1)]
        cosine = min(1.0, max(-1.0, dots[0][1] / norms[0] / norms[1]))
        return {"factors": list(_factors(torch.tensor(cosine, dtype=torch.float64), self._share()))}

    def combine(self, tile: Tile, state: State) -> Tensor:
        first, second = tile.tensors
        if tile.base is not None:
            first, second = first.sub_(tile.base), second.sub_(tile.base)
        if self.flatten:
            a, b = state["factors"]
            merged = (first * a).add_(second * b)
        else:
            dim = 0 if self.row_wise and first.ndim > 1 else -1
            units = [v / v.norm(dim=dim, keepdim=True).clamp(min=1e-7) for v in (first, second)]
            cosine = (units[0] * units[1]).sum(dim, keepdim=True).clamp(-1, 1)
            a_row, b_row = _row_factors(cosine, self._share())
            merged = first * a_row + second * b_row
        return merged if tile.base is None else merged.add_(tile.base)

    def blend(self, models: int, base: bool, state: State) -> Blend | None:
        if not self.flatten:
            return None
        return Blend(tuple(state["factors"]), base="start" if base else "unused")


def _factors(cosine: Tensor, t: float) -> tuple[float, float]:
    a, b = _row_factors(cosine, t)
    return float(a), float(b)


def _row_factors(cosine: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Factors of the two vectors, from the cosine between them."""
    parallel = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(parallel, torch.zeros_like(cosine), cosine))
    sine = angle.sin()
    first = torch.where(parallel, torch.full_like(cosine, 1 - t), ((1 - t) * angle).sin() / sine)
    return first, torch.where(parallel, torch.full_like(cosine, t), (t * angle).sin() / sine)
