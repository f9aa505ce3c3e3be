"""RSQ: rotate, scale, quantize (card: rsq; Sung et al. 2025, arXiv:2503.01820)."""

from __future__ import annotations

from dataclasses import dataclass

from slimwright.methods.feedback import FeedbackSolver
from slimwright.methods.registry import knob, register
from slimwright.methods.token_weights import TokenWeighting, TokenWeights
from slimwright.weights import Grid, Int


@register("quantize/rsq", paper="Sung et al. 2025, RSQ (arXiv:2503.01820)")
@dataclass(frozen=True)
class RSQ(FeedbackSolver):
    """GPTQ on a rotated model whose Gram counts each token by its importance, above all the attention it receives.

    The solver is GPTQ's arithmetic with the source's choices: a symmetric scale per row, its range shrunk for the mean
    error, columns from left to right. What makes it RSQ comes before it: the model is rotated
    (:mod:`slimwright.methods.rotation`), and the Gram is weighted: ``strategy`` names the score, a function of
    :mod:`slimwright.methods.token_weights`, and :attr:`weighting` turns scores into the Gram's weights, the same for
    every linear of a block. With ``r_min = 1`` all tokens count alike: rotation and GPTQ. Defaults are the released
    code's. Where one token draws nearly all attention, a small ``r_min`` leaves little of the others.
    """

    grid: Grid = knob(Int(3, symmetric=True), help="number format")
    damp: float = knob(0.01, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")
    clip: str = knob("mse", choices=("none", "mse", "weighted"), help="int: range of a group (weighted: by diag H)")
    strategy: str = knob(
        "attncon",
        choices=("attncon", "first", "first_last", "token_freq", "act_norm", "act_diff", "token_sim"),
        help="which tokens matter",
    )
    r_min: float = knob(0.005, low=0.0, high=1.0, help="weight of a sample's least important token; the most has 1")
    convention: str = knob("code", choices=("code", "paper"), help="weights over their mean, or squared")

    before = ("fold/rotation",)

    @property
    def weighting(self) -> TokenWeighting | None:
        if self.r_min == 1:
            return None
        return TokenWeighting(self.strategy, TokenWeights(self.r_min, 1.0, self.convention))  # type: ignore[arg-type]
