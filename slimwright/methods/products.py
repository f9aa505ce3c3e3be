"""Sums and dot products of vectors that stream in tiles, exact enough to be all but independent of the tiles.

A run of 16,384 elements is added in pairs (neighbouring rows of 64 elements, then neighbouring sums, at last the 64
columns), in the vector's own dtype: the order that compiled loops follow too, bit for bit. Runs are added exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimwright.kernels import merge as kernel
from slimwright.methods.merging import StoredVectors


def run_sums(values: Tensor) -> Tensor:
    """(runs,) in the vector's dtype: sums over runs of 16,384 elements, the last perhaps shorter."""
    flat = values.reshape(-1)
    whole = len(flat) // kernel.RUN * kernel.RUN
    parts = [flat[:whole]]
    if whole < len(flat):
        parts.append(torch.nn.functional.pad(flat[whole:], (0, kernel.RUN - (len(flat) - whole))))
    sums = []
    for part in parts:
        rows = part.view(-1, kernel.RUN // kernel.LANES, kernel.LANES)
        while rows.shape[1] > 1:
            rows = rows[:, 0::2] + rows[:, 1::2]
        columns = rows[:, 0]
        while columns.shape[1] > 1:
            half = columns.shape[1] // 2
            columns = columns[:, :half] + columns[:, half:]
        sums.append(columns[:, 0])
    return torch.cat(sums)


def added(runs: Tensor) -> Tensor:
    """(quantities,) float64: the exact sums over runs of (runs, quantities)."""
    return torch.tensor([math.fsum(column) for column in runs.t().tolist()], dtype=torch.float64)


def exact_sum(values: Tensor) -> Tensor:
    """float64 scalar: the sum of the elements."""
    return added(run_sums(values)[:, None])[0]


def dot_products(vectors: Sequence[Tensor]) -> Tensor:
    """(n, n) float64: the dot products of vectors."""
    count = len(vectors)
    pairs = [(first, second) for first in range(count) for second in range(first, count)]
    found = None
    if isinstance(vectors, StoredVectors) and kernel.ready(*vectors.given):
        numel = vectors.stored[0].numel()
        found = kernel.run_sums(kernel.sources(vectors.stored), vectors.minus, numel, False)
    if found is None:
        found = torch.stack([run_sums(vectors[first] * vectors[second]) for first, second in pairs], 1)
    total = torch.zeros(count, count, dtype=torch.float64)
    for (first, second), value in zip(pairs, added(found)):
        total[first, second] = total[second, first] = value
    return total
