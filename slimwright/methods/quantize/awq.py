"""AWQ's clip search and group rounding (card: awq, steps 4 and 5); its scale search is ``fold/awq``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Grid, Int, Quantized
from slimwright.weights.ranges import whole_groups

_TILE_ELEMENTS = 1 << 22
"""Elements of the rows that are searched together."""


@register("quantize/awq", paper="Lin et al. 2023, AWQ (arXiv:2306.00978); clip search of its code")
@dataclass(frozen=True)
class AWQClip(WeightSolver):
    """Round to nearest after clipping each group at the fraction of its largest weight that costs the output least.

    Tried are ``1 - i / n_grid`` for ``i = 0 .. max_shrink * n_grid - 1``, the first of equals. A group's cost is
    ``δ H_g δᵀ`` with H_g its own block of the Gram: the squared error of the group's part of the output over all
    tokens, where the reference code samples 512 of them. q and k, whose errors meet in a product, are not clipped. A
    model is scaled by ``fold/awq`` first.
    """

    grid: Grid = knob(Int(4, group=128), help="an int grid")
    n_grid: int = knob(20, low=1, high=1000, help="fractions are multiples of 1 / n_grid")
    max_shrink: float = knob(0.5, low=0.0, high=0.99, help="clip by less than this")
    needs = ("gram",)
    before = ("fold/awq",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, Int):
            raise InputError(f"{self.name} chooses ranges; give an int grid, not {self.grid}.")

    def for_role(self, role: str) -> AWQClip:
        return replace(self, max_shrink=0.0) if role in ("q", "k", "qkv") else self

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, _ = self.checked(weight, stats)
        grid = self.grid
        assert isinstance(grid, Int) and stats.gram is not None
        low, high = grid.extent(weight)
        for columns, groups, size in whole_groups(grid, weight.shape[1]):
            blocks = stats.gram[columns, columns].unflatten(0, (-1, size)).unflatten(2, (-1, size))
            blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # (groups, size, size)
            step = max(1, _TILE_ELEMENTS // (columns.stop - columns.start))
            for start in range(0, weight.shape[0], step):
                rows = slice(start, start + step)
                found = self._search(grid, weight[rows, columns], low[rows, groups], high[rows, groups], blocks)
                low[rows, groups], high[rows, groups] = found
        params = grid.from_range(low, high)
        return Quantized(grid, grid.encode(weight, params), params)

    def _search(self, grid: Int, w: Tensor, low: Tensor, high: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The best bounds (rows, groups) of whole groups: w (rows, groups · size)."""
        groups, size = blocks.shape[:2]
        largest = torch.maximum(-low, high)
        best_error = torch.full_like(low, torch.inf)
        best_low, best_high = low, high
        w = w.contiguous()
        part = Int(grid.bits, None if groups == 1 else size, grid.symmetric, grid.zero)
        for index in range(max(1, round(self.max_shrink * self.n_grid))):
            bound = largest * (1 - index / self.n_grid)
            trial_low, trial_high = torch.maximum(low, -bound), torch.minimum(high, bound)
            delta = part.round(w, part.from_range(trial_low, trial_high)).sub_(w).unflatten(1, (groups, size))
            error = (torch.einsum("rgi,gij->rgj", delta, blocks) * delta).sum(2)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_low, best_high = torch.where(better, trial_low, best_low), torch.where(better, trial_high, best_high)
        return best_low, best_high
