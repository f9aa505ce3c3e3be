"""Packed weights as the compiled kernels see them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from slimwright.kernels.packed import Layout, Library, Matrix
from slimwright.weights.float8 import FP8
from slimwright.weights.gguf import Q4_0, Q8_0
from slimwright.weights.grid import Grid
from slimwright.weights.integer import Int
from slimwright.weights.kquants import Q4_K, Q6_K
from slimwright.weights.mxfp4 import BLOCK as MXFP4_BLOCK
from slimwright.weights.mxfp4 import MXFP4
from slimwright.weights.nf4 import _DYNAMIC, NF4
from slimwright.weights.nf4 import BLOCK as NF4_BLOCK

_GGUF_GROUPS = {Q4_0: 32, Q8_0: 32, Q4_K: 32, Q6_K: 16}


def kernel_layout(grid: Grid, rows: int, columns: int) -> Layout | None:
    """How the kernels read a (rows, columns) matrix on a grid; None where they do not know the grid."""
    if isinstance(grid, Int):
        zero = "halves" if grid.zero == "real" else "middle" if grid.symmetric else None
        zero = zero or ("nibbles" if grid.bits <= 4 else "bytes")
        return Layout("int", rows, columns, min(grid.group or columns, columns), grid.bits, zero)
    if isinstance(grid, NF4):
        return Layout("nf4", rows, columns, min(NF4_BLOCK, columns), 4)
    if isinstance(grid, MXFP4):
        return Layout("mxfp4", rows, columns, min(MXFP4_BLOCK, columns), 4)
    if isinstance(grid, FP8):
        return Layout("fp8", rows, columns, columns)
    if type(grid) in _GGUF_GROUPS and grid.illegal(rows, columns) is None:
        return Layout(grid.spec, rows, columns, _GGUF_GROUPS[type(grid)])  # type: ignore[index]
    return None


@functools.cache
def _fp8_values() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def kernel_matrix(
    grid: Grid, parts: Mapping[str, Tensor], shape: tuple[int, int], using: Library | None = None
) -> Matrix | None:
    """A packed weight for the kernels; None where they do not know the grid.

    Args:
        parts: tensors by suffix as they lie on disk, on the CPU and contiguous.
        shape: (rows, columns) of the logical matrix.
        using: a library other than the best one.

    Raises:
        SlimwrightError: the tensors do not have the sizes of that shape.
    """
    layout = kernel_layout(grid, *shape)
    if layout is None:
        return None
    scale, zero = parts.get("_absmax" if isinstance(grid, NF4) else "_scale"), parts.get("_zero")
    if isinstance(grid, NF4) and grid.double:
        extra = {"block_scale": parts["_absmax_scale"], "mean": parts["_absmax_mean"], "table": _DYNAMIC}
    else:
        extra = {"table": _fp8_values()} if isinstance(grid, FP8) else {}
    return Matrix(layout, parts[""], scale, zero, using=using, **extra)
