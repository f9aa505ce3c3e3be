"""What walks found, kept between jobs: one file an entry up to a cap, those that were used longest ago removed first.

Entries can be made again, so nothing here stops a job: one that is damaged is removed and counts as missing. Files
appear whole under their names, so any number of jobs may share a store; of two that write one entry the later stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

SUFFIX = ".safetensors"

ABANDONED_SECONDS = 3600
"""Age at which a file that nobody finished writing is removed."""


class StatisticsStore:
    """Named tensors by key, in files of a directory.

    Args:
        directory: made when something is put there.
        cap: bytes that all files together may take.
    """

    def __init__(self, directory: Path, cap: int) -> None:
        self.directory = directory
        self.cap = cap

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry by name; none where there is no such entry or it is damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return {}
        with suppress(OSError):  # of a store that may only be read
            os.utime(path)
        try:
            tensors = safetensors.torch.load(content)
            whole = _metadata(content).get("sha256") == _digest(tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            with suppress(OSError):
                path.unlink()
            return {}
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor], about: str) -> None:
        """Keep tensors under a key, in the place of what was there; then remove old entries beyond the cap.

        Args:
            about: one line that says what they are, for whoever lists the store.

        Raises:
            OSError: the file cannot be written.
        """
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        content = safetensors.torch.save(held, {"about": about, "sha256": _digest(held)})
        if len(content) > self.cap:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.directory, prefix=".new-")
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._make_room()

    def _path(self, key: str) -> Path:
        return self.directory / (key + SUFFIX)

    def _make_room(self) -> None:
        """Remove what was used longest ago until the rest is within the cap, and what was never finished."""
        found = []
        for path in self.directory.iterdir():
            with suppress(OSError):  # another job may have removed it
                status = path.stat()
                if path.suffix == SUFFIX:
                    found.append((status.st_mtime_ns, status.st_size, path))
                elif path.name.startswith(".new-") and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.cap:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def about(path: Path) -> str:
    """The line that says what a file of the store is; empty where it cannot be read."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return str(json.loads(file.read(min(length, 1 << 24)))["__metadata__"]["about"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length])["__metadata__"])


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).numpy().tobytes())
    return digest.hexdigest()
