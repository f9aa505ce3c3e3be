"""TALL-masks: one task's model out of a merged vector (card: tall-masks, #284)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.merging import State, Tile
from slimwright.methods.registry import knob, register
from slimwright.methods.wrapping import WrappingMethod


@register("merge/tall", paper="Localizing Task Information (TALL-masks), arXiv:2405.07813")
@dataclass(frozen=True)
class Tall(WrappingMethod):
    """Reconstruct one task's model: of the merged vector keep the entries that belong to that task.

    An entry belongs to task t where ``|tau_t| > lambda * |merged - tau_t|``, ``merged`` being a sum of task vectors
    (``task_arithmetic;lambda=1``, or ``ties;agg=sum``). Without a ``task`` the result is the merged model itself, and a
    merge keeps a mask for each model beside it, from which each is restored (slimwright/job/merging/variants.py).
    """

    inner: str = knob("task_arithmetic;lambda=1", help="what makes the merged vector")
    task: int | None = knob(None, low=0, high=10_000, help="which of the models, from 0; none: a mask for each")
    lambda_: float = knob(0.4, low=0.0, high=100.0, help="how much larger than the rest an entry must be")

    def check_inputs(self, models: int, base: bool) -> None:
        super().check_inputs(models, base)
        if self.task is not None and self.task >= models:
            raise InputError(f"merge/tall: there is no task {self.task} among {models} models (they count from 0).")

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        merged = self.merged_vector(tile, state)
        if self.task is None:
            return merged.add_(tile.base)
        return torch.where(self._mask(merged, tile, self.task), merged.add_(tile.base), tile.base)

    def masks(self, tile: Tile, state: State) -> list[Tensor]:
        """Which entries belong to each task; bool, in the shape of the tile."""
        merged = self.merged_vector(tile, state)
        return [self._mask(merged, tile, task) for task in range(len(tile.tensors))]

    def _mask(self, merged: Tensor, tile: Tile, task: int) -> Tensor:
        assert tile.base is not None
        own = tile.tensors[task] - tile.base
        return own.abs() > (merged - own).abs_().mul_(self.lambda_)
