"""Round to nearest (card: rtn)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Compressed, Grid, Int, quantize
from slimwright.weights.grid import row_blocks


@register("quantize/rtn", paper="folklore; range search as in GPTQ (arXiv:2210.17323), appendix")
@dataclass(frozen=True)
class RTN(WeightSolver):
    """Round each group to the nearest point of its grid, after choosing the group's range.

    ``clip`` chooses the range of ``int`` grids; the other formats define their scales themselves and are rounded by
    their own rule whatever ``clip`` says.

    - ``none``: the group's minimum and maximum.
    - ``mse``: both shrunk by the factor ``1 - i / steps``, ``i = 0 .. maxshrink * steps - 1``, that has the least
      ``sum |Q(w) - w| ** norm``; the first of equals. ``search = exhaustive`` tries every factor; ``coarse`` tries
      every eighth until two in a row are no better, then the neighbours at distance 4, 2 and 1 of the best, with the
      power computed to 1 % (squared error within 0.5 % of the exhaustive search's: docs/formats.md).
    - ``percentile``: the group's quantiles ``1 - percentile`` and ``percentile``.
    """

    grid: Grid = knob(Int(4, group=128), help="number format")
    clip: str = knob("mse", choices=("none", "mse", "percentile"), help="how the range of a group is chosen")
    search: str = knob("coarse", choices=("coarse", "exhaustive"), help="mse: which shrink factors are tried")
    steps: int = knob(100, low=2, high=1000, help="mse: factors are multiples of 1 / steps")
    maxshrink: float = knob(0.8, low=0.0, high=0.99, help="mse: shrink by less than this")
    norm: float = knob(2.4, low=0.5, high=8.0, help="mse: power of the error")
    percentile: float = knob(0.999, low=0.5, high=1.0, help="percentile: the upper quantile")

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Compressed:
        weight, survey = self.checked(weight, stats)
        if not isinstance(self.grid, Int) or self.clip == "none":
            return quantize(self.grid, weight, self.grid.fit(weight, stats.importance, survey))
        low, high = self.grid.extent(weight)
        # A short last group is searched apart, so that no padded position counts.
        group = weight.shape[1] if self.grid.group is None else min(self.grid.group, weight.shape[1])
        whole = weight.shape[1] // group * group
        for columns, size in ((slice(0, whole), group), (slice(whole, None), weight.shape[1] - whole)):
            if not size:
                continue
            groups = slice(columns.start // group, -(-whole // group) if columns.stop else None)
            for rows in row_blocks(weight.shape[0], weight.shape[1]):
                part = weight[rows, columns].unflatten(1, (-1, size))
                bounds = low[rows, groups], high[rows, groups]
                if self.clip == "mse":
                    shrink = self._search(self.grid, part, *bounds)
                    bounds = bounds[0] * shrink, bounds[1] * shrink
                else:
                    quantiles = torch.tensor([1 - self.percentile, self.percentile], device=weight.device)
                    least, most = torch.quantile(part, quantiles, dim=2)
                    bounds = least.clamp_(max=0), most.clamp_(min=0)
                low[rows, groups], high[rows, groups] = bounds
        return quantize(self.grid, weight, self.grid.from_range(low, high))

    def _search(self, grid: Int, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The best shrink factor of each group: w (rows, groups, group) → (rows, groups)."""
        last = max(1, round(self.maxshrink * self.steps)) - 1
        best_error = torch.full_like(low, torch.inf)
        best = torch.zeros_like(low)
        workspace = torch.empty_like(w), torch.empty_like(w)

        def trial(index: Tensor, open_groups: Tensor | None = None) -> Tensor:
            """Which groups are better with the factors ``1 - index / steps``."""
            nonlocal best, best_error
            shrink = 1 - index / self.steps
            error = self._error(grid, w, low * shrink, high * shrink, workspace)
            # Of equals the first wins, also where a neighbour is tried after its successor.
            better = (error < best_error) | ((error == best_error) & (index < best))
            if open_groups is not None:
                better &= open_groups
            best_error, best = torch.where(better, error, best_error), torch.where(better, index, best)
            return better

        if self.search == "exhaustive":
            for index in range(last + 1):
                trial(torch.full_like(low, index))
            return 1 - best / self.steps
        stride = 8
        misses = torch.zeros_like(low)
        for index in range(0, last + 1, stride):
            better = trial(torch.full_like(low, index), misses < 2)
            misses = torch.where(better, 0.0, misses + 1)
            if (misses >= 2).all():
                break
        while stride > 1:
            stride //= 2
            centre = best
            trial((centre - stride).clamp_(min=0))
            trial((centre + stride).clamp_(max=last))
        return 1 - best / self.steps

    def _error(self, grid: Int, w: Tensor, low: Tensor, high: Tensor, workspace: tuple[Tensor, Tensor]) -> Tensor:
        """``sum |Q(w) - w| ** norm`` over each group: (rows, groups) float32."""
        params = grid.from_range(low, high)
        scaled, code = workspace
        torch.div(w, params["scale"].unsqueeze(2), out=scaled)
        scaled += grid.zero_of(params)
        torch.round(scaled, out=code)
        scaled -= code.clamp_(0, 2**grid.bits - 1)  # the error in steps of the scale
        if self.norm == 2:
            power = scaled.square_()
        elif self.search == "exhaustive":
            power = scaled.abs_().pow_(self.norm)
        else:
            power = _power(scaled.abs_(), self.norm, code)
        return power.sum(2).mul_(params["scale"] ** self.norm)


def _power(x: Tensor, norm: float, workspace: Tensor) -> Tensor:
    """``x ** norm`` within 6 % at each and 1 % on average, for float32 x >= 0, in x's memory; five times as fast as
    ``pow``.

    The bits of a positive float, read as an integer, are 2**23 times its exponent plus mantissa: nearly a logarithm,
    so that scaling them scales the logarithm.
    """
    bits = x.view(torch.int32)
    workspace.copy_(bits)
    torch.add(torch.tensor((1 - norm) * (127 << 23), device=x.device), workspace, alpha=norm, out=workspace)
    bits.copy_(workspace.clamp_(min=0, max=float(0x7F000000)))
    return x
