"""Rounding column by column with error feedback: the arithmetic that GPTQ, LDLQ and decoupleQ share.

With ``H + λI = R Rᵀ``, R upper triangular, and Δ = W - Q, ``tr(Δ (H + λI) Δᵀ) = ‖Δ R‖²``: column j of ``Δ R`` depends
on no later column of Δ, so each column is rounded at ``w_j + Δ_before R_before,j / R_jj``, which makes its term as
small as one rounding can. Blocked: the columns of a block B stand at ``W_B + Δ_before R_before,B R_B,B⁻¹`` when their
turn comes, and inside the block the rows of ``R_B,B⁻¹`` carry each error on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright import kernels
from slimwright.kernels import solve
from slimwright.weights.grid import Grid, Levels, Params

_TILE_ELEMENTS = 1 << 24
"""Elements of the rows that are solved together."""

HELD_OUT_TOKENS = 512
"""Inputs that are judged at once."""

Fit = Callable[[Tensor, slice], Params]
"""Parameters for some columns (rows, n) as they have become, and which positions of the order they are."""


def round_with_feedback(
    grid: Grid,
    weight: Tensor,
    factor: Tensor,
    params: Params | Fit,
    *,
    order: Tensor | None = None,
    blocksize: int = 128,
) -> tuple[Tensor, Params]:
    """Round ``weight`` to ``grid``, column by column.

    Args:
        weight: (rows, columns) float32.
        factor: (columns, columns) float32, the upper triangular R, in ``order``.
        params: the grid's parameters; or a function that fits them to each group when its turn comes (without order).
        order: (columns,) in which the columns are rounded; None is from left to right.
        blocksize: columns of a block; changes the speed only.

    Returns:
        The grid's values (rows, columns) float32, and the parameters.
    """
    rows, columns = weight.shape
    values, found = torch.empty_like(weight), []
    step = max(256, _TILE_ELEMENTS // columns)
    for start in range(0, rows, step):
        tile = slice(start, min(start + step, rows))
        own = params if callable(params) else {name: value[tile] for name, value in params.items()}
        values[tile], fitted = _round_tile(grid, weight[tile], factor, own, order, blocksize)
        found.append(fitted)
    return values, {name: torch.cat([part[name] for part in found]) for name in found[0]}


def feedback_gain(gram: Tensor, factor: Tensor, damping: float) -> float:
    """The output error expected of rounding with feedback, relative to plain rounding's on the same grid.

    Errors of equal size on every column cost ``tr(H)`` where they are independent, and the squared pivots of the factor
    where each is fed back into the columns after it.
    """
    plain = float(gram.diagonal().sum()) + damping * factor.shape[0]
    return float(factor.diagonal().square().sum()) / plain


def held_out_gain(factor: Tensor, inputs: Tensor) -> float:
    """:func:`feedback_gain` on inputs that the factor knows nothing of.

    Errors ``e`` of equal size on every column become ``e D R⁻¹`` where the factor R, with the pivots D, feeds them
    back: on a Gram ``X Xᵀ`` of other inputs that costs ``tr(D² R⁻¹ X Xᵀ R⁻ᵀ)`` instead of ``tr(X Xᵀ)``. What feedback
    gains on the Gram that it was made of, it gains in part by fitting that Gram's noise.

    The geometric mean over pieces of the inputs: a few documents unlike all others would else decide.

    Args:
        factor: (in, in) float32.
        inputs: (tokens, in) in the factor's order, of any float dtype.
    """
    pivots, total, tokens = factor.diagonal()[:, None], 0.0, 0
    for part in inputs.split(HELD_OUT_TOKENS):
        x = part.float().t()
        plain = float(x.square().sum(dtype=torch.float64))
        left = torch.linalg.solve_triangular(factor, x, upper=True).mul_(pivots)
        if plain > 0:
            total += len(part) * math.log(float(left.square_().sum(dtype=torch.float64)) / plain)
            tokens += len(part)
    return math.exp(total / tokens) if tokens else 1.0


def _round_tile(
    grid: Grid, weight: Tensor, factor: Tensor, params: Params | Fit, order: Tensor | None, blocksize: int
) -> tuple[Tensor, Params]:
    columns = weight.shape[1]
    # Columns lie along the first dimension here, so that each is contiguous.
    target = weight.t().contiguous()
    if order is not None:
        target = target.index_select(0, order)
    rounded, error = torch.empty_like(target), torch.empty_like(target)
    positions = torch.arange(columns) if order is None else order
    group = grid.fit_block(columns)
    levels = None if callable(params) else _Columns.of(grid.levels(params, columns))
    found: list[Params] = []
    # A group that is fitted on the way begins a block, so that its columns are up to date.
    size = min(group, max(1, blocksize // group) * group) if callable(params) else blocksize
    for first in range(0, columns, size):
        last = min(first + size, columns)
        block = target[first:last].clone()
        upper = torch.linalg.solve_triangular(factor[first:last, first:last], torch.eye(last - first), upper=True)
        if first:
            feedback = factor[:first, first:last] @ upper
            block.addmm_(feedback.t(), error[:first])
        if callable(params):
            own = params(block.t().contiguous(), slice(first, last))
            found.append(own)
            levels = _Columns.of(grid.levels(own, last - first))
            index = torch.arange(last - first) // levels.block
        else:
            assert levels is not None
            index = positions[first:last] // levels.block
        levels.round_block(block, upper, index, rounded[first:last])
        torch.sub(target[first:last], rounded[first:last], out=error[first:last])
    if order is not None:
        rounded = rounded.index_select(0, order.argsort())
    if callable(params):
        params = {name: torch.cat([part[name] for part in found], dim=1) for name in found[0]}
    return rounded.t().contiguous(), params


@dataclass(frozen=True)
class _Columns:
    """A grid's levels, with the blocks first: what a block of columns is rounded to.

    Attributes: those of :class:`Levels`, ``step`` and ``offset`` transposed to (blocks, rows).
    """

    block: int
    step: Tensor
    offset: Tensor | None
    table: Tensor | None
    top: int

    @classmethod
    def of(cls, levels: Levels | None) -> _Columns:
        assert levels is not None
        offset = None if levels.offset is None else levels.offset.t().contiguous()
        return cls(levels.block, levels.step.t().contiguous(), offset, levels.table, levels.top)

    def round_block(self, block: Tensor, upper: Tensor, index: Tensor, rounded: Tensor) -> None:
        """Round the columns of ``block`` (columns, rows) one after the other into ``rounded``, each time moving those
        still to come by the rows of ``upper`` (columns, columns); column i has the levels of block ``index[i]``."""
        if kernels.available(block, rounded):
            solve.feedback(
                block, upper.contiguous(), self.step, self.offset, index, self.table, self.top, rounded
            )  # fmt: skip
            return
        blocks, pivots = index.tolist(), upper.diagonal().tolist()
        midpoints = None if self.table is None else (self.table[1:] + self.table[:-1]) / 2
        for column, current in enumerate(block):
            step = self.step[blocks[column]]
            offset = 0.0 if self.offset is None else self.offset[blocks[column]]
            unit = torch.where(step == 0, 0.0, (current - offset) / step)
            if midpoints is None:
                level = unit.round_().clamp_(0, self.top)
            else:
                assert self.table is not None
                level = self.table[torch.bucketize(unit, midpoints)]
            rounded[column] = level * step + offset
            error = (current - rounded[column]) / pivots[column]
            block[column + 1 :].addr_(upper[column, column + 1 :], error, alpha=-1)
