"""SmoothQuant (card: smoothquant; Xiao et al. 2022, arXiv:2211.10438)."""

from __future__ import annotations

from dataclasses import dataclass

from slimwright.methods.folding import SmoothingFold
from slimwright.methods.registry import SITES, knob, register


@register("fold/smoothquant", paper="Xiao et al. 2022, SmoothQuant (arXiv:2211.10438)")
@dataclass(frozen=True)
class SmoothQuant(SmoothingFold):
    """Move outliers from the activations into the weights: ``s = absmax^α / wmax^(1 - α)``, so that both can be 8-bit.

    α = 0 is not the identity
    (s = 1 / wmax); ``identity`` is. Inputs that were never seen, or that no weight reads, keep a factor of 1, where the
    reference code's floor would multiply the producer by 1e5.
    """

    alpha: float = knob(0.5, low=0.0, high=1.0, help="strength; 0.75 to 0.9 where outliers are strong")
    identity: bool = knob(False, help="all factors 1")
    sites: str = knob("norms", choices=tuple(SITES), help="fold groups; the paper's are the norms'")
