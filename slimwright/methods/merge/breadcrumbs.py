"""Model Breadcrumbs: drop the smallest entries and the largest outliers (card: breadcrumbs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from slimwright.methods.blending import Blend, together
from slimwright.methods.consensus import add_to_base, combined
from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.registry import knob, register
from slimwright.methods.rescaling import restoring, survey_norms
from slimwright.methods.selection import (
    ROUNDS,
    Selection,
    is_settled,
    keep_largest,
    selection,
    settle_magnitudes,
    survey_magnitudes,
)


@register("merge/breadcrumbs", paper="Model Breadcrumbs, arXiv:2312.06795")
@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """Of each task vector drop the largest ``gamma`` and, of the rest, all but the ``density`` next largest; merge.

    Exact counts, ``int(density * n)`` and ``int(gamma * n)``; fewer outliers are dropped where both do not fit. A
    density of 1 drops nothing. Merged by sums, or by TIES' elected signs.
    """

    density: float | tuple[float, ...] = knob(0.15, low=0.0, high=1.0, per_model=True, help="share of entries kept")
    gamma: float | tuple[float, ...] = knob(0.01, low=0.0, high=1.0, per_model=True, help="share of outliers dropped")
    consensus: str = knob("linear", choices=("linear", "ties"), help="sum, or elect signs and merge what agrees")
    lambda_: float = knob(0.3, low=-100.0, high=100.0, help="scale of the merged task vector")
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    normalize: bool = knob(False, help="divide by the sum of the weights (of those that agree)")
    granularity: str = knob("tensor", choices=("tensor", "model"), help="count within each tensor or the whole model")
    rescale: str = knob("none", choices=("none", "l1"), help="l1: what is kept gets the sum of magnitudes of all")

    @property
    def scope(self) -> Literal["tensor", "model"]:
        return "model" if self.granularity == "model" else "tensor"

    @property
    def rounds(self) -> int:
        return ROUNDS + (self.rescale == "l1")

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        numel = sum(site.numel for site in sites.values())
        pairs = zip(self.each("density", models), self.each("gamma", models))
        return self._next({"bounds": [_bounds(density, gamma, numel) for density, gamma in pairs]})

    def survey(self, tile: Tile, state: State) -> Sums:
        if not is_settled(state["bounds"]):
            return survey_magnitudes(tile.deltas(), state["bounds"], tile)
        models = len(tile.deltas())
        entries = self._blend((1.0,) * models, (1.0,) * models, state)
        return survey_norms(tile, entries, lambda deltas: self._kept(deltas, tile, state))

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        if not is_settled(state["bounds"]):
            return self._next({**state, "bounds": settle_magnitudes(sums, state["bounds"])})
        return self._next({**state, "factors": restoring(sums)})

    def _next(self, state: State) -> State:
        return {**state, "done": is_settled(state["bounds"]) and (self.rescale == "none" or "factors" in state)}

    def _kept(self, deltas: Sequence[Tensor], tile: Tile, state: State) -> list[Tensor]:
        return [
            keep_largest(delta, outer, tile) - keep_largest(delta, inner, tile)
            for delta, (outer, inner) in zip(deltas, state["bounds"])
        ]

    def _factors(self, models: int, state: State) -> list[float]:
        return [w * f for w, f in zip(self.each("weight", models), state.get("factors") or [1.0] * models)]

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        weights = self.each("weight", len(tile.tensors))
        kept = self._kept([tensor.sub_(tile.base) for tensor in tile.tensors], tile, state)
        deltas = [delta.mul_(factor) for delta, factor in zip(kept, self._factors(len(kept), state))]
        return add_to_base(tile.base, combined(deltas, weights, self.consensus, self.normalize), self.lambda_)

    def blend(self, models: int, base: bool, state: State) -> Blend:
        return self._blend(self._factors(models, state), self.each("weight", models), state)

    def _blend(self, factors: Sequence[float], weights: tuple[float, ...], state: State) -> Blend:
        return together(
            factors, weights, self.consensus, self.normalize, self.lambda_,
            trims=[outer for outer, _ in state["bounds"]], outliers=[inner for _, inner in state["bounds"]],
        )  # fmt: skip


def _bounds(density: float, gamma: float, numel: int) -> list[Selection]:
    """The largest with the outliers, and the outliers."""
    if density >= 1:
        return [selection(numel, numel), selection(0, numel)]
    kept, outliers = int(density * numel), int(gamma * numel)
    outliers = min(outliers, numel - kept)
    return [selection(kept + outliers, numel), selection(outliers, numel)]
