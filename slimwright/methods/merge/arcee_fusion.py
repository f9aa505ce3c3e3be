"""Arcee Fusion: take over only the changes that matter (card: arcee-fusion)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.registry import register
from slimwright.methods.selection import ROUNDS, is_settled, settle_magnitudes, survey_magnitudes, threshold_of


@register("merge/arcee_fusion", paper="mergekit (Arcee)")
@dataclass(frozen=True)
class ArceeFusion(MergeMethod):
    """Copy into the base those entries of the model whose change is unusually important.

    Importance is |change| times the divergence KL(softmax(row of the model) || softmax(row of the base)); entries of at
    least ``median + 1.5 * (third quartile - first)`` are taken. The quartiles are exact (mergekit samples a million
    entries), and the divergence is computed in float64: in float32 it is rounding noise, below zero as often as above,
    where rows are nearly equal.
    """

    fewest = most = 1

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        return "row"

    @property
    def rounds(self) -> int:
        return ROUNDS

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        (site,) = sites.values()
        places = [int(quantile * (site.numel - 1)) for quantile in (0.25, 0.5, 0.75)]
        return {"quartiles": [[{"keep": site.numel - place, "value_only": True} for place in places]]}

    def survey(self, tile: Tile, state: State) -> Sums:
        return survey_magnitudes([_importance(tile).reshape(-1)], state["quartiles"], tile)

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        quartiles = settle_magnitudes(sums, state["quartiles"])
        if not is_settled(quartiles):
            return {"quartiles": quartiles}
        first, median, third = (threshold_of(found) for found in quartiles[0])
        return {"quartiles": quartiles, "threshold": median + 1.5 * (third - first), "done": True}

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        taken = _importance(tile) >= state["threshold"]
        return torch.where(taken, tile.tensors[0], tile.base)


def _importance(tile: Tile) -> Tensor:
    """(rows, columns) float32."""
    assert tile.base is not None
    (model,) = tile.tensors
    p = model.double().softmax(1).add_(1e-8)
    q = tile.base.double().softmax(1).add_(1e-8)
    divergence = (p * (p / q).log_()).sum(1, keepdim=True).clamp_(min=0)
    return ((model - tile.base).abs() * divergence).float()
