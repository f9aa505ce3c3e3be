"""DELLA: drop small entries more often, rescale, elect signs (card: della)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.chance import random_integers
from slimwright.methods.dropping import DroppingMethod
from slimwright.methods.merging import Tile
from slimwright.methods.registry import knob, register


@register("merge/della", paper="DELLA-Merging, arXiv:2406.11617")
@dataclass(frozen=True)
class Della(DroppingMethod):
    """Keep entries at random, the more probably the larger their rank within the row; rescale; elect signs and merge.

    The probability runs from ``density - epsilon`` (smallest magnitude of a row) to ``density + epsilon`` (largest).
    ``rescale``: ``exact`` divides each kept entry by its own probability (the paper); ``l1`` restores the tensor's sum
    of magnitudes; ``none``. A row of one entry has the probability ``density``.
    """

    density: float | tuple[float, ...] = knob(0.5, low=0.0, high=1.0, per_model=True, help="share of entries kept")
    epsilon: float | tuple[float, ...] = knob(0.15, low=0.0, high=0.5, per_model=True, help="half the spread")
    rescale: str = knob("exact", choices=("exact", "l1", "none"), help="what makes up for what is dropped")
    consensus: str = knob("ties", choices=("ties", "linear"), help="elect signs and merge what agrees, or sum")
    lambda_: float = knob(1.0, low=-100.0, high=100.0, help="scale of the merged task vector")
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    normalize: bool = knob(True, help="divide by the sum of the weights (of those that agree)")

    def check_inputs(self, models: int, base: bool) -> None:
        super().check_inputs(models, base)
        for density, epsilon in zip(self.each("density", models), self.each("epsilon", models)):
            if 0 < density < 1 and not (density + epsilon < 1 and density - epsilon > 0):
                raise InputError(
                    f"merge/della: density {density} plus or minus epsilon {epsilon} leaves (0, 1): choose a smaller "
                    "epsilon."
                )

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        return "row"

    def dropped(self, deltas: list[Tensor], tile: Tile) -> list[Tensor]:
        """The task vectors with what chance drops at 0, rescaled where that is exact, each entry by its own."""
        models = len(deltas)
        kept = []
        for model, (delta, density, epsilon) in enumerate(
            zip(deltas, self.each("density", models), self.each("epsilon", models))
        ):
            if density >= 1 or density <= 0:
                kept.append(delta if density >= 1 else torch.zeros_like(delta))
                continue
            probability = (density - epsilon) + 2 * epsilon * _ranks(delta.abs())
            numbers = random_integers(tile.seed, tile.site.name, model, tile.start, delta.numel()).view(delta.shape)
            chosen = numbers < (probability.double() * 2.0**31)
            values = delta / probability if self.rescale == "exact" else delta
            kept.append(values * chosen)
        return kept


def _ranks(magnitudes: Tensor) -> Tensor:
    """(rows, columns): the rank of each magnitude within its row over 0 .. 1; of equals the first is smaller."""
    columns = magnitudes.shape[1]
    if columns == 1:
        return torch.full_like(magnitudes, 0.5)
    order = magnitudes.argsort(dim=1, stable=True)
    places = torch.arange(columns, dtype=magnitudes.dtype).div_(columns - 1).expand_as(magnitudes)
    return torch.empty_like(magnitudes).scatter_(1, order, places)
