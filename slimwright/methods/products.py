"""Sums and dot products of vectors that stream in tiles, exact enough to be all but independent of the tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimwright.methods.merging import BLOCK

_RUN = BLOCK // 16


def exact_sum(values: Tensor) -> Tensor:
    """float64 scalar: the sum of the elements, in runs of 16,384 that are added in float64."""
    flat = values.reshape(-1)
    whole = len(flat) // _RUN * _RUN
    return flat[:whole].view(-1, _RUN).sum(1).sum(dtype=torch.float64) + flat[whole:].sum(dtype=torch.float64)


def dot_products(vectors: Sequence[Tensor]) -> Tensor:
    """(n, n) float64: the dot products of vectors."""
    count = len(vectors)
    total = torch.zeros(count, count, dtype=torch.float64)
    for first in range(count):
        for second in range(first, count):
            total[first, second] = total[second, first] = exact_sum(vectors[first] * vectors[second])
    return total
