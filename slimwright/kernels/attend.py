"""The functions of attend.cpp on tensors: one layer's cache of keys and values, and attention of one token over it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.kernels import library as shared
from slimwright.kernels import library_path, torch_threads
from slimwright.kernels import why_not as shared_reason
from slimwright.kernels.compiling import single

ABI = 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of keys, values and queries that the kernels take."""

_SIZES = ("batch", "kv_heads", "heads", "key_dim", "value_dim", "bits", "group", "window", "key_capacity",
          "value_capacity", "length", "dtype", "threads", "sliding")  # fmt: skip
PARTS = ("key_window", "value_window", "key_codes", "key_scale", "key_low", "value_codes", "value_scale", "value_low")
"""Tensors that a cache consists of, in the structure's order."""


class Kv(ctypes.Structure):
    """``SlimwrightKv``: sizes, and pointers into tensors that the caller keeps alive."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("start", "sinks", *PARTS)),
    ]


def compiled() -> bool:
    """Whether the library is there already; its first use compiles it otherwise."""
    return library_path(single("attend")).exists()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels with torch's own threads in them; None where there are none."""
    loaded = shared("attend")
    if loaded is None or loaded.slimwright_attend_abi() != ABI or loaded.slimwright_kv_size() != ctypes.sizeof(Kv):
        return None
    loaded.slimwright_kv_append.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    loaded.slimwright_kv_attend.argtypes = [ctypes.c_void_p] * 3
    loaded.slimwright_kv_step.argtypes = [ctypes.c_void_p] * 5
    loaded.slimwright_set_parallel.argtypes = [ctypes.c_void_p]
    loaded.slimwright_set_parallel.restype = None
    loaded.slimwright_kv_parts.restype = ctypes.c_void_p
    loaded.slimwright_set_parallel(torch_threads())
    return loaded


def why_not() -> str:
    """Why there are no compiled kernels; empty where there are."""
    return "" if library() is not None else shared_reason("attend") or "the library is of another version"


def describe(kv: Kv, sizes: Mapping[str, int], tensors: Mapping[str, Tensor | None]) -> None:
    """Set fields of ``kv``; the tensors must outlive its use.

    Raises:
        TypeError: a tensor is not contiguous or not on the CPU: a mistake of the caller's that would corrupt memory.
    """
    for name, size in sizes.items():
        setattr(kv, name, size)
    for name, tensor in tensors.items():
        if tensor is not None and (not tensor.is_contiguous() or tensor.device.type != "cpu"):
            raise TypeError(f"A kernel takes contiguous tensors on the CPU; '{name}' is not one.")
        setattr(kv, name, None if tensor is None or not tensor.numel() else tensor.data_ptr())


def append(kv: Kv, keys: Tensor, values: Tensor) -> None:
    """Add tokens, (batch, kv_heads, count, dim) contiguous in the cache's dtype; ``kv.length`` grows.

    Raises:
        InputError: they do not fit, or there is no memory.
    """
    _checked(kv, keys, values)
    _raise(library().slimwright_kv_append(ctypes.addressof(kv), keys.data_ptr(), values.data_ptr(), keys.shape[2]))  # type: ignore[union-attr]


def attend(kv: Kv, query: Tensor) -> Tensor:
    """Attention of one query a row, (batch, heads, 1, key_dim), over the tokens in the cache.

    Returns:
        (batch, 1, heads, value_dim) in the query's dtype.
    """
    query, out = _query(kv, query)
    _raise(library().slimwright_kv_attend(ctypes.addressof(kv), query.data_ptr(), out.data_ptr()))  # type: ignore[union-attr]
    return out


def step(kv: Kv, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """:func:`append` of one token, then :func:`attend`."""
    _checked(kv, keys, values)
    query, out = _query(kv, query)
    _raise(
        library().slimwright_kv_step(  # type: ignore[union-attr]
            ctypes.addressof(kv), query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr()
        )
    )
    return out


def _query(kv: Kv, query: Tensor) -> tuple[Tensor, Tensor]:
    if query.shape != (kv.batch, kv.heads, 1, kv.key_dim) or DTYPES.get(query.dtype) != kv.dtype:
        raise TypeError(f"A query of {tuple(query.shape)} {query.dtype} does not fit this cache.")
    return query.contiguous(), query.new_empty(kv.batch, 1, kv.heads, kv.value_dim)


def _checked(kv: Kv, keys: Tensor, values: Tensor) -> None:
    for states, width in ((keys, kv.key_dim), (values, kv.value_dim)):
        if (
            states.shape != (kv.batch, kv.kv_heads, keys.shape[2], width)
            or DTYPES.get(states.dtype) != kv.dtype
            or not states.is_contiguous()
        ):
            raise TypeError(f"States of {tuple(states.shape)} {states.dtype} do not fit this cache.")


def _raise(code: int) -> None:
    if code == 2:
        raise InputError("The cache of keys and values is full: ask for fewer tokens, or make it larger.")
    if code == 3:
        raise MemoryError("attention over the cache of keys and values")
    if code:
        raise ValueError("The cache of keys and values is damaged: its sizes contradict each other.")
