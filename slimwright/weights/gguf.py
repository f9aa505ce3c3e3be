"""GGUF's legacy blocks Q4_0 and Q8_0: the payload is the exact bytes of ggml's blocks (card: gguf; ggml-common.h)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.weights.grid import Grid, Levels, Params, Part, register_grid, row_blocks

_FLOAT16_MAX = 65504.0


def stored_half(values: Tensor) -> Tensor:
    """The float32 values of the float16 that are stored: finite, at most 65504 in size."""
    return values.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().float()


def half_bytes(values: Tensor) -> Tensor:
    """(...) float32 holding float16 values → (..., 2) bytes."""
    return values.half().unsqueeze(-1).view(torch.uint8)


def bytes_half(data: Tensor) -> Tensor:
    """Inverse of :func:`half_bytes`."""
    return data.contiguous().view(torch.float16).squeeze(-1).float()


def unit_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (..., n) divided by a power of two so that squares and cubes stay finite, and that power (..., 1).

    Exact, so the searches find what they would have found on the blocks themselves.
    """
    exponent = torch.frexp(torch.maximum(blocks.amax(-1, keepdim=True), -blocks.amin(-1, keepdim=True))).exponent
    power = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return (blocks.double() / power).float(), power.float()


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is not positive."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)


def input_weights(importance: Tensor, block: int) -> Tensor:
    """Importance (columns,) by blocks, (1, blocks, block), in units of each block's largest. Inputs that were never
    seen get a millionth of it; in a block of nothing else all count alike."""
    values = importance.float().view(1, -1, block)
    largest = values.amax(2, keepdim=True)
    return torch.where(largest > 0, values / torch.where(largest > 0, largest, 1.0), 1.0).clamp_(min=1e-6)


