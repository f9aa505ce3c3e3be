"""What low-rank solvers share: the best factors under a metric of the inputs, and putting them on a grid.

A metric H says what an error Δ of the weight costs: ``tr(Δ H Δᵀ)``. It is None (the identity), (in,) (its diagonal) or
(in, in), symmetric.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.calibrate.site_statistics import SiteStatistics
from slimwright.errors import InputError
from slimwright.methods.registry import WeightSolver, method
from slimwright.weights import Compressed, Form, Grid, LowRank, LowRankForm

_TRIES = 40  # doublings of the damping


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular values of ``W S`` with ``H = S Sᵀ``, and what factors of any rank are made of.

    ``W ≈ left[:, :r] @ right[:r]`` is the best of rank r: it loses ``energy[r:].sum()``, and no other loses less.

    Attributes:
        energy: (min(out, in),) their squares, falling.
        left: (out, min(out, in)), with orthogonal columns.
        right: (min(out, in), in).
        outputs: (out, min(out, in)), by row of the weight: what of ``energy`` falls on its output.
    """

    energy: Tensor
    left: Tensor
    right: Tensor

    @property
    def outputs(self) -> Tensor:
        squares = self.left.square()
        return squares * (self.energy / squares.sum(0).clamp_min(1e-30))

    def loss(self, rank: int) -> float:
        """What the best factors of a rank lose: ``tr(Δ H Δᵀ)``."""
        return float(self.energy[rank:].sum())


def under(metric: Tensor | None, weight: Tensor) -> Tensor:
    """``W H``."""
    if metric is None:
        return weight
    return weight * metric if metric.ndim == 1 else weight @ metric


def spectrum(weight: Tensor, metric: Tensor | None, dtype: torch.dtype = torch.float64) -> Spectrum:
    """The spectrum of a weight (out, in) under a metric, from one symmetric eigenproblem of its smaller side.

    With no more outputs than inputs: the eigenvectors U of ``W H Wᵀ`` are the left singular vectors of ``W S``, and
    ``U_r Σ_r V_rᵀ S⁻¹ = U_r U_rᵀ W``, so that neither S nor its inverse is needed and H may be singular. Else: the
    eigenvectors V of ``Sᵀ Wᵀ W S``, the factors ``W S V_r`` and ``V_rᵀ S⁻¹``, S the Cholesky factor.

    Args:
        dtype: what it is computed in.

    Raises:
        InputError: the metric cannot be factorized.
    """
    weight = weight.to(dtype)
    metric = None if metric is None else metric.to(dtype)
    if weight.shape[0] <= weight.shape[1]:
        product = under(metric, weight) @ weight.t()
        energy, left = torch.linalg.eigh((product + product.t()) / 2)
        left = left.flip(1)
        return Spectrum(energy.flip(0).clamp(min=0), left, left.t() @ weight)
    root = None if metric is None else metric.sqrt() if metric.ndim == 1 else _root(metric)
    whitened = under(root, weight)
    energy, vectors = torch.linalg.eigh(whitened.t() @ whitened)
    vectors = vectors.flip(1)
    if root is None:
        right = vectors.t()
    elif root.ndim == 1:
        right = vectors.t() / root.clamp_min(1e-30)
    else:
        right = torch.linalg.solve_triangular(root, vectors.t(), upper=False, left=False)
    return Spectrum(energy.flip(0).clamp(min=0), whitened @ vectors, right)


def _root(metric: Tensor) -> Tensor:
    """Lower-triangular S with ``S Sᵀ = H``; where H is singular, of H with as little damping as makes it regular."""
    mean = float(metric.diagonal().mean())
    damping = 0.0
    for _ in range(_TRIES):
        factor, failed = torch.linalg.cholesky_ex(metric + damping * torch.eye(len(metric), dtype=metric.dtype))
        if not failed and torch.isfinite(factor).all():
            return factor
        damping = max(2 * damping, torch.finfo(metric.dtype).eps * mean)
    raise InputError("The Gram cannot be factorized: it holds NaN or Inf.")


def damped(gram: Tensor, damp: float) -> Tensor:
    """(in, in) float64 ``H + damp * mean(diag H) * I``; the identity where H is zero."""
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    gram = gram.clone()
    gram.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return gram


def low_rank(weight: Tensor, rank: int, grid: Grid, metric: Tensor | None) -> LowRank:
    """The best factors of a weight (out, in), on a grid.

    The right factor is put on its grid first. The left one is then the least-squares fit to what that has become, which
    the grid's rounding takes into account in turn: both are rounded under the metric of their own inputs.

    Raises:
        InputError: the metric cannot be factorized.
    """
    found = spectrum(weight, metric)
    left, right = found.left[:, :rank], found.right[:rank]
    size = (left.norm(dim=0) / right.norm(dim=1).clamp_min(1e-300)).sqrt().clamp(1e-18, 1e18)
    size = torch.where(found.energy[:rank] > 0, size, torch.ones_like(size))
    rounded = on_grid(right * size[:, None], grid, metric)
    values = rounded.dense().double()
    inner = under(metric, values) @ values.t()
    refitted = under(metric, weight.double()) @ values.t() @ torch.linalg.pinv(inner, hermitian=True)
    return LowRank(on_grid(refitted, grid, inner), rounded)


def on_grid(factor: Tensor, grid: Grid, metric: Tensor | None) -> Compressed:
    """A factor (rows, columns) on its grid: with error feedback under a metric of its inputs, else to nearest."""
    factor = factor.float().contiguous()
    if grid.plain or metric is None:
        rounded: Compressed = method("quantize/rtn", grid=grid).solve(factor, SiteStatistics.none())
        return rounded
    gram = (torch.diag(metric) if metric.ndim == 1 else metric).float()
    fed: Compressed = method("quantize/gptq", grid=grid).solve(factor, SiteStatistics(1, gram))
    return fed


class LowRankSolver(WeightSolver):
    """Solvers whose result is not on one grid: they need a whole matrix."""

    family = "factorize"
    row_independent: ClassVar[bool] = False
    of_form: ClassVar[tuple[str, ...]] = ("rank",)
    rank: int


class Factorizer(LowRankSolver):
    """Puts one weight into two factors. Subclasses have the knobs ``rank`` and ``grid``, that of the factors."""

    @property
    def form(self) -> LowRankForm:
        return LowRankForm(self.rank, self.grid)

    @classmethod
    def knobs_for(cls, form: Form) -> dict[str, Any] | None:
        if not isinstance(form, LowRankForm) or form.base is not None:
            return None
        return {"rank": form.rank, "grid": form.factors}

    @abstractmethod
    def metric(self, stats: SiteStatistics) -> Tensor | None:
        """What an error of the weight costs, as this method sees it."""

    def solve(self, weight: Tensor, stats: SiteStatistics) -> LowRank:
        weight = self.checked_weight(weight, stats)
        return low_rank(weight, self.rank, self.grid, self.metric(stats))
