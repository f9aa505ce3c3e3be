"""Activations in 8 bits: what a plan's ``activations`` may say, and the reference that rounds tensors so (cards: rtn
step 7, fp8_mx_nvfp4 step 1, fp8_vs_int8 step 2).

Written ``int8:token`` or ``fp8:token`` (a scale per token, found while the model runs) and ``int8:tensor=0.0123`` or
``fp8:tensor=0.0123`` (one scale for all, found beforehand); ``int8:tensor`` asks for one that is still to be found.
INT8 is symmetric, codes -128..127 with ``scale = absmax / 127``; FP8 is E4M3 with ``scale = absmax / 448``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.errors import InputError

_SPEC = re.compile(r"(int8|fp8):(token|tensor)(?:=(.+))?$")
_TOP = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Activations:
    """How the activations that enter a linear are rounded.

    Args:
        kind: ``int8`` or ``fp8`` (E4M3).
        per_token: a scale per token, from its own largest magnitude; else one scale for everything.
        scale: that one scale; None until it is calibrated, and with ``per_token``.
    """

    kind: Literal["int8", "fp8"] = "int8"
    per_token: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _TOP:
            raise InputError(f"Activations are int8 or fp8, not {self.kind!r}.")
        if self.scale is not None:
            if self.per_token:
                raise InputError("Activations with a scale per token have no fixed scale.")
            if not (math.isfinite(self.scale) and self.scale > 0):
                raise InputError(f"An activation scale must be positive and finite, not {self.scale!r}.")

    @classmethod
    def parse(cls, spec: str) -> Activations:
        """Read ``int8:token``, ``fp8:tensor``, ``fp8:tensor=0.0123``.

        Raises:
            InputError: anything else.
        """
        match = _SPEC.match(spec.strip().lower()) if isinstance(spec, str) else None
        if match is None:
            raise InputError(
                f"Activations are written int8:token, fp8:token, int8:tensor or fp8:tensor=0.0123, not {spec!r}."
            )
        try:
            scale = None if match[3] is None else float(match[3])
        except ValueError:
            raise InputError(f"Activations '{spec}': '{match[3]}' is not a number.") from None
        return cls("int8" if match[1] == "int8" else "fp8", match[2] == "token", scale)

    @property
    def spec(self) -> str:
        """In writing; :meth:`parse` reads it back to an equal value."""
        scope = "token" if self.per_token else "tensor"
        return f"{self.kind}:{scope}" + ("" if self.scale is None else f"={self.scale!r}")

    @property
    def ready(self) -> bool:
        """Whether tensors can be rounded: a scale per token is found on the way, one for all must have been before."""
        return self.per_token or self.scale is not None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales: x (..., features), any float dtype → (int8 or float8_e4m3fn of x's shape, float32 of shape
        (..., 1), or () for one scale).

        Raises:
            InputError: a fixed scale is wanted and not calibrated.
        """
        x = x.float()
        if self.per_token:
            scale = (x.abs().amax(-1, keepdim=True) / _TOP[self.kind]).clamp(min=_SMALLEST_SCALE)
        elif self.scale is None:
            raise InputError(f"The activations '{self.spec}' have no scale yet: calibrate them.")
        else:
            scale = torch.tensor(self.scale, dtype=torch.float32, device=x.device)
        if self.kind == "int8":
            return (x / scale).round_().clamp_(-128, 127).to(torch.int8), scale
        return (x / scale).clamp_(-448, 448).to(torch.float8_e4m3fn), scale

    def round(self, x: Tensor) -> Tensor:
        """x as it comes back from 8 bits, in x's shape and dtype."""
        codes, scale = self.encode(x)
        return (codes.float() * scale).to(x.dtype)

    def calibrated(
        self, x: Tensor, how: Literal["absmax", "mse", "percentile"] = "absmax", percentile: float = 0.9999
    ) -> Activations:
        """The same with one fixed scale, found on samples ``x`` of any shape.

        Args:
            how: ``absmax``: the largest magnitude falls on the largest code. ``percentile``: that quantile of the
                magnitudes does. ``mse``: the least squared error of 111 scales from 0.1 to 1.2 times the first's,
                the smallest of equals.

        Raises:
            InputError: a scale per token needs no calibration, x is empty or holds NaN or Inf, or another ``how``.
        """
        if self.per_token:
            raise InputError(f"The activations '{self.spec}' find their scales while the model runs.")
        if not x.numel() or not torch.isfinite(x).all():
            raise InputError("Activations to calibrate on are empty or hold NaN or Inf.")
        size = x.detach().float().abs().flatten()
        if how == "percentile":
            return self.with_largest(float(size.kthvalue(max(1, math.ceil(percentile * len(size)))).values))
        largest = float(size.max())
        if how == "absmax" or largest == 0:
            return self.with_largest(largest)
        if how != "mse":
            raise InputError(f"Activation scales are found by absmax, mse or percentile, not {how!r}.")
        best, least = self.with_largest(largest), math.inf
        flat = x.detach().float()
        for index in range(111):
            trial = self.with_largest(largest * (0.1 + 0.01 * index))
            error = float((trial.round(flat) - flat).square().sum(dtype=torch.float64))
            if error < least:
                best, least = trial, error
        return best

    def with_largest(self, largest: float) -> Activations:
        """The same with the one scale that puts this magnitude on the largest code; 1 for a magnitude of 0."""
        scale = largest / _TOP[self.kind] if largest > 0 else 1.0
        return dataclasses.replace(self, scale=max(scale, _SMALLEST_SCALE))

    def __str__(self) -> str:
        return self.spec
