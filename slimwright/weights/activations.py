"""Activations in 8 bits: what a plan's ``activations`` may say, and the reference that rounds tensors so (cards: rtn
step 7, fp8_mx_nvfp4 step 1, fp8_vs_int8 step 2).

Written ``int8:token`` or ``fp8:token`` (a scale per token, found while the model runs) and ``int8:tensor=0.0123`` or
``fp8:tensor=0.0123`` (one scale for all, found beforehand); ``int8:tensor`` asks for one that is still to be found, by
the largest magnitude, ``int8:tensor,scale=mse`` by least squared error, ``int8:tensor,scale=percentile`` (or
``,percentile=0.999``) by that share of the magnitudes.
INT8 is symmetric, codes -128..127 with ``scale = absmax / 127``; FP8 is E4M3 with ``scale = absmax / 448``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.errors import InputError

_SPEC = re.compile(r"(int8|fp8):(token|tensor)(?:=([^,]*))?((?:,[^,=]+=[^,=]+)*)$")
_TOP = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
HOW = ("absmax", "mse", "percentile")
PERCENTILE = 0.9999

_CUT_BITS = 12
"""Low bits of a float32 that its bin leaves away: neighbours differ by a part in 2,048, a sixteenth of INT8's step at
the top of its range."""


def magnitude_counts(x: Tensor) -> Tensor:
    """How many magnitudes fall into each bin: x of any shape, finite → int64 (2¹⁹,); counts of parts add up."""
    bits = x.detach().float().abs().reshape(-1).contiguous().view(torch.int32) >> _CUT_BITS
    return torch.bincount(bits, minlength=1 << (31 - _CUT_BITS))


def _middles(bins: Tensor) -> Tensor:
    """The magnitudes in the middle of bins, float32; 0 of the first."""
    middle = ((bins.to(torch.int32) << _CUT_BITS) | (1 << (_CUT_BITS - 1))).view(torch.float32)
    return torch.where(bins == 0, 0.0, middle)


@dataclass(frozen=True)
class Activations:
    """How the activations that enter a linear are rounded.

    Args:
        kind: ``int8`` or ``fp8`` (E4M3).
        per_token: a scale per token, from its own largest magnitude; else one scale for everything.
        scale: that one scale; None until it is calibrated, and with ``per_token``.
        how: how the one scale is to be found (:meth:`calibrated`); means nothing once it is.
        percentile: of ``how="percentile"``.
    """

    kind: Literal["int8", "fp8"] = "int8"
    per_token: bool = True
    scale: float | None = None
    how: str = "absmax"
    percentile: float = PERCENTILE

    def __post_init__(self) -> None:
        if self.kind not in _TOP:
            raise InputError(f"Activations are int8 or fp8, not {self.kind!r}.")
        if self.scale is not None:
            if self.per_token:
                raise InputError("Activations with a scale per token have no fixed scale.")
            if not (math.isfinite(self.scale) and self.scale > 0):
                raise InputError(f"An activation scale must be positive and finite, not {self.scale!r}.")
        if self.how not in HOW:
            raise InputError(f"Activation scales are found by absmax, mse or percentile, not {self.how!r}.")
        if not 0 < self.percentile <= 1:
            raise InputError(f"The percentile of an activation scale is above 0 and at most 1, not {self.percentile}.")
        if self.ready and (self.how, self.percentile) != ("absmax", PERCENTILE):
            raise InputError(f"A scale that is given or belongs to a token is not found by {self.how}.")

    @classmethod
    def parse(cls, spec: str) -> Activations:
        """Read ``int8:token``, ``fp8:tensor``, ``fp8:tensor=0.0123``.

        Raises:
            InputError: anything else.
        """
        match = _SPEC.match(spec.strip().lower()) if isinstance(spec, str) else None
        if match is None:
            raise InputError(
                "Activations are written int8:token, fp8:token, int8:tensor, int8:tensor,scale=mse or "
                f"fp8:tensor=0.0123, not {spec!r}."
            )
        knobs = dict(knob.split("=") for knob in match[4].split(",")[1:])
        if unknown := knobs.keys() - {"scale", "percentile"}:
            raise InputError(f"Activations '{spec}' know scale and percentile, not '{min(unknown)}'.")
        scale = None if match[3] is None else _number(spec, match[3])
        percentile = _number(spec, knobs["percentile"]) if "percentile" in knobs else PERCENTILE
        how = knobs.get("scale", "percentile" if "percentile" in knobs else "absmax")
        return cls("int8" if match[1] == "int8" else "fp8", match[2] == "token", scale, how, percentile)

    @property
    def spec(self) -> str:
        """In writing; :meth:`parse` reads it back to an equal value."""
        scope = "token" if self.per_token else "tensor"
        how = "" if self.how == "absmax" else f",scale={self.how}"
        share = "" if self.percentile == PERCENTILE else f",percentile={self.percentile!r}"
        return f"{self.kind}:{scope}" + ("" if self.scale is None else f"={self.scale!r}") + how + share

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

    def calibrated(self, x: Tensor) -> Activations:
        """The same with one fixed scale, found on samples ``x`` of any shape by ``how``: ``absmax``: the largest
        magnitude falls on the largest code. ``percentile``: that quantile of the magnitudes does. ``mse``: the least
        squared error of 111 scales from 0.1 to 1.2 times the first's, the smallest of equals.

        Raises:
            InputError: a scale per token needs no calibration, or x is empty or holds NaN or Inf.
        """
        if not x.numel() or not torch.isfinite(x).all():
            raise InputError("Activations to calibrate on are empty or hold NaN or Inf.")
        return self.of_magnitudes(magnitude_counts(x), float(x.abs().max()))

    def of_magnitudes(self, counts: Tensor, largest: float) -> Activations:
        """:meth:`calibrated` on what :func:`magnitude_counts` counted, and the largest magnitude."""
        if self.per_token:
            raise InputError(f"The activations '{self.spec}' find their scales while the model runs.")
        bins = counts.nonzero()[:, 0]
        values, often = _middles(bins), counts[bins]
        if self.how == "absmax" or largest == 0:
            return self.with_largest(largest)
        if self.how == "percentile":
            least = math.ceil(self.percentile * int(often.sum()))
            return self.with_largest(min(largest, float(values[int((often.cumsum(0) < least).sum())])))
        best, error = self.with_largest(largest), math.inf
        for index in range(111):
            trial = self.with_largest(largest * (0.1 + 0.01 * index))
            found = float(((trial.round(values) - values).double().square() * often).sum())
            if found < error:
                best, error = trial, found
        return best

    def with_largest(self, largest: float) -> Activations:
        """The same with the one scale that puts this magnitude on the largest code; 1 for a magnitude of 0."""
        scale = largest / _TOP[self.kind] if largest > 0 else 1.0
        return Activations(self.kind, self.per_token, max(scale, _SMALLEST_SCALE))

    def __str__(self) -> str:
        return self.spec


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"Activations '{spec}': '{text}' is not a number.") from None
