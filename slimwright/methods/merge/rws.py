"""Robust weight signatures (card: rws, #261)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.products import dot_products
from slimwright.methods.registry import knob, register


@register("merge/rws", paper="Robust Weight Signatures, arXiv:2302.12480")
@dataclass(frozen=True)
class RobustWeightSignatures(MergeMethod):
    """Add to a clean model what makes others robust: the part of their change that is orthogonal to its own.

    The base is the pretrained model, the first model the clean one (the target), every other one trained on a
    corruption. Per tensor ``rws = d_c - (<d_c, d_s> / <d_s, d_s>) d_s`` of the task vectors, added ``alpha / number``
    times each. Only the first ``keep_num`` layers change (0: all); what lies outside the layers keeps the target's
    values then.
    """

    fewest = 2
    alpha: float = knob(1.0, low=-10.0, high=10.0, help="strength; negative takes a patch off")
    keep_num: int = knob(7, low=0, high=100_000, help="how many of the first layers change; 0: all, and the rest too")

    @property
    def rounds(self) -> int:
        return 1

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        (site,) = sites.values()
        changes = self.keep_num == 0 or (site.block is not None and site.block < self.keep_num)
        return {"changes": changes, "done": not changes}

    def survey(self, tile: Tile, state: State) -> Sums:
        return {"dots": dot_products(tile.deltas())}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        dots = found["dots"][0].tolist()
        return {**state, "shares": [dot / dots[0] if dots[0] > 0 else 0.0 for dot in dots[1:]]}

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        target, *robust = tile.tensors
        if not state["changes"]:
            return target
        own = target - tile.base
        for tensor, share in zip(robust, state["shares"]):
            signature = tensor.sub_(tile.base).sub_(own, alpha=share)
            target.add_(signature, alpha=self.alpha / len(robust))
        return target
