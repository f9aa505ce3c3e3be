"""The functions of solve.cpp on tensors. All need :func:`slimwright.kernels.available`; only dtypes are checked."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from slimwright.kernels import library, pointer

_long, _float = ctypes.c_int64, ctypes.c_float


def _call(name: str, *arguments: Any) -> None:
    loaded = library()
    assert loaded is not None
    getattr(loaded, f"slimwright_{name}")(*arguments)


def extent(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Least and largest weight of each group of columns, 0 included: (rows, groups) twice."""
    groups = -(-w.shape[1] // group)
    low, high = torch.empty(w.shape[0], groups), torch.empty(w.shape[0], groups)
    _call("extent", pointer(w), _long(w.shape[0]), _long(w.shape[1]), _long(group), pointer(low), pointer(high))
    return low, high


def shrink_ranges(
    w: Tensor,
    group: int,
    bits: int,
    kind: int,
    low: Tensor,
    high: Tensor,
    *,
    steps: int,
    last: int,
    norm: float,
    importance: Tensor | None,
) -> None:
    """Shrink ``low`` and ``high`` (rows, groups) in place: :func:`slimwright.weights.ranges.shrink_ranges`.

    Args:
        kind: 0 integer zero point, 1 symmetric, 2 real zero point.
        last: index of the last factor tried.
    """
    _call(
        "shrink_ranges", pointer(w), _long(w.shape[0]), _long(w.shape[1]), _long(group), bits, kind, steps, last,
        _float(norm), pointer(importance), pointer(low), pointer(high),
    )  # fmt: skip


def int_encode(
    w: Tensor, group: int, bits: int, scale: Tensor, zero: Tensor | None, middle: float, shifted: bool
) -> Tensor:
    """Codes (rows, columns) uint8 of an integer grid.

    Args:
        zero: (rows, groups); None is ``middle`` everywhere.
        shifted: the zero point is added before rounding, not after.
    """
    codes = torch.empty(w.shape, dtype=torch.uint8)
    _call(
        "int_encode", pointer(w), _long(w.shape[0]), _long(w.shape[1]), _long(group), bits, pointer(scale),
        pointer(zero), _float(middle), int(shifted), pointer(codes, torch.uint8),
    )  # fmt: skip
    return codes


def int_decode(codes: Tensor, group: int, scale: Tensor, zero: Tensor | None, middle: float) -> Tensor:
    """Values (rows, columns) float32 of codes on an integer grid."""
    values = torch.empty(codes.shape)
    _call(
        "int_decode", pointer(codes, torch.uint8), _long(codes.shape[0]), _long(codes.shape[1]), _long(group),
        pointer(scale), pointer(zero), _float(middle), pointer(values),
    )  # fmt: skip
    return values


def pack(codes: Tensor, bits: int) -> Tensor:
    """:func:`slimwright.weights.packing.pack_codes`."""
    rows, columns = codes.shape
    packed = torch.empty(rows, (columns + 7) // 8 * bits, dtype=torch.uint8)
    _call("pack", pointer(codes, torch.uint8), _long(rows), _long(columns), bits, pointer(packed, torch.uint8))
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """:func:`slimwright.weights.packing.unpack_codes`."""
    codes = torch.empty(packed.shape[0], columns, dtype=torch.uint8)
    _call(
        "unpack", pointer(packed, torch.uint8), _long(packed.shape[0]), _long(columns), bits, _long(packed.shape[1]),
        pointer(codes, torch.uint8),
    )  # fmt: skip
    return codes


def squared_error(source: Tensor, written: Tensor) -> tuple[float, float]:
    """Sums of ``(written - source)²`` and of ``source²``, in double."""
    sums = torch.empty(2, dtype=torch.float64)
    _call("squared_error", pointer(source), pointer(written), _long(source.numel()), pointer(sums, torch.float64))
    error, norm = sums.tolist()
    return error, norm


def feedback(
    block: Tensor,
    upper: Tensor,
    step: Tensor,
    offset: Tensor | None,
    index: Tensor,
    table: Tensor | None,
    top: int,
    rounded: Tensor,
) -> None:
    """One block of GPTQ, in place: rounds the columns of ``block`` one by one into ``rounded`` with error feedback.

    Args:
        block, rounded: (columns, rows) float32.
        upper: (columns, columns) float32, the block of U.
        step, offset: (blocks, rows) float32, of which column i takes row ``index[i]``.
        index: (columns,) int64.
        table: ascending levels; None for the integers 0..``top``.
    """
    _call(
        "feedback", pointer(block), _long(block.shape[0]), _long(block.shape[1]), pointer(upper), pointer(step),
        pointer(offset), pointer(index, torch.int64), pointer(table), _long(0 if table is None else table.numel()),
        _float(top), pointer(rounded),
    )  # fmt: skip
