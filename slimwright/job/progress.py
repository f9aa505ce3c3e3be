"""Progress: one bar with a whole-job ETA on a terminal, ``events.jsonl`` in the result, logs on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from slimwright.job.memory import anonymous_bytes


class Reporter:
    """Tells the user and ``events.jsonl`` where the job is.

    Phases are announced with their forecast seconds; the ETA of the whole job is the forecast of what is left, scaled
    by how the finished part ran.

    Args:
        phases: forecast seconds by phase name, in order.
        events: file that gets one JSON object a line: time, phase, done, total, eta_seconds, memory_bytes.
        quiet: no bar and no log lines (``--json`` keeps the log lines on stderr).
    """

    def __init__(self, phases: dict[str, float], events: Path | None, quiet: bool = False) -> None:
        self.phases = {name: max(seconds, 0.01) for name, seconds in phases.items()}
        self.started = time.monotonic()
        self.phase = ""
        self._finished = 0.0
        self._last_event = 0.0
        self._last_sample = (0, 0)
        self._file: TextIO | None = open(events, "a", encoding="utf-8") if events else None  # noqa: SIM115
        self._console = Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TextColumn("left {task.fields[eta]}"), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=sum(self.phases.values()), eta="?")

    @property
    def eta(self) -> float:
        """Seconds that the rest is expected to take."""
        total, (done, of) = sum(self.phases.values()), self._last_sample
        current = self.phases.get(self.phase, 0.0) * (done / of if of else 0.0)
        spent, planned = time.monotonic() - self.started, self._finished + current
        rate = min(4.0, max(0.25, spent / planned)) if planned > 0.05 * total else 1.0
        return max(0.0, (total - planned) * rate)

    def begin(self, phase: str) -> None:
        """Enter a phase; the one before counts as finished."""
        if self.phase:
            self._finished += self.phases.get(self.phase, 0.0)
        self.phase, self._last_sample = phase, (0, 0)
        self._emit(0, 0, force=True)

    def step(self, done: int, total: int) -> None:
        """Report ``done`` of ``total`` in the current phase (any unit)."""
        self._emit(done, total, force=done >= total)

    def log(self, message: str) -> None:
        """One line for the user, on stderr."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
        self._write({"log": message})

    def _emit(self, done: int, total: int, force: bool) -> None:
        self._last_sample = (done, total)
        now = time.monotonic()
        if self._bar:
            current = self.phases.get(self.phase, 0.0) * (done / total if total else 0.0)
            eta = self.eta
            self._bar.update(
                self._task, description=self.phase, completed=self._finished + current,
                eta=f"{eta / 60:.0f} min" if eta >= 90 else f"{eta:.0f} s",
            )  # fmt: skip
        if force or now - self._last_event > 0.5:
            self._last_event = now
            self._write({"done": done, "total": total, "eta_seconds": round(self.eta, 2)})

    def _write(self, fields: dict[str, Any]) -> None:
        if self._file:
            head = {"time": round(time.time(), 3), "phase": self.phase, "memory_bytes": anonymous_bytes()}
            self._file.write(json.dumps({**head, **fields}) + "\n")
            self._file.flush()

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()
            self._file = None
