"""The C allocator as a process is told, and memory that is used between two samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from slimwright.job.memory import PeakWatch

HOLES = """
import json, sys
import torch
from slimwright.heap import return_large_buffers
from slimwright.job.memory import anonymous_bytes
if sys.argv[1] == "return":
    return_large_buffers()
for _ in range(2):  # freed mappings raise what glibc keeps in its heap
    torch.ones(4 << 20)
start = anonymous_bytes()
large, small = [], []
for _ in range(64):
    large.append(torch.ones(128 << 10))
    small.append(torch.ones(4 << 10))
peak = anonymous_bytes()
del large
print(json.dumps([peak - start, anonymous_bytes() - start]))
"""


def held(how: str, **environment: str) -> tuple[float, float]:
    """MB of 64 buffers of 512 KiB among small ones: while they are there, and after they were freed."""
    made = subprocess.run(
        [sys.executable, "-c", HOLES, how],
        capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    peak, after = json.loads(made.stdout)
    return peak / 1e6, after / 1e6


def test_freed_buffers_go_back_to_the_system() -> None:
    peak, after = held("return")
    assert peak > 33 and after < 6
    assert held("as it is")[1] > 10  # they are holes in the heap
    assert held("return", MALLOC_MMAP_THRESHOLD_="4000000")[1] > 10  # who sets it is obeyed


def test_a_peak_between_samples_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeakWatch, "interval", 0.2)
    with PeakWatch() as watch:
        time.sleep(0.3)  # the first sample begins the interval
        before = watch.peak
        torch.ones(16 << 20)  # 64 MiB, for some milliseconds
    assert before < 20e6 and 60e6 < watch.peak < 90e6
