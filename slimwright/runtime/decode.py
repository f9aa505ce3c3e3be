"""Decoding one token at a time without rebuilding anything for it: the model's own forward, its attention answered by
the cache.

A token costs the model's forward and nothing beside it: masks are never built (attention knows where a row starts and
how far it sees), keys and values are written where they stay, keyword arguments are not rebuilt. Nothing in the forward
has the length of the text then, so that torch.compile makes one graph of it once for all.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from slimwright.errors import SlimwrightError
from slimwright.runtime import fused
from slimwright.runtime.fused import Fused
from slimwright.runtime.kv_cache import KvLayer, attention_layers, kv_cache

ATTENTION = "slimwright_decode"
"""The name under which transformers knows our attention."""


class NotSupportedError(SlimwrightError):
    """The model's attention cannot be answered by the cache; it is run as transformers runs it."""


class Decoding:
    """Single tokens are going through a model; its :class:`KvLayer` give their new states to attention untouched.

    Args:
        cache: that the model gets as ``past_key_values``, with the prompt in it.
        start: (batch,) int64, the first token of each row that is no padding; None: no row is padded.
    """

    def __init__(self, cache: Cache, start: Tensor | None) -> None:
        self.cache = cache
        self.layers = [layer for layer in cache.layers if isinstance(layer, KvLayer)]
        self.caches = [self.layers] if len(self.layers) == len(cache.layers) else []
        """What a step in one call of the kernels takes: layers of one cache for all rows, or of one for each."""
        self.numbered = bool(self.caches)
        """Whether every layer is ours and was attended to by the module of its number."""
        self.start = start
        self.how: dict[int, dict[str, Any]] = {}
        """What each layer's attention was asked for."""
        self.steps: dict[int, Fused | None] = {}
        """By rows: the whole step as one call of the kernels, where that can be."""
        self.offered: dict[int, tuple[KvLayer, Tensor, Tensor]] = {}
        self.taken: set[int] = set()

    def offer(self, layer: KvLayer, keys: Tensor, values: Tensor) -> None:
        self.offered[id(keys)] = (layer, keys, values)

    def attend(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, **how: Any) -> Tensor:
        layer, own_keys, own_values = self.offered.get(id(keys), (None, None, None))
        if layer is None or own_keys is not keys or own_values is not values or query.shape[2] != 1:
            raise NotSupportedError(f"{type(module).__name__} changes keys and values after caching them.")
        fresh = id(keys) not in self.taken  # layers that share keys and values see them a second time
        self.taken.add(id(keys))
        index = getattr(module, "layer_idx", -1)
        self.numbered &= fresh and 0 <= index < len(self.cache.layers) and self.cache.layers[index] is layer
        self.how[index] = how
        return layer.attend(query, (keys, values) if fresh else None, start=self.start, **how)

    def fused(self, model: Any, batch: int) -> Fused | None:
        """The whole step as one call of the kernels; None where the model runs its own forward."""
        if batch not in self.steps:
            exact = bool(self.caches) and all(_exact(layer, model) for layers in self.caches for layer in layers)
            fits = exact and not fused.why_not(model, batch)
            self.steps[batch] = Fused(model, fused.asked(model)) if fits else None
        return self.steps[batch]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """One forward."""
        _thread.decoding = self
        for layer in self.layers:
            layer.taker = self
        try:
            yield
            if len(self.taken) != len(self.offered):
                raise NotSupportedError("A layer caches keys and values without attending to them.")
        finally:
            _thread.decoding = None
            for layer in self.layers:
                layer.taker = None
            self.offered.clear()
            self.taken.clear()


def _exact(layer: KvLayer, model: Any) -> bool:
    """Whether the kernels take a layer's cache as it is."""
    return layer.is_initialized and layer.native is not None and layer.dtype == model.dtype


class _Thread(threading.local):
    decoding: Decoding | None = None


_thread = _Thread()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; see :meth:`KvLayer.attend`."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        how = (module.layer_idx, float(scaling), sliding_window or 0, float(softcap or 0.0), s_aux)
        return torch.ops.slimwright.attend_cached(query, key, value, *how), None
    if _thread.decoding is None or position_bias is not None:
        raise NotSupportedError(f"{type(module).__name__} attends in a way that the cache does not know.")
    out = _thread.decoding.attend(
        module, query, key, value, scaling=scaling, sliding=sliding_window or 0, softcap=softcap or 0.0, sinks=s_aux
    )
    return out, None


AttentionInterface.register(ATTENTION, _attention)


