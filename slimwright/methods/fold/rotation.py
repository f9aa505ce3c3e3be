"""Rotation of the residual stream and the values (card: rotate; Ashkboos et al. 2024, arXiv:2404.00456)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.registry import knob, register
from slimwright.methods.rotation import Rotation, RotationFold
from slimwright.model.structure import Structure


@register("fold/rotation", paper="Ashkboos et al. 2024, QuaRot (arXiv:2404.00456), its offline rotations")
@dataclass(frozen=True)
class ResidualRotation(RotationFold):
    """Turn the residual stream by one orthogonal matrix, so that no channel is an outlier; nothing is left to do when
    the model runs.

    The norms' gains move into the linears behind them. A head tied to the embedding gets a tensor of its own unless the
    last norm's gain is uniform: its bytes enter the budget.
    """

    mode: str = knob("hadamard", choices=("hadamard", "random"), help="randomized Hadamard, or any orthogonal matrix")
    values: bool = knob(True, help="turn the values too, per head, between v and o")

    def rotation(
        self, structure: Structure, shapes: Mapping[str, tuple[int, ...]], gains: Mapping[str, Tensor], seed: int
    ) -> Rotation:
        return Rotation(structure, shapes, gains, mode=self.mode, values=self.values, seed=seed)
