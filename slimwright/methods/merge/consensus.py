"""Consensus merging: only what several tasks need (card: tall-masks, #284, step 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.merging import State, Tile
from slimwright.methods.registry import knob, register
from slimwright.methods.wrapping import WrappingMethod


@register("merge/consensus", paper="Localizing Task Information (Consensus), arXiv:2405.07813")
@dataclass(frozen=True)
class Consensus(WrappingMethod):
    """Of the merged vector keep the entries that belong to at least ``prun_thre_k`` tasks, by their TALL-masks.

    What belongs to none (catastrophic) or to one task alone (selfish) goes. ``mask_lambda`` is the masks' lambda, for
    each task; ``lambda`` scales the result.
    """

    inner: str = knob("task_arithmetic;lambda=1", help="what makes the merged vector")
    mask_lambda: float | tuple[float, ...] = knob(0.4, low=0.0, high=100.0, per_model=True, help="of each task's mask")
    prun_thre_k: int = knob(2, low=0, high=10_000, help="tasks that an entry must belong to")
    lambda_: float = knob(0.3, low=-100.0, high=100.0, help="scale of what is kept")

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        merged = self.merged_vector(tile, state)
        votes = torch.zeros_like(merged)
        for tensor, factor in zip(tile.tensors, self.each("mask_lambda", len(tile.tensors))):
            own = tensor.sub_(tile.base)
            votes.add_(own.abs() > (merged - own).abs_().mul_(factor))
        return merged.mul_(votes >= self.prun_thre_k).mul_(self.lambda_).add_(tile.base)
