"""Which code multiplies with a packed weight, and the operators that do.

On the CPU, with float32 or bfloat16 inputs and the compiled kernels:

- for one or two rows of input by *integers*, where the grid's codes are integers and its scales are shared by multiples
  of 16 columns: codes go from the file into products (see kernels/packed_rows.cpp);
- for more, and for other grids, by *floats*: four rows of the weight at a time are decoded and multiplied with all
  inputs; with bfloat16 inputs and instructions for them, in bfloat16;
- for more than :data:`MOST_ROWS` in *panels*: rows of the weight are decoded into a thread's cache and multiplied with
  whole vectors of inputs, which were laid side by side before (kernels/packed_panels.h), in the same arithmetic;
- in bfloat16 where the processor has a unit for matrices (AMX), which the library's matrix product uses, *tiles*: dense
  rows are written by the kernels into a buffer for it.

Every way reads the packed bytes once.

Everywhere else (another device or dtype, no compiler, gradients in a compiled model) the *reference* in
:mod:`slimwright.runtime.modules` decodes tiles with torch. ``torch.ops.slimwright.packed_linear`` and ``packed_gather``
are what a compiled model calls; eager modules call the kernels directly, which spares the dispatcher's time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimwright.errors import InputError
from slimwright.kernels import one_line, packed
from slimwright.kernels.packed import Matrix
from slimwright.weights import Form, Grid, matrix_shape, parse_grid
from slimwright.weights.matrix import kernel_layout, kernel_matrix

MOST_ROWS = 48
"""Rows of input up to which each is multiplied by itself."""
TILE_ELEMENTS = 8 << 20
"""Most elements of a dense tile."""
AUTOMATIC = -1
"""Digits of the inputs as their dtype asks for."""


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Whether the compiled kernels are there."""
    return packed.library() is not None


def usable(grid: Grid, x: Tensor, parts: Mapping[str, Tensor]) -> bool:
    """Whether the kernels can multiply ``x`` with a weight on ``grid``."""
    return (
        x.device.type == "cpu"
        and x.dtype in packed.DTYPES
        and ready()
        and not grid.plain
        and all(part.device.type == "cpu" for part in parts.values())
        and known(grid)
    )


@torch.compiler.assume_constant_result
def known(grid: Grid) -> bool:
    """Whether the kernels read the grid."""
    return kernel_layout(grid, 256, 256) is not None


def arithmetic(matrix: Matrix, dtype: torch.dtype, batch: int) -> int | None:
    """``digits`` (:meth:`Matrix.linear`) of the fastest arithmetic for so many rows of input; None: tiles.

    Measured on Zen 4 with one thread on 896 -> 4864 and back, int4 and int8 (``python -m benchmarks.products``):
    integers win where decoding a row costs more than its few products, panels where inputs fill more than one vector.
    The library's product has a unit for matrices of bfloat16 (AMX) to itself.
    """
    if batch <= MOST_ROWS:
        return step_arithmetic(matrix, dtype, batch)
    if dtype == torch.float32 or not matrix.library.bfloats:
        return packed.PANELS
    return None if packed.has_matrix_unit() else packed.BFLOAT_PANELS


def step_arithmetic(matrix: Matrix, dtype: torch.dtype, batch: int) -> int | None:
    """The same where every row of input is prepared on its own, as in a whole decoding step; None: so many rows do not
    stay in the second-level cache while rows of the weight pass by."""
    layout, bfloats = matrix.layout, dtype == torch.bfloat16 and matrix.library.bfloats
    lanes = layout.group % 64 != 0 and layout.group < layout.columns  # more scales, more work to decode a row
    if layout.integer and batch <= (3 if lanes else 1 if bfloats else 2):
        return 3 if dtype == torch.float32 else 2
    if batch == 1:
        return 0
    if batch * layout.columns * (2 if bfloats else 4) > (1 << 20 if bfloats else 2 << 20):
        return None
    return packed.BFLOATS if bfloats else 0


