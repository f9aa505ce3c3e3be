"""Multi-SLERP: spherical interpolation of many models about their mean direction (card: nuslerp, last part)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.blending import Blend
from slimwright.methods.consensus import scaled_sum
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.products import dot_products
from slimwright.methods.registry import knob, register


@register("merge/multislerp", paper="mergekit (community method)")
@dataclass(frozen=True)
class MultiSlerp(MergeMethod):
    """Interpolate the directions of several models on the sphere, and give the result their mean norm.

    With a base, task vectors. Each tensor is one vector. The directions' weighted mean is the point of tangency; where
    it vanishes two models are averaged and more are refused. (The weighted tangents at that point add up to zero, so
    the result is the mean direction times the weighted mean norm: docs/merging.md.)
    """

    base_model = "optional"
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    normalize_weights: bool = knob(True, help="divide the weights by their sum")
    eps: float = knob(1e-8, low=0.0, high=1.0, help="norms below count as zero")

    @property
    def rounds(self) -> int:
        return 1

    def survey(self, tile: Tile, state: State) -> Sums:
        return {"dots": dot_products(tile.deltas())}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        ((name, found),) = sums.items()
        dots: Tensor = found["dots"]
        models = len(dots)
        if models == 1:
            return {"factors": [1.0]}
        weights = torch.tensor(self.each("weight", models), dtype=torch.float64)
        if self.normalize_weights:
            if abs(float(weights.sum())) < 1e-12:
                raise InputError("merge/multislerp: the weights add up to 0: give others.")
            weights = weights / weights.sum()
        norms = dots.diagonal().sqrt()
        scale = 1 / (norms + self.eps)
        cosines = dots * scale[:, None] * scale[None, :]
        length = float((weights @ cosines @ weights).clamp(min=0).sqrt())
        if length < self.eps:
            if models == 2 or float(norms.max()) <= self.eps:  # nothing has a direction: all are (nearly) zero
                return {"factors": weights.tolist()}
            raise InputError(
                f"merge/multislerp: the weighted directions of '{name}' cancel and have no mean: change the weights."
            )
        mean = weights / length
        tangent = weights - float(weights @ (cosines @ mean)) * mean
        step = float((tangent @ cosines @ tangent).clamp(min=0).sqrt()) + self.eps
        angle = torch.tensor(step, dtype=torch.float64)
        factors = (mean * angle.cos() + tangent * (angle.sin() / angle)) * scale * float(norms @ weights)
        return {"factors": factors.tolist()}

    def combine(self, tile: Tile, state: State) -> Tensor:
        vectors = [tensor if tile.base is None else tensor.sub_(tile.base) for tensor in tile.tensors]
        merged = scaled_sum(vectors, state["factors"])
        return merged if tile.base is None else merged.add_(tile.base)

    def blend(self, models: int, base: bool, state: State) -> Blend:
        return Blend(tuple(state["factors"]), base="start" if base else "unused")
