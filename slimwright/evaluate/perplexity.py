"""Perplexity: e to the mean negative log likelihood of a token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.table import Metric

_CELLS = 1 << 20  # logits converted to float64 at a time: 8 MB

PERPLEXITY = Metric("perplexity", "nats", "tokens", np.exp)
"""Comparable between models of one tokenizer only: a token of another tokenizer is another thing."""


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) under each row's softmax.

    Args:
        logits: (tokens, vocabulary), any float dtype.
        targets: (tokens,) int64, the token that came.

    Returns:
        (tokens,) float64 nats on the CPU, computed in float64 over tiles.

    Raises:
        InputError: the shapes do not fit, a target is outside the vocabulary, or a logit is NaN or Inf.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise InputError(
            f"Logits (tokens, vocabulary) and targets (tokens,) have shapes {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}."
        )
    vocabulary = logits.shape[1]
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= vocabulary):
        raise InputError(
            f"A token id lies outside the model's vocabulary of {vocabulary}: the tokenizer is not this model's."
        )
    nats = torch.empty(len(targets), dtype=torch.float64)
    rows = max(1, _CELLS // max(1, vocabulary))
    for first in range(0, len(targets), rows):
        tile = logits[first : first + rows].double()
        target = targets[first : first + rows].to(tile.device)
        found = tile.logsumexp(1) - tile.gather(1, target[:, None])[:, 0]
        if not (torch.isfinite(found).all() and torch.isfinite(tile).all()):
            raise InputError("The logits hold NaN or Inf: the model is broken or was built wrong.")
        nats[first : first + rows] = found.cpu()
    return nats
