"""The functions of gram.cpp on tensors."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from slimwright.kernels import available, library, pointer

TOKENS = 512
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
    threads = torch.get_num_threads()
    panels = -(-columns // _PANEL)
    packed = torch.empty(panels, -(-min(tokens, TOKENS) // 2), _PANEL, dtype=torch.int32)
    following = torch.zeros(1, dtype=torch.int64)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, tokens, TOKENS):
            part = x[start : start + TOKENS]
            pairs = -(-part.shape[0] // 2)
            following.zero_()

            def pack(first: int, part: Tensor = part) -> None:
                loaded.slimwright_gram_pack(
                    pointer(part, torch.bfloat16), ctypes.c_int64(part.shape[0]), ctypes.c_int64(columns),
                    ctypes.c_int64(first), ctypes.c_int64(threads), pointer(packed, torch.int32),
                    pointer(moments),
                )  # fmt: skip

            def add(_: int, pairs: int = pairs) -> None:
                loaded.slimwright_gram_add(
                    pointer(packed, torch.int32), ctypes.c_int64(pairs), ctypes.c_int64(columns),
                    pointer(following, torch.int64), pointer(total),
                )  # fmt: skip

            run = map if threads == 1 else pool.map
            list(run(pack, range(threads)))
            list(run(add, range(threads)))
