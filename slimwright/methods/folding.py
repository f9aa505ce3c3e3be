"""Moving a scale between a producer and its consumers without changing the function: what the folds share.

A fold multiplies the consumers' columns by ``s`` and divides what they are fed by it, in the producer: a norm's gain
and bias, or the output rows and bias of v or up. ``s`` is (in,), one factor per input of the consumers. Where several
inputs read one channel of the producer (o under grouped-query attention) their factors must be equal: ``channels``,
(in,) int64, says which channel each input reads, and :func:`tied` makes one value of each channel's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import GroupFold, SiteStatistics, WeightSolver
from slimwright.model.structure import FoldGroup, Structure


class SmoothingFold(GroupFold):
    """Folds whose scale is SmoothQuant's; subclasses have the knobs ``alpha`` and ``identity``."""

    alpha: float
    identity: bool
    needs = ("absmax",)

    def scales(
        self, weights: Sequence[Tensor], stats: SiteStatistics, solver: WeightSolver, channels: Tensor | None = None
    ) -> Tensor:
        weights = self.checked(weights, stats, channels)
        assert stats.absmax is not None
        if self.identity:
            return torch.ones(weights[0].shape[1])
        return smoothing_scale(weights, stats.absmax, self.alpha, channels)


def input_channels(structure: Structure, fold: FoldGroup) -> Tensor | None:
    """Which channel of the producer each input of the consumers reads: (in,) int64; None where each reads its own."""
    if fold.repeat == 1:
        return None
    columns = structure.sites[fold.consumers[0]].columns
    heads = torch.arange(columns // fold.head_dim) // fold.repeat
    return (heads[:, None] * fold.head_dim + torch.arange(fold.head_dim)).flatten()


def tied(values: Tensor, channels: Tensor | None) -> Tensor:
    """Every input takes the largest of its channel's values: (in,) → (in,)."""
    if channels is None:
        return values
    largest = torch.full((int(channels.max()) + 1,), -torch.inf).scatter_reduce_(0, channels, values, "amax")
    return largest[channels]


def bias_of(structure: Structure, weight: str) -> str | None:
    """Disk name of the bias beside a weight; None if it has none."""
    module, _, parameter = structure.to_module[weight].rpartition(".")
    if parameter != "weight":
        return None
    return next((name for name, path in structure.to_module.items() if path == f"{module}.bias"), None)


class Folds:
    """What a set of folds does to each tensor of a model.

    Args:
        scales: (in,) positive, by the disk name of the fold group's producer; equal where inputs read one channel.

    Raises:
        InputError: a scale is not of this shape, not positive or finite, or differs within a channel.
    """

    def __init__(self, structure: Structure, scales: Mapping[str, Tensor]) -> None:
        self._structure = structure
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        self._vectors: dict[str, tuple[Tensor, float]] = {}
        for fold in structure.folds:
            scale = scales.get(fold.producer)
            if scale is None:
                continue
            produced = _produced(structure, fold, scale)
            for name in fold.consumers:
                self._columns[name] = scale
            if fold.producer in structure.sites:
                self._rows[fold.producer] = produced
            else:  # a norm
                self._vectors[fold.producer] = produced, fold.offset
            bias = bias_of(structure, fold.producer)
            if bias is not None:
                self._vectors[bias] = produced, 0.0

    @property
    def changed(self) -> frozenset[str]:
        """Disk names of the tensors that change."""
        return frozenset([*self._columns, *self._rows, *self._vectors])

    def rows(self, name: str, weight: Tensor, rows: slice) -> Tensor:
        """Some rows (rows, in) of a site's matrix after the folds: float32 (float64 from float64), because what is
        rounded to 16 bits afterwards is no longer exact."""
        weight = _wide(weight)
        if name in self._columns:
            weight = weight * self._columns[name].to(weight.dtype)
        if name in self._rows:
            weight = weight / self._rows[name][rows, None].to(weight.dtype)
        return weight

    def vector(self, name: str, values: Tensor) -> Tensor:
        """A gain or a bias (size,) after the folds, in float32 (float64 from float64)."""
        values = _wide(values)
        if name not in self._vectors:
            return values
        scale, offset = self._vectors[name]
        return (values + offset) / scale.to(values.dtype) - offset


def _produced(structure: Structure, fold: FoldGroup, scale: Tensor) -> Tensor:
    """The factors of the producer's channels, after the checks."""
    first = structure.sites[fold.consumers[0]]
    if scale.shape != (first.columns,):
        raise InputError(f"A scale for the inputs of '{first.name}' has {first.columns} factors, not {scale.numel()}.")
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise InputError(f"The scale for the inputs of '{first.name}' is not positive and finite.")
    channels = input_channels(structure, fold)
    if channels is None:
        return scale
    produced = torch.empty(int(channels.max()) + 1, dtype=scale.dtype).index_copy_(0, channels, scale)
    if not torch.equal(produced[channels], scale):
        raise InputError(f"The scale for the inputs of '{first.name}' differs within a shared channel.")
    return produced


def apply_fold(
    tensors: Mapping[str, Tensor], structure: Structure, fold: FoldGroup, scale: Tensor
) -> dict[str, Tensor]:
    """The tensors of one fold group after the fold, by disk name; the others stay as they are.

    Args:
        tensors: by disk name, at least the producer, its bias and the consumers, any float dtype.
        scale: (in,) positive; equal where inputs read the same channel.

    Returns:
        float32 (float64 from float64): what is rounded to 16 bits afterwards is no longer exact.

    Raises:
        InputError: as :class:`Folds`.
    """
    folds = Folds(structure, {fold.producer: scale})
    found: dict[str, Tensor] = {}
    for name in folds.changed:
        site = structure.sites.get(name)
        if site is None:
            found[name] = folds.vector(name, tensors[name])
        else:
            weight = tensors[name].t() if site.transposed else tensors[name]
            weight = folds.rows(name, weight, slice(0, site.rows))
            found[name] = weight.t() if site.transposed else weight
    return found


def storable_scale(gain: Tensor, offset: float, scale: Tensor) -> Tensor:
    """The scale next to ``scale`` that leaves a norm's gain exact in the dtype it is stored in, for folds into a norm.

    With the gain's new value rounded as it will be stored, ``s = old / new``: the consumers are multiplied by what the
    norm was divided by, not by what it should have been. Where the gain is 0, or would become 0 or infinite, 1.

    Args:
        gain: (in,) as stored; the norm multiplies by ``gain + offset``.
        scale: (in,) positive.

    Returns:
        (in,) float32, positive. (A norm's bias is still rounded on its own.)
    """
    old = gain.double() + offset
    new = (old / scale.double() - offset).to(gain.dtype).double() + offset
    found = old / new
    return torch.where(torch.isfinite(found) & (found > 0), found, 1.0).float()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def folded_statistics(stats: SiteStatistics, scale: Tensor) -> SiteStatistics:
    """Statistics of the inputs divided by ``scale`` (in,), exactly: what the consumers are fed after the fold."""
    inverse = 1 / scale

    def divided(values: Tensor | None) -> Tensor | None:
        return None if values is None else values * inverse

    gram = None if stats.gram is None else stats.gram * inverse[:, None] * inverse
    return SiteStatistics(
        tokens=stats.tokens, gram=gram, absmax=divided(stats.absmax), absmean=divided(stats.absmean),
        mean=divided(stats.mean),
    )  # fmt: skip


def folded_loss(weights: Sequence[Tensor], stats: SiteStatistics, solver: WeightSolver, scale: Tensor) -> float:
    """What the solver loses on the consumers after the fold: ``tr(Δ H Δᵀ)`` per token, summed over the ``weights``
    (out, in); Δ is the error of ``Q(W s) / s``."""
    after = folded_statistics(stats, scale)
    assert after.gram is not None
    loss = 0.0
    for weight in weights:
        scaled = weight * scale
        delta = solver.solve(scaled, after).dense() - scaled
        loss += float(((delta @ after.gram) * delta).sum(dtype=torch.float64))
    return loss


def candidate_losses(
    fold: GroupFold,
    weights: Sequence[Tensor],
    stats: SiteStatistics,
    solver: WeightSolver,
    channels: Tensor | None = None,
) -> list[float]:
    """What each of a fold's candidates loses on one fold group (:func:`folded_loss`).

    Raises:
        InputError: as :meth:`GroupFold.scales`, or there is no Gram.
    """
    if stats.gram is None:
        raise InputError(f"{fold.name}: choosing among candidates needs the statistic 'gram': give data.")
    wide = [weight.float() for weight in weights]
    return [
        folded_loss(wide, stats, solver, candidate.scales(wide, stats, solver, channels))
        for candidate in fold.candidates()
    ]


def chosen(fold: GroupFold, losses: Iterable[Sequence[float]]) -> GroupFold:
    """The candidate with the least sum over fold groups, the first of equals.

    Args:
        losses: of each group, what each candidate loses.
    """
    sums = [math.fsum(values) for values in zip(*losses, strict=True)]
    return fold.candidates()[sums.index(min(sums))] if sums else fold.candidates()[0]


def smoothing_scale(weights: Sequence[Tensor], absmax: Tensor, alpha: float, channels: Tensor | None) -> Tensor:
    """SmoothQuant's factors ``absmax^α / wmax^(1 - α)``, both at least 1e-5; wmax is the largest weight of each column
    over all ``weights`` (out, in). Inputs that were never seen, or read by no weight, keep a factor of 1."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    activation, largest = tied(absmax, channels), tied(largest, channels)
    scale = (activation.pow(alpha) / largest.clamp(min=1e-5).pow(1 - alpha)).clamp(min=1e-5)
    return torch.where((activation > 0) & (largest > 0), scale, 1.0)
