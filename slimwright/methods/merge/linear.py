"""Weighted average of models (card: linear)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.blending import Blend
from slimwright.methods.merging import MergeMethod, State, Tile
from slimwright.methods.registry import knob, register


@register("merge/linear", paper="Model soups, arXiv:2203.05482")
@dataclass(frozen=True)
class Linear(MergeMethod):
    """Average the weights: ``sum(weight * model)``, divided by the sum of the weights if ``normalize``."""

    base_model = "unused"
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    normalize: bool = knob(True, help="divide by the sum of the weights")

    def check_inputs(self, models: int, base: bool) -> None:
        super().check_inputs(models, base)
        if self.normalize and abs(sum(self.each("weight", models))) < 1e-8:
            raise InputError("merge/linear: the weights add up to 0; give others, or normalize = false.")

    def combine(self, tile: Tile, state: State) -> Tensor:
        weights = self.each("weight", len(tile.tensors))
        total = tile.tensors[0].mul_(weights[0])
        for tensor, weight in zip(tile.tensors[1:], weights[1:]):
            total.add_(tensor, alpha=weight)
        divisor = self._divisor(weights, total.dtype)
        return total if divisor == 1 else total.div_(divisor)

    def _divisor(self, weights: tuple[float, ...], dtype: torch.dtype) -> float:
        return float(torch.tensor(weights, dtype=dtype).sum()) if self.normalize else 1.0

    def blend(self, models: int, base: bool, state: State) -> Blend:
        weights = self.each("weight", models)
        return Blend(weights, "fused", divisor=self._divisor(weights, torch.float32), base="unused")
