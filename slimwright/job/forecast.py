"""What a job will take, before it starts: bytes, memory, disk and seconds, from rates measured on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from slimwright.checkpoint import Checkpoint
from slimwright.job.fold_walk import SCORED_PRODUCTS as FOLD_PRODUCTS
from slimwright.job.held_out import RETRIEVED_QUERIES, RETRIEVED_TOKENS, retrieves
from slimwright.job.low_rank import Work as LowRankWork
from slimwright.job.options import FEW_GROUPS, FINE_LADDER, LADDER, sampling
from slimwright.job.parallel import in_order
from slimwright.job.verify import SAMPLE_TOKENS, SAMPLED_BELOW, logits_width, spare_bytes, tokens_for
from slimwright.job.verify_files import SAMPLED_TILES
from slimwright.job.walk_forecast import THREAD_BYTES, rate_of, walk_cost
from slimwright.job.weights import TILE_ELEMENTS, plain_rounding
from slimwright.kernels import attend, packed, switched_off
from slimwright.methods import GroupFold, SiteStatistics, WeightSolver
from slimwright.model.structure import Structure
from slimwright.weights import Dense, unpack_rows

WRITE_RATE = 8e8
"""Bytes per second assumed for writing with fsync; a guess until the job itself has written something."""

CHILD_IMPORT = 330_000_000
"""Anonymous bytes of the verifying process once torch, transformers and a model's class are imported (measured)."""

COMPILE_SECONDS = 15.0
"""Time that compiling one of the larger kernels takes when it is first used (measured)."""

CONVERT = 4e-10
"""Seconds to read one weight of the source and convert it to float32."""

EVALUATION_SECONDS = 0.02
"""What an evaluation takes beside its products."""


def _started() -> float:
    """Seconds that this process needed until its imports were done: its age, but of one that waited or worked on
    something else before (a notebook) no more than twice what it has computed."""
    process = psutil.Process(os.getpid())
    computed = sum(process.cpu_times()[:2])
    return min(20.0, max(2.0, min(time.time() - process.create_time(), 2 * computed)))


STARTED = _started()

READ_RATE = 2e9
"""Bytes per second assumed for reading weights that may not be in the page cache."""


@dataclass(frozen=True)
class Rates:
    """Weights (or products) per second of this machine, each timed for some tens of milliseconds.

    Attributes:
        solve: solving, packing and measuring the errors on all worker threads, weights/s.
        score: one solve on all worker threads, weights/s.
        decode: unpacking to float32 in one call of torch, weights/s.
        multiply: float32 matrix products, multiply-adds/s.
        start: seconds that a fresh process needs until its imports are done.
    """

    solve: float
    score: float
    decode: float
    multiply: float
    start: float


@dataclass(frozen=True)
class Evaluations:
    """Runs of the model beside the walks and the verification: how many, and on how many tokens all together."""

    count: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Forecast:
    """The forecast; ``phases`` are seconds by phase, in order; ``evaluations`` are those of the search."""

    bytes: int
    peak_memory_bytes: int
    least_memory_bytes: int
    disk_bytes: int
    phases: dict[str, float] = field(default_factory=dict)
    evaluations: int = 0

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def _pooled_rate(work: int, function: Callable[[], object]) -> float:
    """Work per second of all worker threads together, each doing ``work`` in a call."""
    calls = 2 * torch.get_num_threads()
    return rate_of(work * calls, lambda: [None for _ in in_order(lambda _: function(), range(calls))])


