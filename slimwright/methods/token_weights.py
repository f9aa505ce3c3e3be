"""How much each calibration token counts (card: rsq, steps 3, 4, 5, 8 and 9).

Scores say which tokens matter; :class:`TokenWeights` turns a sample's scores into the weights of its tokens in a Gram,
``SiteStatistics.from_inputs(x, weights)``. All functions take (samples, tokens) tensors; ``mask`` marks real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.errors import InputError


@dataclass(frozen=True)
class TokenWeights:
    """From scores to weights: per sample, scores are mapped onto [r_min, r_max]; all alike give r_max everywhere.

    Args:
        r_min, r_max: weight of the sample's least and most important token.
        convention: ``paper``: tokens are scaled by r, so that a Gram's terms are weighted by r²; ``code``: the
            released code's, r over its mean in the sample, not squared.
    """

    r_min: float = 0.005
    r_max: float = 1.0
    convention: Literal["paper", "code"] = "code"

    def of(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights in the Gram of tokens with these scores: (samples, tokens) float32, 0 where masked.

        Raises:
            InputError: scores that are not (samples, tokens), or NaN or Inf where they count.
        """
        if scores.ndim != 2:
            raise InputError(f"Token scores must be (samples, tokens), but have shape {tuple(scores.shape)}.")
        counts = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
        scores = scores.float()
        if not torch.isfinite(scores[counts]).all():
            raise InputError("Token scores hold NaN or Inf.")
        low = scores.masked_fill(~counts, torch.inf).amin(1, keepdim=True)
        extent = scores.masked_fill(~counts, -torch.inf).amax(1, keepdim=True) - low
        unit = torch.where(extent > 0, (scores - low) / torch.where(extent > 0, extent, 1.0), 1.0)
        r = (self.r_min + unit * (self.r_max - self.r_min)).masked_fill(~counts, 0)
        if self.convention == "paper":
            return r.square()
        total = r.sum(1, keepdim=True)
        return r * torch.where(total > 0, counts.sum(1, keepdim=True) / torch.where(total > 0, total, 1.0), 0.0)


@dataclass(frozen=True)
class TokenWeighting:
    """How a solver wants its Gram weighted.

    Args:
        strategy: which score: ``attncon``, ``first``, ``first_last``, ``token_freq``, ``act_norm``, ``act_diff``,
            ``token_sim``.
        weights: makes weights of scores.
    """

    strategy: str
    weights: TokenWeights


def attention_concentration(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """The attention that each token receives, over heads and queries: attention (samples, heads, queries, tokens) →
    (samples, tokens). Queries that are masked give none. Not divided by how many queries may see a token."""
    if mask is not None:
        attention = attention * mask[:, None, :, None].to(attention.dtype)
    return attention.float().sum((1, 2))


def first_tokens(mask: Tensor, share: float = 1 / 8, last: float = 0.0) -> Tensor:
    """1 for the first ``share`` of each sample's real tokens, and the last ``last`` of them, else 0."""
    counts = mask.bool()
    place = counts.cumsum(1)  # 1 for the first real token
    length = counts.sum(1, keepdim=True)
    chosen = (place <= (share * length).ceil()) | (place > length - (last * length).ceil())
    return (chosen & counts).float()


def token_rarity(ids: Tensor, mask: Tensor | None = None, among: Tensor | None = None) -> Tensor:
    """Minus how often each token's id occurs in the whole set: ids (samples, tokens).

    Args:
        among: the ids of the whole set, of any shape; None: those of ``ids`` that ``mask`` counts.
    """
    if among is None:
        among = ids if mask is None else ids[mask.bool()]
    return -torch.bincount(among.flatten(), minlength=int(ids.max()) + 1)[ids].float()


def activation_norm(hidden: Tensor) -> Tensor:
    """The length of each token's hidden state: (samples, tokens, hidden) → (samples, tokens)."""
    return hidden.float().norm(dim=2)


def activation_change(given: Tensor, returned: Tensor) -> Tensor:
    """Minus how far a block moves each token's hidden state."""
    return -(returned.float() - given.float()).norm(dim=2)


def token_distance(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance of each token's hidden state to the sample's others: (samples, tokens)."""
    hidden = hidden.float()
    counts = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
    number = counts.sum(1, keepdim=True)
    mean = (hidden * counts[:, :, None]).sum(1, keepdim=True) / number[:, :, None].clamp(min=1)
    centred = hidden - mean
    square = centred.square().sum(2)
    spread = (square * counts).sum(1, keepdim=True) / number.clamp(min=1)
    # The sum of squared distances to all is n (own squared distance to the mean + mean squared distance to it).
    return (square + spread) * number / (number - 1).clamp(min=1)


def circularly_shifted(ids: Tensor, copies: int = 8) -> Tensor:
    """Every sequence again, shifted round by k / copies of its length, so that late tokens also come early: ids
    (samples, tokens) → (samples · copies, tokens), the originals first."""
    length = ids.shape[1]
    return torch.cat([ids.roll(copy * length // copies, dims=1) for copy in range(copies)])
