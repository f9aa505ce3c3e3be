"""Forms: how a weight is held. A grid is one; low-rank factors and a grid with a low-rank correction are others.

A form is made of *components*, each a matrix (or a stack of them, for experts) on one grid. ``docs/formats.md`` says
how their tensors are named on disk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from slimwright.weights.grid import Grid


@dataclass(frozen=True)
class Part:
    """One tensor on disk: its suffix after the weight's name, dtype and shape."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Component:
    """A matrix on a grid that, alone or with others, stands for a weight.

    Attributes:
        prefix: what its tensors' suffixes begin with.
        grid: the number format.
        shape: (out, in) of the matrix; (experts, out, in) for stacked experts.
        shared: whether all rows of one of the weight's matrices need all of this one: a right factor.
        widened: whether a plain payload has a dimension of 1 behind its own, so that nobody takes it for the weight.
    """

    prefix: str
    grid: Grid
    shape: tuple[int, ...]
    shared: bool = False
    widened: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns): experts are stacked along the rows."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    def parts(self) -> dict[str, Part]:
        """Its tensors on disk by the grid's own suffix.

        A packed payload has one dimension more than the matrix: (experts, out, bytes, 1) for stacked experts.
        """
        payload, *rest = self.grid.parts(*self.matrix_shape)
        tail = (*payload.shape[1:], 1) if self.widened and self.grid.plain else payload.shape[1:]
        found = {"": Part(self.prefix, payload.dtype, (*self.shape[:-1], *tail))}
        return found | {part.suffix: Part(self.prefix + part.suffix, part.dtype, part.shape) for part in rest}

    def rows_for(self, rows: slice, out: int) -> slice:
        """Its rows that rows of the weight's matrix need.

        Args:
            rows: start and stop, of the weight; where :attr:`shared`, those of whole matrices are given.
            out: rows of one of the weight's matrices.
        """
        if not self.shared:
            return rows
        own = self.shape[-2]
        return slice(rows.start // out * own, -(-rows.stop // out) * own)


class Form(ABC):
    """How a weight is held: on a grid, or as factors on grids."""

    plain: ClassVar[bool] = False
    """Whether the payload is the dense tensor itself in another dtype, which every program reads."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The form in writing; :func:`slimwright.weights.parse_form` reads it back to an equal one."""

    @abstractmethod
    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """What a weight of ``shape``, (out, in) or (experts, out, in), is made of."""

    @abstractmethod
    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why this form cannot hold a weight of ``shape``, or None if it can."""

    @abstractmethod
    def row_multiple(self, columns: int) -> int:
        """Tiles must begin at multiples of this many rows (1 where rows are independent)."""

    def parts_of(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """The tensors on disk of a weight of ``shape``, by suffix, payload first."""
        return {part.suffix: part for own in self.components(shape) for part in own.parts().values()}

    def nbytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of these tensors."""
        return sum(part.nbytes for part in self.parts_of(shape).values())

    def __str__(self) -> str:
        return self.spec
