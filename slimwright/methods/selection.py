"""Exactly the k largest magnitudes of a vector that never fits, by histograms of bit patterns, never by a sort.

The bits of a positive float32, read as an integer, are in the order of the floats. A first survey counts the upper 16
bits (32,768 bins), which finds the bin of the k-th largest and how many elements are in it. Where these are few (the
usual case: a bin spans less than 1 %), a second survey gathers them, and the k-th magnitude and the place of the last
element that is wanted follow. Where they are many, a second counts the lower 16 bits inside the bin, and where more
elements have the k-th magnitude than are wanted, a third counts these per block of 2**18 elements. Of equal magnitudes
the first in the order of their indices are taken. A vector is a tensor, or all tensors in the sorted order of their
names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimwright.kernels import merge as kernel
from slimwright.methods.merging import BLOCK, StoredVectors, Sums, Tile

ROUNDS = 3
_LOW = 1 << 16
GATHERED = 1 << 22
"""Elements of one bin that are gathered at most (12 bytes each)."""

Selection = dict[str, Any]
"""What is known of one selection, in JSON values: ``keep`` (how many), then ``high`` (bin), ``wanted`` (how many of
it), ``few`` (whether they are gathered), ``threshold`` (bits of the k-th magnitude), and where those that have it are
cut: ``cut`` (name of the tensor, an index, how many more of the block of 2**18 elements that begins there: those before
are taken). With ``value_only`` just the k-th magnitude is looked for."""


class Gathered:
    """Elements that surveys pick out: (indices int64, bits int32) by tile, in order. Adding puts them together."""

    def __init__(self, indices: Tensor, bits: Tensor) -> None:
        self.parts = [(indices, bits)]

    def __iadd__(self, other: Gathered) -> Gathered:
        self.parts += other.parts
        return self

    def together(self) -> tuple[Tensor, Tensor]:
        """All indices and all bits."""
        return torch.cat([part[0] for part in self.parts]), torch.cat([part[1] for part in self.parts])


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
    if isinstance(values, StoredVectors) and kernel.ready(*values.given):
        found = _survey_stored(values, selections, tile)
        if found is not None:
            return found
    sums: Sums = {}
    width = torch.int32 if tile.site.numel < 1 << 31 else torch.int64  # one set a tensor is kept until the round ends
    for model, (vector, wanted) in enumerate(zip(values, selections)):
        open_ones = [(index, found) for index, found in enumerate(wanted) if not found.get("done")]
        if not open_ones:
            continue
        dense = any("threshold" not in found and not found.get("few") for _, found in open_ones)
        bits = magnitude_bits(vector) if dense else None
        for index, found in open_ones:
            key = f"{model}.{index}"
            if bits is not None and "high" not in found:
                first = next((f"high{model}.{i}" for i, _ in open_ones if f"high{model}.{i}" in sums), None)
                counts = torch.bincount(bits >> 16, minlength=_LOW // 2).to(width) if first is None else sums[first]
                sums["high" + key] = counts if first is None else counts.clone()
            elif "threshold" not in found and found["few"]:
                sums["few" + key] = _gathered(vector, found["high"] << 16, tile.start)
            elif bits is not None and "threshold" not in found:
                inside = (bits - (found["high"] << 16)).clamp_(-1, _LOW).add_(1)
                sums["low" + key] = torch.bincount(inside, minlength=_LOW + 2)[1 : _LOW + 1].to(width)
            else:
                counts = torch.zeros(-(-tile.site.numel // BLOCK), dtype=torch.int64)
                for number, part in enumerate(vector.split(BLOCK), tile.start // BLOCK):
                    counts[number] = _count(part, found["threshold"]) - _count(part, found["threshold"] + 1)
                sums["ties" + key] = counts
    return sums


def _survey_stored(values: StoredVectors, selections: Sequence[Sequence[Selection]], tile: Tile) -> Sums | None:
    """The same by compiled loops over what is stored; None where a value is not finite."""
    sums: Sums = {}
    numel = values.stored[0].numel()
    wide = tile.site.numel >= 1 << 31
    sources = kernel.sources(values.stored)
    histograms: dict[str, tuple[int, int | None]] = {}
    for model, wanted in enumerate(selections):
        for index, found in enumerate(wanted):
            key = f"{model}.{index}"
            if found.get("done"):
                continue
            if "high" not in found:
                histograms["high" + key] = (model, None)
            elif "threshold" not in found and not found["few"]:
                histograms["low" + key] = (model, found["high"])
            elif "threshold" not in found:
                gathered = kernel.gather(sources[model], values.minus, numel, found["high"])
                if gathered is None:
                    return None
                sums["few" + key] = Gathered(gathered[0].long() + tile.start, gathered[1])
            else:
                counts = kernel.count_equal(sources[model], values.minus, numel, found["threshold"], BLOCK)
                if counts is None:
                    return None
                first = tile.start // BLOCK
                sums["ties" + key] = torch.zeros(-(-tile.site.numel // BLOCK), dtype=torch.int64)
                sums["ties" + key][first : first + len(counts)] = counts
    asked = list(dict.fromkeys(histograms.values()))
    if asked:
        chosen = kernel.sources([values.stored[model] for model, _ in asked])
        counted = kernel.count_bits(chosen, values.minus, numel, [high for _, high in asked])
        if counted is None:
            return None
        made = dict(zip(asked, counted))
        for key, what in histograms.items():
            sums[key] = made[what].long() if wide else made[what].clone()
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
        counts = _together([part["high" + key] for part in sums.values()])
        found["high"], found["wanted"] = _bin_of(counts, found["keep"])
        found["few"] = found["high"] > 0 and int(counts[found["high"]]) <= GATHERED
    elif found.get("few"):
        bits = {name: part["few" + key].together() for name, part in sums.items()}
        counts = _together([torch.bincount(own & 0xFFFF, minlength=_LOW) for _, own in bits.values()])
        low, wanted = _bin_of(counts, found["wanted"])
        found["threshold"], found["wanted"] = (found["high"] << 16) + low, wanted
        if wanted < int(counts[low]) and "value_only" not in found:
            found["cut"] = _cut({n: indices[own == found["threshold"]] for n, (indices, own) in bits.items()}, wanted)
        found["done"] = True
    elif "threshold" not in found:
        counts = _together([part["low" + key] for part in sums.values()])
        low, wanted = _bin_of(counts, found["wanted"])
        found["threshold"], found["wanted"] = (found["high"] << 16) + low, wanted
        # Zeros are the same kept or not, and where all of them are wanted there is nothing to cut.
        found["done"] = found["threshold"] == 0 or wanted == int(counts[low]) or "value_only" in found
    else:
        wanted = found["wanted"]
        for name, part in sums.items():
            counts = part["ties" + key].numpy().cumsum()
            if int(counts[-1]) >= wanted:
                block = int(np.searchsorted(counts, wanted))
                found["cut"] = [name, block * BLOCK, wanted - (int(counts[block - 1]) if block else 0)]
                break
            wanted -= int(counts[-1])
        found["done"] = True
    return found


def _cut(tied: Mapping[str, Tensor], wanted: int) -> list[Any]:
    """Where the first ``wanted`` of the tied elements end: the tensor, and the index behind the last."""
    for name, indices in tied.items():
        if len(indices) >= wanted:
            return [name, int(indices[wanted - 1]) + 1, 0]
        wanted -= len(indices)
    raise AssertionError("fewer elements are tied than are wanted")


def _gathered(values: Tensor, first_bits: int, start: int) -> Gathered:
    """The elements whose magnitude has these upper 16 bits. Eight at a time are passed over where none has."""
    inside = _at_least(values.float(), first_bits)
    inside = inside.sub_(_at_least(values.float(), first_bits + _LOW))
    whole = len(inside) // 8 * 8
    busy = (inside[:whole] != 0).view(torch.int64).nonzero().flatten()
    some = inside[:whole].view(-1, 8).index_select(0, busy).view(-1)
    found = some.nonzero().flatten()
    rest = inside[whole:].nonzero().flatten()
    indices = torch.cat([busy[found >> 3] * 8 + (found & 7), rest + whole])
    return Gathered(indices + start, magnitude_bits(torch.cat([some[found], inside[whole:][rest]])))


def _together(histograms: Sequence[Tensor]) -> np.ndarray:
    """Their sum, int64. In numpy: of arrays this small torch's threads cost more than the work."""
    total = histograms[0].numpy().astype(np.int64)
    for histogram in histograms[1:]:
        total += histogram.numpy()
    return total


