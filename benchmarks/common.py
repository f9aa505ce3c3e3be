"""What the benchmarks share: facts about the machine, results as a table and a JSON file, watched child processes."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import slimwright

RESULTS = Path("bench-results")

Row = dict[str, Any]
"""One line of a result. ``ok`` says whether its checks held; a row of plain figures has none."""


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu": next(
            (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")), platform.processor(),
        ),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "slimwright": slimwright.__version__,
    }  # fmt: skip


def publish(name: str, rows: Sequence[Row], columns: Mapping[str, str], started: float, **facts: Any) -> list[Row]:
    """Print rows as a table and write them to bench-results/NAME.json.

    Args:
        name: of the benchmark.
        rows: what it found.
        columns: heading by key, for the table; a function of the value is not needed: floats are cut to four digits.
        started: ``time.time()`` at the start.
        facts: what else belongs into the file.
    """
    table = Table(title=name)
    for heading in columns.values():
        table.add_column(heading)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    Console(width=200).print(table)
    RESULTS.mkdir(exist_ok=True)
    result = {
        "name": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "ok": all(row.get("ok", True) for row in rows),
        "seconds": round(time.time() - started, 1),
        "machine": machine(),
        **facts,
        "rows": list(rows),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return list(rows)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def exit_code(rows: Sequence[Row]) -> int:
    """1 if a check of any row failed."""
    return int(not all(row.get("ok", True) for row in rows))


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A temporary directory, removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix=f"slimwright-bench-{name}-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def forked(function: Callable[[], None], output: Path | None = None) -> int:
    """Start a function in a forked child and return its process id; the exit status is 0, or that of SystemExit.

    The parent must not have started threads. The child gets no input; its output goes to ``output`` (else unchanged).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        function()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def plain_copy(files: Iterable[Path], written: int, target: Path) -> float:
    """Seconds to read files and to write ``written`` bytes with fsync: what no job over them can be faster than."""
    started = time.perf_counter()
    buffer = bytearray(16 << 20)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    with open(target, "wb", buffering=0) as stream:
        while written > 0:
            written -= stream.write(memoryview(buffer)[: min(written, len(buffer))])
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def file_contents(directory: Path, pattern: str = "**/*") -> dict[str, bytes]:
    """Bytes by relative name of the files that match."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }
