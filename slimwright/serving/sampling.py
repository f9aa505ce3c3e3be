"""The next token of each row, and the scores that a request asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from slimwright.serving.requests import Sampling, TokenScore


def generator(sampling: Sampling) -> torch.Generator | None:
    """A request's own random numbers; None where it draws none."""
    if sampling.temperature == 0:
        return None
    made = torch.Generator()
    if sampling.seed is None:
        made.seed()
    else:
        made.manual_seed(sampling.seed)
    return made


def draw(logits: Tensor, sampling: Sampling, numbers: torch.Generator) -> int:
    """A token of one row.

    Args:
        logits: (vocabulary,) float32.
        sampling: its temperature is above 0.
        numbers: of this request.
    """
    # The likeliest is subtracted first, so that no temperature however small makes an overflow.
    probabilities = ((logits - logits.max()) / max(sampling.temperature, 1e-6)).softmax(-1)
    if sampling.top_p >= 1:
        return int(torch.multinomial(probabilities, 1, generator=numbers))
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
    kept[0] = ordered[0]
    return int(tokens[torch.multinomial(kept, 1, generator=numbers)])


def score(logits: Tensor, token: int, likeliest: int) -> TokenScore:
    """Log probabilities of the token taken and of the likeliest ones, from (vocabulary,) float32 logits."""
    logs = logits.log_softmax(-1)
    values, tokens = logs.topk(min(likeliest, logs.numel()))
    return TokenScore(token, float(logs[token]), tuple(zip(tokens.tolist(), values.tolist())))
