"""NF4: sixteen levels at the quantiles of a normal, one absmax per 64 weights (QLoRA, arXiv:2305.14314; card: nf4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.weights.grid import Grid, Levels, Params, Part, register_grid, row_blocks
from slimwright.weights.packing import pack_codes, packed_row_bytes, unpack_codes

BLOCK = 64
SUPERBLOCK = 256
_CELLS = 32  # of unit length, so that no two midpoints between levels share one

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


_LEVELS = torch.tensor(LEVELS)
_MIDPOINTS = (_LEVELS[1:] + _LEVELS[:-1]) / 2


def _cell(t: Tensor) -> Tensor:
    """The cell of [-1, 1] that t lies in. Monotone in t after rounding too, so that comparing t with the one midpoint
    of its cell decides as comparing it with all of them would."""
    return ((t + 1) * _CELLS).to(torch.int32)


# For each cell: the code below the midpoint that lies in it, and that midpoint (2 where none does).
_BELOW = torch.bucketize(torch.arange(2 * _CELLS + 1), _cell(_MIDPOINTS)).to(torch.uint8)
_LIMIT = torch.full((2 * _CELLS + 1,), 2.0).index_copy_(0, _cell(_MIDPOINTS).long(), _MIDPOINTS)


def _dynamic_levels() -> Tensor:
    """The 256 signed levels of the 8-bit dynamic code (8-bit optimizers, arXiv:2110.02861, section 1.3), ascending.

    Decade ``10**-k`` (k = 6..0) is cut into ``2**(6-k)`` equal intervals between 0.1 and 1, whose middles are levels
    with either sign; 0 and 1 complete them.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive += (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return torch.tensor(sorted([*positive, *(-level for level in positive), 0.0, 1.0]))


_DYNAMIC = _dynamic_levels()
_DYNAMIC_MIDPOINTS = (_DYNAMIC[1:] + _DYNAMIC[:-1]) / 2


@dataclass(frozen=True, eq=False)
class AbsMaxima:
    """Absolute maxima of the blocks of a matrix, one tensor per tile."""

    tiles: tuple[Tensor, ...]

    @cached_property
    def mean(self) -> Tensor:
        """Their mean as bitsandbytes takes it: float32, over one vector. Finite also where the sum is not."""
        values = torch.cat(self.tiles)
        mean = values.mean()
        return mean if torch.isfinite(mean) else values.double().mean().float()


@register_grid
@dataclass(frozen=True)
class NF4(Grid):
    """``w ≈ level[code] * absmax`` per block of 64 along the row; the last block of a row may be short.

    Where 64 divides the columns the blocks are those of the matrix flattened row-major, and codes and statistics equal
    bitsandbytes's (whose nibbles are in another order; export re-arranges them). As there, codes are chosen with the
    exact absmax, before the absmax itself is quantized.

    Args:
        double: store ``absmax - mean(absmax)`` in the 8-bit dynamic code with one float32 scale per 256 consecutive
            blocks in row-major order; they cross rows, hence :meth:`row_multiple`. The mean is over the whole matrix:
            :meth:`survey` keeps every absmax (1/16 of the float32 matrix), so that it is the same for any tiling.
    """

    key: ClassVar[str] = "nf4"
    examples: ClassVar[tuple[str, ...]] = ("nf4", "nf4:single")
    double: bool = True

    @property
    def spec(self) -> str:
        return "nf4" if self.double else "nf4:single"

    @classmethod
    def parse(cls, spec: str) -> NF4 | None:
        kind, *words = spec.split(":")
        if kind != cls.key:
            return None
        if words not in ([], ["single"]):
            raise InputError(f"Grid '{spec}': nf4 is written nf4 or nf4:single.")
        return cls(double=not words)

    # -- geometry ------------------------------------------------------------------------------------------------

    def blocks(self, columns: int) -> int:
        """Blocks per row."""
        return -(-columns // BLOCK)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        blocks = self.blocks(columns)
        payload = Part("", torch.uint8, (rows, packed_row_bytes(columns, 4), 1))
        if not self.double:
            return payload, Part("_absmax", torch.float32, (rows, blocks))
        return (
            payload,
            Part("_absmax", torch.uint8, (rows, blocks)),
            Part("_absmax_scale", torch.float32, (-(-rows * blocks // SUPERBLOCK),)),
            Part("_absmax_mean", torch.float32, (1,)),
        )

    def row_multiple(self, columns: int) -> int:
        return SUPERBLOCK // math.gcd(SUPERBLOCK, self.blocks(columns)) if self.double else 1

    def part_slice(self, suffix: str, rows: slice, columns: int) -> slice:
        if suffix == "_absmax_scale":
            blocks = self.blocks(columns)
            return slice(rows.start * blocks // SUPERBLOCK, -(-rows.stop * blocks // SUPERBLOCK))
        return slice(0, 1) if suffix == "_absmax_mean" else rows

    @staticmethod
    def _blocked(w: Tensor) -> Tensor:
        """(rows, columns) → (rows, blocks, 64), a short last block padded with zeros."""
        short = -w.shape[1] % BLOCK
        return (torch.nn.functional.pad(w, (0, short)) if short else w).unflatten(1, (-1, BLOCK))

    # -- numbers -------------------------------------------------------------------------------------------------

    def survey(self, w: Tensor, state: Any = None) -> AbsMaxima | None:
        """The absmax of every block so far, in row-major order."""
        if not self.double:
            return None
        return AbsMaxima((*(state.tiles if state else ()), self._absmax(w).flatten()))

    def _absmax(self, w: Tensor) -> Tensor:
        blocks = self._blocked(w)
        return torch.maximum(blocks.amax(2), -blocks.amin(2)).abs_().float()  # abs: 0, never -0

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        absmax = self._absmax(w)
        if not self.double:
            return {"absmax": absmax}
        mean = (survey or AbsMaxima((absmax.flatten(),))).mean.to(w.device)
        flat = (absmax - mean).flatten()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % SUPERBLOCK)).view(-1, SUPERBLOCK)
        scale = padded.abs().amax(1, keepdim=True)
        unit = (padded * (1 / scale.clamp(min=1e-38))).clamp_(-1, 1)
        codes = torch.bucketize(unit, _DYNAMIC_MIDPOINTS.to(w.device)).to(torch.uint8)

        def by_row(values: Tensor) -> Tensor:
            return values.flatten()[: flat.numel()].view_as(absmax)

        return {
            "exact": absmax,
            "absmax": by_row(codes),
            "absmax_scale": by_row(scale.expand_as(padded)),
            "absmax_mean": mean.expand(w.shape[0], 1),
        }

    def _stored_absmax(self, params: Params) -> Tensor:
        """(rows, blocks) float32 as the file says."""
        if not self.double:
            return params["absmax"]
        offset = _DYNAMIC.to(params["absmax"].device)[params["absmax"].int()] * params["absmax_scale"]
        largest = torch.finfo(torch.float32).max
        return (offset + params["absmax_mean"]).clamp_(-largest, largest)

    def fit_block(self, columns: int) -> int:
        return columns if self.double else min(BLOCK, columns)

    def levels(self, params: Params, columns: int) -> Levels:
        return Levels(BLOCK, self._stored_absmax(params), table=_LEVELS)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        absmax = params["exact"] if "exact" in params else self._stored_absmax(params)
        # A stored absmax may be negative: the smallest of very unequal blocks, off by the error of their second code.
        inverse = (1 / torch.where(absmax.abs() < 1e-38, 1e-38, absmax)).unsqueeze(2)
        below, limit = _BELOW.to(w.device), _LIMIT.to(w.device)
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in row_blocks(*w.shape):
            unit = (self._blocked(w[rows]) * inverse[rows]).clamp_(-1, 1)
            unit = unit.flatten(1)[:, : w.shape[1]].contiguous()
            cell = _cell(unit).flatten()
            above = unit.flatten() > limit.index_select(0, cell)
            codes[rows] = below.index_select(0, cell).add_(above).view_as(unit)
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = _LEVELS.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
        values = self._blocked(values) * self._stored_absmax(params).unsqueeze(2)
        return values.flatten(1)[:, : codes.shape[1]]

    # -- disk ----------------------------------------------------------------------------------------------------

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        packed = {"": pack_codes(codes, 4).unsqueeze(-1), "_absmax": params["absmax"]}
        if self.double:
            packed["_absmax_scale"] = params["absmax_scale"].flatten()[::SUPERBLOCK].contiguous()
            packed["_absmax_mean"] = params["absmax_mean"][:1, 0].clone()
        return packed

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        payload, absmax = parts[""], parts["_absmax"]
        codes = unpack_codes(payload.reshape(payload.shape[0], -1), 4, columns)
        params = {"absmax": absmax}
        if self.double:
            scale = parts["_absmax_scale"].repeat_interleave(SUPERBLOCK)[: absmax.numel()]
            params["absmax_scale"] = scale.view(absmax.shape)
            params["absmax_mean"] = parts["_absmax_mean"].expand(absmax.shape[0], 1)
        return codes, params

    def gather(self, parts: Mapping[str, Tensor], index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As :meth:`Grid.gather`, without unpacking the rows that share a superblock."""
        payload = parts[""]
        codes = unpack_codes(payload.reshape(payload.shape[0], -1)[index], 4, shape[1])
        params = {"absmax": parts["_absmax"][index]}
        if self.double:
            blocks = self.blocks(shape[1])
            block = index[:, None] * blocks + torch.arange(blocks, device=index.device)
            params["absmax_scale"] = parts["_absmax_scale"][block // SUPERBLOCK]
            params["absmax_mean"] = parts["_absmax_mean"].expand(index.shape[0], 1)
        return self.decode(codes, params)
