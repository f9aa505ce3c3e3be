"""Sums of task vectors (card: task-arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.consensus import add_to_base, divisor, normalized, scaled_sum
from slimwright.methods.merging import MergeMethod, State, Tile
from slimwright.methods.registry import knob, register


@register("merge/task_arithmetic", paper="Editing models with task arithmetic, arXiv:2212.04089")
@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """Add the weighted task vectors to the base: ``base + lambda * sum(weight * (model - base))``.

    A negative weight forgets a task. With ``normalize`` the sum is divided by the sum of the weights (by 1 where that
    is zero).
    """

    lambda_: float = knob(0.3, low=-100.0, high=100.0, help="scale of the summed task vectors")
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    normalize: bool = knob(False, help="divide by the sum of the weights")

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        weights = self.each("weight", len(tile.tensors))
        change = scaled_sum([tensor.sub_(tile.base) for tensor in tile.tensors], weights)
        return add_to_base(tile.base, normalized(change, weights) if self.normalize else change, self.lambda_)

    def blend(self, models: int, base: bool, state: State) -> Blend:
        weights = self.each("weight", models)
        return Blend(weights, divisor=divisor(weights) if self.normalize else 1.0, scale=self.lambda_)
