"""Memory as the design means it: *anonymous* memory of the process tree above a bare import (DESIGN §1.5)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import psutil

from slimwright.errors import InputError
from slimwright.sizes import parse_bytes


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of one process in bytes; 0 if it is gone. Mapped file pages do not count: the kernel may evict them."""
    found = _resident(pid)
    if not found and pid != "self" and not os.path.isdir("/proc"):
        return int(psutil.Process(int(pid)).memory_info().rss)
    return found.get("RssAnon", 0)


def _resident(pid: int | str = "self") -> dict[str, int]:
    """Bytes of one process by the kernel's name (``VmHWM``, ``RssAnon``, ``RssFile``, ``RssShmem``); empty where the
    kernel does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        pairs = (line.split(":") for line in lines if line.startswith(("VmHWM:", "Rss")))
        return {name: int(value.split()[0]) * 1024 for name, value in pairs}
    except (OSError, ValueError):
        return {}


def memory_cap(asked: str | None) -> int:
    """Bytes the job may use above a bare import: what the user asked, else 80 % of what is free.

    Raises:
        InputError: not a size.
    """
    if asked is not None:
        return parse_bytes(asked, "--job-memory")
    return int(psutil.virtual_memory().available * 0.8)


class MemoryWatch:
    """Samples this process and its :attr:`children`; remembers the peak above the start, enforces a cap.

    When the cap is passed, :attr:`exceeded` is set, the children are terminated, and the next :meth:`check` raises.

    Attributes:
        children: process ids that whoever starts a process adds. They are not searched for: that reads every process
            of the machine, and a fifth of a core spent so held up the threads that solve.
    """

    interval: ClassVar[float] = 0.02
    """Seconds between samples."""

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.baseline = anonymous_bytes()
        self.peak = 0
        self.exceeded = False
        self.children: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slimwright-memory", daemon=True)

    def _used(self) -> int:
        """Bytes above the start."""
        return anonymous_bytes() + sum(map(anonymous_bytes, tuple(self.children))) - self.baseline

    def _sample(self) -> None:
        used = self._used()
        self.peak = max(self.peak, used)
        if self.cap is not None and used > self.cap and not self.exceeded:
            self.exceeded = True
            for child in tuple(self.children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def check(self) -> None:
        """Raise if the cap was passed.

        Raises:
            InputError: the cap was passed; the sentence says by how much. What was finished is kept for a resume.
        """
        if self.exceeded:
            raise InputError(
                f"The job needed {self.peak / 1e6:.0f} MB of memory but --job-memory allows "
                f"{(self.cap or 0) / 1e6:.0f} MB; run the same command with a larger --job-memory to continue."
            )

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class PeakWatch(MemoryWatch):
    """A watch of this process alone that sees what lies between samples too: an activation lives for a millisecond.

    Of every interval the kernel knows the most resident pages of all kinds; what is mapped of files at its end, or was
    at its start, is taken from them. Where the kernel does not let the interval begin anew, samples alone count.
    """

    interval = 0.005

    def __init__(self) -> None:
        super().__init__(None)
        self._mapped = 0

    def _used(self) -> int:
        found = _resident()
        mapped = found.get("RssFile", 0) + found.get("RssShmem", 0)
        used = found.get("RssAnon", 0)
        if self._mapped:
            used = max(used, found.get("VmHWM", 0) - max(mapped, self._mapped))
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._mapped = mapped
        except OSError:
            self._mapped = 0
        return used - self.baseline

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._sample()
