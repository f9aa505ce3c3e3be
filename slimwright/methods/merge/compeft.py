"""ComPEFT: task vectors as signs and one number (card: compeft, #76)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.consensus import add_to_base, scaled_sum
from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.products import exact_sum
from slimwright.methods.registry import knob, register
from slimwright.methods.selection import (
    ROUNDS,
    is_settled,
    keep_largest,
    settle_magnitudes,
    share_of,
    survey_magnitudes,
)


@register("merge/compeft", paper="ComPEFT, arXiv:2311.13171")
@dataclass(frozen=True)
class ComPeft(MergeMethod):
    """Replace each task vector by the signs of its largest entries times one number; add them to the base.

    Exactly ``int(density * n)`` entries of the whole model (or of each tensor) keep their sign; the number is ``alpha``
    times the unbiased standard deviation of the task vector before pruning. Without a base the models are adapters' own
    tensors. :mod:`slimwright.formats.golomb` stores what comes out.
    """

    base_model = "optional"
    density: float | tuple[float, ...] = knob(0.2, low=0.0, high=1.0, per_model=True, help="share of entries kept")
    alpha: float | tuple[float, ...] = knob(1.0, low=0.0, high=100.0, per_model=True, help="times the deviation")
    weight: float | tuple[float, ...] = knob(1.0, low=-1e3, high=1e3, per_model=True, help="weight of each model")
    granularity: str = knob("model", choices=("model", "tensor"), help="over the whole model or each tensor")

    @property
    def scope(self) -> Literal["tensor", "model"]:
        return "model" if self.granularity == "model" else "tensor"

    @property
    def rounds(self) -> int:
        return ROUNDS + 1

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        numel = sum(site.numel for site in sites.values())
        return {"numel": numel, "top": [[share_of(density, numel)] for density in self.each("density", models)]}

    def survey(self, tile: Tile, state: State) -> Sums:
        deltas = tile.deltas()
        sums = survey_magnitudes(deltas, state["top"], tile)
        if "deviations" not in state:
            sums["sums"] = torch.stack([exact_sum(delta) for delta in deltas])
            sums["squares"] = torch.stack([exact_sum(delta.double().square()) for delta in deltas])
        return sums

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        state = dict(state)
        if "deviations" not in state:
            numel = state["numel"]
            total = torch.stack([part["sums"] for part in sums.values()]).sum(0)
            squares = torch.stack([part["squares"] for part in sums.values()]).sum(0)
            variance = (squares - total.square() / numel).clamp_(min=0) / max(1, numel - 1)
            state["deviations"] = variance.sqrt().tolist()
        top = settle_magnitudes(sums, state["top"])
        return {**state, "top": top, "done": is_settled(top)}

    def combine(self, tile: Tile, state: State) -> Tensor:
        models = len(tile.tensors)
        signs = []
        for tensor, (found,) in zip(tile.tensors, state["top"]):
            delta = tensor if tile.base is None else tensor.sub_(tile.base)
            signs.append(keep_largest(delta, found, tile).sign())
        factors = [
            weight * alpha * deviation
            for weight, alpha, deviation in zip(
                self.each("weight", models), self.each("alpha", models), state["deviations"]
            )
        ]
        change = scaled_sum(signs, factors)
        return change if tile.base is None else add_to_base(tile.base, change, 1.0)
