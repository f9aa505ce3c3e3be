"""The journal of a job: one line per finished unit, on the disk before the unit counts as finished.

A line is the CRC-32 of its JSON in eight hex digits, a space, the JSON and a newline. The first says which job it is
(`{"journal": 1, "key": ...}`), every other one which unit is done, with what later units need to know of it
(`{"unit": ..., "payload": ...}`). Lines are only ever appended; a tail that a crash cut short or mixed up fails its
checksum and is dropped when the journal is opened. All lines of a commit but its last say `"more": true`: of a commit
that was cut short nothing counts, since what was found together may not be found again for a part of it.
"""

import functools
import hashlib
import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import torch

import slimwright
from slimwright import kernels
from slimwright.checkpoint import faults
from slimwright.checkpoint.files import shown, write_bytes_atomic
from slimwright.errors import InputError, SlimwrightError

FORMAT_VERSION = 1


class Journal:
    """The finished units of one job. `done` maps each to its payload, in the order of their commits.

    Open it with `Journal.open`. What a unit wrote must be on the disk before its commit: `writer.sync()` comes first.
    Safe to use from several threads.
    """

    def __init__(self, path: Path, key: str, done: dict[str, Any], descriptor: int) -> None:
        self.path = path
        self.key = key
        self.done = done
        self._descriptor = descriptor
        self._pending: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, key: str, reset: bool = False) -> "Journal":
        """Open the journal of job `key`, made if there is none.

        One of another job, or of a later version, is replaced if `reset` is true, else InputError.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        records, kept = _read(content)
        head = records[0] if records else None
        if head is not None and (head.get("journal") != FORMAT_VERSION or head.get("key") != key):
            if not reset:
                raise InputError(
                    f"{shown(path)} is the journal of another job: remove {shown(path.parent)}, or start over."
                )
            head = None
        done: dict[str, Any] = {}
        if head is None:
            write_bytes_atomic(path, _line({"journal": FORMAT_VERSION, "key": key}))
        else:
            for record in records[1:]:
                done[record["unit"]] = record["payload"]
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        if head is not None and kept != len(content):
            os.ftruncate(descriptor, kept)
            os.fsync(descriptor)
        return cls(path, key, done, descriptor)

    def append(self, unit: str, payload: Any = None) -> None:
        """Note that `unit` is finished; it counts from the next `commit` on. `payload` is any JSON value."""
        copied = json.loads(json.dumps(payload, allow_nan=False))
        with self._lock:
            self._pending.append((unit, copied))

    def commit(self) -> None:
        """Bring all appended units to the disk at once. SlimwrightError if the disk is full: then none is noted."""
        with self._lock:
            pending, self._pending = self._pending, []
            if not pending:
                return
            records = [{"unit": unit, "payload": payload} for unit, payload in pending]
            content = b"".join(_line(record | {"more": True}) for record in records[:-1]) + _line(records[-1])
            faults.reach("journal")
            faults.reach("torn-journal", lambda: os.write(self._descriptor, content[: len(content) // 2]))
            before = os.fstat(self._descriptor).st_size
            try:
                if os.write(self._descriptor, content) != len(content):
                    raise OSError(28, "No space left on device")
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, before)
                self._pending = pending + self._pending
                raise SlimwrightError(
                    f"{shown(self.path)} cannot be written ({error.strerror}): free space, then run again to resume."
                ) from error
            self.done.update(pending)
            faults.reach("journal")

    def close(self) -> None:
        """Close the file; units appended but not committed are forgotten."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def job_key(**parts: Any) -> str:
    """SHA-256 (hex) of everything that decides a job's bytes: model, data, recipe, environment. Parts are JSON values.

    ValueError or TypeError for a value that JSON lacks (NaN, an object): a key must not depend on how it is printed.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def environment_key(library: str = "solve") -> dict[str, Any]:
    """What makes the same code on the same input give other bytes: threads, instruction set, torch, our own code.

    Args:
        library: which compiled kernels the job uses.
    """
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "kernels": not kernels.why_not(library),
        "slimwright": slimwright.__version__,
        "code": code_version(),
    }


@functools.cache
def code_version() -> str:
    """SHA-256 (hex, 16 digits) over the package's Python and C++ files as they are installed."""
    root = Path(slimwright.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.cpp")]):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _read(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records of the whole commits at the beginning of a journal, and how many bytes they are."""
    records: list[dict[str, Any]] = []
    position, whole, kept = 0, 0, 0
    while (end := content.find(b"\n", position)) >= 0:
        line = content[position:end]
        text = line[9:]
        if line[:9] != b"%08x " % zlib.crc32(text):
            break
        try:
            record = json.loads(text)
        except ValueError:
            break
        if not isinstance(record, dict) or (records and not {"unit", "payload"} <= record.keys()):
            break
        records.append(record)
        position = end + 1
        if "more" not in record:
            whole, kept = len(records), position
    return records[:whole], kept
