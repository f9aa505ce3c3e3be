"""What walks will take: forwards, Grams and their factors, options scored, from rates timed on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimwright.calibrate.sensitivity import REVERSE_TOKENS
from slimwright.calibrate.statistics import APART_SHARE, APART_TOKENS, InputSums
from slimwright.calibrate.tokens import BATCH_TOKENS
from slimwright.calibrate.walk import walk_units
from slimwright.checkpoint import Checkpoint
from slimwright.job.options import LADDER
from slimwright.job.probe import REVERSE_LOGITS, SCORED_PRODUCTS
from slimwright.job.verify import logits_width
from slimwright.job.walked import walk_dtype
from slimwright.job.walked_build import SOLVED_ELEMENTS
from slimwright.methods import WeightSolver
from slimwright.model.structure import Structure

THREAD_BYTES = 30_000_000
"""Anonymous bytes that each thread's buffers of matrix products and its heap take (measured)."""

TIMED_ELEMENTS = 1 << 21
"""Numbers in the widest tensor of what is timed."""

SEQUENCE = 512
"""Tokens of a sequence, if the model has positions for as many."""


def rate_of(work: int, function: Callable[[], object]) -> float:
    """Work per second of the calling thread, best of the second and third call."""
    function()
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return work / max(best, 1e-9)


@dataclass(frozen=True)
class WalkCost:
    """Seconds of a walk that only collects statistics, of the probe and of the build walk, bytes at their peak and at
    least."""

    fold: float
    probe: float
    build: float
    memory: int
    least_memory: int


def walk_cost(
    source: Checkpoint,
    structure: Structure,
    solver: WeightSolver,
    multiply: float,
    tokens: int,
    cap: int,
    searched: bool,
) -> WalkCost:
    """What calibrating on ``tokens`` takes beside solving: forwards, Grams, their factors; where options are searched,
    scoring them and the reverse walk.

    Args:
        multiply: float32 multiply-adds per second.
    """
    dtype = walk_dtype(source, structure)
    units = [unit for unit in walk_units(structure).values() if unit.sites]
    block_weights = sum(site.numel * unit.runs for unit in units for site in unit.sites if unit.block)
    grams = [
        {site.gram_group or site.name: site.columns for site in unit.sites if site.kind != "experts"} for unit in units
    ]  # fmt: skip
    cubes = sum(n**3 for group in grams for n in group.values())
    blocks = sum(unit.runs for unit in units if unit.block)
    tallest = max([site.weight_shape[-2] for unit in units if unit.block for site in unit.sites] or [1])
    hidden = max(
        [site.columns for site in structure.sites.values() if site.role in ("q", "qkv", "gate", "up")] or [512]
    )
    positions = source.config.get("max_position_embeddings")
    length = min(SEQUENCE, positions) if isinstance(positions, int) and positions > 0 else SEQUENCE
    between = blocks * _between_products(dtype, hidden, tallest, length)
    forward = tokens * (block_weights / _multiply_rate(dtype, hidden, tallest) + between)
    sums = {n: _seconds_of_sums(dtype, n) for group in grams for n in group.values()}
    gram = tokens * sum(sums[n] for group in grams for n in group.values())
    factor = cubes / 6 / (0.3 * multiply)
    products = sum(site.numel * site.columns for site in structure.sites.values())
    scored = min(products, SCORED_PRODUCTS) * len(LADDER) / multiply
    reverse = min(tokens, REVERSE_TOKENS)
    head = sum(site.numel for unit in units if not unit.block for site in unit.sites)
    fed = products / 2 / multiply if solver.needs else 0.0  # the feedback from the columns before a block's
    backward = reverse * ((4 * block_weights + 3 * head) / multiply + 4 * between)
    probe = forward + gram + factor + scored + backward + 1.0
    # What is used before its inputs are known is solved on a walk of its own.
    tied = set(structure.ties.values())
    early = any(unit.runs > 1 or any(site.name in tied for site in unit.sites if not unit.block) for unit in units)
    build = (3 if early else 2) * forward + gram + factor + fed + 1.0

    largest = max([sum(site.numel for site in unit.sites) for unit in units] or [0])
    size = dtype.itemsize
    held = largest * size
    whole = max([sum(4 * n * n for n in group.values()) for group in grams] or [0])
    running = min(tokens, BATCH_TOKENS) * (size * (3 * tallest + 4 * hidden) + 2 * 4 * hidden)
    tiles = torch.get_num_threads() * 7 * 4 * SOLVED_ELEMENTS
    kept = size * sum(source.tensors[name].numel for name in structure.kept if name in source.tensors)
    states = tokens * hidden * size
    base = held + states + 2 * kept + 60_000_000 + torch.get_num_threads() * THREAD_BYTES
    solving = 2 * whole + tiles  # Grams and their factors
    collecting = whole + running
    peak = base + max(solving, collecting)
    movable = states
    if searched:
        apart = int(1.5 * min(APART_SHARE * tokens, APART_TOKENS))
        peak += apart * size * max([sum(group.values()) for group in grams] or [0])
        backwards = min(tokens, BATCH_TOKENS, max(512, REVERSE_LOGITS // max(1, logits_width(structure))))
        graph = backwards * (size * 2 * (4 * tallest + 8 * hidden) + 24 * hidden)
        peak = max(peak, base + graph + 6 * 4 * REVERSE_LOGITS)
        movable = max(movable, reverse * hidden * size * len(units))
    return WalkCost(forward + gram + 1.0, probe, build, int(peak + min(movable, cap // 4)), int(peak))


def _multiply_rate(dtype: torch.dtype, columns: int, rows: int) -> float:
    """Multiply-adds per second of a product with a matrix of about that shape, on all threads."""
    columns, rows = min(columns, 1024), min(rows, 1024)
    x, weight = torch.randn(1024, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    return rate_of(1024 * weight.numel(), lambda: torch.nn.functional.linear(x, weight))


def _between_products(dtype: torch.dtype, hidden: int, inner: int, length: int) -> float:
    """Seconds per token of what a block does between its products: norms, rotations, attention, an activation."""
    tokens = max(128, min(1024, TIMED_ELEMENTS // max(hidden, inner)))
    length = min(length, tokens)
    rows, width = tokens // length, min(64, hidden)
    x = torch.randn(rows, length, hidden // width * width).to(dtype)
    wide = torch.randn(rows, length, inner).to(dtype)

    def block() -> object:
        y = x
        for _ in range(2):
            norm = y.float()
            y = x + x * (norm * torch.rsqrt(norm.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        q = y.unflatten(-1, (-1, width)).transpose(1, 2)
        for _ in range(2):
            q = q * q + torch.cat((-q[..., width // 2 :], q[..., : width // 2]), -1) * q
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return attended.transpose(1, 2).flatten(2) + x, torch.nn.functional.silu(wide) * wide

    return 1 / rate_of(rows * length, block)


def _seconds_of_sums(dtype: torch.dtype, columns: int) -> float:
    """Seconds per token of summing up the inputs of a site: its Gram above all."""
    timed = min(columns, 1024)
    x, sums = torch.randn(1024, timed).to(dtype), InputSums(timed)
    return (columns / timed) ** 2 / rate_of(1024, lambda: sums.add(x))
