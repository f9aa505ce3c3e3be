"""The functions of packed.cpp on tensors: products with a packed matrix, dense rows of it.

A matrix is described once (:class:`Matrix`) by the addresses of its parts; every function checks each bound on the C
side. One library per instruction set is compiled from the same sources; the best that this machine has is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimwright.errors import SlimwrightError
from slimwright.kernels import compiling, library_path, one_line, shared_library, switched_off, torch_threads
from slimwright.kernels.compiling import INSTRUCTION_SETS

ABI = 2
BFLOATS = 4
"""``digits`` of products in bfloat16."""
PANELS, BFLOAT_PANELS = 5, 6
"""``digits`` of products with many inputs in float32 and in bfloat16."""
KINDS = {"int": 0, "nf4": 1, "mxfp4": 2, "fp8": 3, "q4_0": 4, "q8_0": 5, "q4_k": 6, "q6_k": 7}
ZEROS = {"middle": 0, "bytes": 1, "nibbles": 2, "halves": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@functools.cache
def _flags() -> frozenset[str]:
    """What the processor has, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass  # not Linux: the portable code runs anywhere
    return frozenset()


def instruction_sets() -> list[str]:
    """Those that this machine runs, the best first."""
    if platform.machine() in ("aarch64", "arm64"):
        return ["neon", "portable"]
    known = [name for name, (_, needs) in INSTRUCTION_SETS.items() if needs <= _flags()]
    return [name for name in known if name != "neon"]


def has_matrix_unit() -> bool:
    """Whether the processor multiplies matrices of bfloat16 by a unit for it, as torch's product does then."""
    return "amx_bf16" in _flags()


def compiled() -> bool:
    """Whether the library is there already; its first use compiles it otherwise."""
    return library_path(compiling.packed(instruction_sets()[0])).exists()


class Structure(ctypes.Structure):
    """``Weight`` of packed.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group")),
        *((name, ctypes.c_int32) for name in ("kind", "bits", "zero_kind", "reserved")),
        ("payload", ctypes.c_void_p), ("payload_bytes", ctypes.c_int64),
        ("scale", ctypes.c_void_p), ("scale_bytes", ctypes.c_int64),
        ("zero", ctypes.c_void_p), ("zero_bytes", ctypes.c_int64),
        ("block_scale", ctypes.c_void_p), ("block_scale_bytes", ctypes.c_int64),
        ("mean", ctypes.c_void_p), ("table", ctypes.c_void_p),
    ]  # fmt: skip


class Library:
    """The functions of one instruction set's library.

    Args:
        name: of the instruction set.

    Raises:
        OSError: there is no compiler, or the library cannot be loaded; subprocess.SubprocessError: compiling failed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # GCC 12 takes the placeholders of its own AVX-512 headers for uninitialized values
        self.loaded = ctypes.CDLL(str(shared_library(compiling.packed(name))))
        if self.loaded.slimwright_packed_abi() != ABI:
            raise OSError("the library is of another version")
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self.linear = self.loaded.slimwright_packed_linear
        self.linear.argtypes = [pointer, pointer, long, long, long, pointer, pointer, integer, integer, integer]
        self.decode = self.loaded.slimwright_packed_decode
        self.decode.argtypes = [pointer, long, long, pointer, integer, integer]
        self.gather = self.loaded.slimwright_packed_gather
        self.gather.argtypes = [pointer, pointer, long, pointer, integer, integer]
        self.check = self.loaded.slimwright_packed_check
        self.check.argtypes = [pointer]
        self.step = self.loaded.slimwright_packed_step
        self.step.argtypes = [pointer]
        self.loaded.slimwright_packed_step_size.restype = long
        self.step_bytes = self.loaded.slimwright_packed_step_size()
        self.bfloats = bool(self.loaded.slimwright_packed_bfloats())
        self._error = self.loaded.slimwright_packed_error
        self._error.argtypes, self._error.restype = [integer], ctypes.c_char_p
        self._threads = self.loaded.slimwright_packed_threads
        self._threads.argtypes, self._threads.restype = [pointer], None
        self.share_threads(_torch_threads())

    def share_threads(self, function: int | None) -> None:
        """Run on the threads of the OpenMP library that has this ``GOMP_parallel``; None: on threads of its own."""
        self.threads = "own" if function is None else "torch's"
        self._threads(function)

    def raise_for(self, code: int) -> None:
        """
        Raises:
            SlimwrightError: a function returned an error.
        """
        if code:
            raise SlimwrightError(f"A packed weight cannot be used: {self._error(code).decode()}.")


