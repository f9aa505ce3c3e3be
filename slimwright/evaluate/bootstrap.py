"""The bootstrap over documents: how far a mean would move had other documents been drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    values, weight = _documents(values_per_document, weights)
    used = weight > 0
    values, weight = values[used], weight[used]
    _enough(len(values))
    ratios = np.concatenate(
        [values[drawn].sum(1) / weight[drawn].sum(1) for drawn in _draws(len(values), seed, resamples)]
    )
    return _expanded(float(values.sum() / weight.sum()), ratios, len(values))


def paired_interval(
    before: tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray],
    after: tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray],
    seed: int = 0,
    resamples: int = 1000,
    transform: Callable[[np.ndarray], np.ndarray] = lambda ratio: ratio,
) -> Estimate:
    """The difference f(after) − f(before) of two ratios on the same documents, with its paired 95 % bootstrap interval.

    Every draw takes the same documents for both, so that what is hard for both cancels. The interval is much narrower
    than two single ones would suggest wherever the two models find the same documents hard.

    Args:
        before: (values, weights) per document, as for :func:`interval`.
        after: the same documents in the same order.
        seed: the same seed gives the same interval.
        resamples: draws.
        transform: f, applied to each ratio before the difference, e.g. ``numpy.exp``.

    Raises:
        InputError: as :func:`interval`, or other documents in one than in the other.
    """
    pairs = [_documents(*before), _documents(*after)]
    if len(pairs[0][0]) != len(pairs[1][0]):
        counts = f"{len(pairs[0][0])} and {len(pairs[1][0])}"
        raise InputError(f"A paired interval needs the same documents twice, but there are {counts}.")
    used = (pairs[0][1] > 0) & (pairs[1][1] > 0)
    if ((pairs[0][1] > 0) != used).any() or ((pairs[1][1] > 0) != used).any():
        raise InputError("A paired interval needs the same documents twice, but some are empty in one and not in both.")
    (v, w), (x, y) = ((values[used], weight[used]) for values, weight in pairs)
    _enough(len(v))
    differences = np.concatenate(
        [
            transform(x[drawn].sum(1) / y[drawn].sum(1)) - transform(v[drawn].sum(1) / w[drawn].sum(1))
            for drawn in _draws(len(v), seed, resamples)
        ]
    )
    value = float(transform(x.sum() / y.sum()) - transform(v.sum() / w.sum()))
    return _expanded(value, differences, len(v))


def _documents(
    values_per_document: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    values, weight = np.asarray(values_per_document, np.float64), np.asarray(weights, np.float64)
    if values.ndim != 1 or values.shape != weight.shape:
        raise InputError(f"Values {values.shape} and weights {weight.shape} of documents must be lists of one length.")
    if not (np.isfinite(values).all() and np.isfinite(weight).all() and (weight >= 0).all()):
        raise InputError("The values or weights of the documents hold NaN, Inf or a negative weight.")
    return values, weight


def _enough(count: int) -> None:
    if count < 2:
        raise InputError(f"An interval needs at least two documents that are not empty, but there are {count}.")


def _draws(count: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Indices (draws, documents) of all draws, a bounded number at a time; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    step = max(1, _CELLS // count)
    for first in range(0, resamples, step):
        yield generator.integers(count, size=(min(step, resamples - first), count))


def _expanded(value: float, drawn: np.ndarray, count: int) -> Estimate:
    tail = norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # Rounding must not put the value outside its own interval where all documents agree.
    return Estimate(value, min(float(low), value), max(float(high), value))
