"""GPTQ: rounding column by column with error feedback (card: gptq; Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright import kernels
from slimwright.errors import InputError
from slimwright.kernels import solve
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Grid, Int, Levels, Quantized
from slimwright.weights.grid import Params
from slimwright.weights.ranges import shrink_ranges

_TILE_ELEMENTS = 1 << 24
"""Elements of the rows that are solved together."""


@register("quantize/gptq", paper="Frantar et al. 2022, GPTQ (arXiv:2210.17323)")
@dataclass(frozen=True)
class GPTQ(WeightSolver):
    """Round the columns one after the other, each time moving the columns still to come so that the layer's output
    changes least: ``tr(ΔW H ΔWᵀ)`` with H the Gram of the layer's inputs.

    The Cholesky form, exact for any ``blocksize``: with ``H + λI = R Rᵀ``, R upper triangular, the columns of a block B
    stand at ``W_B + (W - Q)_before R_before,B R_B,B⁻¹`` when their turn comes. That is the paper's update by the rows
    of ``U = R⁻¹`` with neither the inverse of H nor U itself. Two differences from the reference code: an input that
    the data never used keeps its weights, rounded as they are, instead of losing them; where the factorization fails,
    the damping doubles.

    Works on every grid with parameters. A grid's parameters come from the weight as it was (``static_groups``), or
    group by group from the columns as they have become (not with ``act_order``, whose groups would need an index that
    the format does not store).
    """

    grid: Grid = knob(Int(4, group=128), help="number format")
    damp: float = knob(0.01, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")
    act_order: bool = knob(True, help="columns by falling mean squared input instead of from left to right")
    static_groups: bool = knob(True, help="fit the grid to the weight as it was")
    clip: str = knob(
        "weighted", choices=("none", "mse", "weighted"), help="int: range of a group (weighted: by diag H)"
    )
    blocksize: int = knob(128, low=1, high=4096, help="columns of a block; changes the speed only")
    needs = ("gram",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.act_order and not self.static_groups:
            raise InputError(f"{self.name}: act_order needs static_groups: a group's columns are not solved together.")
        if self.grid.plain:
            raise InputError(f"{self.name}: {self.grid} is a plain float; use quantize/rtn for it.")

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, survey = self.checked(weight, stats)
        importance = stats.importance
        assert importance is not None
        rows, columns = weight.shape
        if importance.shape[0] != columns:
            raise InputError(f"{self.name}: the Gram is of {importance.shape[0]} inputs, the weight has {columns}.")
        order = self._order(stats)
        factor, _ = stats.factor(self.damp, order)
        static = self.static_groups or self.grid.fit_block(columns) >= columns
        params = self._fit(weight, importance, survey) if static else None
        values, found = torch.empty_like(weight), []
        step = max(256, _TILE_ELEMENTS // columns)
        for start in range(0, rows, step):
            tile = slice(start, min(start + step, rows))
            own = None if params is None else {name: value[tile] for name, value in params.items()}
            solved, own = self._solve_tile(weight[tile], factor, order, own, importance)
            values[tile] = solved
            found.append(own)
        params = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return Quantized(self.grid, self.grid.encode(values, params), params)

    def prepare(self, stats: SiteStatistics) -> None:
        if stats.gram is not None:
            stats.factor(self.damp, self._order(stats))

    def expected_gain(self, stats: SiteStatistics) -> float:
        """Errors of equal size on every column cost ``tr(H)`` where they are independent, and the squared pivots of the
        factor where each is fed back into the columns after it."""
        if stats.gram is None:
            return 1.0
        factor, damping = stats.factor(self.damp, self._order(stats))
        plain = float(stats.gram.diagonal().sum()) + damping * factor.shape[0]
        return float(factor.diagonal().square().sum()) / plain

    def _order(self, stats: SiteStatistics) -> Tensor | None:
        """(in,) the order of the columns; None is their own."""
        assert stats.importance is not None
        return torch.argsort(stats.importance, descending=True, stable=True) if self.act_order else None

    def _fit(self, weight: Tensor, importance: Tensor, survey: object = None) -> Params:
        """The grid's parameters for some columns as they are."""
        if not isinstance(self.grid, Int) or self.clip == "none":
            params = self.grid.fit(weight, importance, survey)
        else:
            weighted = importance if self.clip == "weighted" else None
            params = self.grid.from_range(*shrink_ranges(self.grid, weight, importance=weighted))
        # What is stored decides, not what a format keeps beside it until the codes are chosen.
        return {name: value for name, value in params.items() if name != "exact"}

    def _solve_tile(
        self, weight: Tensor, factor: Tensor, order: Tensor | None, params: Params | None, importance: Tensor
    ) -> tuple[Tensor, Params]:
        """Grid values (rows, columns) and the parameters of some rows; ``params`` None: fitted on the way."""
        columns = weight.shape[1]
        # Columns lie along the first dimension here, so that each is contiguous.
        target = weight.t().contiguous() if order is None else weight.t().index_select(0, order)
        rounded, error = torch.empty_like(target), torch.empty_like(target)
        positions = torch.arange(columns) if order is None else order
        group = self.grid.fit_block(columns)
        levels = None if params is None else _Columns.of(self.grid.levels(params, columns))
        found: list[Params] = []
        # A group that is fitted on the way begins a block, so that its columns are up to date.
        size = self.blocksize if params is not None else min(group, max(1, self.blocksize // group) * group)
        for first in range(0, columns, size):
            last = min(first + size, columns)
            block = target[first:last].clone()
            upper = torch.linalg.solve_triangular(factor[first:last, first:last], torch.eye(last - first), upper=True)
            if first:
                feedback = factor[:first, first:last] @ upper
                block.addmm_(feedback.t(), error[:first])
            if params is None:
                own = self._fit(block.t().contiguous(), importance[first:last])
                found.append(own)
                levels = _Columns.of(self.grid.levels(own, last - first))
                index = torch.arange(last - first) // levels.block
            else:
                assert levels is not None
                index = positions[first:last] // levels.block
            levels.round_block(block, upper, index, rounded[first:last])
            torch.sub(target[first:last], rounded[first:last], out=error[first:last])
        if order is not None:
            unordered = torch.empty_like(rounded)
            unordered[order] = rounded
            rounded = unordered
        if params is None:
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
