"""What a job will take, before it starts: bytes, memory, disk and seconds, from rates measured on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from slimwright.checkpoint import Checkpoint
from slimwright.job.memory import anonymous_bytes
from slimwright.job.options import LADDER, sampling
from slimwright.job.verify import SAMPLED_TILES, tokens_for
from slimwright.job.weights import TILE_ELEMENTS
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Structure

WRITE_RATE = 8e8
"""Bytes per second assumed for writing with fsync; a guess until the job itself has written something."""

READ_RATE = 2e9
"""Bytes per second assumed for reading weights that may not be in the page cache."""


@dataclass(frozen=True)
class Rates:
    """Weights (or products) per second of this machine, each timed for some tens of milliseconds.

    Attributes:
        solve: solving, packing and measuring the error, weights/s.
        score: one solve on a small sample, weights/s.
        decode: unpacking to float32, weights/s.
        multiply: float32 matrix products, multiply-adds/s.
        start: seconds that a fresh process needs until its imports are done.
    """

    solve: float
    score: float
    decode: float
    multiply: float
    start: float


@dataclass(frozen=True)
class Forecast:
    """The forecast; ``phases`` are seconds by phase, in order."""

    bytes: int
    peak_memory_bytes: int
    least_memory_bytes: int
    disk_bytes: int
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def _rate(work: int, function: Callable[[], object]) -> float:
    """Work per second, best of the second and third call."""
    function()
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return work / max(best, 1e-9)


def measure_rates(solver: WeightSolver) -> Rates:
    """Time the solver and a matrix product on this machine (about 0.3 s)."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 512, 1024
    weight = torch.randn(rows, columns, generator=generator)
    stats = SiteStatistics(survey=solver.grid.survey(weight))

    def solve() -> object:
        value = solver.solve(weight, stats)
        value.dense().sub_(weight).square_().sum(dtype=torch.float64)
        return value.save()

    value = solver.solve(weight, stats)
    a, b = torch.randn(512, 1024, generator=generator), torch.randn(1024, 1024, generator=generator)
    return Rates(
        solve=_rate(weight.numel(), solve),
        score=_rate(weight.numel(), lambda: solver.solve(weight, stats).dense()),
        decode=_rate(weight.numel(), value.dense),
        multiply=_rate(512 * 1024 * 1024, lambda: a @ b),
        start=min(20.0, max(2.0, time.time() - psutil.Process(os.getpid()).create_time())),
    )


def forecast(
    source: Checkpoint,
    structure: Structure,
    solver: WeightSolver,
    rates: Rates,
    budget: int,
    searched: bool,
    cap: int,
) -> Forecast:
    """Forecast a data-free fit.

    Args:
        budget: bytes of the result's weight files.
        searched: whether options are scored (no forced grid or plan).
        cap: bytes the job may use.
    """
    sites = list(structure.sites.values())
    weights = sum(site.numel for site in sites)
    parameters = structure.parameters
    vocabulary = max([site.rows for site in sites if site.role in ("embed", "head")] or [1])
    share = sampling(structure).share
    spare = max(64 << 20, min(cap // 4, 1 << 30))
    tokens, batch = tokens_for(parameters, vocabulary, spare)
    batches = -(-tokens // batch)
    compared = sum(min(site.numel, SAMPLED_TILES * TILE_ELEMENTS) for site in sites)
    overhead = 3e-4 * len(source.tensors)
    phases = {}
    if searched:
        phases["score"] = weights * share * len(LADDER) / rates.score + overhead * len(LADDER)
    phases["build"] = (
        weights / rates.solve * 1.4 + source.total_bytes / READ_RATE + budget / WRITE_RATE + overhead * 10 + 0.2
    )
    phases["verify"] = (
        rates.start
        + 0.5
        + 1.3 * compared / rates.score
        + weights / rates.score
        + batches * weights * (1.5 / rates.decode + 4e-10)
        + 3 * tokens * parameters / rates.multiply
        + overhead * 10
    )
    phases["publish"] = budget / 1.2e9 + 0.3
    memory, least = _memory(source, structure, batch, vocabulary)
    return Forecast(
        bytes=budget,
        peak_memory_bytes=memory,
        least_memory_bytes=least,
        disk_bytes=budget + (1 << 20),
        phases=phases,
    )


def _memory(source: Checkpoint, structure: Structure, batch: int, vocabulary: int) -> tuple[int, int]:
    """(peak, least possible peak) in bytes above a bare import. The verifying process's own import counts."""
    child = max(anonymous_bytes(), 250_000_000)
    dense = 4 * sum(source.tensors[name].numel for name in structure.kept if name in source.tensors)
    largest = max([site.numel for site in structure.sites.values()] or [1])
    tile = 4 * min(largest, 16 << 20)
    build = 14 * 4 * min(largest, TILE_ELEMENTS)

    def verifying(tokens: int) -> int:
        return child + 3 * dense + 4 * tile + 14 * tokens * vocabulary + 64 * tokens * 4096 + 30_000_000

    return max(build, verifying(batch)), max(build, verifying(64))
