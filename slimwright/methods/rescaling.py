"""Task vectors that lost entries, rescaled to the sum of magnitudes that they had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from slimwright.methods.blending import Blend, stored_norms
from slimwright.methods.merging import Sums, Tile
from slimwright.methods.products import exact_sum

_LEAST = 1e-7


def survey_norms(tile: Tile, entries: Blend | None, kept: Callable[[list[Tensor]], Sequence[Tensor]]) -> Sums:
    """The sums of magnitudes of a tile's task vectors, and of what is kept of them.

    Args:
        entries: which are kept, for a compiled loop (the factors do not count); None where there is none.
        kept: gives what is kept of task vectors, perhaps in their memory.
    """
    found = None if entries is None else stored_norms(entries, tile)
    if found is None:
        deltas = list(tile.deltas())
        before = torch.stack([exact_sum(delta.abs()) for delta in deltas])
        found = torch.stack([before, torch.stack([exact_sum(delta.abs()) for delta in kept(deltas)])])
    return {"norms": found}


def restoring(sums: Mapping[str, Sums]) -> list[float]:
    """The factor of each model that restores its sum of magnitudes; 1 where one of the two is below 1e-7."""
    before, after = torch.stack([part["norms"] for part in sums.values()]).sum(0).tolist()
    return [b / a if a >= _LEAST and b >= _LEAST else 1.0 for b, a in zip(before, after)]
