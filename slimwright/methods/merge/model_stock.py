"""Model Stock: towards the base by the angle between task vectors (card: model-stock)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.consensus import scaled_sum
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.products import dot_products
from slimwright.methods.registry import knob, register


@register("merge/model_stock", paper="Model Stock, arXiv:2403.19522")
@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """``r * mean(models) + (1 - r) * base``: the nearer to the base, the wider the angle between the task vectors.

    ``r = N cos / (1 + (N - 1) cos)``, cos the mean cosine over pairs of the N task vectors.

    By tensor, or by row with ``filter_wise``. ``clamp`` keeps r in 0 .. 1; without it task vectors that oppose each
    other extrapolate beyond the base. Where the denominator vanishes r is 0.
    """

    fewest = 2
    filter_wise: bool = knob(False, help="an angle for each row")
    clamp: bool = knob(True, help="keep the ratio in 0 .. 1")

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        return "row" if self.filter_wise else "element"

    @property
    def rounds(self) -> int:
        return int(not self.filter_wise)

    def survey(self, tile: Tile, state: State) -> Sums:
        return {"dots": dot_products(tile.deltas())}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        return {"ratio": float(self._ratio(found["dots"].unsqueeze(-1)))}

    def _ratio(self, dots: Tensor) -> Tensor:
        """(n, n, rows) dot products → (rows,) ratios."""
        models = len(dots)
        norms = torch.stack([dots[i, i].clamp(min=0).sqrt() for i in range(models)])
        cosines = [
            (dots[i, j] / (norms[i] * norms[j]).clamp(min=1e-6)).clamp(-1, 1)
            for i in range(models)
            for j in range(i + 1, models)
        ]
        cosine = torch.stack(cosines).mean(0)
        divisor = 1 + (models - 1) * cosine
        singular = divisor.abs() < 1e-6
        ratio = torch.where(singular, torch.zeros_like(cosine), models * cosine / torch.where(singular, 1.0, divisor))
        return ratio.clamp(0, 1) if self.clamp else ratio

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        models = len(tile.tensors)
        ratio: float | Tensor
        if self.filter_wise:
            deltas = [delta.double() for delta in tile.deltas()]
            dots = torch.stack([torch.stack([(a * b).sum(1) for b in deltas]) for a in deltas])
            ratio = self._ratio(dots).to(tile.base.dtype).unsqueeze(1)
        else:
            ratio = state["ratio"]
        mean = scaled_sum(list(tile.tensors), [1.0] * models).div_(models)
        return mean.mul_(ratio).add_(tile.base * (1 - ratio))

    def blend(self, models: int, base: bool, state: State) -> Blend | None:
        if self.filter_wise:
            return None
        ratio = state["ratio"]
        return Blend((1.0,) * models, divisor=models, scale=ratio, base_factor=1 - ratio, base="added")
