"""The cache directory: zoo models and, later, statistics."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from slimwright.directories import cache_directory
from slimwright.errors import InputError


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def entries() -> list[dict[str, Any]]:
    """Name and bytes of everything in the cache."""
    root = cache_directory()
    if not root.is_dir():
        return []
    return [{"name": path.name, "bytes": _bytes(path)} for path in sorted(root.iterdir())]


def remove(names: list[str] | None) -> int:
    """Remove entries by name, or all; returns the bytes freed.

    Raises:
        InputError: no such entry.
    """
    root = cache_directory()
    known = [entry["name"] for entry in entries()]
    for name in names or []:
        if name not in known:
            raise InputError(f"The cache {root} has no entry '{name}'; it has: {', '.join(known) or 'nothing'}.")
    freed = 0
    for name in names or known:
        path = root / name
        freed += _bytes(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return freed
