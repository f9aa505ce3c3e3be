"""FP8 E4M3 with a float32 scale per row or per tensor (OCP OFP8 v1.0; card: fp8_mx_nvfp4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.weights.grid import Grid, Levels, Params, Part, register_grid, row_blocks
from slimwright.weights.packing import pack_codes, packed_row_bytes, unpack_codes

LARGEST = 448.0
# Below, dividing by the scale would lose its meaning (subnormal scales); above, 448 times the scale would be infinite.
_SCALE_MIN = torch.finfo(torch.float32).tiny
_SCALE_MAX = 7.5e35
# Every finite value once, ascending: codes 0..126 are the positive ones, 127 is NaN.
_POSITIVE = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_LEVELS = torch.cat([-_POSITIVE[1:].flip(0), _POSITIVE])


@register_grid
@dataclass(frozen=True)
class FP8(Grid):
    """``w ≈ scale * E4M3(code)``, ``scale = absmax / 448``; codes are the bytes of ``torch.float8_e4m3fn``.

    Args:
        per_tensor: one scale for the whole matrix (its absmax comes from :meth:`survey`) instead of one per row.
    """

    key: ClassVar[str] = "fp8"
    examples: ClassVar[tuple[str, ...]] = ("fp8", "fp8:tensor")
    per_tensor: bool = False

    @property
    def spec(self) -> str:
        return "fp8:tensor" if self.per_tensor else "fp8"

    @classmethod
    def parse(cls, spec: str) -> FP8 | None:
        kind, *words = spec.split(":")
        if kind != cls.key:
            return None
        if words not in ([], ["tensor"]):
            raise InputError(f"Grid '{spec}': fp8 is written fp8 (a scale per row) or fp8:tensor.")
        return cls(per_tensor=bool(words))

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (
            Part("", torch.uint8, (rows, packed_row_bytes(columns, 8), 1)),
            Part("_scale", torch.float32, (1 if self.per_tensor else rows, 1)),
        )

    def part_slice(self, suffix: str, rows: slice, columns: int) -> slice:
        return slice(0, 1) if self.per_tensor and suffix == "_scale" else rows

    def survey(self, w: Tensor, state: Any = None) -> Any:
        """Absmax so far."""
        if not self.per_tensor:
            return None
        low, high = w.aminmax()
        return max(float(-low), float(high), state or 0.0)

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        if self.per_tensor:
            largest = self.survey(w) if survey is None else survey
            absmax = torch.tensor([[largest]], dtype=torch.float32, device=w.device).expand(w.shape[0], 1)
        else:
            absmax = torch.maximum(w.amax(1, keepdim=True), -w.amin(1, keepdim=True)).float()
        return {"scale": torch.where(absmax > 0, absmax / LARGEST, 1.0).clamp_(_SCALE_MIN, _SCALE_MAX)}

    def levels(self, params: Params, columns: int) -> Levels:
        return Levels(columns, params["scale"], table=_LEVELS)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in row_blocks(*w.shape):
            scaled = (w[rows] / params["scale"][rows]).clamp_(-LARGEST, LARGEST)
            codes[rows] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float().mul_(params["scale"])

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        scale = params["scale"]
        return {"": pack_codes(codes, 8).unsqueeze(-1), "_scale": scale[:1].clone() if self.per_tensor else scale}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        payload = parts[""]
        codes = unpack_codes(payload.reshape(payload.shape[0], -1), 8, columns)
        return codes, {"scale": parts["_scale"].expand(codes.shape[0], 1)}
