"""SmoothQuant+ (card: smoothquant_plus; Pan et al. 2023, arXiv:2312.03788)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from slimwright.methods.folding import SmoothingFold
from slimwright.methods.registry import SITES, GroupFold, knob, register


@register("fold/smoothquant_plus", paper="Pan et al. 2023, SmoothQuant+ (arXiv:2312.03788)")
@dataclass(frozen=True)
class SmoothQuantPlus(SmoothingFold):
    """SmoothQuant's scale before weight-only rounding, with one strength α for the whole model.

    The α of a model is the one with the least sum of the fold groups' output errors, which stands for the card's loss
    of the whole quantized model: it does not see how errors add up from block to block. ``identity`` is no scale at
    all; α = 0 is not (s = 1 / wmax).
    """

    alpha: float = knob(0.5, low=0.0, high=1.0, help="strength where none is searched (steps=0)")
    identity: bool = knob(False, help="all factors 1")
    steps: int = knob(20, low=0, high=1000, help="a model's α is searched in 0, 1/steps, ..., 1; 0: alpha as it is")
    sites: str = knob("all", choices=tuple(SITES), help="fold groups")

    def candidates(self) -> tuple[GroupFold, ...]:
        if not self.steps or self.identity:
            return (self,)
        return tuple(replace(self, alpha=index / self.steps, steps=0) for index in range(self.steps + 1))