def measure_rates(solver: WeightSolver) -> Rates:
    """Time the solver and a matrix product on this machine, as busy as it is now (about 0.5 s)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=generator)
    survey = solver.grid.survey(weight)
    inputs = torch.randn(256, 1024, generator=generator)
    stats = SiteStatistics.from_inputs(inputs) if solver.needs else SiteStatistics.none()
    without, stats = SiteStatistics(survey=survey), stats.with_survey(survey)
    plain = plain_rounding(solver)
    value = solver.solve(weight, stats)
    parts = value.save()

    def solve() -> object:
        solved = solver.solve(weight, stats)
        solved.dense().sub_(weight).square_().sum(dtype=torch.float64)
        if plain is not None:
            plain.solve(weight, without).dense().sub_(weight).square_().sum(dtype=torch.float64)
        return solved.save()

    def decode() -> object:
        if isinstance(value, Dense):
            return value.dense()
        return solver.grid.decode(*unpack_rows(solver.grid, parts, value.shape))

    a, b = torch.randn(128, 1024, generator=generator), torch.randn(1024, 2048, generator=generator)
    return Rates(
        solve=_pooled_rate(weight.numel(), solve),
        score=_pooled_rate(weight.numel(), lambda: solver.solve(weight, stats).dense()),
        decode=rate_of(weight.numel(), decode),
        multiply=rate_of(a.shape[0] * b.numel(), lambda: a @ b),
        start=STARTED,
    )


def forecast(
    source: Checkpoint,
    structure: Structure,
    solver: WeightSolver,
    rates: Rates,
    budget: int,
    searched: bool,
    cap: int,
    tokens_seen: int = 0,
    folds: Sequence[GroupFold] = (),
    ranges: bool = False,
    eval_tokens: int | None = None,
    eval_queries: int | None = None,
    low_rank: LowRankWork | None = None,
    evaluations: Evaluations = Evaluations(),
) -> Forecast:
    """Forecast a fit.

    Args:
        budget: bytes of the result's weight files.
        searched: whether options are scored (no forced grid or plan).
        cap: bytes the job may use.
        tokens_seen: tokens that it calibrates on; 0: data-free.
        folds: whose scales are found first, each in a walk of its own.
        ranges: whether scales of activations are found in another.
        eval_tokens: that the quality is measured on; None: :func:`tokens_for` says.
        eval_queries: that an encoder's nDCG@10 is measured on; None: :data:`RETRIEVED_QUERIES`.
        low_rank: what scoring (where options are searched) or solving low-rank forms takes.
        evaluations: of the search.
    """
    sites = list(structure.sites.values())
    weights = sum(site.numel for site in sites)
    parameters = structure.parameters
    vocabulary = logits_width(structure)
    share = sampling(structure).share
    spare = spare_bytes(cap)
    tokens, batch = tokens_for(parameters, vocabulary, spare, eval_tokens)
    batches = -(-tokens // batch)
    compared = sum(min(site.numel, SAMPLED_TILES * TILE_ELEMENTS) for site in sites)
    overhead = 3e-4 * len(source.tensors)
    phases = {}
    walks = walk_cost(source, structure, solver, rates.multiply, tokens_seen, cap, searched) if tokens_seen else None
    if folds and walks is not None:
        products = min(FOLD_PRODUCTS, sum(site.numel * site.columns for site in sites))
        phases["fold"] = sum(walks.fold + fold.trials * products / rates.multiply for fold in folds)
    if searched:
        ladder = FINE_LADDER if len(structure.choice_groups()) <= FEW_GROUPS else LADDER
        phases["score"] = weights * share * len(ladder) / rates.score + overhead * len(ladder)
    if walks is not None and ranges:
        phases["ranges"] = walks.fold
    if walks is not None and searched:
        phases["score"] = walks.probe + phases["score"]
    if evaluations.count:
        # Every evaluation solves what changed, and reads outputs as wide as the vocabulary in float64.
        products = 1.3 * parameters + 24 * vocabulary
        phases["score"] += evaluations.tokens * products / rates.multiply + evaluations.count * EVALUATION_SECONDS
        phases["score"] += min(evaluations.count, 8) * weights / (rates.solve if solver.needs else rates.score)
        phases["score"] += walks.fold if walks is not None and solver.needs else 0.0
    phases["build"] = weights / rates.solve + source.total_bytes / READ_RATE + budget / WRITE_RATE + 4 * overhead + 0.1
    if walks is not None and solver.needs:
        phases["build"] += walks.build
    low_rank = low_rank or LowRankWork()
    phases["score" if searched else "build"] += low_rank.products / rates.multiply
    generated = 2 * SAMPLE_TOKENS if parameters < SAMPLED_BELOW else 0
    phases["verify"] = (
        1.5 * rates.start  # imports, and three models built
        + (compared + weights) / rates.score
        + batches * weights * (1 / rates.decode + CONVERT)
        + (2 * tokens + min(tokens, batch)) * parameters / rates.multiply
        + generated * weights * (1 / rates.decode + CONVERT)
        + 10 * overhead
        + 0.5
    )
    if retrieves(Path(source.path), parameters):
        multiplied = sum(site.numel for site in sites if site.kind != "embedding")
        embedded = RETRIEVED_TOKENS * (eval_queries or RETRIEVED_QUERIES) / RETRIEVED_QUERIES
        phases["verify"] += rates.start + 1.3 * embedded * multiplied / rates.multiply
    if not switched_off():
        phases["verify"] += COMPILE_SECONDS * (not packed.compiled()) + COMPILE_SECONDS * (
            generated > 0 and not attend.compiled()
        )
    phases["publish"] = budget / 1.2e9 + 0.3
    if not searched and not tokens_seen:  # the verification solves data-free factors again
        phases["verify"] += low_rank.products / rates.multiply
    memory, least = _memory(source, structure, batch, vocabulary)
    memory, least = memory + torch.get_num_threads() * low_rank.memory, max(least, low_rank.memory)
    if walks is not None:
        memory, least = max(memory, walks.memory), max(least, walks.least_memory)
        if evaluations.count:  # the original's outputs and rounded weights, as many as a quarter of the cap holds
            memory += min(cap // 4, 4 * tokens_seen * vocabulary + 12 * weights)
    return Forecast(
        bytes=budget,
        peak_memory_bytes=memory,
        least_memory_bytes=least,
        disk_bytes=budget + (1 << 20),
        phases=phases,
        evaluations=evaluations.count,
    )


def _memory(source: Checkpoint, structure: Structure, batch: int, vocabulary: int) -> tuple[int, int]:
    """(peak, least possible peak) in bytes above a bare import. The verifying process's own import counts."""
    child = CHILD_IMPORT
    dense = 4 * sum(source.tensors[name].numel for name in structure.kept if name in source.tensors)
    largest = max([site.numel for site in structure.sites.values()] or [1])
    tile = 4 * min(largest, 16 << 20)
    hidden = max([site.columns for site in structure.sites.values() if site.role in ("embed", "head")] or [1024])
    build = 14 * 4 * min(largest, TILE_ELEMENTS)
    child += (torch.get_num_threads() - 1) * THREAD_BYTES

    def verifying(tokens: int) -> int:
        # logits of three models
        return child + 3 * dense + 4 * tile + 12 * tokens * vocabulary + 128 * tokens * hidden + 30_000_000

    return max(build, verifying(batch)), max(build, verifying(64))
