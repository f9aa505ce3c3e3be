"""Products with packed integer matrices on a GPU, by Triton: what packed.cpp is to the CPU.

One program multiplies a block of rows of the weight with a block of rows of inputs, walks over the chunks of 64 columns
(weights/packing.py) and reads every packed byte once. Codes become exact values, ``scale * (code - zero)``, in float32;
products are added in float32. Triton is not among slimwright's dependencies: this module is imported where it is
installed (torch's wheels for GPUs bring it), or with ``TRITON_INTERPRET=1``, which runs it on the CPU, for the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimwright.errors import SlimwrightError
from slimwright.kernels.packed import ZEROS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_ROWS = 64
"""Of inputs; for more the library's product with decoded tiles is faster."""


@triton.jit
def _plane(row, at, column, length, shift, WIDTH: tl.constexpr, mask):  # type: ignore[no-untyped-def]
    """Bits of codes that lie in the plane of WIDTH bits, which begins at byte ``at`` of the row."""
    if WIDTH == 8:
        return tl.load(row + at + column, mask=mask, other=0).to(tl.int32)
    if WIDTH == 1:
        return ((tl.load(row + at + column // 8, mask=mask, other=0).to(tl.int32) >> (column % 8)) & 1) << shift
    size = length * WIDTH // 8
    part = tl.load(row + at + column % size, mask=mask, other=0).to(tl.int32)
    return ((part >> (column // size * WIDTH)) & ((1 << WIDTH) - 1)) << shift


@triton.jit
def _linear(  # type: ignore[no-untyped-def]
    x, payload, scale, zero, bias, out, batch, first, last, columns, group, groups, row_bytes,
    BITS: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """out (batch, last - first) = x (batch, columns) W[first:last]' + bias."""
    rows = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inputs = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    lanes = tl.arange(0, 64)
    inside = rows < last
    wide = rows.to(tl.int64)
    start = payload + wide[:, None] * row_bytes
    total = tl.zeros((INPUTS, ROWS), tl.float32)
    for chunk in range(0, tl.cdiv(columns, 64)):
        rest = columns - chunk * 64
        length = tl.minimum(64, (rest + 7) // 8 * 8)
        mask = inside[:, None] & (lanes < rest)[None, :]
        column = lanes[None, :]
        at, shift = chunk * 8 * BITS, 0
        codes = tl.zeros((ROWS, 64), tl.int32)
        if BITS & 8:
            codes += _plane(start, at, column, length, shift, 8, mask)
        if BITS & 4:
            codes += _plane(start, at, column, length, shift, 4, mask)
            at += length * 4 // 8
            shift += 4
        if BITS & 2:
            codes += _plane(start, at, column, length, shift, 2, mask)
            at += length * 2 // 8
            shift += 2
        if BITS & 1:
            codes += _plane(start, at, column, length, shift, 1, mask)
        number = (chunk * 64 + lanes) // group
        index = wide[:, None] * groups + number[None, :]
        factor = tl.load(scale + index, mask=mask, other=0.0).to(tl.float32)
        if ZERO == 0:
            point = tl.full((ROWS, 64), 1 << (BITS - 1), tl.float32)
        elif ZERO == 2:
            pair = wide[:, None] * ((groups + 1) // 2) + (number // 2)[None, :]
            nibble = tl.load(zero + pair, mask=mask, other=0).to(tl.int32) >> (number % 2 * 4)[None, :]
            point = (nibble & 15).to(tl.float32)
        else:
            point = tl.load(zero + index, mask=mask, other=0).to(tl.float32)
        values = tl.where(mask, (codes.to(tl.float32) - point) * factor, 0.0)
        here = (inputs < batch)[:, None] & (lanes < rest)[None, :]
        own = tl.load(x + inputs.to(tl.int64)[:, None] * columns + chunk * 64 + lanes[None, :], mask=here, other=0.0)
        if INPUTS == 1:
            total += tl.sum(values * own.to(tl.float32), axis=1)[None, :]
        else:
            total += tl.dot(own.to(tl.float32), tl.trans(values), input_precision="ieee")
    if BIAS:
        total += tl.load(bias + rows - first, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = out + inputs.to(tl.int64)[:, None] * (last - first) + (rows - first)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(inputs < batch)[:, None] & inside[None, :])


def linear(
    x: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int], group: int, bits: int, zero: str, start: int,
    stop: int, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x @ W[start:stop].T + bias``: (..., columns) → (..., stop - start) in x's dtype.

    Args:
        x: float32, bfloat16 or float16.
        parts: an integer grid's tensors by suffix, on x's device.
        shape: (rows, columns) of the matrix.
        group, bits, zero: as in :class:`slimwright.kernels.packed.Layout`.
        bias: (stop - start,) in x's dtype.

    Raises:
        SlimwrightError: a tensor has not the size that the shape asks for.
    """
    rows, columns = shape
    groups, row_bytes = -(-columns // group), (columns + 7) // 8 * bits
    sizes = {"": rows * row_bytes, "_scale": rows * groups}
    if zero != "middle":
        sizes["_zero"] = rows * ((groups + 1) // 2 if zero == "nibbles" else groups)
    for suffix, size in sizes.items():
        part = parts[suffix]
        if part.numel() != size or not part.is_contiguous() or part.device != x.device:
            raise SlimwrightError(
                f"The packed weight's '{suffix or 'codes'}' is not that of a {rows} x {columns} matrix."
            )
    if x.shape[-1] != columns or not 0 <= start < stop <= rows or x.dtype not in DTYPES:
        raise SlimwrightError(f"Inputs of {tuple(x.shape)} {x.dtype} do not fit a packed weight of {columns} columns.")
    if bias is not None and (bias.numel() != stop - start or bias.device != x.device):
        raise SlimwrightError(f"The bias must have {stop - start} values.")
    flat = x.reshape(-1, columns).contiguous()
    out = x.new_empty(flat.shape[0], stop - start)
    if flat.shape[0]:
        block = 1 if flat.shape[0] == 1 else 16
        height = 8 if block == 1 else 32
        grid = (triton.cdiv(stop - start, height), triton.cdiv(flat.shape[0], block))
        unused: Any = parts["_scale"]
        _linear[grid](
            flat, parts[""], parts["_scale"], parts.get("_zero", unused), unused if bias is None else bias.contiguous(),
            out, flat.shape[0], start, stop, columns, group, groups, row_bytes,
            BITS=bits, ZERO=ZEROS[zero], BIAS=bias is not None, ROWS=height, INPUTS=block,
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], stop - start)