def kernel_name(grid: Form, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """What multiplies with a weight and one row of input, and why, in a few words (``doctor`` and the report); of
    factors, what multiplies with each."""
    if not isinstance(grid, Grid):
        names = [kernel_name(own.grid, own.shape, dtype) for own in grid.components(shape)]
        return "; ".join(dict.fromkeys(names)) + "; decoded module by module"
    if grid.plain:
        return "the library's product (not packed)"
    if not ready():
        return f"reference ({packed.why_not()})"
    if dtype not in packed.DTYPES:
        return f"reference (inputs of {str(dtype).removeprefix('torch.')})"
    layout = kernel_layout(grid, *matrix_shape(shape))
    if layout is None:
        return f"reference (the kernels do not read {grid})"
    library = packed.library()
    assert library is not None
    if layout.integer:
        return f"{library.name} integers, {24 if dtype == torch.float32 else 16}-bit inputs"
    why = f"groups of {layout.group} columns" if layout.kind == "int" else "levels that are no integers"
    return f"{library.name} floats ({why})"


@functools.cache
def _gpu_kernels() -> Any:
    """The module of the Triton kernels, or why there is none."""
    if off := packed.switched_off():
        return off
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        return importlib.import_module("slimwright.kernels.packed_gpu")
    except Exception as error:  # triton's own imports fail in many ways: with a wrong driver, Python or torch
        return f"triton cannot be imported: {one_line(error)}"


def gpu_why_not(grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Why the Triton kernel does not multiply with a weight on a GPU, the reference does; empty where it does."""
    kernels = _gpu_kernels()
    if isinstance(kernels, str):
        return kernels
    layout = None if grid.plain else kernel_layout(grid, *matrix_shape(shape))
    if layout is None or layout.kind != "int":
        return f"the Triton kernel does not read {grid}"
    return "" if dtype in kernels.DTYPES else f"inputs of {str(dtype).removeprefix('torch.')}"


def gpu_linear(
    x: Tensor, parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, ...], rows: slice, bias: Tensor | None
) -> Tensor | None:
    """``x @ W[rows].T + bias`` on a GPU by the Triton kernel; None where it does not, or for so many rows of input that
    the library's product with decoded tiles is the better one."""
    if gpu_why_not(grid, shape, x.dtype) or x.numel() // x.shape[-1] > _gpu_kernels().MOST_ROWS:
        return None
    layout = kernel_layout(grid, *matrix_shape(shape))
    assert layout is not None
    how = (matrix_shape(shape), layout.group, layout.bits, layout.zero)
    return _gpu_kernels().linear(x, parts, *how, rows.start, rows.stop, bias)


def gpu_overview() -> str:
    """What products with packed weights would run on where there is a GPU, in a few words."""
    kernels = _gpu_kernels()
    found = "" if torch.cuda.is_available() else "no GPU here; "
    if isinstance(kernels, str):
        return f"{found}reference: tiles decoded by torch, then the library's product ({kernels})"
    return f"{found}triton for int grids up to {kernels.MOST_ROWS} rows of input; the reference for more and others"


def overview() -> str:
    """What the kernels of packed weights run on, in a few words."""
    library = packed.library()
    if library is None:
        return f"reference: tiles decoded by torch, then the library's product ({packed.why_not()})"
    return f"compiled for {library.name}, on {library.threads} threads"


# -- products ------------------------------------------------------------------------------------------------------


class _Scratch(threading.local):
    """A buffer per thread for dense tiles, so that their pages are not new each time."""

    buffer: Tensor | None = None

    def get(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        count = rows * columns * dtype.itemsize
        if self.buffer is None or self.buffer.numel() < count:
            self.buffer = torch.empty(count, dtype=torch.uint8)
        return self.buffer[:count].view(dtype).view(rows, columns)


_scratch = _Scratch()


def multiply(matrix: Matrix, x: Tensor, bias: Tensor | None, start: int, stop: int, digits: int = AUTOMATIC) -> Tensor:
    """``x @ W[start:stop].T + bias`` by whichever is faster for so many inputs.

    Args:
        x: (..., columns) float32 or bfloat16 on the CPU.
        bias: (stop - start,) in x's dtype.
        digits: 1 rounds inputs to 8 bits, with a scale per group of the weight, where integers are the fastest.
    """
    layout = matrix.layout
    chosen = arithmetic(matrix, x.dtype, x.numel() // layout.columns)
    if digits == 1 and chosen in (2, 3):
        chosen = 1
    if chosen is not None:
        return matrix.linear(x, bias, start, stop, chosen)
    step = max(1, TILE_ELEMENTS // layout.columns)
    if stop - start <= step:
        tile = _scratch.get(stop - start, layout.columns, x.dtype)
        return F.linear(x, matrix.decode(start, stop, out=tile), bias)
    flat = x.reshape(-1, layout.columns)
    out = x.new_empty(flat.shape[0], stop - start)
    for first in range(start, stop, step):
        last = min(stop, first + step)
        tile = matrix.decode(first, last, out=_scratch.get(last - first, layout.columns, x.dtype)).T
        part = out[:, first - start : last - start]
        if bias is None:
            torch.mm(flat, tile, out=part)
        else:
            torch.addmm(bias[first - start : last - start], flat, tile, out=part)
    return out.reshape(*x.shape[:-1], stop - start)


@torch.no_grad()
def eight_bit_inputs(model: nn.Module, on: bool = True, **inputs: Tensor) -> float:
    """Let the packed modules of a model round their inputs to 8 bits where they multiply in integers, that is when it
    decodes for one or two sequences: less arithmetic, for machines whose memory is faster than that.

    Args:
        model: a model with packed modules; changed in place.
        on: False takes it back.
        inputs: what the model is called with to measure the error; one sequence of one token is decoded as by
            ``generate``, longer ones are not rounded.

    Returns:
        ``||after - before|| / ||before||`` of the logits (or the first output) on these inputs; NaN without inputs.
    """
    before = model(**inputs)[0] if inputs else None
    for module in model.modules():
        if hasattr(module, "input_digits"):
            module.input_digits = 1 if on else AUTOMATIC  # type: ignore[assignment]
    if before is None:
        return float("nan")
    return float((model(**inputs)[0] - before).norm() / before.norm())


# -- operators -----------------------------------------------------------------------------------------------------

_matrices: dict[int, tuple[list[Any], Matrix]] = {}
"""By address of the payload: weak references to the parts, and the matrix, which does not keep them alive."""


def _matrix(parts: Sequence[Tensor], suffixes: Sequence[str], grid: str, shape: Sequence[int]) -> Matrix:
    """The matrix of these parts, from an earlier call if it was made of the same tensors."""
    key = parts[0].data_ptr()
    found = _matrices.get(key)
    if found is not None:
        references, matrix = found
        if len(references) == len(parts) and all(ref() is part for ref, part in zip(references, parts)):
            addresses = matrix.addresses
            if all(part.data_ptr() == address for part, address in zip(parts, addresses)):
                return matrix
    made = kernel_matrix(parse_grid(grid), dict(zip(suffixes, parts)), matrix_shape(tuple(shape)))
    if made is None:
        raise InputError(f"The kernels do not read {grid}.")
    made.tensors = ()
    made.addresses = tuple(part.data_ptr() for part in parts)
    _matrices[key] = ([weakref.ref(parts[0], lambda _: _matrices.pop(key, None)), *map(weakref.ref, parts[1:])], made)
    return made


def _linear(
    x: Tensor,
    parts: list[Tensor],
    suffixes: list[str],
    grid: str,
    shape: list[int],
    start: int,
    stop: int,
    bias: Tensor | None,
    digits: int,
) -> Tensor:
    return multiply(_matrix(parts, suffixes, grid, shape), x, bias, start, stop, digits)


def _gather(
    index: Tensor, parts: list[Tensor], suffixes: list[str], grid: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return _matrix(parts, suffixes, grid, shape).gather(index.long(), dtype)


_library = torch.library.Library("slimwright", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor[] parts, str[] suffixes, str grid, int[] shape, SymInt start, SymInt stop, "
    "Tensor? bias, int digits) -> Tensor"
)
_library.define(
    "packed_gather(Tensor index, Tensor[] parts, str[] suffixes, str grid, int[] shape, ScalarType dtype) -> Tensor"
)
_library.impl("packed_linear", _linear, "CPU")
_library.impl("packed_gather", _gather, "CPU")


# what a compiler is told of their results: the arguments that these do not depend on go by unread
torch.library.register_fake(
    "slimwright::packed_linear",
    lambda x, parts, suffixes, grid, shape, start, stop, *_: x.new_empty(*x.shape[:-1], stop - start),
)
torch.library.register_fake(
    "slimwright::packed_gather",
    lambda index, parts, suffixes, grid, shape, dtype: index.new_empty(index.shape[0], shape[-1], dtype=dtype),
)


def packed_linear(
    x: Tensor,
    parts: Mapping[str, Tensor],
    grid: Grid,
    shape: tuple[int, ...],
    rows: slice,
    bias: Tensor | None,
    digits: int = AUTOMATIC,
) -> Tensor:
    """The operator ``packed_linear`` on a weight's parts by suffix; :func:`usable` must hold."""
    return torch.ops.slimwright.packed_linear(
        x, list(parts.values()), list(parts), grid.spec, list(shape), rows.start, rows.stop, bias, digits
    )


def packed_gather(
    index: Tensor, parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The operator ``packed_gather``: (n, columns) in float32 or bfloat16."""
    return torch.ops.slimwright.packed_gather(index, list(parts.values()), list(parts), grid.spec, list(shape), dtype)
