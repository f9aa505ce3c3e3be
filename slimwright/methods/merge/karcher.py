"""Karcher mean: the spherical mean of several models' directions (card: karcher)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.consensus import scaled_sum
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.products import dot_products
from slimwright.methods.registry import knob, register


@register("merge/karcher", paper="Riemannian centre of mass (Karcher 1977); for models, mergekit")
@dataclass(frozen=True)
class Karcher(MergeMethod):
    """Average the directions on the sphere until the mean no longer moves, and give the result the mean norm.

    Each tensor is one vector. Everything is a combination of the models' tensors, so the iteration runs on their dot
    products alone. Tensors whose norm is at most ``tol`` have no direction, but count in the mean norm. A direction
    opposite to the mean (no shortest way) is passed over.
    """

    base_model = "unused"
    max_iter: int = knob(10, low=1, high=10_000, help="steps at most")
    tol: float = knob(1e-5, low=0.0, high=1.0, help="a shorter step ends the iteration")

    @property
    def rounds(self) -> int:
        return 1

    def survey(self, tile: Tile, state: State) -> Sums:
        return {"dots": dot_products(tile.vectors())}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        dots: Tensor = found["dots"]
        models = len(dots)
        norms = dots.diagonal().sqrt()
        if models == 1:
            return {"factors": [1.0]}
        valid = (norms > self.tol).double()
        if not valid.any():
            return {"factors": [0.0] * models}
        scale = torch.where(norms > self.tol, 1 / norms.clamp(min=1e-300), torch.zeros_like(norms))
        cosines = dots * scale[:, None] * scale[None, :]
        share = valid / valid.sum()
        mean = share.clone()  # coefficients of the unit vectors
        length = _length(mean, cosines)
        if length < self.tol:
            mean = torch.zeros_like(share)
            mean[int(valid.argmax())] = 1.0
        else:
            mean /= length
        for _ in range(self.max_iter):
            cosine = (cosines @ mean).clamp(-1, 1)
            angle = cosine.acos()
            sine = angle.sin()
            moves = (angle >= self.tol) & (sine > 1e-12) & (valid > 0)
            factor = torch.where(moves, share * angle / sine.clamp(min=1e-300), torch.zeros_like(share))
            tangent = factor - float(factor @ cosine) * mean
            step = _length(tangent, cosines)
            if step < self.tol:
                break
            angle_of_step = torch.tensor(step, dtype=torch.float64)
            mean = mean * angle_of_step.cos() + tangent * (angle_of_step.sin() / step)
            mean = mean / max(_length(mean, cosines), 1e-300)
        return {"factors": (mean * scale * float(norms.mean())).tolist()}

    def combine(self, tile: Tile, state: State) -> Tensor:
        return scaled_sum(list(tile.tensors), state["factors"])

    def blend(self, models: int, base: bool, state: State) -> Blend:
        return Blend(tuple(state["factors"]), base="unused")


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    """The norm of a combination of unit vectors."""
    return float((coefficients @ cosines @ coefficients).clamp(min=0).sqrt())
