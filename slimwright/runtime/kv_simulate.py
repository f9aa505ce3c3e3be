"""A packed cache's effect on a whole text in one forward: every token attends to what it would find in the cache if the
text had come token by token. For measuring; decoding itself is in :mod:`slimwright.runtime.decode`.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from slimwright.runtime.kv_format import KvFormat

ATTENTION = "slimwright_simulated_cache"


class _Thread(threading.local):
    formats: Mapping[int, KvFormat] | None = None
    seen: set[int] | None = None


_thread = _Thread()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of (batch, heads, tokens, dim) over keys and values of the same tokens, in float32."""
    index = getattr(module, "layer_idx", None)
    format = None if index is None else (_thread.formats or {}).get(index)
    if _thread.seen is not None and index is not None:
        _thread.seen.add(index)
    batch, heads, tokens, dim = query.shape
    group = heads // key.shape[1]
    grouped = query.float().reshape(batch, key.shape[1], group, tokens, dim)
    keys, values = key.float(), value.float()

    def scores_of(keys: Tensor) -> Tensor:
        scores = grouped @ keys[:, :, None].transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
        return softcap * torch.tanh(scores / softcap) if softcap else scores

    scores = scores_of(keys)
    now, then = torch.arange(tokens)[:, None], torch.arange(tokens)
    if format is not None:
        whole = tokens // format.window * format.window
        rounded = torch.cat([format.round_keys(key[:, :, :whole]).to(key.dtype).float(), keys[:, :, whole:]], 2)
        packed = then < now // format.window * format.window
        scores = torch.where(packed, scores_of(rounded), scores)
    if attention_mask is not None:
        mask = attention_mask[..., :tokens]
        scores = scores + (mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (-1, group)))
    else:
        scores = scores.masked_fill(then > now, -math.inf)
    if s_aux is not None:
        column = s_aux.float().reshape(1, -1, group, 1, 1).expand(batch, -1, -1, tokens, 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :tokens]
    out = weights @ values[:, :, None]
    if format is not None:
        change = format.round_values(value).to(value.dtype).float() - values
        out = out + (weights * (then <= now - format.window)) @ change[:, :, None]
    return out.reshape(batch, heads, tokens, -1).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def why_not(model: nn.Module) -> str:
    """Why a model cannot be measured so; empty where it can."""
    supported = getattr(model, "_supports_attention_backend", False)
    return "" if supported else f"{type(model).__name__} does not use transformers' attention interface"


@contextlib.contextmanager
def simulated(model: Any, formats: Mapping[int, KvFormat]) -> Iterator[set[int]]:
    """Forwards of the model meanwhile, without a cache, see keys and values as a packed cache would give them.

    Yields:
        The layers that have attended so far, for the caller to check that all formats were used.
    """
    text = model.config.get_text_config(decoder=True)
    configs = {id(config): config for config in (model.config, text)}.values()
    before = [config._attn_implementation for config in configs]
    _thread.formats, _thread.seen = formats, set()
    try:
        for config in configs:
            config._attn_implementation_internal = ATTENTION
        yield _thread.seen
    finally:
        _thread.formats = _thread.seen = None
        for config, name in zip(configs, before):
            config._attn_implementation_internal = name
