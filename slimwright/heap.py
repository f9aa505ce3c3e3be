"""The C allocator of this process: when it gives freed memory back to the system. Only glibc's is told."""

from __future__ import annotations

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Parameters of glibc's mallopt."""

LARGE = 64 << 10
"""Bytes from which :func:`return_large_buffers` lets a buffer be mapped by itself."""


def trim() -> None:
    """Give freed heap pages back to the system, so that finished work does not count against a cap."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reuse_freed_pages() -> None:
    """Let the allocator keep what tiles free for the next tile, instead of giving it back and faulting it in again:
    1.4 times the speed of solving on one core. :func:`trim` gives it back when a phase is over."""
    _set({_MMAP_THRESHOLD: 8 << 20, _TRIM_THRESHOLD: 256 << 20, _TOP_PAD: 16 << 20})


def return_large_buffers() -> None:
    """Let the allocator give every buffer of 64 KiB and more back as soon as it is freed. By itself it keeps buffers of
    up to 32 MB in a heap with holes, so that a run takes more memory, and each run another amount. An environment that
    sets ``MALLOC_MMAP_THRESHOLD_`` is obeyed instead."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _set({_MMAP_THRESHOLD: LARGE, _TRIM_THRESHOLD: 2 * LARGE, _TOP_PAD: LARGE, _ARENA_MAX: 2})
        trim()


def _set(parameters: dict[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
