"""Exactly the k largest magnitudes of a vector that never fits, by histograms of bit patterns, never by a sort.

The bits of a positive float32, read as an integer, are in the order of the floats. A first survey counts the upper 16
bits (32,768 bins), which finds the bin of the k-th largest; a second counts the lower 16 inside that bin, which finds
the k-th magnitude itself; where more elements have it than are still wanted, a third counts these per block of 2**18
elements, so that the first of them in the order of their indices are taken. A vector is a tensor, or all tensors in the
sorted order of their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimwright.methods.merging import BLOCK, Sums, Tile

ROUNDS = 3
_LOW = 1 << 16

Selection = dict[str, Any]
"""What is known of one selection, in JSON values: ``keep`` (how many), then ``high`` (bin), ``wanted`` (how many of it),
``threshold`` (bits of the k-th magnitude), ``ties`` (how many have it), and where they are cut: ``cut`` (name of the
tensor, block, how many of that block)."""


def selection(keep: int, numel: int) -> Selection:
    """A selection of the ``keep`` largest of ``numel`` magnitudes; all or none need no survey."""
    if keep >= numel or keep <= 0:
        return {"keep": max(0, min(keep, numel)), "done": True, "all": keep >= numel}
    return {"keep": keep}


def share_of(density: float, numel: int) -> Selection:
    """A selection of ``int(density * numel)``, at least one unless the density is 0."""
    return selection(max(1, int(density * numel)) if density > 0 else 0, numel)


def is_settled(selections: Sequence[Sequence[Selection]]) -> bool:
    """Whether every selection needs no further survey."""
    return all(bool(found.get("done")) for wanted in selections for found in wanted)


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |values| as int32; of anything but float32, after rounding to it."""
    return values.float().view(torch.int32) & 0x7FFFFFFF


def survey_magnitudes(values: Sequence[Tensor], selections: Sequence[Sequence[Selection]], tile: Tile) -> Sums:
    """What this tile adds to the current round of every open selection.

    Args:
        values: flat vectors, one a model.
        selections: one list of selections a vector.
        tile: the tile that the values are of.
    """
    sums: Sums = {}
    for model, (vector, wanted) in enumerate(zip(values, selections)):
        open_ones = [(index, found) for index, found in enumerate(wanted) if not found.get("done")]
        if not open_ones:
            continue
        bits = magnitude_bits(vector)
        for index, found in open_ones:
            key = f"{model}.{index}"
            if "high" not in found:
                first = next((f"high{model}.{i}" for i, _ in open_ones if f"high{model}.{i}" in sums), None)
                sums["high" + key] = (
                    torch.bincount(bits >> 16, minlength=_LOW // 2) if first is None else sums[first].clone()
                )
            elif "threshold" not in found:
                inside = (bits - (found["high"] << 16)).clamp_(-1, _LOW).add_(1)
                sums["low" + key] = torch.bincount(inside, minlength=_LOW + 2)[1 : _LOW + 1].clone()
            else:
                counts = torch.zeros(-(-tile.site.numel // BLOCK), dtype=torch.int64)
                for number, part in enumerate(bits.split(BLOCK), tile.start // BLOCK):
                    counts[number] = torch.count_nonzero(part == found["threshold"])
                sums["ties" + key] = counts
    return sums


def settle_magnitudes(sums: Mapping[str, Sums], selections: Sequence[Sequence[Selection]]) -> list[list[Selection]]:
    """The selections after a round."""
    return [
        [
            found if found.get("done") else _settled(sums, f"{model}.{index}", found)
            for index, found in enumerate(wanted)
        ]
        for model, wanted in enumerate(selections)
    ]


def _settled(sums: Mapping[str, Sums], key: str, found: Selection) -> Selection:
    found = dict(found)
    if "high" not in found:
        counts = torch.stack([part["high" + key] for part in sums.values()]).sum(0)
        found["high"], found["wanted"] = _bin_of(counts, found["keep"])
    elif "threshold" not in found:
        counts = torch.stack([part["low" + key] for part in sums.values()]).sum(0)
        low, wanted = _bin_of(counts, found["wanted"])
        found["threshold"], found["wanted"], found["ties"] = (found["high"] << 16) + low, wanted, int(counts[low])
        # Zeros are the same kept or not, and where all of them are wanted there is nothing to cut.
        found["done"] = found["threshold"] == 0 or wanted == found["ties"]
    else:
        wanted = found["wanted"]
        for name, part in sums.items():
            counts = part["ties" + key].cumsum(0)
            if int(counts[-1]) >= wanted:
                block = int(torch.searchsorted(counts, wanted))
                found["cut"] = [name, block, wanted - (int(counts[block - 1]) if block else 0)]
                break
            wanted -= int(counts[-1])
        found["done"] = True
    return found


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the ``wanted``-th largest, and how many of that bin are wanted."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, wanted))
    return len(counts) - 1 - place, wanted - (int(from_above[place - 1]) if place else 0)


def threshold_of(found: Selection) -> float:
    """The k-th largest magnitude."""
    return float(np.array(found["threshold"], dtype=np.int32).view(np.float32))


def keep_largest(values: Tensor, found: Selection, tile: Tile) -> Tensor:
    """``values`` (flat) where selected, 0 elsewhere. May be the same memory."""
    if "threshold" not in found:
        return values if found["all"] else torch.zeros_like(values)
    bits = found["threshold"]
    if bits == 0:
        return values
    if "cut" not in found:
        return _at_least(values, bits)
    name, block, wanted = found["cut"]
    if tile.site.name != name:
        return _at_least(values, bits + (tile.site.name > name))
    before = min(max(0, block * BLOCK - tile.start), len(values))
    after = min(max(0, (block + 1) * BLOCK - tile.start), len(values))
    middle = values[before:after]
    tied = magnitude_bits(middle) == bits
    chosen = tied & (tied.cumsum(0) <= wanted)
    parts = [
        _at_least(values[:before], bits),
        torch.where(chosen, middle, _at_least(middle, bits + 1)),
        _at_least(values[after:], bits + 1),
    ]
    return torch.cat([part for part in parts if len(part)]) if len(values) else values


def _at_least(values: Tensor, bits: int) -> Tensor:
    """``values`` where the bits of the magnitude are at least these (> 0), 0 elsewhere."""
    below = float(np.array(bits - 1, dtype=np.int32).view(np.float32))
    if values.dtype == torch.float32:
        return torch.nn.functional.hardshrink(values, below)
    return values * (magnitude_bits(values) >= bits)
