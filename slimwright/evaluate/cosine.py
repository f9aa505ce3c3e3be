"""Cosine similarity between the outputs of two encoders."""

from __future__ import annotations

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.table import Metric

COSINE_MEAN = Metric("cosine_mean", "cosine")


def mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the tokens that count.

    Args:
        hidden: (..., tokens, features) hidden states, any float dtype.
        mask: (..., tokens) true where a token counts; None: all count. What is masked may hold anything.

    Returns:
        (..., features) float64.

    Raises:
        InputError: the shapes do not fit, or a text has no token that counts.
    """
    if mask is None:
        mask = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:-1]:
        raise InputError(f"The mask {tuple(mask.shape)} does not fit hidden states of shape {tuple(hidden.shape)}.")
    counted = mask.bool()
    if not counted.any(-1).all():
        raise InputError("A text has no token that counts: its mask is empty.")
    total = hidden.double().masked_fill(~counted[..., None], 0).sum(-2)
    return total / counted.sum(-1, keepdim=True)


def cosine_similarity(reference: Tensor, candidate: Tensor) -> Tensor:
    """Cosine of the angle between vectors of two models.

    Args:
        reference: (..., features), any float dtype.
        candidate: the same shape.

    Returns:
        (...) float64 in [-1, 1]. Two zero vectors are alike (1); a zero vector and another are not (0).

    Raises:
        InputError: the shapes differ, or a value is NaN or Inf.
    """
    if reference.shape != candidate.shape:
        raise InputError(f"Embeddings have shapes {tuple(reference.shape)} and {tuple(candidate.shape)}: not alike.")
    pair = []
    for name, vectors in (("reference", reference), ("candidate", candidate)):
        if not torch.isfinite(vectors).all():
            raise InputError(f"The embeddings of the {name} hold NaN or Inf: the model is broken or was built wrong.")
        vectors = vectors.double().cpu()
        pair.append(vectors / vectors.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny))
    x, y = pair
    lengths = x.norm(dim=-1), y.norm(dim=-1)
    cosine = (x * y).sum(-1) / (lengths[0] * lengths[1]).clamp(min=torch.finfo(torch.float64).tiny)
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    return torch.where(both_zero, 1.0, cosine).clamp(-1, 1)
