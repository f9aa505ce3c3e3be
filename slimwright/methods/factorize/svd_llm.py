"""SVD-LLM (card: svd-llm; Wang et al. 2024, arXiv:2403.07378)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimwright.methods.factorizing import Factorizer, damped
from slimwright.methods.registry import SiteStatistics, knob, register
from slimwright.weights import Float, Grid


@register("factorize/svd_llm", paper="Wang et al. 2024, SVD-LLM (arXiv:2403.07378)")
@dataclass(frozen=True)
class SVDLLM(Factorizer):
    """Truncate the SVD of ``W S`` with ``H = S Sᵀ`` the Gram of the inputs: each singular value that is dropped costs
    exactly its square of the layer's output, so that no other factors of that rank lose less.

    Where a matrix has no more outputs than inputs this is ``U_r U_rᵀ W`` with U the eigenvectors of ``W H Wᵀ``, and no
    Gram is inverted. Inputs that were never seen count with ``damp`` alone.
    """

    needs = ("gram",)
    rank: int = knob(64, low=1, help="columns of the left factor")
    grid: Grid = knob(Float("bf16"), help="number format of both factors")
    damp: float = knob(0.001, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")

    def metric(self, stats: SiteStatistics) -> Tensor:
        assert stats.gram is not None
        return damped(stats.gram, self.damp)
