"""RAM: what one task alone changed stays whole, what several changed is averaged (no card: mergekit's definition)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.registry import knob, register


@register("merge/ram", paper="Reinforced Agent Merging, arXiv:2601.13572; mergekit's definition")
@dataclass(frozen=True)
class Ram(MergeMethod):
    """Add to the base the entries that one model alone changed, and of those that several changed their mean.

    An entry is changed by more than ``epsilon``. With ``r`` above 0 (RAM+, by tensor) the entries that model t alone
    changed are multiplied by ``1 + r * min(shared / own, alpha)``: ``own`` of its entries only it changed, ``shared``
    others changed too.
    """

    epsilon: float = knob(1e-5, low=0.0, high=1.0, help="changes up to this are none")
    r: float = knob(0.0, low=0.0, high=100.0, help="how much a model's own entries make up for its shared ones")
    alpha: float = knob(0.2, low=0.0, high=100.0, help="largest share that counts")

    @property
    def rounds(self) -> int:
        return int(self.r > 0)

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        return {"factors": [1.0] * models}

    def survey(self, tile: Tile, state: State) -> Sums:
        changed, count = self._changed(tile.deltas())
        shared = torch.stack([own.mul(count > 1).sum(dtype=torch.float64) for own in changed])
        return {"changed": torch.stack([own.sum(dtype=torch.float64) for own in changed]), "shared": shared}

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        (found,) = sums.values()
        pairs = zip(found["shared"].tolist(), (found["changed"] - found["shared"]).tolist())
        # Where a model has no entry of its own the factor does not matter, so that none of them is divided by zero.
        return {"factors": [1 + self.r * min(shared / max(own, 1.0), self.alpha) for shared, own in pairs]}

    def _changed(self, deltas: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """1 where each model changed an entry, else 0; and how many did."""
        changed = [(delta.abs() > self.epsilon).to(delta.dtype) for delta in deltas]
        return changed, torch.stack(changed).sum(0)

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        deltas = [tensor.sub_(tile.base) for tensor in tile.tensors]
        changed, count = self._changed(deltas)
        alone, divisor = count < 2, count.clamp(min=1)
        total = torch.zeros_like(tile.base)
        for delta, own, factor in zip(deltas, changed, state["factors"]):
            delta.mul_(own)
            total.add_(torch.where(alone, delta * factor, delta / divisor))
        return total.add_(tile.base)
