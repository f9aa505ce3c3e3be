"""LiNeS: scale a task vector by depth (card: lines, #249)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.merging import MergeSite, State, Sums, Tile
from slimwright.methods.products import exact_sum
from slimwright.methods.registry import knob, register
from slimwright.methods.wrapping import WrappingMethod


@register("merge/lines", paper="LiNeS, arXiv:2410.17146")
@dataclass(frozen=True)
class LiNeS(WrappingMethod):
    """Merge with another method, then scale its change by ``alpha + beta * depth``, depth 0 .. 1 over the blocks.

    Shallow layers so stay near the base. What lies outside the blocks gets ``alpha``. ``alpha = none`` is the paper's
    for several tasks: the size (sum of magnitudes) of the plain sum of task vectors over that of the merged one,
    divided by the number of tasks. For one model and retention g, alpha = g and beta = 1 - g.
    """

    inner: str = knob("task_arithmetic;lambda=1", help="the method that merges")
    alpha: float | None = knob(None, low=-10.0, high=10.0, help="scale at the first block; none: from the sizes")
    beta: float = knob(0.5, low=-10.0, high=10.0, help="what is added up to the last block")

    @property
    def scope(self) -> Literal["tensor", "model"]:
        return "model" if self.alpha is None else self.merger.scope

    @property
    def rounds(self) -> int:
        return self.merger.rounds + (self.alpha is None)

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        if self.alpha is not None:
            return {"inner": {"": super().begin(models, sites)}, "alpha": self.alpha, "models": models}
        if self.merger.scope == "model":
            inner = {"": super().begin(models, sites)}
        else:
            inner = {name: super(LiNeS, self).begin(models, {name: site}) for name, site in sites.items()}
        return {"inner": inner, "models": models, "round": 0}

    def _inner(self, state: State, name: str) -> State:
        inner: dict[str, State] = state["inner"]
        return inner[name] if name in inner else inner[""]

    def _surveys_inner(self, state: State) -> bool:
        return state.get("round", 0) < self.merger.rounds and not all(s.get("done") for s in state["inner"].values())

    def survey(self, tile: Tile, state: State) -> Sums:
        inner = self._inner(state, tile.site.name)
        if self.alpha is not None:
            return super().survey(tile, inner)
        if self._surveys_inner(state):
            return {} if inner.get("done") else super().survey(tile, inner)
        deltas = tile.deltas()
        plain = exact_sum(sum(deltas[1:], deltas[0]).abs())
        return {"sizes": torch.stack([plain, exact_sum(self.merged_vector(tile, inner).abs())])}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        if self.alpha is not None or (self._surveys_inner(state) and self.merger.scope == "model"):
            inner = {"": super().settle(sums, state["inner"][""])}
            done = self.alpha is not None and bool(inner[""].get("done"))
            return {**state, "inner": inner, "round": state.get("round", 0) + 1, "done": done}
        if self._surveys_inner(state):
            inner = {
                name: own if own.get("done") else super(LiNeS, self).settle({name: sums[name]}, own)
                for name, own in state["inner"].items()
            }
            return {**state, "inner": inner, "round": state["round"] + 1}
        plain, merged = torch.stack([part["sizes"] for part in sums.values()]).sum(0).tolist()
        return {**state, "alpha": plain / merged / state["models"] if merged > 0 else 1.0, "done": True}

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        inner = self._inner(state, tile.site.name)
        site = tile.site
        depth = 0.0 if site.block is None or site.blocks < 2 else site.block / (site.blocks - 1)
        scale = state["alpha"] + (0.0 if site.block is None else self.beta * depth)
        return self.merged_vector(tile, inner).mul_(scale).add_(tile.base)
