"""What a solver is told of the inputs of one site (DESIGN §5). It lies below the methods, which are given it, and below
the walks, which find it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from slimwright.errors import InputError

REORDERED_ROWS = 256
"""Rows of a Gram that are put in order at once."""

SUBTRACTED_TOKENS = 512
"""Inputs that are taken out of a Gram at once."""

REVERSED_ELEMENTS = 1 << 18
"""Elements of a factor that are turned round at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Apart:
    """Inputs of documents on which is judged what a solver makes of all the others.

    Args:
        inputs: (tokens, in) of any float dtype; they are in the Gram too.
        share: of the Gram's tokens that they are.
    """

    inputs: Tensor
    share: float

    @property
    def weight(self) -> float:
        """What one of the inputs weighs in the Gram."""
        return self.share / self.inputs.shape[0]

    def take_from_diagonal(self, diagonal: Tensor) -> None:
        """Take the inputs out of a Gram's diagonal (in,), in its memory."""
        for part in self.inputs.split(SUBTRACTED_TOKENS):
            diagonal -= part.float().square().sum(0) * self.weight

    def take_from(self, gram: Tensor, order: Tensor | None = None) -> None:
        """Take the inputs out of a Gram (in, in), in its memory.

        Args:
            order: (in,) in which it has the inputs; None: their own.
        """
        for part in self.inputs.split(SUBTRACTED_TOKENS):
            x = part.float() if order is None else part.float()[:, order]
            gram.addmm_(x.t(), x, alpha=-self.weight)


