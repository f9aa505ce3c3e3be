"""Task vectors combined: weighted sums, elected signs, disjoint means. Masks are float arithmetic, which torch
vectorises; its boolean operations are several times slower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-30
"""Below every magnitude that counts, and no denormal number: those are slow."""


def scaled_sum(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(weight * vector)``, in the memory of the first vector; the other vectors are written into too."""
    total = vectors[0] if weights[0] == 1 else vectors[0].mul_(weights[0])
    for vector, weight in zip(vectors[1:], weights[1:]):
        total.add_(vector if weight == 1 else vector.mul_(weight))
    return total


def elected_signs(vectors: Sequence[Tensor], by: str = "mass", majority: int = 1) -> Tensor:
    """+1 or -1 for each element (0 where nobody wins, if asked).

    Args:
        vectors: weighted task vectors.
        by: ``mass``: the sign of their sum; ``count``: of the sum of their signs.
        majority: the sign where that sum is zero; 0 leaves a zero there.
    """
    total = vectors[0].clone() if by == "mass" else vectors[0].sign()
    for vector in vectors[1:]:
        total.add_(vector if by == "mass" else vector.sign())
    return (total.add_(majority * _TINY) if majority else total).sign_()


def disjoint(vectors: Sequence[Tensor], weights: Sequence[float], signs: Tensor, how: str = "mean") -> Tensor:
    """Of each element, only the vectors that agree with the elected sign, put together. The vectors are written into.

    Args:
        vectors: task vectors, already multiplied by their weights.
        weights: one a vector.
        signs: +1 or -1, from :func:`elected_signs`.
        how: ``mean``: the sum divided by the summed weights of those that agree (by 1 where that is zero); ``sum``;
            ``max``: the one of the largest magnitude.
    """
    agreeing = [vector.mul_(signs).clamp_(min=0) for vector in vectors]
    if how == "max":
        largest = agreeing[0]
        for vector in agreeing[1:]:
            largest = torch.maximum(largest, vector)
        return largest.mul_(signs)
    if how == "sum":
        return scaled_sum(agreeing, [1.0] * len(agreeing)).mul_(signs)
    divisor = agreeing[0].sign()
    if weights[0] != 1:
        divisor.mul_(weights[0])
    for vector, weight in zip(agreeing[1:], weights[1:]):
        divisor.add_(vector.sign(), alpha=weight)
    if min(weights) >= 0:
        divisor.clamp_(min=_TINY)  # where nobody agrees the sum is zero too
    else:
        divisor.masked_fill_(divisor == 0, 1.0)
    return scaled_sum(agreeing, [1.0] * len(agreeing)).mul_(signs).div_(divisor)


def normalized(change: Tensor, weights: Sequence[float]) -> Tensor:
    """``change`` divided by the sum of the weights (by 1 where that is zero), in its memory."""
    total = divisor(weights)
    return change if total == 1 else change.div_(total)


def divisor(weights: Sequence[float]) -> float:
    """The sum of the weights; 1 where that is zero."""
    total = sum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def combined(vectors: Sequence[Tensor], weights: Sequence[float], consensus: str, normalize: bool) -> Tensor:
    """Task vectors put together, in their memory.

    Args:
        vectors: already multiplied by their weights.
        weights: one a vector.
        consensus: ``linear``: their sum; ``ties``: of each element those that agree with the elected sign.
        normalize: divide by the sum of the weights (of those that agree).
    """
    if consensus == "ties":
        return disjoint(vectors, weights, elected_signs(vectors), "mean" if normalize else "sum")
    change = scaled_sum(vectors, [1.0] * len(vectors))
    return normalized(change, weights) if normalize else change


def add_to_base(base: Tensor, change: Tensor, scale: float) -> Tensor:
    """``base + scale * change``, in the memory of ``change``."""
    return (change if scale == 1 else change.mul_(scale)).add_(base)
