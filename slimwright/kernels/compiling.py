"""Compiling the kernels: names, flags, the compiler. The wheel's build reads this file alone (setup.py), so it imports
neither torch nor the rest of slimwright."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SHIPPED = HERE / "compiled"
"""Where a wheel has libraries."""
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
)  # fmt: skip
"""Of every library."""
MORE_FLAGS = {"attend": ("-ffp-contract=fast",)}
"""Of libraries of one source, by name."""
PACKED_SOURCES = (
    "packed.cpp", "packed_rows.cpp", "packed_step.cpp", "packed_threads.cpp", "packed_codes.h", "packed_inputs.h",
    "packed_panels.h", "packed_vectors.h", "packed.h", "packed_step.h", "packed_threads.h", "attend.h", "common.h",
)  # fmt: skip
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"})
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "avx512bf16": (("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), _AVX512 | {"avx512_bf16"}),
    "avx512": (("-march=x86-64-v4", "-mavx512vnni"), _AVX512),
    "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})),
    "neon": ((), frozenset({"asimd"})),
    "portable": ((), frozenset()),
}
"""Flags of the compiler and names in /proc/cpuinfo by instruction set, the best first."""


class Recipe(NamedTuple):
    """What a library is made of.

    Attributes:
        name: of the library.
        sources: files beside this one; headers are read for the file's name and not compiled.
        flags: of the compiler, beside those that all libraries share.
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The library's file name, which has a hash of all that it is made of."""
        contents = [(HERE / source).read_bytes() for source in self.sources]
        words = " ".join((*FLAGS, *self.flags))
        key = hashlib.sha256(b"\0".join([*contents, words.encode(), os.uname().machine.encode()]))
        return f"{self.name}-{key.hexdigest()[:16]}.so"


def single(name: str) -> Recipe:
    """The library of the source of that name, and of the headers beside it which it includes."""
    text = (HERE / f"{name}.cpp").read_text()
    headers = re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE)
    return Recipe(name, (f"{name}.cpp", *headers), MORE_FLAGS.get(name, ()))


def packed(isa: str) -> Recipe:
    """The packed kernels for an instruction set."""
    return Recipe(f"packed-{isa}", PACKED_SOURCES, (f"-DISA={isa}", "-pthread", *INSTRUCTION_SETS[isa][0]))


def all_recipes(machine: str) -> list[Recipe]:
    """Every library for a kind of processor, as ``os.uname().machine`` calls it."""
    names = ["neon"] if machine in ("aarch64", "arm64") else ["avx512bf16", "avx512", "avx2"]
    sets = [*(names if machine in ("x86_64", "aarch64", "arm64") else []), "portable"]
    return [*(single(name) for name in ("solve", "gram", "merge", "attend")), *(packed(name) for name in sets)]


def compiler() -> str | None:
    """``$CXX``, or the first compiler there is."""
    return os.environ.get("CXX") or next((found for found in ("g++", "clang++", "c++") if shutil.which(found)), None)


def compile_into(recipe: Recipe, directory: Path, seconds: float = 300) -> Path:
    """Compile a library into a directory, whole or not at all, in so many seconds at most.

    Raises:
        OSError: no compiler; subprocess.SubprocessError: it failed.
    """
    program, target = compiler(), directory / recipe.file
    if program is None:
        raise OSError("there is no C++ compiler")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        made = Path(folder) / "made.so"
        paths = [str(HERE / source) for source in recipe.sources if source.endswith(".cpp")]
        command: Sequence[str] = [*program.split(), *FLAGS, *recipe.flags, "-o", str(made), *paths]
        subprocess.run(command, check=True, capture_output=True, timeout=seconds)
        os.replace(made, target)  # another process may have made the same meanwhile: either will do
    return target