@dataclasses.dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What the calibration knows of one site. Without data: :meth:`none`.

    Args:
        tokens: how many tokens were seen (masked and padded ones never count).
        gram: (in, in) float32, the sum over tokens of ``x xᵀ`` divided by ``tokens``; None without data.
        survey: what the grid's ``survey`` found over the whole matrix when ``solve`` sees only a tile of it.
        absmax: (in,) float32, the largest magnitude of each input; None without data.
        absmean: (in,) float32, the mean magnitude of each input; None without data.
        mean: (in,) float32, the mean of each input; None without data.
        apart: inputs of some documents, where a solver is to be judged on what it did not see; None: there are none.
    """

    tokens: int = 0
    gram: Tensor | None = None
    survey: Any = None
    absmax: Tensor | None = None
    absmean: Tensor | None = None
    mean: Tensor | None = None
    apart: Apart | None = None
    _factors: dict[Any, tuple[Tensor, float]] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def none(cls) -> SiteStatistics:
        """No data."""
        return cls()

    @classmethod
    def from_inputs(cls, x: Tensor, weights: Tensor | None = None) -> SiteStatistics:
        """Statistics of the inputs ``x`` (tokens, in) of one site.

        Args:
            weights: (tokens,) what each token counts in the Gram and the mean, whose scale does not matter; tokens with
                a weight of 0 are left out of everything. None: all count alike.

        Raises:
            InputError: ``x`` is not two-dimensional, is empty or holds NaN or Inf; the weights are of another shape,
                negative, NaN or Inf, or all 0.
        """
        if x.ndim != 2 or not x.numel():
            raise InputError(f"Inputs must be (tokens, in) and not empty, but have shape {tuple(x.shape)}.")
        x = x.detach().float()
        if not torch.isfinite(x).all():
            raise InputError("Inputs hold NaN or Inf.")
        weighted = x
        if weights is not None:
            if weights.shape != (x.shape[0],):
                raise InputError(f"{x.shape[0]} tokens need as many weights, not {tuple(weights.shape)}.")
            if not torch.isfinite(weights).all() or (weights < 0).any() or not (weights > 0).any():
                raise InputError("Token weights must be finite, not negative and not all 0.")
            x, weights = x[weights > 0], weights[weights > 0].float()
            weighted = x * (weights / weights.mean())[:, None]
        size, tokens = x.abs(), x.shape[0]
        gram = x.T @ weighted / tokens
        if weights is not None:  # equal on both sides but for rounding
            gram = (gram + gram.T) / 2
        return cls(tokens, gram, absmax=size.amax(0), absmean=size.mean(0), mean=weighted.mean(0))

    @property
    def importance(self) -> Tensor | None:
        """(in,) mean squared input, the diagonal of the Gram; None without data."""
        return None if self.gram is None else self.gram.diagonal()

    def centred_gram(self) -> Tensor:
        """(in, in) float32, the inputs' covariance ``H - μ μᵀ``: the Gram of a layer whose bias follows the mean error.

        Raises:
            InputError: there is no Gram or no mean input.
        """
        if self.gram is None or self.mean is None:
            raise InputError("The centred Gram needs the statistics 'gram' and 'mean': give data.")
        return self.gram - torch.outer(self.mean, self.mean)

    def gram_of_rest(self) -> Tensor | None:
        """(in, in) float32, the part of the Gram that is not of what is :attr:`apart`; the Gram where nothing is."""
        if self.gram is None or self.apart is None:
            return self.gram
        rest = self.gram.clone()
        self.apart.take_from(rest)
        return rest

    def with_survey(self, survey: Any) -> SiteStatistics:
        """The same with another survey; factors found by one are known to both."""
        return dataclasses.replace(self, survey=survey)

    def factor(self, damp: float, order: Tensor | None = None, rest: bool = False) -> tuple[Tensor, float]:
        """Upper-triangular ``R`` with ``R Rᵀ = H + damping * I``, H the Gram in the given order of inputs. With
        ``U = R⁻¹``, ``(H + damping * I)⁻¹ = Uᵀ U``: the factor that GPTQ works with, at a third of the cost.

        Inputs that were never seen (a zero on the diagonal) get the diagonal's mean, and so nothing to do with others.
        Where the factorization fails, the damping is doubled until it does not.

        Args:
            damp: first damping, as a fraction of the diagonal's mean.
            order: (in,) permutation of the inputs; None is their own order.
            rest: of the Gram without what is :attr:`apart`, where anything is.

        Returns:
            ((in, in) float32, damping). Kept, so that sites which share these statistics factorize once.

        Raises:
            InputError: there is no Gram, or it holds NaN or Inf.
        """
        if self.gram is None:
            raise InputError("There is no Gram to factorize: give data.")
        apart = self.apart if rest else None
        key = (damp, None if order is None else hash(order.numpy().tobytes()), apart is not None)
        if key not in self._factors:
            self._factors[key] = _factor(self.gram, damp, order, apart)
        return self._factors[key]


def _factor(gram: Tensor, damp: float, order: Tensor | None, apart: Apart | None = None) -> tuple[Tensor, float]:
    """:meth:`SiteStatistics.factor`, in the memory of one matrix beside the Gram."""
    diagonal = gram.diagonal().clone()
    if apart is not None:
        apart.take_from_diagonal(diagonal)
    mean = float(diagonal.mean())
    if not math.isfinite(mean):
        raise InputError("The Gram holds NaN or Inf.")
    mean = mean if mean > 0 else 1.0
    backwards = torch.arange(gram.shape[0]) if order is None else order
    backwards = backwards.flip(0)  # a lower factor of the reversed matrix is an upper one of the matrix itself
    diagonal = diagonal[backwards]
    diagonal[diagonal <= 0] = mean
    damping = damp * mean
    failed = torch.empty((), dtype=torch.int32)
    for _ in range(60):
        lower = _reordered(gram, backwards).t()  # symmetric; stored by columns it is factorized where it lies
        if apart is not None:
            apart.take_from(lower.t(), backwards)
        lower.diagonal().copy_(diagonal + damping)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and torch.isfinite(lower.diagonal()).all():
            _reverse(lower.t().view(-1))
            return lower, damping
        damping = max(2 * damping, 1e-6 * mean)
    raise InputError("The Gram cannot be factorized: it holds NaN or Inf.")


def _reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """``matrix[order][:, order]``, contiguous, a few rows at a time."""
    reordered = torch.empty_like(matrix)
    for start in range(0, len(order), REORDERED_ROWS):
        rows = slice(start, start + REORDERED_ROWS)
        reordered[rows] = matrix.index_select(0, order[rows]).index_select(1, order)
    return reordered


def _reverse(values: Tensor) -> None:
    """Turn a vector round in its own memory. Of a square matrix's elements that reverses both its axes."""
    half, step = len(values) // 2, REVERSED_ELEMENTS
    for start in range(0, half, step):
        stop = min(start + step, half)
        left, right = values[start:stop], values[len(values) - stop : len(values) - start]
        held = left.flip(0)
        left.copy_(right.flip(0))
        right.copy_(held)
