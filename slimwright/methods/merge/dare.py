"""DARE: drop at random and rescale (card: dare)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.blending import Blend, together
from slimwright.methods.chance import keep_randomly, random_integers
from slimwright.methods.dropping import DroppingMethod
from slimwright.methods.merging import State, Tile
from slimwright.methods.registry import knob, register


@register("merge/dare", paper="Language models are super Mario, arXiv:2311.03099")
@dataclass(frozen=True)
class Dare(DroppingMethod):
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

    def dropped(self, deltas: list[Tensor], tile: Tile) -> list[Tensor]:
        for model, (delta, density) in enumerate(zip(deltas, self.each("density", len(deltas)))):
            if density < 1:
                numbers = random_integers(tile.seed, tile.site.name, model, tile.start, delta.numel())
                keep_randomly(delta, density, numbers)
        return deltas

    def factors(self, models: int) -> Sequence[float]:
        exact = self.rescale == "exact"
        return [1 / density if exact and density > 0 else 1.0 for density in self.each("density", models)]

    def entries(self, models: int) -> Blend:
        return Blend((1.0,) * models, densities=self.each("density", models))

    def blend(self, models: int, base: bool, state: State) -> Blend:
        weights = self.each("weight", models)
        factors = [f * w for f, w in zip(state.get("factors") or self.factors(models), weights)]
        return together(
            factors, weights, self.consensus, self.normalize, self.lambda_, densities=self.each("density", models)
        )