@torch.library.custom_op("slimwright::attend_cached", mutates_args=())
def _attend_cached(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, sliding: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """:meth:`KvLayer.attend` of the running decoding's layer, for a compiled forward."""
    assert _thread.decoding is not None
    decoding = _thread.decoding
    return decoding.cache.layers[layer].attend(  # type: ignore[union-attr]
        query, (keys, values), scaling, sliding=sliding, softcap=softcap, start=decoding.start, sinks=sinks
    )


@_attend_cached.register_fake
def _(
    query: Tensor, keys: Tensor, values: Tensor, layer: int, scaling: float, sliding: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    return query.new_empty(query.shape[0], 1, query.shape[1], values.shape[-1])


class _Untouched(Cache):
    """Stands for the cache in a compiled forward: hands on what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def compiled_step(model: Any, options: dict[str, Any]) -> Any:
    """The model's forward of one token compiled: a function of tokens and positions, both (batch, 1). Kept with the
    model, which compiles again for another batch size.

    Args:
        options: arguments of torch.compile.

    Raises:
        NotSupportedError: the model's layers do not attend in the cache's order, or count positions themselves.
    """
    if not model.__dict__.get("_slimwright_numbered"):
        raise NotSupportedError(f"The decoding of {type(model).__name__} cannot be compiled: leave out compile_config.")
    kept = model.__dict__.setdefault("_slimwright_steps", {})
    key = repr(sorted(options.items()))
    if key not in kept:
        untouched = _Untouched()

        def step(tokens: Tensor, positions: Tensor) -> Tensor:
            found = model(input_ids=tokens, position_ids=positions, past_key_values=untouched, use_cache=True)
            return found.logits[:, -1]

        kept[key] = torch.compile(step, **{**options, "dynamic": False, "fullgraph": True})
    return kept[key]


@contextlib.contextmanager
def attention_by_cache(model: Any) -> Iterator[None]:
    """The model's text layers use our attention meanwhile."""
    configs = {id(c): c for c in _text_configs(model)}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation_internal = name


def _text_configs(model: Any) -> list[Any]:
    return [model.config, model.config.get_text_config(decoder=True)]


def supported(model: Any) -> str:
    """Why tokens cannot be decoded here; empty where they can. The first call runs ten tokens through the model."""
    if "_slimwright_decodes" not in model.__dict__:
        model.__dict__["_slimwright_decodes"] = _why_not(model)
    return model.__dict__["_slimwright_decodes"]


def _why_not(model: Any) -> str:
    from transformers import GenerationMixin

    config = model.config
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return "the model is spread over devices"
    if config.is_encoder_decoder or not model._supports_attention_backend:
        return f"{type(model).__name__} does not use transformers' attention interface"
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return f"{type(model).__name__} prepares its inputs in its own way"
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if not attention_layers(config) or "chunked_attention" in kinds:
        return f"{type(model).__name__} has layers of another kind"
    try:
        same = _same_as_transformers(model)
    except NotSupportedError as error:
        return str(error)
    return "" if same else f"{type(model).__name__} gives other logits"


@torch.no_grad()
def _same_as_transformers(model: Any) -> bool:
    """Whether two rows, one padded, give the same logits for one more token as with transformers' own cache."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(6).reshape(2, 3) * 7 % vocabulary
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = torch.tensor([[3], [5]]) % vocabulary

    theirs, last = own_cache(model), positions[:, -1:] + 1
    model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=theirs, use_cache=True)
    ours = kv_cache(model.config, {}, ours=True)
    for index, layer in enumerate(theirs.layers):
        own = ours.layers[index]
        if isinstance(own, KvLayer):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is not None and values is not None:
                own.update(keys, values)
        else:
            ours.layers[index] = copy.deepcopy(layer)
    expected = model(
        input_ids=more, attention_mask=torch.cat([mask, mask[:, -1:]], 1), position_ids=last, use_cache=True,
        past_key_values=theirs,
    ).logits[:, -1].float()  # fmt: skip
    start, before = torch.tensor([0, 2]), copy.deepcopy(ours)
    decoding = Decoding(ours, start)
    decoding.steps[2] = None  # module by module
    with attention_by_cache(model):
        got = decode(model, decoding, more, last).float()
        model.__dict__["_slimwright_numbered"] = decoding.numbered
        if decoding.numbered and len(decoding.how) == len(ours.layers):  # else a layer has no attention: it was dropped
            again = Decoding(copy.deepcopy(before), start)
            again.steps[2] = None
            how = [decoding.how[index] for index in range(len(ours.layers))]
            fused.compare(model, lambda: decode(model, again, more, last), before, how, more, last, start)
    bound = 1e-4 if model.dtype == torch.float32 else 0.05
    return bool((got - expected).abs().max() <= bound * expected.abs().max())


def own_cache(model: Any) -> Cache:
    """An empty cache of transformers' own, with nothing packed."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def decode(model: Any, decoding: Decoding, tokens: Tensor, positions: Tensor | None, step: Any = None) -> Tensor:
    """Logits (batch, vocabulary) after one more token a row; call it inside :func:`attention_by_cache`.

    Args:
        tokens: (batch, 1).
        positions: (..., batch, 1), or None where the model counts them itself.
        step: what :func:`compiled_step` gave, to run instead of the model.

    Raises:
        NotSupportedError: the model does not let the cache answer its attention.
    """
    more = {} if positions is None else {"position_ids": positions}
    whole = None if step is not None or positions is None else decoding.fused(model, tokens.shape[0])
    if whole is not None and positions is not None and positions.ndim == 2:
        return whole(tokens, positions, decoding.caches, decoding.start)
    with decoding.running():
        if step is not None:
            return step(tokens, positions)
        out = model(input_ids=tokens, past_key_values=decoding.cache, use_cache=True, return_dict=True, **more)
        return out.logits[:, -1]


def decoded(model: Any, cache: Cache, tokens: Tensor, positions: Tensor) -> Tensor:
    """:func:`decode` of a single step over rows without padding.

    Raises:
        NotSupportedError: the model cannot be decoded so.
    """
    reason = supported(model)
    if reason:
        raise NotSupportedError(reason)
    with attention_by_cache(model):
        return decode(model, Decoding(cache, None), tokens, positions)
