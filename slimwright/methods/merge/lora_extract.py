"""LoRA extraction: a fine-tune as a low-rank change of its base (card: lora-extract)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.merging import MergeMethod, State, Tile
from slimwright.methods.registry import knob, register


@register("merge/lora_extract", paper="truncated SVD (Eckart and Young 1936); for fine-tunes, mergekit")
@dataclass(frozen=True)
class LoraExtract(MergeMethod):
    """Keep of each matrix's change its largest singular directions: ``base + up @ down``.

    The rank is at most ``max_rank``, no larger than the number of singular values above ``sv_epsilon``, and than what
    holds the share ``energy`` of their squares. What is no matrix changes whole. A recipe with this method writes an
    adapter (PEFT's format) instead of a model.
    """

    fewest = most = 1
    max_rank: int = knob(128, low=1, high=100_000, help="rank at most")
    sv_epsilon: float = knob(0.0, low=0.0, high=1e6, help="singular values up to this are dropped")
    energy: float = knob(1.0, low=0.0, high=1.0, help="share of the squared singular values that suffices")
    distribute_scale: bool = knob(True, help="put the roots of the singular values into both factors")

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        return "tensor"

    def factors(self, weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """The change of a matrix (out, in) as ``up`` (out, r) and ``down`` (r, in), float32; r is 0 for no change."""
        u, s, vh = torch.linalg.svd(weight.float() - base.float(), full_matrices=False)
        rank = min(self.max_rank, int((s > self.sv_epsilon).sum()))
        if self.energy < 1 and rank:
            squares = s.double().square().cumsum(0)
            rank = min(rank, int(torch.searchsorted(squares, self.energy * squares[-1])) + 1)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        if self.distribute_scale:
            root = s.sqrt()
            return u * root, root[:, None] * vh
        return u, s[:, None] * vh

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        (weight,) = tile.tensors
        if weight.ndim != 2:
            return weight
        up, down = self.factors(weight, tile.base)
        return tile.base + (up @ down).to(tile.base.dtype)
