"""Half-quadratic quantization (card: hqq; Badri and Shaji, 2023, https://mobiusml.github.io/hqq_blog/)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Grid, Int, Quantized
from slimwright.weights.grid import Params, row_blocks

_LARGEST_ZERO = 256.0  # up to here float16 holds a zero point to an eighth of a step
_BOUND = 1024.0  # of zero points on the way


@register("quantize/hqq", paper="Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models")
@dataclass(frozen=True)
class HQQ(WeightSolver):
    """Without data: keep each group's min-max scale and move its zero point, to lower an L_p error with p < 1.

    The zero point is real on a grid with ``zero="real"``, else rounded to the grid's integers in the end. A symmetric
    grid has none and is refused. Differences from the reference code, which make rows independent of each other and of
    the weight's magnitude: each group keeps the zero point with its least mean |error| and stops by itself, when its
    zero point no longer moves; the scale's floor is float16's smallest instead of 5e-5; a group so far from 0 that
    float16 could not hold its zero point has 0 put into its range.

    ``iters=0`` is min-max rounding with that zero point.
    """

    grid: Grid = knob(Int(4, group=64, zero="real"), help="an int grid that is not symmetric")
    lp_norm: float = knob(0.7, low=0.05, high=1.0, help="p of the error's norm; 1 shrinks by a constant")
    beta: float = knob(10.0, low=1e-3, high=1e6, help="weight of the quadratic penalty at the start")
    kappa: float = knob(1.01, low=1.0, high=10.0, help="growth of beta per iteration")
    iters: int = knob(20, low=0, high=1000, help="iterations at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, Int) or self.grid.symmetric:
            raise InputError(
                f"{self.name} moves zero points; give an int grid with one, such as int4:g64:real, not {self.grid}."
            )

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, _ = self.checked(weight, stats)
        grid = self.grid
        assert isinstance(grid, Int)
        group = weight.shape[1] if grid.group is None else min(grid.group, weight.shape[1])
        whole = weight.shape[1] // group * group
        # A short last group is solved apart, so that no padded position counts.
        found = []
        for columns, size in ((slice(0, whole), group), (slice(whole, None), weight.shape[1] - whole)):
            if size:
                found.append(self._solve_groups(grid, weight[:, columns].unflatten(1, (-1, size))))
        params = {name: torch.cat([part[name] for part in found], dim=1) for name in found[0]}
        return Quantized(grid, grid.encode(weight, params), params)

    def _solve_groups(self, grid: Int, w: Tensor) -> Params:
        """Scale and zero (rows, groups) of w (rows, groups, group)."""
        rows, groups, size = w.shape
        scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
        for block in row_blocks(rows, groups * size):
            flat = w[block].reshape(-1, size)
            block_scale, block_zero = self._start(grid, flat)
            if self.iters:
                block_zero = self._descend(grid, flat, block_scale, block_zero)
            scale[block], zero[block] = block_scale.view(-1, groups), block_zero.view(-1, groups)
        if grid.zero == "integer":
            return {"scale": scale, "zero": zero.round_().clamp_(0, 2**grid.bits - 1)}
        return {"scale": scale, "zero": zero.half().float()}

    @staticmethod
    def _start(grid: Int, w: Tensor) -> tuple[Tensor, Tensor]:
        """Min-max scale, as stored, and real zero point: w (n, group) → (n, 1) twice."""
        top = 2**grid.bits - 1
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        scale = grid.stored_scale(high / top - low / top)
        far = (low / scale).abs() > _LARGEST_ZERO
        if grid.zero == "integer":  # the zero point must be a code
            far = torch.ones_like(far)
        low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
        scale = grid.stored_scale(high / top - low / top)
        return scale, (-low / scale).clamp_(-_LARGEST_ZERO, _LARGEST_ZERO)

    def _descend(self, grid: Int, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The best zero point found from ``zero``: all (n, 1), w (n, group)."""
        top = 2**grid.bits - 1
        best, best_error = zero.clone(), torch.full_like(zero, torch.inf)
        active = torch.arange(w.shape[0], device=w.device)
        units = w / scale
        beta = self.beta
        for iteration in range(self.iters + 1):  # the last only judges the last update
            code = (units + zero).round_().clamp_(0, top)
            error = (units - code).add_(zero).mul_(scale)  # w - scale * (code - zero)
            size = error.abs()
            mean = size.mean(1, keepdim=True)
            better = mean < best_error[active]
            best[active] = torch.where(better, zero, best[active])
            best_error[active] = torch.where(better, mean, best_error[active])
            if iteration == self.iters:
                break
            updated = code.sub_(units)
            if beta * float(size.max()) ** (2 - self.lp_norm) > 0.99:  # else the shrinkage leaves nothing
                shrunk = (size - size.pow(self.lp_norm - 1).div_(beta)).clamp_(min=0).copysign_(error)
                updated += shrunk.div_(scale)
            updated = updated.mean(1, keepdim=True).clamp_(-_BOUND, _BOUND)
            moved = (updated != zero).squeeze(1)
            if not moved.any():
                break
            active, zero, scale, units = active[moved], updated[moved], scale[moved], units[moved]
            beta *= self.kappa
        return best
