"""TIES: trim, elect signs, merge what agrees (card: ties, #276)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.blending import Blend, elected
from slimwright.methods.consensus import add_to_base, disjoint, elected_signs
from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.registry import knob, register
from slimwright.methods.rescaling import restoring, survey_norms
from slimwright.methods.selection import (
    ROUNDS,
    is_settled,
    keep_largest,
    settle_magnitudes,
    share_of,
    survey_magnitudes,
)


@register("merge/ties", paper="TIES-Merging, arXiv:2306.01708")
@dataclass(frozen=True)
class Ties(MergeMethod):
    """Keep the largest entries of each task vector, and of each parameter only those that agree with the elected sign.

    Trimming keeps exactly ``int(density * n)`` entries (at least one of a density above 0; of equal magnitudes the
    first), over the whole model or over each tensor. The authors' code keeps one more, and all that tie with it.
    ``majority`` decides the sign where the votes cancel: the sign that most parameters elected (the paper's), or plus.
    """

    density: float | tuple[float, ...] = knob(0.2, low=0.0, high=1.0, per_model=True, help="share of entries kept")
    lambda_: float = knob(1.0, low=-100.0, high=100.0, help="scale of the merged task vector")
    weight: float | tuple[float, ...] = knob(
        1.0, low=-1e3, high=1e3, per_model=True, help="multiplies each task vector before the election"
    )
    agg: str = knob("mean", choices=("mean", "sum", "max"), help="how what agrees is put together")
    sign_method: str = knob("mass", choices=("mass", "count"), help="election by the sum of values or of signs")
    majority: str = knob("elected", choices=("elected", "plus"), help="the sign where the votes cancel")
    granularity: str = knob("model", choices=("model", "tensor"), help="trim over the whole model or each tensor")
    rescale: str = knob("none", choices=("none", "l1"), help="l1: what is kept gets the sum of magnitudes of all")

    @property
    def scope(self) -> Literal["tensor", "model"]:
        return "model" if self.granularity == "model" else "tensor"

    @property
    def rounds(self) -> int:
        densities = self.density if isinstance(self.density, tuple) else (self.density,)
        trims = ROUNDS * any(0 < density < 1 for density in densities)
        return trims + (self.rescale == "l1") + (self.majority == "elected")

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        numel = sum(site.numel for site in sites.values())
        trim = [[share_of(density, numel)] for density in self.each("density", models)]
        return self._next({"trim": trim, "majority": 1})

    def survey(self, tile: Tile, state: State) -> Sums:
        deltas = tile.deltas()
        if not state["trimmed"]:
            return survey_magnitudes(deltas, state["trim"], tile)
        if self.rescale == "l1" and "factors" not in state:
            entries = Blend((1.0,) * len(deltas), trims=[trim[0] for trim in state["trim"]])
            return survey_norms(tile, entries, lambda vectors: self._kept(vectors, tile, state))
        votes = elected(self.blend(len(deltas), True, state), tile)
        if votes is not None:
            return {"signs": torch.tensor([votes], dtype=torch.float64)}
        signs = elected_signs(self._trimmed(list(deltas), tile, state), self.sign_method, majority=0)
        return {"signs": signs.sum(dtype=torch.float64).reshape(1)}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        if not state["trimmed"]:
            return self._next({**state, "trim": settle_magnitudes(sums, state["trim"])})
        if self.rescale == "l1" and "factors" not in state:
            return self._next({**state, "factors": restoring(sums)})
        elected = sum(float(part["signs"]) for part in sums.values())
        return {**state, "majority": -1 if elected < 0 else 1, "done": True}

    def _next(self, state: State) -> State:
        trimmed = is_settled(state["trim"])
        scaled = self.rescale == "none" or "factors" in state
        return {**state, "trimmed": trimmed, "done": trimmed and scaled and self.majority == "plus"}

    def _kept(self, deltas: list[Tensor], tile: Tile, state: State) -> list[Tensor]:
        return [keep_largest(delta, trim[0], tile) for delta, trim in zip(deltas, state["trim"])]

    def _factors(self, models: int, state: State) -> tuple[float, ...]:
        """What each trimmed task vector is multiplied by."""
        return tuple(w * f for w, f in zip(self.each("weight", models), state.get("factors") or [1.0] * models))

    def _trimmed(self, deltas: list[Tensor], tile: Tile, state: State) -> list[Tensor]:
        """The trimmed task vectors times their factors."""
        factors = self._factors(len(deltas), state)
        kept = self._kept(deltas, tile, state)
        return [delta if factor == 1 else delta.mul_(factor) for delta, factor in zip(kept, factors)]

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        deltas = self._trimmed([tensor.sub_(tile.base) for tensor in tile.tensors], tile, state)
        signs = elected_signs(deltas, self.sign_method, state["majority"])
        change = disjoint(deltas, self.each("weight", len(deltas)), signs, self.agg)
        return add_to_base(tile.base, change, self.lambda_)

    def blend(self, models: int, base: bool, state: State) -> Blend:
        how: Literal["mean", "agreeing", "max"] = "agreeing"
        if self.agg != "sum":
            how = "mean" if self.agg == "mean" else "max"
        return Blend(
            self._factors(models, state), how, self.each("weight", models), by_count=self.sign_method == "count",
            majority=state["majority"], trims=[trim[0] for trim in state["trim"]], scale=self.lambda_,
        )  # fmt: skip
