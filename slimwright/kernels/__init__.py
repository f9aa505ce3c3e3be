"""Compiled kernels of what torch does slowly: loops over small groups, and steps of which each needs the one before.

C++ files with a plain C interface, called through ctypes, which lets other threads run meanwhile: ``solve.cpp`` for
solvers, ``merge.cpp`` for merging. Each is compiled once, at first use, into the cache; where there is no compiler, the
callers' own torch code does the work (as it does for tensors that are not on the CPU, and under
``SLIMWRIGHT_KERNELS=off``). The files say what is equal bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from slimwright.directories import cache_directory

__all__ = ["available", "library", "pointer", "why_not"]

ABI = 1
_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """A library by the name of its source, and why there is none."""
    if os.environ.get("SLIMWRIGHT_KERNELS", "").lower() in ("off", "0", "no"):
        return None, "turned off by SLIMWRIGHT_KERNELS"
    try:
        loaded = ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
        if loaded.slimwright_abi() != ABI:
            return None, "the library is of another version"
        return loaded, ""
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def library(name: str = "solve") -> ctypes.CDLL | None:
    """The compiled kernels of a source; None where there are none."""
    return _load(name)[0]


def why_not(name: str = "solve") -> str:
    """Why there are no compiled kernels; empty where there are."""
    return _load(name)[1]


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors: real ones, on the CPU, contiguous. Never while torch traces a
    function: what it compiles is the torch code beside the kernels."""
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


def _compiled(source: Path) -> Path:
    """The shared library, compiled now if the cache does not have it.

    Raises:
        OSError: no compiler; subprocess.SubprocessError: it failed.
    """
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    key = hashlib.sha256(b"\0".join([source.read_bytes(), " ".join(_FLAGS).encode(), os.uname().machine.encode()]))
    target = cache_directory() / "kernels" / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    if compiler is None:
        raise OSError("there is no C++ compiler")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [*compiler.split(), *_FLAGS, "-o", str(made), str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        os.replace(made, target)  # another process may have made the same meanwhile: either will do
    return target
