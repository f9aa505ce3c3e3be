"""Compressed weights as values: what a solver returns, what is saved, what a module multiplies with.

Everything outside this package works on :class:`Compressed` alone, so that new forms compose with the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.weights.form import Component, Form, Part
from slimwright.weights.grid import Grid, Params, parse_grid


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

    def matrices(self) -> tuple[Compressed, ...]:
        """What it is made of: itself, or factors and terms. Their values are what a checksum is taken of."""
        return (self,)

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for ``x`` (..., in), in x's dtype: the reference, through the dense weight. Factors are
        multiplied with one after the other, and terms added.

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


RIGHT = "_right"
LEFT = "_left"
"""What the suffixes of a right factor's tensors begin with; of a left factor's in a sum."""


@dataclass(frozen=True, eq=False)
class LowRank(Compressed):
    """``L R``.

    Args:
        left: (out, rank), or (experts, out, rank).
        right: (rank, in), or (experts, rank, in).
    """

    left: Compressed
    right: Compressed

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != len(right) or left[:-2] != right[:-2] or left[-1] != right[-2]:
            raise InputError(f"Factors of shapes {left} and {right} cannot be multiplied.")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (*self.left.shape[:-1], self.right.shape[-1])

    def dense(self) -> Tensor:
        return self.left.dense() @ self.right.dense()

    def matrices(self) -> tuple[Compressed, ...]:
        return (*self.left.matrices(), *self.right.matrices())

    def matmul(self, x: Tensor) -> Tensor:
        return self.left.matmul(self.right.matmul(x))

    def save(self) -> dict[str, Tensor]:
        """The left factor under the weight's own name; if it is not packed, with a dimension of 1 behind its own, so
        that a program which does not know the form stops with a size mismatch even where the rank is the width."""
        left = self.left.save()
        if isinstance(self.left, Dense):
            left = {"": left[""].unsqueeze(-1)}
        return left | {RIGHT + suffix: tensor for suffix, tensor in self.right.save().items()}

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def spec(self) -> dict[str, Any]:
        return {"form": "low_rank", "left": self.left.spec(), "right": self.right.spec()}


@dataclass(frozen=True, eq=False)
class Sum(Compressed):
    """A weight and its low-rank correction: their values add up."""

    base: Compressed
    correction: LowRank

    def __post_init__(self) -> None:
        if self.base.shape != self.correction.shape:
            raise InputError(f"A correction of shape {self.correction.shape} does not fit a weight {self.base.shape}.")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.base.shape

    def dense(self) -> Tensor:
        return self.base.dense() + self.correction.dense()

    def matrices(self) -> tuple[Compressed, ...]:
        return (*self.base.matrices(), *self.correction.matrices())

    def matmul(self, x: Tensor) -> Tensor:
        return self.base.matmul(x) + self.correction.matmul(x)

    def save(self) -> dict[str, Tensor]:
        correction = self.correction.save()
        return self.base.save() | {
            suffix if suffix.startswith(RIGHT) else LEFT + suffix: tensor for suffix, tensor in correction.items()
        }

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.correction.nbytes

    def spec(self) -> dict[str, Any]:
        return {"form": "sum", "base": self.base.spec(), "correction": self.correction.spec()}


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


def disk_shapes(form: Form, shape: tuple[int, ...]) -> dict[str, Part]:
    """The tensors on disk of a weight of ``shape`` in a form, by suffix.

    A packed payload has one dimension more than the weight: (experts, out, bytes, 1) for stacked experts; that of a
    plain grid is the weight's own shape in the grid's dtype. Of factors see :class:`slimwright.weights.LowRankForm`.
    """
    return form.parts_of(shape)


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


def component_parts(component: Component, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one component by its grid's own suffixes, as they would lie on disk if it were a weight.

    Args:
        parts: all tensors of the weight by suffix.
    """
    found = {suffix: parts[part.suffix] for suffix, part in component.parts().items()}
    if component.widened and component.grid.plain:
        found[""] = found[""].squeeze(-1)
    return found


def decode_component(component: Component, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
    """Values of a range of a component's matrix rows: (rows, columns) float32.

    Args:
        parts: all tensors of the weight by suffix, as they lie on disk.
        rows: any range; it is widened to where the grid's tiles begin, and cut again.
    """
    grid, (count, columns) = component.grid, component.matrix_shape
    multiple = grid.row_multiple(columns)
    first = rows.start - rows.start % multiple
    last = min(count, rows.stop + -rows.stop % multiple)
    own = component_parts(component, parts)
    values = grid.decode(*unpack_rows(grid, own, component.shape, slice(first, last)))
    return values if (first, last) == (rows.start, rows.stop) else values[rows.start - first : rows.stop - first]


def decode_rows(form: Form, parts: Mapping[str, Tensor], shape: tuple[int, ...], rows: slice) -> Tensor:
    """Values of a range of matrix rows: (rows, columns) float32.

    Args:
        parts: tensors by suffix as they lie on disk (:func:`disk_shapes`).
        shape: (out, in) or (experts, out, in); experts are stacked along the rows.
        rows: start and stop of any range.
    """
    components = form.components(shape)
    if len(components) == 1:
        return decode_component(components[0], parts, rows)
    *base, left, right = components
    products = [
        decode_component(left, parts, own) @ decode_component(right, parts, right.rows_for(own, shape[-2]))
        for own in matrix_ranges(rows, shape[-2])
    ]
    product = products[0] if len(products) == 1 else torch.cat(products)
    return product if not base else decode_component(base[0], parts, rows) + product


def matrix_ranges(rows: slice, out: int) -> Iterator[slice]:
    """Cut a range of stacked rows where one matrix of ``out`` rows ends and the next begins."""
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // out + 1) * out)
        yield slice(start, stop)
        start = stop


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
    if form == "low_rank":
        left = {key: tensor for key, tensor in tensors.items() if not key.startswith(RIGHT)}
        if spec["left"].get("form") == "dense":
            left = {"": left[""].squeeze(-1)}
        right = {key.removeprefix(RIGHT): tensor for key, tensor in tensors.items() if key.startswith(RIGHT)}
        return LowRank(load_value(left, spec["left"]), load_value(right, spec["right"]))
    if form == "sum":
        factors = {key.removeprefix(LEFT): t for key, t in tensors.items() if key.startswith((LEFT, RIGHT))}
        correction = load_value(factors, spec["correction"])
        if not isinstance(correction, LowRank):
            raise InputError("A sum's correction must be of low rank.")
        return Sum(load_value(tensors, spec["base"]), correction)
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
