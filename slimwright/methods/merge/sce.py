"""SCE: select by variance, weigh by energy, erase minority signs (card: sce)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.consensus import elected_signs
from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.products import exact_sum
from slimwright.methods.registry import knob, register
from slimwright.methods.selection import (
    ROUNDS,
    is_settled,
    keep_largest,
    selection,
    settle_magnitudes,
    survey_magnitudes,
)


@register("merge/sce", paper="FuseChat, arXiv:2408.07990")
@dataclass(frozen=True)
class Sce(MergeMethod):
    """Keep the entries that vary most between models, weigh each model by its task vector's energy, merge what agrees.

    Per tensor. ``int(select_topk * m)`` entries are kept, m those whose variance is not 0 (so identical models give the
    base below 1). The elected sign is that of the unweighted sum, plus where it is 0.
    """

    select_topk: float = knob(1.0, low=0.0, high=1.0, help="share of the varying entries kept")

    @property
    def rounds(self) -> int:
        return (ROUNDS if self.select_topk < 1 else 0) + 1

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        (site,) = sites.values()
        return {"top": [[selection(site.numel, site.numel) if self.select_topk >= 1 else {}]], "numel": site.numel}

    def survey(self, tile: Tile, state: State) -> Sums:
        deltas = list(tile.deltas())
        if not is_settled(state["top"]):
            variance = _variance(deltas)
            sums = survey_magnitudes([variance], state["top"], tile)
            return {**sums, "varying": torch.count_nonzero(variance).reshape(1)}
        return {"energies": torch.stack([exact_sum(delta.square()) for delta in self._selected(deltas, tile, state)])}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        ((name, found),) = sums.items()
        if not is_settled(state["top"]):
            top = state["top"]
            if not top[0][0]:
                varying = int(found["varying"])
                top = [[selection(int(self.select_topk * varying), varying + 1)]]
            return {**state, "top": settle_magnitudes({name: found}, top)}
        energies: Tensor = found["energies"]
        total = float(energies.sum())
        models = len(energies)
        # mean(tau ** 2) as in the paper: the number of entries cancels, but for the threshold of 1e-6.
        weights = energies / total if total / state["numel"] >= 1e-6 else torch.full((models,), 1 / models)
        return {**state, "weights": weights.tolist(), "done": True}

    def _selected(self, deltas: list[Tensor], tile: Tile, state: State) -> list[Tensor]:
        """The task vectors where the variance is selected, 0 elsewhere."""
        if self.select_topk >= 1:
            return deltas
        variance = _variance(deltas)
        mask = keep_largest(variance, state["top"][0][0], tile).sign()
        return [delta.mul_(mask) for delta in deltas]

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        deltas = self._selected([tensor.sub_(tile.base) for tensor in tile.tensors], tile, state)
        signs = elected_signs(deltas)
        total = torch.zeros_like(tile.base)
        divisor = torch.zeros_like(tile.base)
        for delta, weight in zip(deltas, state["weights"]):
            agreeing = delta.mul_(signs).clamp_(min=0)
            total.add_(agreeing, alpha=weight)
            divisor.add_(agreeing.sign_(), alpha=weight)
        return total.mul_(signs).div_(divisor.clamp_(min=1e-6)).add_(tile.base)


def _variance(deltas: list[Tensor]) -> Tensor:
    """The biased variance over models, by entry."""
    mean = sum(deltas[1:], deltas[0]) / len(deltas)
    total = torch.zeros_like(mean)
    for delta in deltas:
        total.addcmul_(delta - mean, delta - mean)
    return total.div_(len(deltas))