def _bin_of(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin of the ``wanted``-th largest, and how many of that bin are wanted."""
    from_above = counts[::-1].cumsum()
    place = int(np.searchsorted(from_above, wanted))
    return len(counts) - 1 - place, wanted - (int(from_above[place - 1]) if place else 0)


def threshold_of(found: Selection) -> float:
    """The k-th largest magnitude."""
    return float(np.array(found["threshold"], dtype=np.int32).view(np.float32))


EVERYTHING, NOTHING = 0, 0x7F800000
"""Bits that every finite magnitude has at least, and that none has."""


def boundary(
    found: Selection, name: str, start: int, numel: int, values: Callable[[int, int], Tensor]
) -> tuple[int, int, int]:
    """Where a tile is cut, and the bits that a selected magnitude has at least: before that place, and from it on.

    Args:
        found: a settled selection.
        name: the tensor's.
        start: the tile's first element in it.
        numel: elements of the tile.
        values: gives those from the first to behind the last of two places in the tile.
    """
    if "threshold" not in found or found["threshold"] == 0:
        bits = EVERYTHING if "threshold" in found or found["all"] else NOTHING
        return numel, bits, bits
    bits = found["threshold"]
    if "cut" not in found:
        return numel, bits, bits
    cut_name, index, more = found["cut"]
    if name != cut_name:
        bits += name > cut_name
        return numel, bits, bits
    place = min(max(0, index - start), numel)
    if more and place < numel and index >= start:  # so many of the block that begins there are taken too
        tied = (magnitude_bits(values(place, min(place + BLOCK, numel))) == bits).nonzero().flatten()
        place += int(tied[more - 1]) + 1
    return place, bits, bits + 1


def keep_largest(values: Tensor, found: Selection, tile: Tile) -> Tensor:
    """``values`` (flat) where selected, 0 elsewhere. May be the same memory."""
    place, before, behind = boundary(
        found, tile.site.name, tile.start, len(values), lambda first, last: values[first:last]
    )
    if before == behind or place >= len(values):
        return _at_least(values, before)
    return torch.cat([_at_least(values[:place], before), _at_least(values[place:], behind)])


def _at_least(values: Tensor, bits: int) -> Tensor:
    """``values`` where the bits of the magnitude are at least these, 0 elsewhere. May be the same memory."""
    if bits in (EVERYTHING, NOTHING):
        return values if bits == EVERYTHING else torch.zeros_like(values)
    below = float(np.array(bits - 1, dtype=np.int32).view(np.float32))
    if values.dtype == torch.float32:
        return torch.nn.functional.hardshrink(values, below)
    return values * (magnitude_bits(values) >= bits)


def _count(values: Tensor, bits: int) -> int:
    """How many of at most 2**24 values have a magnitude of at least these bits (> 0)."""
    signs = _at_least(values, bits).sign_()
    return int(torch.dot(signs, signs))
