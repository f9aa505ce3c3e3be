"""Rounding with an importance matrix, as llama.cpp calls it (card: gguf, item 7)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Grid, Int, Quantized
from slimwright.weights.kquants import Q4_K
from slimwright.weights.ranges import fit_params


@register("quantize/imatrix", paper="llama.cpp, quantize --imatrix (pull request 4861); no paper")
@dataclass(frozen=True)
class Imatrix(WeightSolver):
    """Round to the nearest point of a grid whose scales weigh each input's squared error by its mean square.

    The importance is the Gram's diagonal: the loss ``tr(Δ diag(H) Δᵀ)``, which is exact where inputs are uncorrelated.
    GGUF's formats have their own search (``q8_0`` looks at nothing but the largest weight, as in llama.cpp, and is
    refused here); the ranges of ``int`` grids are shrunk for the weighted error. The other formats' scales do not
    depend on the data: ``quantize/rtn`` is for them. GPTQ fits its scales in this way too.
    """

    grid: Grid = knob(Q4_K(), help="a format whose scales can follow the data: int, q4_0, q4_k, q6_k")
    needs = ("gram",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.grid.weighted or isinstance(self.grid, Int)):
            raise InputError(f"{self.name}: the scales of {self.grid} do not depend on data; use quantize/rtn.")

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, survey = self.checked(weight, stats)
        params = fit_params(self.grid, weight, "weighted", stats.importance, survey)
        return Quantized(self.grid, self.grid.encode(weight, params), params)
