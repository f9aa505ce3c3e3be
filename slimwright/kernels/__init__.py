"""Compiled kernels: loops over small groups, steps of which each needs the one before, products with packed weights.

Small C++ libraries with a plain C interface, called through ctypes, which lets other threads run meanwhile: one for
every module beside this file, named after it. A wheel has them compiled; else each is compiled once, at first use,
into the cache (:mod:`slimwright.kernels.compiling`). Where there is no compiler, the callers' own torch code does the
work (as it does for tensors that are not on the CPU, and under ``SLIMWRIGHT_KERNELS=off``). The sources say what is
equal bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from slimwright.directories import cache_directory
from slimwright.kernels.compiling import SHIPPED, Recipe, compile_into, single

__all__ = ["available", "library", "pointer", "shared_library", "switched_off", "torch_threads", "why_not"]


def switched_off() -> str:
    """Why the kernels are not to be used; empty where they are."""
    off = os.environ.get("SLIMWRIGHT_KERNELS", "").lower() in ("off", "0", "no")
    return "turned off by SLIMWRIGHT_KERNELS" if off else ""


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """A library, and why there is none."""
    if off := switched_off():
        return None, off
    try:
        return ctypes.CDLL(str(shared_library(single(name)))), ""
    except (OSError, subprocess.SubprocessError) as error:
        return None, one_line(error)


def library(name: str = "solve") -> ctypes.CDLL | None:
    """The library of a source beside this file; None where there is none."""
    return _load(name)[0]


def why_not(name: str = "solve") -> str:
    """Why there is no such library; empty where there is."""
    return _load(name)[1]


def one_line(error: Exception) -> str:
    """The first line of what an error says; a compiler's own words where it failed."""
    said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
    return next((line for line in said.splitlines() if line.strip()), type(error).__name__)


def available(*tensors: Tensor) -> bool:
    """Whether the kernels of ``solve`` can work on these tensors: real ones, on the CPU, contiguous. Never while torch
    traces a function: what it compiles is the torch code beside the kernels."""
    if torch.compiler.is_compiling():
        return False
    return library() is not None and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> ctypes.c_void_p:
    """The address of a contiguous tensor of that dtype; null for None.

    Raises:
        TypeError: another dtype or not contiguous: a mistake of the caller's that would corrupt memory.
    """
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise TypeError(f"A kernel takes a contiguous {dtype} tensor on the CPU, not {tensor.dtype} {tensor.stride()}.")
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def torch_threads() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP library that torch runs on, whose threads are then a kernel's too: two
    sets of threads would spin against each other. None where there is no such library."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}
    home = str(Path(torch.__file__).parent.parent)
    for path in sorted(paths, key=lambda path: not path.startswith(home)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def library_path(recipe: Recipe) -> Path:
    """Where a library is: in the package, if the wheel had it; else where the cache has it, or will."""
    shipped = SHIPPED / recipe.file
    return shipped if shipped.exists() else cache_directory() / "kernels" / recipe.file


def shared_library(recipe: Recipe) -> Path:
    """A library, compiled now if neither the package nor the cache has it.

    Raises:
        OSError: no compiler; subprocess.SubprocessError: it failed.
    """
    target = library_path(recipe)
    return target if target.exists() else compile_into(recipe, target.parent)
