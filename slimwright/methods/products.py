"""Dot products of vectors that stream in tiles, exact enough to be independent of the tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimwright.methods.merging import BLOCK

_RUN = BLOCK // 16


def dot_products(vectors: Sequence[Tensor]) -> Tensor:
    """(n, n) float64: the dot products of flat vectors, in runs of 16,384 elements that are added in float64."""
    count = len(vectors)
    total = torch.zeros(count, count, dtype=torch.float64)
    flat = [vector.reshape(-1) for vector in vectors]
    for first in range(count):
        for second in range(first, count):
            products = flat[first] * flat[second]
            whole = len(products) // _RUN * _RUN
            runs = products[:whole].view(-1, _RUN).sum(1)
            dot = runs.sum(dtype=torch.float64) + products[whole:].sum(dtype=torch.float64)
            total[first, second] = total[second, first] = dot
    return total
