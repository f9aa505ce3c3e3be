"""MXFP4: E2M1 elements with a power-of-two scale per 32 (OCP Microscaling Formats v1.0; card: fp8_mx_nvfp4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.weights.grid import Grid, Levels, Params, Part, register_grid, row_blocks
from slimwright.weights.packing import pack_codes, packed_row_bytes, unpack_codes

BLOCK = 32
_BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of codes 0..7; bit 3 is the sign."""


_LEVELS = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])


@register_grid
@dataclass(frozen=True)
class MXFP4(Grid):
    """``w ≈ 2**e * E2M1(code)`` with ``e = floor(log2(absmax)) - 2`` per block of 32 along the row, which may be short
    at the end; ``e + 127`` is stored as a byte (E8M0). Elements are rounded to nearest, ties to the even code, and
    saturate at 6.

    Codes lie in the layout of :mod:`~slimwright.weights.packing`, so that one kernel family reads all 4-bit grids; OCP
    checkpoints put the even element in the low nibble, and export re-arranges them.
    """

    key: ClassVar[str] = "mxfp4"

    @property
    def spec(self) -> str:
        return self.key

    @classmethod
    def parse(cls, spec: str) -> MXFP4 | None:
        return cls() if spec == cls.key else None

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (
            Part("", torch.uint8, (rows, packed_row_bytes(columns, 4), 1)),
            Part("_scale", torch.uint8, (rows, -(-columns // BLOCK))),
        )

    @staticmethod
    def _blocked(w: Tensor) -> Tensor:
        """(rows, columns) → (rows, blocks, 32), a short last block padded with zeros."""
        short = -w.shape[1] % BLOCK
        return (torch.nn.functional.pad(w, (0, short)) if short else w).unflatten(1, (-1, BLOCK))

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        """``scale``: (rows, blocks) uint8, E8M0. An all-zero block gets the smallest scale, 0."""
        blocks = self._blocked(w)
        absmax = torch.maximum(blocks.amax(2), -blocks.amin(2)).float()
        exponent = torch.frexp(absmax).exponent - 1 - 2  # frexp's mantissa lies in [0.5, 1); 6 = 1.5 * 2**2
        exponent = torch.where(absmax > 0, exponent, -_BIAS).clamp_(-_BIAS, _BIAS)
        return {"scale": (exponent + _BIAS).to(torch.uint8)}

    @staticmethod
    def _power(exponent: Tensor) -> Tensor:
        """2**exponent, exact (the smallest are subnormal): (rows, blocks) → (rows, blocks, 1) float32."""
        return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent).float().unsqueeze(2)

    def fit_block(self, columns: int) -> int:
        return min(BLOCK, columns)

    def levels(self, params: Params, columns: int) -> Levels:
        table = torch.tensor([*(-magnitude for magnitude in reversed(MAGNITUDES[1:])), *MAGNITUDES])
        return Levels(BLOCK, self._power(params["scale"].int() - _BIAS).squeeze(2), table=table)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        inverse = self._power(_BIAS - params["scale"].int())
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in row_blocks(*w.shape):
            x = self._blocked(w[rows]) * inverse[rows]
            size = x.abs().clamp_(max=6.0)
            # Codes step by 0.5 up to 2, by 1 up to 4, by 2 up to 6: the least of the three roundings is the nearest.
            code = (size * 2).round_()
            torch.minimum(code, size.round().add_(2), out=code)
            torch.minimum(code, size.mul_(0.5).round_().add_(4), out=code)
            code += (x < 0) * 8.0
            codes[rows] = code.flatten(1)[:, : w.shape[1]]
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = _LEVELS.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
        values = self._blocked(values) * self._power(params["scale"].int() - _BIAS)
        return values.flatten(1)[:, : codes.shape[1]]

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"": pack_codes(codes, 4).unsqueeze(-1), "_scale": params["scale"]}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        payload = parts[""]
        codes = unpack_codes(payload.reshape(payload.shape[0], -1), 4, columns)
        return codes, {"scale": parts["_scale"]}
