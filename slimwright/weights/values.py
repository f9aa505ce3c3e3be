"""Compressed weights as values: what a solver returns, what is saved, what a module multiplies with.

Everything outside this package works on :class:`Compressed` alone, so that new forms compose with the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimwright.errors import InputError
from slimwright.weights.grid import Grid, Params, Part, parse_grid


class Compressed(ABC):
    """A weight of shape (out, in) or, for stacked experts, (experts, out, in)."""

    shape: tuple[int, ...]

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight it stands for, float32, of :attr:`shape`."""

    @abstractmethod
    def save(self) -> dict[str, Tensor]:
        """Named tensors by suffix: what goes on disk after the weight's name."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors that :meth:`save` returns; parts shared with another value count once, there."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """What :func:`load_value` needs beside the tensors (JSON values)."""

    @property
    def bits_per_weight(self) -> float:
        """Honest bits per weight, scales and padding included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` (..., in), in x's dtype: the reference, through the dense weight.

        Stacked experts take ``x`` of shape (experts, tokens, in).
        """
        weight = self.dense().to(x.dtype)
        return x @ weight.transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Dense(Compressed):
    """A plain tensor, in the dtype it is stored in."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self.weight.shape)

    def dense(self) -> Tensor:
        return self.weight.float()

    def save(self) -> dict[str, Tensor]:
        return {"": self.weight}

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def spec(self) -> dict[str, Any]:
        return {"form": "dense"}


@dataclass(frozen=True, eq=False)
class Quantized(Compressed):
    """Codes on a grid.

    Args:
        grid: the number format.
        codes: (rows, columns), as the grid's ``encode`` gives them; rows are experts × out for stacked experts.
        params: the grid's parameters, rows first.
        shape: the weight's shape; None is that of ``codes``.
    """

    grid: Grid
    codes: Tensor
    params: Params
    shape: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", tuple(self.codes.shape))
        if math.prod(self.shape) != self.codes.numel() or self.shape[-1] != self.codes.shape[1]:
            raise InputError(f"Codes of shape {tuple(self.codes.shape)} cannot stand for a weight of {self.shape}.")

    def dense(self) -> Tensor:
        return self.grid.decode(self.codes, self.params).reshape(self.shape)

    def save(self) -> dict[str, Tensor]:
        parts = self.grid.pack(self.codes, self.params)
        shapes = disk_shapes(self.grid, self.shape)
        return {suffix: part.reshape(shapes[suffix].shape) for suffix, part in parts.items()}

    @property
    def nbytes(self) -> int:
        return self.grid.nbytes(*self.codes.shape)

    def spec(self) -> dict[str, Any]:
        return {"form": "quantized", "grid": self.grid.spec, "shape": list(self.shape)}


@dataclass(frozen=True, eq=False)
class Shared(Compressed):
    """Another value under a second name (a tied head, a repeated block): owns no bytes.

    Args:
        key: disk name of the weight that owns the tensors.
        value: that weight.
    """

    key: str
    value: Compressed

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.value.shape

    def dense(self) -> Tensor:
        return self.value.dense()

    def save(self) -> dict[str, Tensor]:
        return {}

    @property
    def nbytes(self) -> int:
        return 0

    def spec(self) -> dict[str, Any]:
        return {"form": "shared", "key": self.key}


def quantize(grid: Grid, w: Tensor, params: Params, shape: tuple[int, ...] = ()) -> Compressed:
    """The value that rounding a matrix ``w`` (rows, columns) with ``params`` gives.

    Args:
        shape: the weight's shape where rows are stacked experts; empty is that of ``w``.

    Returns:
        :class:`Quantized`, or :class:`Dense` on a plain grid (``bf16``, ``fp16``).
    """
    codes = grid.encode(w, params)
    return Dense(codes.reshape(shape or codes.shape)) if grid.plain else Quantized(grid, codes, params, shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of the logical matrix of a weight: experts are stacked along the rows."""
    return math.prod(shape[:-1]), shape[-1]


def disk_shapes(grid: Grid, shape: tuple[int, ...]) -> dict[str, Part]:
    """The tensors on disk of a weight of ``shape`` on ``grid``, by suffix.

    The payload has one dimension more than the weight: (experts, out, bytes, 1) for stacked experts; a plain grid's
    payload is the weight's own shape in the grid's dtype.
    """
    payload, *rest = grid.parts(*matrix_shape(shape))
    found = {"": Part("", payload.dtype, (*shape[:-1], *payload.shape[1:]))}
    found.update({part.suffix: part for part in rest})
    return found


def unpack_rows(
    grid: Grid, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: slice | None = None
) -> tuple[Tensor, Params]:
    """Codes and parameters of a range of matrix rows, read from tensors as they lie on disk.

    Args:
        parts: tensors by suffix, of :func:`disk_shapes`.
        shape: the weight's shape.
        rows: start and stop, start a multiple of the grid's ``row_multiple``; None is all rows.
    """
    count, columns = matrix_shape(shape)
    rows = slice(0, count) if rows is None else slice(*rows.indices(count)[:2])
    cut = {}
    for suffix, part in parts.items():
        flat = part.reshape(count, *part.shape[len(shape) - 1 :]) if suffix == "" else part
        cut[suffix] = flat[grid.part_slice(suffix, rows, columns)]
    return grid.unpack(cut, columns)


def load_value(tensors: Mapping[str, Tensor], spec: Mapping[str, Any], shared: Compressed | None = None) -> Compressed:
    """Inverse of ``save`` and ``spec``.

    Raises:
        InputError: an unknown form, a missing tensor, or one of another shape or dtype than the spec says.
    """
    form = spec.get("form")
    if form == "dense":
        return Dense(tensors[""])
    if form == "shared":
        if shared is None:
            raise InputError(f"The weight shared under '{spec.get('key')}' was not given.")
        return Shared(str(spec["key"]), shared)
    if form != "quantized":
        raise InputError(f"Unknown form of a compressed weight: {form!r}; a newer version of slimwright may read it.")
    grid, shape = parse_grid(str(spec["grid"])), tuple(int(size) for size in spec["shape"])
    for suffix, part in disk_shapes(grid, shape).items():
        tensor = tensors.get(suffix)
        if tensor is None:
            raise InputError(f"The tensor '{suffix or 'payload'}' of a {grid} weight is missing.")
        if tuple(tensor.shape) != part.shape or tensor.dtype != part.dtype:
            raise InputError(
                f"The tensor '{suffix or 'payload'}' of a {grid} weight is {tensor.dtype} {tuple(tensor.shape)}, "
                f"but {part.dtype} {part.shape} belongs there."
            )
    codes, params = unpack_rows(grid, tensors, shape)
    return Quantized(grid, codes, params, shape)
