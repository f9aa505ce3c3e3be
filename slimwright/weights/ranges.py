"""Choosing the range that each group of an integer grid covers (card: rtn, step 6): shared by the solvers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimwright import kernels
from slimwright.kernels import solve
from slimwright.weights.grid import Grid, Params, row_blocks
from slimwright.weights.integer import Int


def whole_groups(grid: Int, columns: int) -> Iterator[tuple[slice, slice, int]]:
    """(columns, groups, size of a group) of the full groups, then of a short last one: no padded position counts."""
    group = columns if grid.group is None else min(grid.group, columns)
    whole = columns // group * group
    for part, size in ((slice(0, whole), group), (slice(whole, columns), columns - whole)):
        if size:
            yield part, slice(part.start // group, -(-part.stop // group)), size


def shrink_ranges(
    grid: Int,
    w: Tensor,
    *,
    steps: int = 100,
    maxshrink: float = 0.8,
    norm: float = 2.4,
    exhaustive: bool = False,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Least and largest weight of each group, both shrunk by the factor with the least ``sum importance * |Q(w) - w| **
    norm``, the first of equals, out of ``1 - i / steps``, ``i = 0 .. maxshrink * steps - 1``.

    Without ``exhaustive`` every eighth factor is tried until two in a row are no better, then the neighbours at
    distance 4, 2 and 1 of the best, with the power computed to 1 %.

    Args:
        w: (rows, columns) float32.
        importance: (columns,) weight of each column's error; None is 1.

    Returns:
        (rows, groups) float32, twice.
    """
    low, high = grid.extent(w)
    last = max(1, round(maxshrink * steps)) - 1
    if kernels.available(w) and w.dtype == torch.float32 and not exhaustive:
        kind = 1 if grid.symmetric else 0 if grid.zero == "integer" else 2
        solve.shrink_ranges(
            w, grid.group or w.shape[1], grid.bits, kind, low, high, steps=steps, last=last, norm=norm,
            importance=None if importance is None else importance.float().contiguous(),
        )  # fmt: skip
        return low, high
    for columns, groups, size in whole_groups(grid, w.shape[1]):
        weight = None if importance is None else importance[columns].float().view(1, -1, size)
        for rows in row_blocks(w.shape[0], columns.stop - columns.start):
            part = w[rows, columns].unflatten(1, (-1, size))
            bounds = low[rows, groups], high[rows, groups]
            shrink = _search(grid, part, *bounds, steps, last, norm, exhaustive, weight)
            low[rows, groups], high[rows, groups] = bounds[0] * shrink, bounds[1] * shrink
    return low, high


def fit_params(grid: Grid, w: Tensor, clip: str, importance: Tensor | None = None, survey: Any = None) -> Params:
    """The parameters that a solver starts from, as they are stored.

    Args:
        w: (rows, columns) float32.
        clip: ``int`` grids: ``none`` the groups' minimum and maximum, ``mse`` both shrunk (:func:`shrink_ranges`),
            ``weighted`` so that the error weighted by ``importance`` is least. Other grids have their own rule.
        importance: (columns,) diagonal of the Gram.
        survey: what the grid's ``survey`` found.
    """
    if not isinstance(grid, Int) or clip == "none":
        params = grid.fit(w, importance, survey)
    else:
        params = grid.from_range(*shrink_ranges(grid, w, importance=importance if clip == "weighted" else None))
    # What is stored decides, not what a format keeps beside it until the codes are chosen.
    return {name: value for name, value in params.items() if name != "exact"}


def _search(
    grid: Int,
    w: Tensor,
    low: Tensor,
    high: Tensor,
    steps: int,
    last: int,
    norm: float,
    exhaustive: bool,
    weight: Tensor | None,
) -> Tensor:
    """The best shrink factor of each group: w (rows, groups, group) → (rows, groups)."""
    best_error = torch.full_like(low, torch.inf)
    best = torch.zeros_like(low)
    workspace = torch.empty_like(w), torch.empty_like(w)

    def trial(index: Tensor, open_groups: Tensor | None = None) -> Tensor:
        """Which groups are better with the factors ``1 - index / steps``."""
        nonlocal best, best_error
        shrink = 1 - index / steps
        error = _error(grid, w, low * shrink, high * shrink, norm, exhaustive, weight, workspace)
        # Of equals the first wins, also where a neighbour is tried after its successor.
        better = (error < best_error) | ((error == best_error) & (index < best))
        if open_groups is not None:
            better &= open_groups
        best_error, best = torch.where(better, error, best_error), torch.where(better, index, best)
        return better

    if exhaustive:
        for index in range(last + 1):
            trial(torch.full_like(low, index))
        return 1 - best / steps
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
    return 1 - best / steps


def _error(
    grid: Int,
    w: Tensor,
    low: Tensor,
    high: Tensor,
    norm: float,
    exact: bool,
    weight: Tensor | None,
    workspace: tuple[Tensor, Tensor],
) -> Tensor:
    """``sum weight * |Q(w) - w| ** norm`` over each group: (rows, groups) float32."""
    params = grid.from_range(low, high)
    scaled, code = workspace
    torch.div(w, params["scale"].unsqueeze(2), out=scaled)
    scaled += grid.zero_of(params)
    torch.round(scaled, out=code)
    scaled -= code.clamp_(0, 2**grid.bits - 1)  # the error in steps of the scale
    if norm == 2:
        power = scaled.square_()
    elif exact:
        power = scaled.abs_().pow_(norm)
    else:
        power = _power(scaled.abs_(), norm, code)
    if weight is not None:
        power *= weight
    return power.sum(2).mul_(params["scale"] ** norm)


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
