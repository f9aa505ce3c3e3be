"""Ternary vectors in few bits: the gaps between nonzero entries in Golomb's code, one bit a sign, one number.

For entries that are nonzero with probability p the best Golomb parameter is a power of two, 2**b with
``b = 1 + floor(log2(log((sqrt(5) - 1) / 2) / log(1 - p)))`` (ComPEFT, arXiv:2311.13171, section 2.2), so a gap g costs
``g >> b`` ones, a zero, and its b low bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slimwright.errors import InputError


@dataclass(frozen=True)
class Ternary:
    """A vector of 0 and plus or minus ``scale``.

    Attributes:
        numel: entries.
        nonzero: how many are not 0.
        bits: of the code's remainders (b).
        scale: magnitude of the nonzero ones.
        code: gaps and signs, packed, most significant bit first.
    """

    numel: int
    nonzero: int
    bits: int
    scale: float
    code: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the code and of the four numbers."""
        return self.code.numel() + 8 + 8 + 1 + 4


def encode(values: Tensor) -> Ternary:
    """Code a flat vector whose nonzero entries all have the same magnitude.

    Raises:
        InputError: two magnitudes beside 0.
    """
    flat = values.detach().float().reshape(-1)
    places = flat.nonzero().flatten()
    found = flat[places]
    scale = float(found[0].abs()) if len(found) else 0.0
    if len(found) and not bool((found.abs() == found[0].abs()).all()):
        raise InputError("Only vectors of 0 and plus or minus one number can be coded so: make them ternary first.")
    count, numel = len(places), flat.numel()
    share = count / numel if numel else 0.0
    bits = 0
    if 0 < share < 1:
        bits = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log1p(-share))))
    gaps = np.diff(places.numpy(), prepend=-1) - 1
    quotients = gaps >> bits
    lengths = quotients + 1 + bits + 1
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if count else 0
    stream = np.zeros(total, dtype=np.uint8)
    starts = ends - lengths
    # Unary: ones from the start, then the zero that is there already.
    ones = np.zeros(total + 1, dtype=np.int64)
    np.add.at(ones, starts, 1)
    np.add.at(ones, starts + quotients, -1)
    stream |= np.cumsum(ones[:-1]).astype(np.uint8)
    for bit in range(bits):
        stream[starts + quotients + 1 + bit] = (gaps >> (bits - 1 - bit)) & 1
    stream[ends - 1] = (found < 0).numpy()
    return Ternary(numel, count, bits, scale, torch.from_numpy(np.packbits(stream)))


def decode(ternary: Ternary) -> Tensor:
    """(numel,) float32: the vector that was coded.

    Raises:
        InputError: the code is damaged.
    """
    stream = np.unpackbits(ternary.code.numpy())
    zeros = np.flatnonzero(stream == 0)
    out = torch.zeros(ternary.numel)
    position, place, at = 0, -1, 0
    places, negative = np.empty(ternary.nonzero, dtype=np.int64), np.empty(ternary.nonzero, dtype=bool)
    for number in range(ternary.nonzero):
        at = int(np.searchsorted(zeros[at:], position)) + at
        end = int(zeros[at]) if at < len(zeros) else len(stream)
        if end + ternary.bits + 1 >= len(stream):
            raise InputError("The coded vector is cut short: make it again.")
        low = 0
        for bit in stream[end + 1 : end + 1 + ternary.bits]:
            low = low << 1 | int(bit)
        place += ((end - position) << ternary.bits | low) + 1
        places[number], negative[number] = place, bool(stream[end + 1 + ternary.bits])
        position = end + ternary.bits + 2
    if ternary.nonzero and places[-1] >= ternary.numel:
        raise InputError("The coded vector has an entry behind its end: make it again.")
    out[torch.from_numpy(places)] = torch.from_numpy(np.where(negative, -ternary.scale, ternary.scale)).float()
    return out


def expected_bits(share: float) -> float:
    """Bits a nonzero entry that the paper's formula predicts, its sign included."""
    bits = max(0, 1 + math.floor(math.log2(math.log((math.sqrt(5) - 1) / 2) / math.log1p(-share))))
    return bits + 1 / (1 - (1 - share) ** (2**bits)) + 1
