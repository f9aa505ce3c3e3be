"""The bootstrap over documents: how far a mean would move had other documents been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

from slimwright.errors import InputError

_CELLS = 1 << 22  # resampled indices held at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval [low, high]."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def interval(
    values_per_document: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = 1000,
) -> Estimate:
    """The ratio Σ values / Σ weights with its 95 % bootstrap interval over documents.

    Documents, not tokens, are drawn with replacement (tokens of one document are alike, so drawing them singly would
    give intervals that are too narrow), and the ratio is taken anew of each draw. The percentiles are the expanded ones
    of Hesterberg (2015, "What Teachers Should Know About the Bootstrap"), which widen the plain percentile interval for
    few documents as Student's t does; with many documents they tend to the plain 2.5 and 97.5 %.

    Args:
        values_per_document: (documents,) sums over each document, e.g. of KL in nats.
        weights: (documents,) what they are divided by, e.g. numbers of tokens; not negative.
        seed: the same seed gives the same interval.
        resamples: draws.

    Raises:
        InputError: fewer than two documents of positive weight, unequal lengths, or a value that is NaN or Inf.
    """
    values, weight = np.asarray(values_per_document, np.float64), np.asarray(weights, np.float64)
    if values.ndim != 1 or values.shape != weight.shape:
        raise InputError(f"Values {values.shape} and weights {weight.shape} of documents must be lists of one length.")
    if not (np.isfinite(values).all() and np.isfinite(weight).all() and (weight >= 0).all()):
        raise InputError("The values or weights of the documents hold NaN, Inf or a negative weight.")
    values, weight = values[weight > 0], weight[weight > 0]
    count = len(values)
    if count < 2:
        raise InputError(f"An interval needs at least two documents that are not empty, but there are {count}.")
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    step = max(1, _CELLS // count)
    for first in range(0, resamples, step):
        drawn = generator.integers(count, size=(min(step, resamples - first), count))
        ratios[first : first + step] = values[drawn].sum(1) / weight[drawn].sum(1)
    tail = norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1))
    value = float(values.sum() / weight.sum())
    low, high = np.quantile(ratios, [tail, 1 - tail])
    # Rounding must not put the value outside its own interval where all documents agree.
    return Estimate(value, min(float(low), value), max(float(high), value))
