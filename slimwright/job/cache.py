"""The cache directory: zoo models, compiled kernels, what walks found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from slimwright.calibrate.store import SUFFIX, about
from slimwright.directories import cache_directory
from slimwright.errors import InputError

STATISTICS = "statistics"
"""Directory of :mod:`slimwright.calibrate.store` in the cache."""


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def entries() -> list[dict[str, Any]]:
    """Name and bytes of everything in the cache; of statistics each entry by itself, with ``what`` it is."""
    root = cache_directory()
    if not root.is_dir():
        return []
    found: list[dict[str, Any]] = []
    for path in sorted(root.iterdir()):
        kept = sorted(path.glob(f"*{SUFFIX}")) if path.name == STATISTICS and path.is_dir() else []
        found += [
            {"name": f"{STATISTICS}/{file.stem}", "bytes": _bytes(file), "what": about(file)} for file in kept
        ] or [{"name": path.name, "bytes": _bytes(path)}]
    return found


def remove(names: list[str] | None) -> int:
    """Remove entries by name, or all; returns the bytes freed.

    Raises:
        InputError: no such entry.
    """
    root = cache_directory()
    known = [entry["name"] for entry in entries()]
    statistics = [name for name in known if name.startswith(f"{STATISTICS}/")]
    for name in names or []:
        if name not in known and not (name == STATISTICS and statistics):
            raise InputError(f"The cache {root} has no entry '{name}'; it has: {', '.join(known) or 'nothing'}.")
    freed = 0
    for name in names or sorted({name.partition("/")[0] for name in known}):
        path = root / (name + SUFFIX if name in statistics else name)
        freed += _bytes(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return freed