def search_scale(x: Tensor, weight: Tensor, half: int) -> Tensor:
    """(..., n) → (..., 1): the scale, of either sign, with which codes ``-half .. half - 1`` have the least weighted
    squared error: 19 trials around the one that puts the weight of largest magnitude on ``-half``, each followed by
    least squares. Of equals the plain trial wins."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))  # the first one on ties
    inverse = torch.where(extreme != 0, 1 / torch.where(extreme != 0, extreme, 1.0), 0.0)
    scale, best = torch.zeros_like(extreme), torch.full_like(extreme, -1.0)
    for index in sorted(range(-9, 10), key=lambda index: index != 0):
        code = (x * (-(half + 0.1 * index) * inverse)).round_().clamp_(-half, half - 1)
        weighted = weight * code
        sum_xl, sum_l2 = (weighted * x).sum(-1, keepdim=True), (weighted * code).sum(-1, keepdim=True)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        trial = ratio(sum_xl, sum_l2)
        scale, best = torch.where(better, trial, scale), torch.where(better, trial * sum_xl, best)
    return scale


class GGUFBlocks(Grid):
    """Blocks along the row, each a struct of ggml's; the only part is the payload, (rows, bytes, 1).

    Block boundaries are the rows', so the columns must be a multiple of the block.
    """

    block: ClassVar[int]
    block_bytes: ClassVar[int]

    @property
    def spec(self) -> str:
        return self.key

    @classmethod
    def parse(cls, spec: str) -> Grid | None:
        return cls() if spec == cls.key else None

    def illegal(self, rows: int, columns: int) -> str | None:
        return f"its {columns} columns are not a multiple of {self.block}" if columns % self.block else None

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (Part("", torch.uint8, (rows, -(-columns // self.block) * self.block_bytes, 1)),)

    def fit_block(self, columns: int) -> int:
        return self.block

    def blocked(self, values: Tensor) -> Tensor:
        """(rows, columns) → (rows, blocks, block)."""
        return values.unflatten(1, (-1, self.block))

    @abstractmethod
    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        """Codes (rows, blocks, block) → (rows, blocks, block_bytes)."""

    @abstractmethod
    def from_bytes(self, data: Tensor) -> tuple[Tensor, Params]:
        """Inverse of :meth:`to_bytes`."""

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"": self.to_bytes(self.blocked(codes), params).flatten(1).unsqueeze(-1)}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        payload = parts[""]
        codes, params = self.from_bytes(payload.reshape(payload.shape[0], -1, self.block_bytes))
        return codes.flatten(1), params


class _Legacy(GGUFBlocks):
    """One float16 scale per 32 weights. As in ggml, codes are chosen with the scale before it is rounded to float16."""

    block = 32
    top: ClassVar[int]

    def _params(self, exact: Tensor) -> Params:
        return {"exact": exact.clamp(-_FLOAT16_MAX, _FLOAT16_MAX), "scale": stored_half(exact)}

    def _scaled(self, w: Tensor, params: Params) -> Tensor:
        """w / scale by blocks, computed as ggml does, by the reciprocal; 0 where the scale is 0."""
        scale = params["exact"] if "exact" in params else params["scale"]
        inverse = 1 / scale
        inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
        return self.blocked(w) * inverse.unsqueeze(2)

    def levels(self, params: Params, columns: int) -> Levels:
        scale = params["scale"]
        return Levels(self.block, scale, scale * -(self.top // 2 + 1), top=self.top)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        values = self.blocked(codes).to(torch.float32).sub_(self.top // 2 + 1)
        return values.mul_(params["scale"].unsqueeze(2)).flatten(1)


@register_grid
@dataclass(frozen=True)
class Q4_0(_Legacy):  # noqa: N801 - the format's name
    """``w ≈ scale * (code - 8)``; 18 bytes per 32. The weight of largest magnitude in a block falls on code 0.

    With importance the scale is searched as llama.cpp does it: 19 trials around that one, each followed by least
    squares, with the squared errors weighted by ``importance * sqrt(mean(x²) + x²)``. Two differences: the mean is over
    the block, where llama.cpp takes the row's, so that a block's scale depends on nothing outside it; and the codes are
    the nearest ones for the scale found, not those of the trial that led to it.
    """

    key: ClassVar[str] = "q4_0"
    block_bytes = 18
    top = 15
    weighted = True

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        if importance is not None:
            found = [self._search(w[rows], importance) for rows in row_blocks(*w.shape)]
            return self._params(torch.cat(found))
        blocks = self.blocked(w)
        extreme = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)).squeeze(2)  # the first one on ties
        return self._params(extreme.float() / -8)

    def _search(self, w: Tensor, importance: Tensor) -> Tensor:
        """(rows, blocks) scales."""
        blocks, power = unit_blocks(self.blocked(w))
        square = blocks.square()
        weight = input_weights(importance, self.block) * (square.mean(2, keepdim=True) + square).sqrt_()
        return (search_scale(blocks, weight, 8) * power).squeeze(2)

    def encode(self, w: Tensor, params: Params) -> Tensor:
        return self._scaled(w, params).add_(8.5).clamp_(0, 15).to(torch.uint8).flatten(1)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        return torch.cat([half_bytes(params["scale"]), codes[..., :16] | (codes[..., 16:] << 4)], dim=-1)

    def from_bytes(self, data: Tensor) -> tuple[Tensor, Params]:
        nibbles = data[..., 2:]
        return torch.cat([nibbles & 15, nibbles >> 4], dim=-1), {"scale": bytes_half(data[..., :2])}


@register_grid
@dataclass(frozen=True)
class Q8_0(_Legacy):  # noqa: N801 - the format's name
    """``w ≈ scale * (code - 128)``; 34 bytes per 32; ``scale = absmax / 127``. On disk the codes are signed bytes.

    ``importance`` is not used, as in llama.cpp.
    """

    key: ClassVar[str] = "q8_0"
    block_bytes = 34
    top = 255

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        blocks = self.blocked(w)
        return self._params(torch.maximum(blocks.amax(2), -blocks.amin(2)).abs_().float() / 127)  # abs: 0, never -0

    def encode(self, w: Tensor, params: Params) -> Tensor:
        # Rounds half away from zero: truncation of |x| + 0.5 would round 0.49999997 up, hence by parts.
        x = self._scaled(w, params)
        size = x.abs()
        whole = size.floor()
        whole += (size - whole) >= 0.5
        return whole.copysign_(x).clamp_(-128, 127).add_(128).to(torch.uint8).flatten(1)

    def to_bytes(self, codes: Tensor, params: Params) -> Tensor:
        return torch.cat([half_bytes(params["scale"]), codes ^ 128], dim=-1)

    def from_bytes(self, data: Tensor) -> tuple[Tensor, Params]:
        return data[..., 2:] ^ 128, {"scale": bytes_half(data[..., :2])}
