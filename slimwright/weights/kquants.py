"""GGUF's k-quants Q4_K and Q6_K: super-blocks of 256 whose sub-block scales are integers (card: gguf).

Without importance the scale search is ggml's reference quantizer; with it (mean squared input of each column) that of
llama.cpp with an importance matrix (card: item 7). Q4_K weights squared errors by ``importance * sqrt(2 mean(x²) +
x²)``, mean over the super-block; Q6_K by the importance itself, as llama.cpp's source does, not the card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.weights.gguf import (
    GGUFBlocks,
    bytes_half,
    half_bytes,
    input_weights,
    ratio,
    search_scale,
    stored_half,
    unit_blocks,
)
from slimwright.weights.grid import Levels, Params, register_grid, row_blocks


@register_grid
@dataclass(frozen=True)
class Q4_K(GGUFBlocks):  # noqa: N801 - the format's name
    """``w ≈ d * scale * code - dmin * min``: 4-bit codes, 6-bit scale and min per 32, float16 d and dmin per 256."""

    key: ClassVar[str] = "q4_k"
    block = 256
    block_bytes = 144
    weighted = True

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        """``d``, ``dmin`` (rows, blocks) float32; ``scale``, ``min`` (rows, blocks, 8) uint8."""
        found = [self._fit_rows(w[rows], importance) for rows in row_blocks(*w.shape)]
        return {name: torch.cat([params[name] for params in found]) for name in found[0]}

    def _fit_rows(self, w: Tensor, importance: Tensor | None) -> Params:
        blocks, power = unit_blocks(self.blocked(w))
        x = blocks.unflatten(2, (8, 32))
        if importance is None:
            weight = x.abs() + x.square().mean(3, keepdim=True).sqrt_()
            scale, low = _search_affine(x, weight, start=-1.0, step=0.1, candidates=21)
            d, dmin = scale.amax(2) / 63, -low.amin(2) / 63
        else:
            square = blocks.square()
            weight = input_weights(importance, 256) * (2 * square.mean(2, keepdim=True) + square).sqrt_()
            weight = weight.unflatten(2, (8, 32))
            scale, low = _search_affine(x, weight, start=-0.9, step=0.05, candidates=37)
            total = weight.sum(3)
            d, dmin = _fit_scale(scale, total), _fit_scale(-low, total)
        power = power.squeeze(2)
        return {
            "d": stored_half(d * power),
            "dmin": stored_half(dmin * power),
            "scale": ratio(scale, d.unsqueeze(2).expand_as(scale)).round_().clamp_(0, 63).to(torch.uint8),
            "min": ratio(-low, dmin.unsqueeze(2).expand_as(low)).round_().clamp_(0, 63).to(torch.uint8),
        }

    def _steps(self, params: Params) -> tuple[Tensor, Tensor]:
        """Step and offset of each sub-block: (rows, blocks, 8, 1)."""
        step = params["d"].unsqueeze(2) * params["scale"]
        offset = params["dmin"].unsqueeze(2) * params["min"]
        return step.unsqueeze(3), offset.unsqueeze(3)

    def levels(self, params: Params, columns: int) -> Levels:
        step, offset = self._steps(params)
        return Levels(32, step.flatten(1), -offset.flatten(1), top=15)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        step, offset = self._steps(params)
        step = torch.where(step > 0, step, torch.inf)  # a step of 0: every code decodes alike, take 0
        x = self.blocked(w).unflatten(2, (8, 32)) + offset
        return x.div_(step).round_().clamp_(0, 15).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        step, offset = self._steps(params)
        values = self.blocked(codes).unflatten(2, (8, 32)).to(torch.float32)
        return values.mul_(step).sub_(offset).flatten(1)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        scale, low = params["scale"], params["min"]
        scales = torch.cat(
            [
                scale[..., :4] | (scale[..., 4:] >> 4 << 6),
                low[..., :4] | (low[..., 4:] >> 4 << 6),
                (scale[..., 4:] & 15) | (low[..., 4:] << 4),
            ],
            dim=-1,
        )
        halves = codes.unflatten(2, (4, 2, 32))
        nibbles = (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(2)
        return torch.cat([half_bytes(params["d"]), half_bytes(params["dmin"]), scales, nibbles], dim=-1)

    def from_bytes(self, data: Tensor) -> tuple[Tensor, Params]:
        first, second, third = data[..., 4:8], data[..., 8:12], data[..., 12:16]
        nibbles = data[..., 16:].unflatten(2, (4, 32))
        return torch.stack([nibbles & 15, nibbles >> 4], dim=3).flatten(2), {
            "d": bytes_half(data[..., 0:2]),
            "dmin": bytes_half(data[..., 2:4]),
            "scale": torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=-1),
            "min": torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=-1),
        }


def _search_affine(x: Tensor, weight: Tensor, start: float, step: float, candidates: int) -> tuple[Tensor, Tensor]:
    """Scale >= 0 and minimum <= 0 of each sub-block (..., 32), so that ``scale * code + minimum`` with codes 0..15 has
    the least weighted squared error: for each trial scale the codes, then least squares for both."""
    low = x.amin(-1, keepdim=True).clamp_(max=0)
    extent = x.amax(-1, keepdim=True) - low
    sum_w, sum_x = weight.sum(-1, keepdim=True), (weight * x).sum(-1, keepdim=True)

    def codes(top: float) -> Tensor:
        return ((x - low) * ratio(torch.full_like(extent, top), extent)).round_().clamp_(0, 15)

    code = codes(15.0)
    scale, minimum = extent / 15, low
    best = (weight * (code * scale + minimum - x).square_()).sum(-1, keepdim=True)
    for index in range(candidates):
        code = codes(start + step * index + 15)
        weighted = weight * code
        sum_l, sum_l2 = weighted.sum(-1, keepdim=True), (weighted * code).sum(-1, keepdim=True)
        sum_xl = (weighted * x).sum(-1, keepdim=True)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial = ratio(sum_w * sum_xl - sum_x * sum_l, determinant)
        offset = ratio(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        trial = torch.where(offset > 0, ratio(sum_xl, sum_l2), trial)
        offset.clamp_(max=0)
        error = (weight * (code * trial + offset - x).square_()).sum(-1, keepdim=True)
        better = (determinant > 0) & (error < best)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, trial, scale), torch.where(better, offset, minimum)
    return scale.squeeze(-1).clamp_(min=0), minimum.squeeze(-1)


def _fit_scale(values: Tensor, weight: Tensor) -> Tensor:
    """(..., n) values >= 0 → (...): the scale with which codes 0..63 have the least weighted squared error, from nine
    trials around max / 63, each followed by least squares."""
    top = values.amax(-1, keepdim=True)
    scale, best = top / 63, torch.full_like(top, torch.inf)
    for index in range(-4, 5):
        code = (values * ratio(torch.full_like(top, 63 + 0.1 * index), top)).round_().clamp_(0, 63)
        trial = ratio((weight * code * values).sum(-1, keepdim=True), (weight * code * code).sum(-1, keepdim=True))
        error = (weight * (code * trial - values).square_()).sum(-1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, trial, scale)
    return scale.squeeze(-1)


@register_grid
@dataclass(frozen=True)
class Q6_K(GGUFBlocks):  # noqa: N801 - the format's name
    """``w ≈ d * scale * (code - 32)``: 6-bit codes, signed 8-bit scale per 16, float16 d per 256."""

    key: ClassVar[str] = "q6_k"
    block = 256
    block_bytes = 210
    weighted = True

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        """``d`` (rows, blocks) float32; ``scale`` (rows, blocks, 16) int8."""
        found = [self._fit_rows(w[rows], importance) for rows in row_blocks(*w.shape)]
        return {name: torch.cat([params[name] for params in found]) for name in found[0]}

    def _fit_rows(self, w: Tensor, importance: Tensor | None) -> Params:
        blocks, power = unit_blocks(self.blocked(w))
        x = blocks.unflatten(2, (16, 16))
        weight = x.square() if importance is None else input_weights(importance, 256).unflatten(2, (16, 16))
        scale = search_scale(x, weight, 32).squeeze(3)
        largest = scale.gather(2, scale.abs().argmax(2, keepdim=True))
        inverse = torch.where(largest != 0, -128 / torch.where(largest != 0, largest, 1.0), 0.0)
        return {
            "d": stored_half(torch.where(inverse != 0, 1 / inverse, 0.0) * power).squeeze(2),
            "scale": (scale * inverse).round_().clamp_(-128, 127).to(torch.int8),
        }

    @staticmethod
    def _steps(params: Params) -> Tensor:
        return (params["d"].unsqueeze(2) * params["scale"]).unsqueeze(3)

    def levels(self, params: Params, columns: int) -> Levels:
        step = self._steps(params).flatten(1)
        return Levels(16, step, step * -32, top=63)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        step = self._steps(params)
        step = torch.where(step != 0, step, torch.inf)
        x = self.blocked(w).unflatten(2, (16, 16)) / step
        return x.round_().clamp_(-32, 31).add_(32).to(torch.uint8).flatten(1)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = self.blocked(codes).unflatten(2, (16, 16)).to(torch.float32)
        return values.sub_(32).mul_(self._steps(params)).flatten(1)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        quarters = codes.unflatten(2, (2, 4, 32))
        first, second, third, fourth = quarters.unbind(3)
        low = torch.stack([(first & 15) | (third << 4), (second & 15) | (fourth << 4)], dim=3).flatten(2)
        high = ((first >> 4) | (second >> 4 << 2) | (third >> 4 << 4) | (fourth >> 4 << 6)).flatten(2)
        return torch.cat([low, high, params["scale"].view(torch.uint8), half_bytes(params["d"])], dim=-1)

    def from_bytes(self, data: Tensor) -> tuple[Tensor, Params]:
        low, high = data[..., :128].unflatten(2, (2, 2, 32)), data[..., 128:192].unflatten(2, (2, 32))
        first, second = low.unbind(3)
        codes = torch.stack(
            [
                (first & 15) | (high & 3) << 4,
                (second & 15) | (high >> 2 & 3) << 4,
                (first >> 4) | (high >> 4 & 3) << 4,
                (second >> 4) | (high >> 6) << 4,
            ],
            dim=3,
        )
        scale = data[..., 192:208].contiguous().view(torch.int8)
        return codes.flatten(2), {"d": bytes_half(data[..., 208:210]), "scale": scale}
