"""Uniform affine integers, 2-8 bits, grouped along the input (card: rtn; GPTQ-family conventions)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from slimwright import kernels
from slimwright.errors import InputError
from slimwright.kernels import solve
from slimwright.weights.grid import Grid, Levels, Params, Part, register_grid, row_blocks
from slimwright.weights.packing import pack_codes, packed_row_bytes, unpack_codes

_SPEC = re.compile(r"int([0-9]{1,3})((?::[a-z0-9]+)*)$")
_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
_SMALLEST_NORMAL = 2.0**-14
_LARGEST_SCALE = 65504.0


@register_grid
@dataclass(frozen=True)
class Int(Grid):
    """``w ≈ scale * (code - zero)`` with float16 scales.

    Args:
        bits: 2..8.
        group: inputs that share a scale; None is a whole row. The last group of a row may be short.
        symmetric: no stored zero point: ``zero = 2**(bits-1)`` and ``scale = absmax / (2**(bits-1) - 1)`` (the card's
            "full range" signed form; not the GPTQ family's half-step grid).
        zero: ``integer`` keeps the zero point on the grid, so that 0.0 is representable, in 4 bits (bits <= 4) or 8;
            ``real`` stores it as float16 (AWQ, HQQ).
    """

    key: ClassVar[str] = "int"
    examples: ClassVar[tuple[str, ...]] = ("int4:g128", "int8:row", "int3:g64:real", "int4:g32:sym")
    bits: int = 4
    group: int | None = None
    symmetric: bool = False
    zero: Literal["integer", "real"] = "integer"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise InputError(f"Int grid: bits must be 2 to 8, not {self.bits!r}.")
        if self.group is not None and (not isinstance(self.group, int) or not 8 <= self.group <= 65536):
            raise InputError(f"Int grid: group must be 8 to 65536 or None (a whole row), not {self.group!r}.")
        if self.zero not in ("integer", "real"):
            raise InputError(f"Int grid: zero must be 'integer' or 'real', not {self.zero!r}.")
        if self.symmetric and self.zero == "real":
            raise InputError("Int grid: a symmetric grid stores no zero point; drop zero='real'.")

    @property
    def spec(self) -> str:
        text = f"int{self.bits}:" + ("row" if self.group is None else f"g{self.group}")
        return text + (":sym" if self.symmetric else "") + (":real" if self.zero == "real" else "")

    @classmethod
    def parse(cls, spec: str) -> Int | None:
        match = _SPEC.match(spec)
        if not match:
            return None
        options: dict[str, Any] = {"bits": int(match[1]), "group": 128}
        words = match[2].split(":")[1:]
        kinds = ["group" if word[0] == "g" or word == "row" else word for word in words]
        if len(set(kinds)) < len(kinds):
            raise InputError(f"Grid '{spec}' says the same thing twice; write at most one of g<N> and row.")
        for word in words:
            if word == "row":
                options["group"] = None
            elif word == "sym":
                options["symmetric"] = True
            elif word == "real":
                options["zero"] = "real"
            elif re.fullmatch(r"g[0-9]{1,6}", word):
                options["group"] = int(word[1:])
            else:
                raise InputError(f"Grid '{spec}': '{word}' is none of g<N>, row, sym, real.")
        return cls(**options)

    # -- geometry ------------------------------------------------------------------------------------------------

    def groups(self, columns: int) -> int:
        """Scales per row."""
        return 1 if self.group is None else -(-columns // self.group)

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        groups = self.groups(columns)
        found = [
            Part("", torch.uint8, (rows, packed_row_bytes(columns, self.bits), 1)),
            Part("_scale", torch.float16, (rows, groups)),
        ]
        if self.zero == "real":
            found.append(Part("_zero", torch.float16, (rows, groups)))
        elif not self.symmetric:
            found.append(Part("_zero", torch.uint8, (rows, (groups + 1) // 2 if self.bits <= 4 else groups)))
        return tuple(found)

    def grouped(self, w: Tensor) -> Tensor:
        """(rows, columns) → (rows, groups, group) where groups divide the columns; else the last group is padded
        with each row's last value, which changes neither its minimum nor its maximum."""
        if self.group is None:
            return w.unsqueeze(1)
        short = -w.shape[1] % self.group
        if short:
            w = torch.cat([w, w[:, -1:].expand(-1, short)], dim=1)
        return w.unflatten(1, (-1, self.group))

    def ungrouped(self, grouped: Tensor, columns: int) -> Tensor:
        """Inverse of :meth:`grouped`."""
        return grouped.flatten(1)[:, :columns]

    # -- numbers -------------------------------------------------------------------------------------------------

    def from_range(self, low: Tensor, high: Tensor) -> Params:
        """Scale and zero for ranges (rows, groups) with ``low <= 0 <= high``, rounded as they are stored."""
        top = 2**self.bits - 1
        if self.symmetric:
            return {"scale": self.stored_scale(torch.maximum(-low, high) / (2 ** (self.bits - 1) - 1))}
        scale = self.stored_scale(high / top - low / top)  # each divided first: their difference may be infinite
        zero = (-low / scale).clamp_(0, top)
        return {"scale": scale, "zero": zero.half().float() if self.zero == "real" else zero.round_()}

    @staticmethod
    def stored_scale(scale: Tensor) -> Tensor:
        """The float32 value of the float16 scale that is stored: positive and finite; 1 for a scale of 0.

        Rounded to nearest; subnormal float16 are rounded up, whose steps are so coarse that a scale rounded down would
        clip the group's largest weights.
        """
        half = torch.where(scale > 0, scale, 1.0).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).half()
        short = (half < _SMALLEST_NORMAL) & (half.float() < scale)
        return torch.where(short, (half.view(torch.int16) + 1).view(torch.float16), half).float()

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        """Min-max (card rtn, steps 2-5): 0 is always representable; an all-zero group gets scale 1."""
        return self.from_range(*self.extent(w))

    def extent(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest weight of each group, 0 included: (rows, groups) twice."""
        if kernels.available(w) and w.dtype == torch.float32:
            return solve.extent(w, self.group or w.shape[1])
        grouped = self.grouped(w)  # two reductions: aminmax over a dimension takes ten times as long
        return grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)

    def fit_block(self, columns: int) -> int:
        return columns if self.group is None else min(self.group, columns)

    def levels(self, params: Params, columns: int) -> Levels:
        scale = params["scale"]
        zero = params["zero"] if "zero" in params else float(2 ** (self.bits - 1))
        return Levels(self.group or columns, scale, -scale * zero, top=2**self.bits - 1)

    def zero_of(self, params: Params) -> Tensor | float:
        """The zero point in code units, to broadcast over (rows, groups, group)."""
        return params["zero"].unsqueeze(2) if "zero" in params else float(2 ** (self.bits - 1))

    def encode(self, w: Tensor, params: Params) -> Tensor:
        scale, zero = params["scale"], params.get("zero")
        if kernels.available(w, scale) and (zero is None or zero.is_contiguous()):
            middle, group = float(2 ** (self.bits - 1)), self.group or w.shape[1]
            return solve.int_encode(w, group, self.bits, scale, zero, middle, self.zero == "real")
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in row_blocks(*w.shape):
            block = {name: value[rows] for name, value in params.items()}
            values = self.grouped(w[rows]) / block["scale"].unsqueeze(2)
            if self.zero == "integer":
                values.round_()  # round first, shift after: half to even is then the same for every zero point
            values += self.zero_of(block)
            if self.zero == "real":
                values.round_()
            codes[rows] = self.ungrouped(values.clamp_(0, 2**self.bits - 1), w.shape[1])
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        scale, zero = params["scale"], params.get("zero")
        if kernels.available(codes, scale) and (zero is None or zero.is_contiguous()):
            return solve.int_decode(codes, self.group or codes.shape[1], scale, zero, float(2 ** (self.bits - 1)))
        values = self.grouped(codes).to(torch.float32)
        values -= self.zero_of(params)
        values *= params["scale"].unsqueeze(2)
        return self.ungrouped(values, codes.shape[1])

    # -- disk ----------------------------------------------------------------------------------------------------

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        packed = {"": pack_codes(codes, self.bits).unsqueeze(-1), "_scale": params["scale"].half()}
        if self.zero == "real":
            packed["_zero"] = params["zero"].half()
        elif not self.symmetric:
            zero = params["zero"].to(torch.uint8)
            if self.bits <= 4:
                zero = torch.nn.functional.pad(zero, (0, zero.shape[1] % 2))
                zero = zero[:, 0::2] | (zero[:, 1::2] << 4)
            packed["_zero"] = zero
        return packed

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        payload = parts[""]
        codes = unpack_codes(payload.reshape(payload.shape[0], -1), self.bits, columns)
        params = {"scale": parts["_scale"].float()}
        if self.zero == "real":
            params["zero"] = parts["_zero"].float()
        elif not self.symmetric:
            zero = parts["_zero"]
            if self.bits <= 4:
                zero = torch.stack([zero & 15, zero >> 4], dim=-1).flatten(1)[:, : self.groups(columns)]
            params["zero"] = zero.float()
        return codes, params
