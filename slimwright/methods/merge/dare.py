"""DARE: drop at random and rescale (card: dare)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.chance import keep_randomly, random_integers
from slimwright.methods.consensus import add_to_base, disjoint, elected_signs, scaled_sum
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.products import exact_sum
from slimwright.methods.registry import knob, register


@register("merge/dare", paper="Language models are super Mario, arXiv:2311.03099")
@dataclass(frozen=True)
class Dare(MergeMethod):
    """Zero a random share of each task vector, rescale the rest, and merge by sums or by TIES' elected signs.

    ``rescale``: ``exact`` divides by the density (the paper); ``l1`` restores each tensor's sum of magnitudes (not
    where one of the two is below 1e-7); ``none``.
    """

    density: float | tuple[float, ...] = knob(0.1, low=0.0, high=1.0, per_model=True, help="share of entries kept")
    rescale: str = knob("exact", choices=("exact", "l1", "none"), help="what makes up for what is dropped")
    consensus: str = knob("linear", choices=("linear", "ties"), help="sum, or elect signs and merge what agrees")
    lambda_: float = knob(1.0, low=-100.0, high=100.0, help="scale of the merged task vector")
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    normalize: bool = knob(False, help="divide by the sum of the weights (of those that agree)")

    @property
    def rounds(self) -> int:
        return int(self.rescale == "l1")

    def survey(self, tile: Tile, state: State) -> Sums:
        deltas = tile.deltas()
        before = torch.stack([exact_sum(delta.abs()) for delta in deltas])
        after = torch.stack([exact_sum(delta.abs()) for delta in self._dropped(deltas, tile)])
        return {"norms": torch.stack([before, after])}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        before, after = found["norms"].tolist()
        return {"factors": [b / a if a >= 1e-7 and b >= 1e-7 else 1.0 for b, a in zip(before, after)]}

    def _dropped(self, deltas: list[Tensor], tile: Tile) -> list[Tensor]:
        """The task vectors with their dropped entries at 0; in their memory."""
        densities = self.each("density", len(deltas))
        for model, (delta, density) in enumerate(zip(deltas, densities)):
            if density < 1:
                numbers = random_integers(tile.seed, tile.site.name, model, tile.start, delta.numel())
                keep_randomly(delta, density, numbers)
        return deltas

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        models = len(tile.tensors)
        densities, weights = self.each("density", models), self.each("weight", models)
        factors = state.get("factors") or [
            1 / density if self.rescale == "exact" and density > 0 else 1.0 for density in densities
        ]
        deltas = self._dropped([tensor.sub_(tile.base) for tensor in tile.tensors], tile)
        for delta, factor, weight in zip(deltas, factors, weights):
            if factor * weight != 1:
                delta.mul_(factor * weight)
        if self.consensus == "ties":
            change = disjoint(deltas, weights, elected_signs(deltas), "mean" if self.normalize else "sum")
        else:
            change = scaled_sum(deltas, [1.0] * models)
            total = sum(weights)
            if self.normalize and abs(total) >= 1e-8:
                change.div_(total)
        return add_to_base(tile.base, change, self.lambda_)
