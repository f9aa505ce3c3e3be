"""Element-wise merges as one compiled loop over stored tiles (slimwright/kernels/merge.cpp).

A :class:`Blend` says what a method's ``combine`` does: which entries of each vector stay, what they are multiplied by,
how vectors are put together. The loop does the same operations in the same order, so the bytes are equal; where it
cannot run (no compiler, float64, a value that is not finite) the method's own torch code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slimwright.kernels import merge as kernel
from slimwright.methods.chance import block_words
from slimwright.methods.consensus import divisor
from slimwright.methods.merging import BLOCK, StoredTile, Tile
from slimwright.methods.products import added
from slimwright.methods.selection import Selection, boundary

_FUSES = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
"""Whether torch's `add` with a factor is a fused multiply-add on this machine."""


@dataclass(frozen=True)
class Blend:
    """``scale * merged / divisor + base_factor * base``.

    Attributes:
        factors: what each vector is multiplied by, after its entries were chosen.
        how: ``sum``; ``fused``, a sum by torch's ``add`` with a factor; of the entries that agree with the elected sign
            their weighted ``mean``, their sum (``agreeing``) or the ``max``.
        weights: of each vector in the divisor of that mean; the factors by default.
        by_count: signs are elected by their number, not by the sum of values.
        majority: the sign where the votes cancel: 1 or -1.
        trims: of each vector the largest that stay, or None for all.
        outliers: of each vector the largest that go, or None for none.
        densities: the share of each vector's entries that stays by chance.
        divisor, scale, base_factor: as above.
        base: what becomes of the base: vectors are differences from it, which it is added to (``start``); it is added
            alone (``added``); it is the first of the vectors (``first``); it is not used.
    """

    factors: tuple[float, ...]
    how: Literal["sum", "fused", "mean", "agreeing", "max"] = "sum"
    weights: tuple[float, ...] = ()
    by_count: bool = False
    majority: int = 1
    trims: Sequence[Selection | None] = ()
    outliers: Sequence[Selection | None] = ()
    densities: tuple[float, ...] = ()
    divisor: float = 1.0
    scale: float = 1.0
    base_factor: float = 1.0
    base: Literal["start", "added", "first", "unused"] = "start"


def together(
    factors: Sequence[float], weights: tuple[float, ...], consensus: str, normalize: bool, scale: float, **entries: Any
) -> Blend:
    """What :func:`slimwright.methods.consensus.combined` and ``add_to_base`` do; ``entries`` say what stays."""
    if consensus == "ties":
        return Blend(tuple(factors), "mean" if normalize else "agreeing", weights, scale=scale, **entries)
    return Blend(tuple(factors), divisor=divisor(weights) if normalize else 1.0, scale=scale, **entries)


def _sources(blend: Blend, tile: StoredTile) -> tuple[Any, Any]:
    """The kernel's view of the vectors, and what must live as long."""
    stored = tile.stored
    if blend.base == "first":
        assert tile.stored_base is not None
        stored = (tile.stored_base, *stored)
    made, kept = kernel.sources(stored), [*stored]
    for model, source in enumerate(made):
        source.factor = blend.factors[model]
        source.weight = (blend.weights or blend.factors)[model]

        def values(first: int, last: int, stored: Tensor = stored[model]) -> Tensor:
            part = stored[first:last].float()
            return part - tile.stored_base[first:last].float() if tile.stored_base is not None else part

        if blend.trims and (trim := blend.trims[model]) is not None:
            source.place, source.before, source.behind = boundary(trim, tile.site.name, tile.start, tile.numel, values)
        if blend.outliers and (outliers := blend.outliers[model]) is not None:
            source.outlier_place, source.outlier_before, source.outlier_behind = boundary(
                outliers, tile.site.name, tile.start, tile.numel, values
            )
        if blend.densities and blend.densities[model] < 1:
            words = block_words(tile.seed, tile.site.name, model, tile.start // BLOCK, -(-tile.numel // BLOCK))
            kept.append(words)
            source.keys, source.limit = words.data_ptr(), round(max(0.0, blend.densities[model]) * 2.0**31)
    return made, kept


def _ready(tile: Tile) -> bool:
    if not isinstance(tile, StoredTile):
        return False
    return kernel.ready(*tile.stored, *([] if tile.stored_base is None else [tile.stored_base]))


def blended(blend: Blend, tile: Tile, dtype: torch.dtype) -> Tensor | None:
    """The merged elements of a stored tile, flat, in ``dtype``; None where the loop cannot run or a value is not
    finite."""
    if not _ready(tile) or dtype not in kernel.KINDS or (blend.how == "fused" and not _FUSES):
        return None
    assert isinstance(tile, StoredTile)
    sources, _kept = _sources(blend, tile)
    out = torch.empty(tile.numel, dtype=dtype)
    base = tile.stored_base if blend.base in ("start", "added") else None
    done = kernel.blend(
        sources, base, base is not None and blend.base == "start", out, how=blend.how, by_count=blend.by_count,
        majority=blend.majority, divisor=blend.divisor, scale=blend.scale, base_factor=blend.base_factor,
        add_base=base is not None,
    )  # fmt: skip
    return out if done else None


def elected(blend: Blend, tile: Tile) -> int | None:
    """The elected signs of a tile added up, 0 where the votes cancel; None where the loop cannot run."""
    if not _ready(tile):
        return None
    assert isinstance(tile, StoredTile)
    sources, _kept = _sources(blend, tile)
    return kernel.votes(sources, tile.stored_base, tile.numel, blend.by_count)


def stored_norms(blend: Blend, tile: Tile) -> Tensor | None:
    """(2, models) float64: sums of magnitudes, of the vectors and of what stays of them (factors do not count); None
    where the loop cannot run."""
    if not _ready(tile):
        return None
    assert isinstance(tile, StoredTile)
    sources, _kept = _sources(blend, tile)
    found = kernel.run_sums(sources, tile.stored_base, tile.numel, True)
    return None if found is None else added(found).reshape(2, -1)