def _torch_threads() -> int | None:
    """:func:`slimwright.kernels.torch_threads`, but None where they are told to sleep between uses: waking them takes
    longer than the product with a small matrix."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" or os.environ.get("GOMP_SPINCOUNT") == "0":
        return None
    return torch_threads()


@functools.cache
def _load() -> tuple[Library | None, str]:
    """The library, and why there is none."""
    if off := switched_off():
        return None, off
    try:
        return Library(instruction_sets()[0]), ""
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return None, one_line(error)


def library() -> Library | None:
    """The best library for this machine; None where there is none."""
    return _load()[0]


def why_not() -> str:
    """Why there is none; empty where there is one."""
    return _load()[1]


@dataclass(frozen=True)
class Layout:
    """How a matrix is packed.

    Args:
        kind: of :data:`KINDS`.
        rows, columns: of the matrix.
        group: columns that share a scale; at most the columns.
        bits: of a code.
        zero: of :data:`ZEROS`.
    """

    kind: str
    rows: int
    columns: int
    group: int
    bits: int = 8
    zero: str = "middle"

    @property
    def integer(self) -> bool:
        """Whether products are computed in integers: codes are integers, and 16 columns never have two scales."""
        return self.kind not in ("nf4", "fp8") and (self.group >= self.columns or self.group % 16 == 0)


class Matrix:
    """A packed matrix as its tensors lie in memory; they are kept alive and must not move.

    Args:
        layout: how it is packed.
        payload: uint8 codes.
        scale: the tensor of scales (NF4: absmax), if any.
        zero: the tensor of zero points, if any.
        block_scale, mean: NF4's second quantization.
        table: (256,) float32: values of NF4's absmax codes, or of FP8's codes.
        using: the library.

    Raises:
        SlimwrightError: the tensors do not have the sizes that the layout asks for, or are not contiguous on the CPU.
    """

    def __init__(
        self,
        layout: Layout,
        payload: Tensor,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        block_scale: Tensor | None = None,
        mean: Tensor | None = None,
        table: Tensor | None = None,
        using: Library | None = None,
    ) -> None:
        found = using or library()
        if found is None:
            raise SlimwrightError(f"There are no compiled kernels: {why_not()}.")
        self.layout, self.library, self.integer = layout, found, layout.integer
        self.tensors: tuple[Tensor | None, ...] = (payload, scale, zero, block_scale, mean, table)
        if any(t is not None and (t.device.type != "cpu" or not t.is_contiguous()) for t in self.tensors):
            raise SlimwrightError("The tensors of a packed weight must be contiguous and on the CPU.")
        self.addresses = tuple(t.data_ptr() for t in self.tensors if t is not None)
        self.structure = Structure(
            layout.rows, layout.columns, min(layout.group, layout.columns), KINDS[layout.kind], layout.bits,
            ZEROS[layout.zero], 0, *_where(payload), *_where(scale), *_where(zero), *_where(block_scale),
            _where(mean)[0], _where(table)[0],
        )  # fmt: skip
        if mean is not None and (mean.dtype != torch.float32 or mean.numel() != 1):
            raise SlimwrightError("NF4's mean must be one float32 value.")
        if table is not None and (table.dtype != torch.float32 or table.numel() != 256):
            raise SlimwrightError("A table of values must have 256 float32 values.")
        self.address = ctypes.addressof(self.structure)
        found.raise_for(found.check(self.address))

    def linear(
        self, x: Tensor, bias: Tensor | None = None, start: int = 0, stop: int | None = None, digits: int | None = None
    ) -> Tensor:
        """``x @ W[start:stop].T + bias``: (..., columns) → (..., stop - start).

        Args:
            x: float32 or bfloat16 on the CPU.
            bias: (stop - start,) in x's dtype.
            digits: bytes that stand for an input in integer arithmetic; 0 is float arithmetic, :data:`BFLOATS` rounds
                the weight to bfloat16 as well, :data:`PANELS` and :data:`BFLOAT_PANELS` are the same two for many
                inputs. None: 3 for float32, 2 for bfloat16, 0 where
                :attr:`Layout.integer` is false.

        Raises:
            SlimwrightError: a shape or dtype that does not fit.
        """
        columns = self.layout.columns
        stop = self.layout.rows if stop is None else stop
        kind, shape = DTYPES.get(x.dtype), x.shape
        if kind is None or not x.is_cpu or shape[-1] != columns:
            raise SlimwrightError(
                f"A packed weight of {columns} columns takes as many float32 or bfloat16 inputs on the CPU, "
                f"not {x.dtype} {tuple(shape)} on {x.device}."
            )
        address = None
        if bias is not None:
            if bias.dtype is not x.dtype or not bias.is_cpu or bias.numel() != stop - start:
                raise SlimwrightError(f"The bias must be {stop - start} values of {x.dtype} on the CPU.")
            bias = bias.contiguous()
            address = bias.data_ptr()
        if digits is None:
            digits = (3 if kind == 0 else 2) if self.integer else 0
        x = x.contiguous()
        out = x.new_empty((*shape[:-1], stop - start))
        batch = x.numel() // columns
        if batch:
            code = self.library.linear(
                self.address, x.data_ptr(), batch, start, stop, address, out.data_ptr(), kind, digits,
                torch.get_num_threads(),
            )  # fmt: skip
            if code:
                self.library.raise_for(code)
        return out

    def decode(
        self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32, out: Tensor | None = None
    ) -> Tensor:
        """Dense rows: (stop - start, columns) in float32 or bfloat16, exactly the grid's values (rounded to bfloat16).

        Args:
            out: a contiguous tensor of that shape to write into; its dtype counts then.
        """
        stop = self.layout.rows if stop is None else stop
        if out is None:
            out = torch.empty(stop - start, self.layout.columns, dtype=dtype)
        elif out.shape != (stop - start, self.layout.columns) or not out.is_contiguous():
            raise SlimwrightError("The tensor for dense rows has another shape than they.")
        self.library.raise_for(
            self.library.decode(self.address, start, stop, out.data_ptr(), DTYPES[out.dtype], torch.get_num_threads())
        )
        return out

    def gather(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Single dense rows: (n, columns) for ``index`` (n,) int64."""
        index = index.contiguous()
        if index.dtype != torch.int64 or index.device.type != "cpu":
            raise SlimwrightError("Rows are named by int64 numbers on the CPU.")
        out = torch.empty(index.numel(), self.layout.columns, dtype=dtype)
        if index.numel():
            self.library.raise_for(
                self.library.gather(
                    self.address,
                    index.data_ptr(),
                    index.numel(),
                    out.data_ptr(),
                    DTYPES[dtype],
                    torch.get_num_threads(),
                )
            )
        return out


def _where(tensor: Tensor | None) -> tuple[int | None, int]:
    """Address and bytes."""
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())
