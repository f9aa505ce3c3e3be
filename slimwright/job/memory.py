"""Memory as the design means it: *anonymous* memory of the process tree above a bare import (DESIGN §1.5)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from pathlib import Path
from types import TracebackType

import psutil

from slimwright.errors import InputError
from slimwright.sizes import parse_bytes


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of one process in bytes; 0 if it is gone. Mapped file pages do not count: the kernel may evict them."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        if pid != "self" and not os.path.isdir("/proc"):
            return int(psutil.Process(int(pid)).memory_info().rss)
    return 0


def memory_cap(asked: str | None) -> int:
    """Bytes the job may use above a bare import: what the user asked, else 80 % of what is free.

    Raises:
        InputError: not a size.
    """
    if asked is not None:
        return parse_bytes(asked, "--job-memory")
    return int(psutil.virtual_memory().available * 0.8)


def trim() -> None:
    """Give freed heap pages back to the system, so that finished work does not count against the cap."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reuse_freed_pages() -> None:
    """Let the allocator keep what tiles free for the next tile, instead of giving it back and faulting it in again:
    1.4 times the speed of solving on one core. :func:`trim` gives it back when a phase is over."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_MMAP_THRESHOLD, 8 << 20), (_TRIM_THRESHOLD, 256 << 20), (_TOP_PAD, 16 << 20)):
            libc.mallopt(parameter, value)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt."""


class MemoryWatch:
    """Samples this process and its :attr:`children` every 20 ms; remembers the peak above the start, enforces a cap.

    When the cap is passed, :attr:`exceeded` is set, the children are terminated, and the next :meth:`check` raises.

    Attributes:
        children: process ids that whoever starts a process adds. They are not searched for: that reads every process
            of the machine, and a fifth of a core spent so held up the threads that solve.
    """

    def __init__(self, cap: int | None) -> None:
        self.cap = cap
        self.baseline = anonymous_bytes()
        self.peak = 0
        self.exceeded = False
        self.children: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slimwright-memory", daemon=True)

    def _sample(self) -> None:
        used = anonymous_bytes() + sum(map(anonymous_bytes, tuple(self.children))) - self.baseline
        self.peak = max(self.peak, used)
        if self.cap is not None and used > self.cap and not self.exceeded:
            self.exceeded = True
            for child in tuple(self.children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
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
