"""How keys and values of one attention layer are packed: the number format, and torch code that packs and unpacks.

KIVI (Liu et al. 2024, arXiv 2402.02750): keys are rounded per channel over ``group`` consecutive tokens, values per
token over ``group`` channels, the newest ``window`` tokens stay as they are. ``value = low + scale * code``; both are
float16, and codes are measured from the rounded ``low``, so that rounding it costs nothing.

Where the source leaves the moment open, a token is packed when the next one needs its place: the keys of a block of
``window`` tokens when the first token after the block comes, the value of token ``t`` when token ``t + window`` comes.
The newest token is therefore always exact.

Packed parts (``n`` tokens; B batch, H heads of keys and values, D channels; codes come in tiles of 32, see
kernels/attend.cpp): keys (B, H, n/32, D, 4*bits) uint8 with ranges (B, H, n/group, D) float16; values (B, H, n,
ceil(D/32), 4*bits) uint8 with ranges (B, H, n, ceil(D/group)) float16.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError

TILE = 32
BITS = (2, 4, 8)
GROUPS = (32, 64, 128)
LARGEST_WINDOW = 1 << 20
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class KvFormat:
    """Format of one layer's cache.

    Attributes:
        bits: of a code.
        group: tokens (keys) or channels (values) that share a range.
        window: newest tokens that are not packed; a multiple of ``group``.

    Raises:
        InputError: a value that cannot be.
    """

    bits: int = 4
    group: int = 32
    window: int = 128

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"A cache of keys and values has 2, 4 or 8 bits, not {self.bits}.")
        if self.group not in GROUPS:
            raise InputError(f"The group of a cache is one of 32, 64, 128, not {self.group}.")
        if not self.group <= self.window <= LARGEST_WINDOW or self.window % self.group:
            raise InputError(
                f"The window of a cache must be a multiple of its group of {self.group}, not {self.window}."
            )

    @property
    def spec(self) -> str:
        """``kv4:g32:w128``."""
        return f"kv{self.bits}:g{self.group}:w{self.window}"

    @classmethod
    def parse(cls, spec: str) -> KvFormat:
        """Inverse of :attr:`spec`.

        Raises:
            InputError: not of that form.
        """
        match = re.fullmatch(r"kv(\d{1,2}):g(\d{1,4}):w(\d{1,8})", spec)
        if not match:
            raise InputError(f"'{spec[:60]}' is not a format of a cache such as kv4:g32:w128.")
        return cls(*map(int, match.groups()))

    def packed_keys(self, length: int) -> int:
        """How many of ``length`` tokens have packed keys."""
        return (length - 1) // self.window * self.window if length else 0

    def packed_values(self, length: int) -> int:
        """How many of ``length`` tokens have packed values."""
        return max(0, length - self.window)

    def capacity(self, length: int) -> tuple[int, int]:
        """Tokens that the packed keys and values are allocated for at ``length`` tokens."""
        return self.packed_keys(length), -(-self.packed_values(length) // self.window) * self.window

    def nbytes(self, length: int, batch: int, heads: int, key_dim: int, value_dim: int, element: int) -> int:
        """Bytes that are allocated for ``length`` tokens.

        Args:
            heads: of keys and values.
            element: bytes of one element of the window.
        """
        keys, values = self.capacity(length)
        tile, rows = 4 * self.bits, batch * heads
        packed = keys // TILE * key_dim * tile + keys // self.group * key_dim * 4
        packed += values * (-(-value_dim // TILE) * tile + -(-value_dim // self.group) * 4)
        return rows * (packed + self.window * (key_dim + value_dim) * element)

    # -- packing -----------------------------------------------------------------------------------------------------

    def pack_keys(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and lows of keys (..., n, D), ``n`` a multiple of ``group``."""
        *lead, tokens, dim = keys.shape
        grouped = keys.float().reshape(*lead, tokens // self.group, self.group, dim)
        codes, scale, low = self._codes(grouped, -2)
        codes = codes.reshape(*lead, tokens // TILE, TILE, dim).transpose(-1, -2)
        return _to_tiles(codes, self.bits), scale.squeeze(-2), low.squeeze(-2)

    def unpack_keys(self, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        """Inverse of :meth:`pack_keys` up to rounding: (..., n, D) float32."""
        *lead, tiles, dim, _ = codes.shape
        values = _from_tiles(codes, self.bits).transpose(-1, -2).reshape(*lead, -1, self.group, dim)
        values = torch.addcmul(low.float()[..., None, :], values.float(), scale.float()[..., None, :])
        return values.reshape(*lead, tiles * TILE, dim)

    def pack_values(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and lows of values (..., n, D)."""
        *lead, dim = values.shape
        groups = -(-dim // self.group)
        # the last group may be short: repeating its last channel changes neither end of its range
        padded = torch.cat([values, values[..., -1:].expand(*lead, groups * self.group - dim)], -1).float()
        codes, scale, low = self._codes(padded.reshape(*lead, groups, self.group), -1)
        codes = codes.reshape(*lead, groups * self.group)
        codes[..., dim:] = 0
        tiles = -(-dim // TILE)
        codes = codes[..., : tiles * TILE].reshape(*lead, tiles, TILE)
        return _to_tiles(codes, self.bits), scale.squeeze(-1), low.squeeze(-1)

    def unpack_values(self, codes: Tensor, scale: Tensor, low: Tensor, dim: int) -> Tensor:
        """Inverse of :meth:`pack_values` up to rounding: (..., n, dim) float32."""
        values = _from_tiles(codes, self.bits).flatten(-2)[..., :dim].float()
        wide = (self._widened(part, dim) for part in (low, scale))
        return torch.addcmul(next(wide), values, next(wide))

    def round_keys(self, keys: Tensor) -> Tensor:
        """Keys (..., n, D) as packing and unpacking returns them; ``n`` a multiple of ``group``; float32."""
        return self.unpack_keys(*self.pack_keys(keys))

    def round_values(self, values: Tensor) -> Tensor:
        """Values (..., n, D) as packing and unpacking returns them; float32."""
        return self.unpack_values(*self.pack_values(values), values.shape[-1])

    def _widened(self, ranges: Tensor, dim: int) -> Tensor:
        return ranges.float().repeat_interleave(self.group, -1)[..., :dim]

    def _codes(self, grouped: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        top = float(2**self.bits - 1)
        low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        low = low.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
        scale = ((high - low.float()) / top).clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
        divisor = scale.float()
        codes = ((grouped - low.float()) / torch.where(divisor > 0, divisor, 1.0)).round().clamp(0, top)
        return torch.where(divisor > 0, codes, 0.0).to(torch.uint8), scale, low


def _to_tiles(codes: Tensor, bits: int) -> Tensor:
    """(..., 32) uint8 → (..., 4*bits) uint8: byte i holds the codes i, i + n, i + 2n ... from its low bits up."""
    count = 4 * bits
    parts = codes.unflatten(-1, (8 // bits, count))
    packed = parts[..., 0, :].clone()
    for index in range(1, 8 // bits):
        packed |= parts[..., index, :] << (index * bits)
    return packed


def _from_tiles(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_to_tiles`."""
    if bits == 8:
        return packed
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -2).flatten(-2)


__all__ = ["BITS", "GROUPS", "KvFormat"]
