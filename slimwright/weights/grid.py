"""Grids: number formats. A grid says which values a weight may take and how they lie on disk; a solver chooses them.

All functions work on a logical matrix ``w`` of shape (rows, columns) = (out, in) in float32. Rows are independent
unless ``row_multiple`` or ``survey`` say otherwise, so a weight of any size is handled in tiles of whole rows.

On disk a matrix becomes a few named tensors, its *parts*. The part with the empty suffix is the payload: uint8, kept
under the weight's own name with one dimension more than the dense weight, so that a program which does not know the
format stops with a size mismatch instead of loading garbage. The others have a suffix (``_scale``) and are buffers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.errors import InputError, did_you_mean
from slimwright.weights.form import Component, Form, Part

__all__ = ["Grid", "Levels", "Params", "Part", "grid_kinds", "parse_grid", "register_grid", "row_blocks"]

Params = dict[str, Tensor]
"""What ``fit`` finds for a tile: named tensors such as ``scale`` and ``zero``, every one with the rows first.

Formats that round their scales after the codes are chosen (NF4's second quantization, GGUF's legacy blocks) keep the
unrounded scale under ``exact``, which ``encode`` then uses; it is not stored, so ``unpack`` does not return it.
"""


@dataclass(frozen=True)
class Levels:
    """The values that elements may take once the parameters are fixed, for solvers that round column by column.

    Column ``j`` belongs to block ``j // block``; its values are ``step * level + offset`` with the levels of ``table``,
    or 0, 1, ..., ``top`` where that is None. A step of 0 leaves the offset as the only value.

    Attributes:
        block: columns that share a step.
        step: (rows, blocks) float32.
        offset: (rows, blocks) float32; None is 0.
        table: (levels,) float32, ascending; None for the integers 0..``top``.
        top: the largest integer level; 0 with a table.
    """

    block: int
    step: Tensor
    offset: Tensor | None = None
    table: Tensor | None = None
    top: int = 0


_BLOCK_ELEMENTS = 1 << 19
"""Elements worked on at a time, so that temporaries stay in the processor's cache."""


class Grid(Form):
    """A number format. Subclasses are frozen dataclasses registered by :func:`register_grid`."""

    key: ClassVar[str]
    """Name of the kind; the spec of most grids."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Specs that show what the kind offers (error messages, tests over the registry); empty: just the key."""
    weighted: ClassVar[bool] = False
    """Whether :meth:`fit` uses ``importance``."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The grid in writing, e.g. ``int4:g128``; :func:`parse_grid` reads it back to an equal grid."""

    @classmethod
    @abstractmethod
    def parse(cls, spec: str) -> Grid | None:
        """The grid that ``spec`` writes, or None if it is not of this kind.

        Raises:
            InputError: the spec is of this kind but a value in it is out of range.
        """

    @abstractmethod
    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """The tensors on disk for a (rows, columns) matrix, payload first."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        """Min-max parameters (or the format's own rule) for a tile.

        Args:
            w: (rows, columns) float32.
            importance: (columns,) weight of each input's squared error (diag of the Gram), where the format uses it.
            survey: what :meth:`survey` returned for the whole matrix, for grids that need it.
        """

    @abstractmethod
    def encode(self, w: Tensor, params: Params) -> Tensor:
        """Nearest codes: (rows, columns) uint8 (a plain grid: the values in its dtype)."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The values of codes: (rows, columns) float32."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Parts by suffix, with the shapes and dtypes of :meth:`parts`."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        """Inverse of :meth:`pack`, for any range of rows cut by :meth:`part_slice`."""

    @abstractmethod
    def levels(self, params: Params, columns: int) -> Levels | None:
        """The values of a matrix with these parameters, as they are read back from the file.

        None for a plain grid, which has no parameters to round with.
        """

    # -- with defaults -------------------------------------------------------------------------------------------

    def fit_block(self, columns: int) -> int:
        """Columns that :meth:`fit` treats together: fitting ranges that start at multiples of it, one by one, and
        joining their parameters along the second dimension is fitting the whole. All of them, unless a grid says less.
        """
        return columns

    def illegal(self, rows: int, columns: int) -> str | None:
        """Why this grid cannot hold a (rows, columns) matrix, or None if it can."""
        return None

    def row_multiple(self, columns: int) -> int:
        """Tiles must begin at multiples of this many rows (1 where rows are independent)."""
        return 1

    def survey(self, w: Tensor, state: Any = None) -> Any:
        """Accumulate what the grid must know of the whole matrix before any tile is fitted (None: nothing)."""
        return None

    def part_slice(self, suffix: str, rows: slice, columns: int) -> slice:
        """The range of a part's first dimension that belongs to a range of rows (with start and stop set)."""
        return rows

    def gather(self, parts: Mapping[str, Tensor], index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Values of single rows, as an embedding reads them: only the tiles that hold them are unpacked.

        Args:
            parts: tensors by suffix as they lie on disk.
            index: (n,) row numbers.
            shape: (rows, columns) of the matrix.

        Returns:
            (n, columns) float32.
        """
        columns = shape[1]
        multiple = self.row_multiple(columns)
        tiles = index if multiple == 1 else index // multiple
        cut = {}
        for suffix, part in parts.items():
            first = self.part_slice(suffix, slice(0, multiple), columns)
            second = self.part_slice(suffix, slice(multiple, 2 * multiple), columns)
            if first == second:  # one for the whole matrix
                cut[suffix] = part
                continue
            length = first.stop - first.start
            rows = (
                tiles
                if length == 1
                else (tiles[:, None] * length + torch.arange(length, device=index.device)).flatten()
            )
            # the last tile may be short: the rows beyond it repeat the last one and are never picked
            cut[suffix] = part[rows if length == 1 else rows.clamp(max=part.shape[0] - 1)]
        values = self.decode(*self.unpack(cut, columns))
        if multiple == 1:
            return values
        return values[torch.arange(index.shape[0], device=index.device) * multiple + index % multiple]

    def round(self, w: Tensor, params: Params) -> Tensor:
        """The nearest grid values: (rows, columns) float32."""
        return self.decode(self.encode(w, params), params)

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        return (Component("", self, shape),)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self.illegal(math.prod(shape[:-1]), shape[-1])

    def nbytes(self, rows: int, columns: int) -> int:
        return sum(part.nbytes for part in self.parts(rows, columns))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Honest bits: scales, zeros and padding included."""
        return 8 * self.nbytes(rows, columns) / (rows * columns)


_GRIDS: dict[str, type[Grid]] = {}


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows that cover a matrix, each of about half a million elements."""
    step = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def register_grid(cls: type[Grid]) -> type[Grid]:
    """Class decorator: makes :func:`parse_grid` know the grid."""
    _GRIDS[cls.key] = cls
    return cls


def grid_kinds() -> dict[str, type[Grid]]:
    """The registered grid classes by key."""
    return dict(_GRIDS)


def parse_grid(spec: str) -> Grid:
    """Read a grid spec such as ``int4:g128``, ``nf4``, ``q4_k``.

    Raises:
        InputError: unknown or out of range, with the nearest known names.
    """
    if not isinstance(spec, str):
        raise InputError(f"A grid is written as text such as int4:g128, not {spec!r}.")
    text = spec.strip().lower()
    for cls in _GRIDS.values():
        grid = cls.parse(text)
        if grid is not None:
            return grid
    known = [example for cls in _GRIDS.values() for example in cls.examples or (cls.key,)]
    hint = did_you_mean(text, known, 0.4)
    raise InputError(f"Unknown grid '{spec}'{hint} Known: int<2-8>[:g<N>|:row][:sym|:real], {', '.join(known)}.")
