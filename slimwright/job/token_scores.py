"""How much each token of a batch counts in a block's Grams, where the solver weighs tokens (card: rsq, steps 2-5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from slimwright.calibrate.replay import ReplayStep
from slimwright.calibrate.walk import Step
from slimwright.errors import InputError
from slimwright.methods.token_weights import (
    TokenWeighting,
    activation_change,
    activation_norm,
    first_tokens,
    token_distance,
    token_rarity,
)


class AttentionReceived(TorchFunctionMode):
    """While it is entered, sums the attention that each token receives in ``scaled_dot_product_attention``.

    Args:
        counts: (samples, tokens) bool, the queries that count; None: all.

    Attributes:
        total: (samples, tokens) float32, over heads, queries and calls; None before the first call.
    """

    def __init__(self, counts: Tensor | None) -> None:
        super().__init__()
        self.total: Tensor | None = None
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            received = attention_received(*args, counts=self._counts, **kwargs)
            self.total = received if self.total is None else self.total + received
        return func(*args, **kwargs)


def attention_received(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    counts: Tensor | None = None,
) -> Tensor:
    """Column sums of the attention probabilities, head by head: (samples, tokens) float32.

    Args:
        query: (samples, heads, queries, size); the rest as ``scaled_dot_product_attention`` takes it.
        counts: (samples, queries) bool, the queries that count.
    """
    heads, queries, tokens = query.shape[1], query.shape[2], key.shape[2]
    repeat = heads // key.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    total = torch.zeros(query.shape[0], tokens)
    future = torch.ones(queries, tokens, dtype=torch.bool).triu(1) if is_causal else None
    for head in range(heads):
        logits = query[:, head].float() @ key[:, head // repeat].float().transpose(1, 2) * factor
        if future is not None:
            logits = logits.masked_fill(future, -torch.inf)
        if attn_mask is not None:
            mask = attn_mask[:, min(head, attn_mask.shape[1] - 1)] if attn_mask.ndim == 4 else attn_mask
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        received = logits.softmax(-1).nan_to_num(0.0)  # a padded query may see nothing
        if counts is not None and counts.shape == received.shape[:2]:
            received = received * counts[:, :, None]
        total += received.sum(1)
    return total


def token_weights(step: Step | ReplayStep, index: int, weighting: TokenWeighting) -> Tensor:
    """What each token of a batch counts in the Grams of a block: (samples, tokens) float32, 0 where masked.

    Raises:
        InputError: the strategy needs what this model does not show: attention through torch's own function, token ids.
    """
    batch = step.batch(index)
    hidden = step.hidden(index)
    assert isinstance(step, Step)
    counts = batch.masks.get(tuple(hidden.shape[:2]))
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if counts is None else counts
    return weighting.weights.of(_SCORES[weighting.strategy](step, index, hidden, mask), mask)


def _attention(step: Step, index: int, hidden: Tensor, mask: Tensor) -> Tensor:
    with AttentionReceived(mask) as seen:
        step.output(index)
    if seen.total is None or seen.total.shape != hidden.shape[:2]:
        raise InputError(
            f"The attention of {step.unit.module} cannot be seen (it is not torch's scaled_dot_product_attention over "
            "the block's own tokens): use another strategy, such as act_norm."
        )
    return seen.total


def _change(step: Step, index: int, hidden: Tensor, mask: Tensor) -> Tensor:
    returned = step.output(index)
    return activation_change(hidden, returned[0] if isinstance(returned, tuple) else returned)


def _rarity(step: Step, index: int, hidden: Tensor, mask: Tensor) -> Tensor:
    ids = step.batch(index).inputs.get("input_ids")
    if ids is None or ids.shape != hidden.shape[:2]:
        raise InputError(f"The inputs of {step.unit.module} have no token ids: use another strategy, such as act_norm.")
    every = [(b.inputs["input_ids"], b.masks.get(tuple(b.inputs["input_ids"].shape))) for b in step.batches]
    return token_rarity(ids, mask, torch.cat([(i if m is None else i[m]).flatten() for i, m in every]))


_SCORES: dict[str, Callable[[Step, int, Tensor, Tensor], Tensor]] = {
    "attncon": _attention,
    "first": lambda step, index, hidden, mask: first_tokens(mask),
    "first_last": lambda step, index, hidden, mask: first_tokens(mask, 1 / 32, 1 / 32),
    "token_freq": _rarity,
    "act_norm": lambda step, index, hidden, mask: activation_norm(hidden),
    "act_diff": _change,
    "token_sim": lambda step, index, hidden, mask: token_distance(hidden, mask),
}
