"""Compiled kernels: loops over small groups, steps of which each needs the one before, products with packed weights.

Small C++ libraries with a plain C interface, called through ctypes, which lets other threads run meanwhile: one for
every module beside this file, named after it. Each is compiled once, at first use, into the cache; where there is no
compiler, the callers' own torch code does the work (as it does for tensors that are not on the CPU, and under
``SLIMWRIGHT_KERNELS=off``). The sources say what is equal bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimwright.directories import cache_directory

__all__ = ["available", "library", "pointer", "shared_library", "switched_off", "torch_threads", "why_not"]


_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip


def switched_off() -> str:
    """Why the kernels are not to be used; empty where they are."""
    off = os.environ.get("SLIMWRIGHT_KERNELS", "").lower() in ("off", "0", "no")
    return "turned off by SLIMWRIGHT_KERNELS" if off else ""


@functools.cache
def _load(name: str, flags: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    """A library, and why there is none."""
    if off := switched_off():
        return None, off
    try:
        return ctypes.CDLL(str(shared_library(name, sources(name), flags))), ""
    except (OSError, subprocess.SubprocessError) as error:
        return None, one_line(error)


@functools.cache
def sources(name: str) -> tuple[str, ...]:
    """Files of a library of one source: that, and the headers beside it which it includes."""
    text = Path(__file__).with_name(f"{name}.cpp").read_text()
    return (f"{name}.cpp", *re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE))


def library(name: str = "solve", flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library of a source beside this file; None where there is none.

    Args:
        flags: of the compiler, beside those that all libraries share.
    """
    return _load(name, flags)[0]


def why_not(name: str = "solve", flags: tuple[str, ...] = ()) -> str:
    """Why there is no such library; empty where there is."""
    return _load(name, flags)[1]


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


def library_path(name: str, sources: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """Where the cache has a shared library, or will have it; arguments as of :func:`shared_library`."""
    contents = [Path(__file__).with_name(source).read_bytes() for source in sources]
    words = " ".join((*_FLAGS, *flags))
    key = hashlib.sha256(b"\0".join([*contents, words.encode(), os.uname().machine.encode()]))
    return cache_directory() / "kernels" / f"{name}-{key.hexdigest()[:16]}.so"


def shared_library(name: str, sources: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """A shared library, compiled now if the cache does not have it.

    Args:
        name: of the library.
        sources: files beside this one; headers are read for the cache's key and not compiled.
        flags: of the compiler, beside those that all libraries share.

    Raises:
        OSError: no compiler; subprocess.SubprocessError: it failed.
    """
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    target = library_path(name, sources, flags)
    paths, flags = [Path(__file__).with_name(source) for source in sources], (*_FLAGS, *flags)
    if target.exists():
        return target
    if compiler is None:
        raise OSError("there is no C++ compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "made.so"
        command = [*compiler.split(), *flags, "-o", str(made), *(str(path) for path in paths if path.suffix == ".cpp")]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        os.replace(made, target)  # another process may have made the same meanwhile: either will do
    return target
