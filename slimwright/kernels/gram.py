"""The functions of gram.cpp on tensors."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from slimwright.kernels import available, library, pointer, torch_threads

TOKENS = 1024
"""Tokens that are packed and summed at once: three panels stay in a core's cache."""

_PANEL = 16


@functools.cache
def _supported() -> bool:
    loaded = library("gram")
    return loaded is not None and bool(loaded.slimwright_has_bf16())


def gram_available(x: Tensor, total: Tensor) -> bool:
    """Whether :func:`add_gram` can work on these tensors: bfloat16 ones, on a CPU that multiplies them natively."""
    return x.dtype == torch.bfloat16 and total.dtype == torch.float32 and available(x, total) and _supported()


def add_gram(total: Tensor, x: Tensor, moments: Tensor) -> None:
    """Add ``xᵀ x`` to the lower triangle of ``total``, on all of torch's threads; what lies right of the diagonal is
    not to be used. Moments come along, since every input is read anyway.

    Products are exact and sums float32, of :data:`TOKENS` tokens at a time. The result does not depend on the number of
    threads.

    Args:
        total: (in, in) float32, contiguous.
        x: (tokens, in) bfloat16, contiguous.
        moments: (3, in) float32, contiguous: each input's largest magnitude so far (NaN once there was one), and the
            sums of its magnitudes and of its values, to which those of ``x`` are added.
    """
    loaded = library("gram")
    assert loaded is not None
    tokens, columns = x.shape
    packed = torch.empty(-(-columns // _PANEL), -(-min(tokens, TOKENS) // 2), _PANEL, dtype=torch.int32)
    loaded.slimwright_gram(
        pointer(x, torch.bfloat16), ctypes.c_int64(tokens), ctypes.c_int64(columns), ctypes.c_int64(TOKENS),
        ctypes.c_int64(torch.get_num_threads()), ctypes.c_void_p(torch_threads()), pointer(packed, torch.int32),
        pointer(total), pointer(moments),
    )  # fmt: skip
