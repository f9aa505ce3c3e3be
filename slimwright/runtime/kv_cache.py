"""The cache of keys and values: a transformers ``Cache`` whose attention layers are packed, or preallocated as they
are.

Any transformers model takes one as ``past_key_values``; what its attention then gets are dense tensors, unpacked for
this step. While a :class:`slimwright.runtime.decode.Decoding` runs, a layer hands out only the new token, and attention
reads the rest packed (kernels/attend.cpp, or torch code that gives the same within rounding).

The first tokens that a layer sees attend to each other exactly, as KIVI's do; later ones see packed what was packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from slimwright.errors import InputError
from slimwright.kernels import attend as kernel
from slimwright.runtime.kv_format import TILE, KvFormat

STEP = 256
"""Tokens by which an unpacked layer without a given capacity grows."""


class Taker(Protocol):
    """Who takes the new token's keys and values instead of the model's own attention."""

    def offer(self, layer: KvLayer, keys: Tensor, values: Tensor) -> None: ...


class KvLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    Args:
        format: how they are packed; None keeps them in the model's dtype.
        sliding: tokens that attention sees, the newest included; 0 is all. Such a layer is never packed: it is a ring
        of
            that many tokens.
        capacity: most tokens that may come; an unpacked layer allocates them at once. None grows as tokens come.
    """

    is_croppable = False

    def __init__(self, format: KvFormat | None = None, sliding: int = 0, capacity: int | None = None) -> None:
        super().__init__()
        self.format, self.sliding, self.capacity = format, sliding, capacity
        self.is_sliding = sliding > 0
        self.length = 0
        self.taker: Taker | None = None
        self.parts: dict[str, Tensor] = {}
        self.native: kernel.Kv | None = None

    # -- what transformers asks --------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch, self.heads = key_states.shape[:2]
        self.key_dim, self.value_dim = key_states.shape[-1], value_states.shape[-1]
        self.window = self.format.window if self.format else self.sliding or self.capacity or 0
        self._allocate_window(self.window)
        if self.format:
            self._reserve(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens, (batch, heads, count, dim); gives what they attend to.

        Raises:
            InputError: more tokens than the capacity.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if self.taker is not None and count == 1:
            self.taker.offer(self, key_states, value_states)
            return key_states, value_states
        if count == 1 and self.length:
            self.append(key_states, value_states)
            return self.dense()
        if not self.length:
            self.append(key_states, value_states)
            return key_states, value_states
        keys, values = self.dense(self.sliding - 1 if self.sliding else None)
        self.append(key_states, value_states)
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def pass_tokens(self, count: int) -> None:
        """Tokens pass a layer whose attention was dropped: they count, and nothing of them is kept."""
        self.length += count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = min(self.length, self.sliding - 1) if self.sliding else self.length
        return seen + query_length, self.length - seen

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.sliding or self.capacity or -1

    def reset(self) -> None:
        self.parts, self.native, self.length, self.is_initialized = {}, None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda part: part[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """
        Raises:
            InputError: tokens are to be removed: what was packed for them cannot be unpacked exactly.
        """
        if tokens_to_remove:
            raise InputError(
                "A packed cache of keys and values cannot forget tokens, as assisted decoding asks: generate without "
                "an assistant, or without the packed cache (past_key_values=DynamicCache(config=model.config))."
            )

    def offload(self) -> None:
        raise InputError("A packed cache of keys and values is not offloaded: it stays where the model computes.")

    # -- storage -----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(part.nbytes for part in self.parts.values())

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store tokens (batch, heads, count, dim).

        Raises:
            InputError: more than the capacity.
        """
        self._reserve(keys.shape[2])
        if self.native is not None:
            self._describe()
            kernel.append(self.native, keys.contiguous(), values.contiguous())
        elif self.format is None:
            self._append_plain(keys, values)
        else:
            self._append_packed(self.format, keys, values)
        self.length += keys.shape[2]

    def dense(self, newest: int | None = None) -> tuple[Tensor, Tensor]:
        """All tokens that are kept, or the newest ones, unpacked: (batch, heads, tokens, dim) twice, in the own
        dtype."""
        keys, values = self._window("key_window"), self._window("value_window")
        if self.format is not None and self.length:
            count = self.format.packed_keys(self.length)
            tiles, groups = count // TILE, count // self.format.group
            packed = [self.parts["key_codes"][:, :, :tiles]]
            packed += [self.parts[name][:, :, :groups] for name in ("key_scale", "key_low")]
            old_keys = self.format.unpack_keys(*packed).to(self.dtype)
            count = self.format.packed_values(self.length)
            packed = [self.parts[name][:, :, :count] for name in ("value_codes", "value_scale", "value_low")]
            codes, scale, low = packed
            old_values = self.format.unpack_values(codes, scale, low, self.value_dim).to(self.dtype)
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        if newest is None:
            return keys, values
        start = max(0, keys.shape[2] - newest)
        return keys[:, :, start:], values[:, :, start:]

    def _window(self, name: str) -> Tensor:
        """The tokens of a window in their order."""
        first = self.length - min(self.length, self.window)
        if self.format is not None and name == "key_window":
            first = self.format.packed_keys(self.length)
        slots = torch.arange(first, self.length, device=self.device) % max(self.window, 1)
        if self.format is None and not self.sliding:
            return self.parts[name][:, :, : self.length]
        return self.parts[name].index_select(2, slots)

    def _allocate_window(self, window: int) -> None:
        for name, dim in (("key_window", self.key_dim), ("value_window", self.value_dim)):
            fresh = torch.empty(self.batch, self.heads, window, dim, dtype=self.dtype, device=self.device)
            if name in self.parts:
                fresh[:, :, : self.length] = self.parts[name][:, :, : self.length]
            self.parts[name] = fresh
        self.window = window
        self._use_kernels()

    def _use_kernels(self) -> None:
        supported = self.device.type == "cpu" and self.dtype in kernel.DTYPES and kernel.library() is not None
        self.native = kernel.Kv() if supported else None
        self.stale = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "native": None, "taker": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_initialized:
            self._use_kernels()

    def _reserve(self, count: int) -> None:
        """Make room for ``count`` more tokens."""
        needed = self.length + count
        if self.capacity is not None and needed > self.capacity:
            raise InputError(
                f"The cache of keys and values holds {self.capacity} tokens, but {needed} are needed: generate fewer "
                "tokens, shorten the prompt, or make the cache with a larger capacity."
            )
        if self.format is None:
            if not self.sliding and needed > self.window:
                self._allocate_window(-(-needed // STEP) * STEP)
            return
        keys, values = self.format.capacity(needed)
        tile, group = 4 * self.format.bits, self.format.group
        value_tiles, value_groups = -(-self.value_dim // TILE), -(-self.value_dim // group)
        self._grow("key_codes", keys // TILE, (self.key_dim, tile), torch.uint8)
        self._grow("value_codes", values, (value_tiles, tile), torch.uint8)
        for name in ("scale", "low"):
            self._grow(f"key_{name}", keys // group, (self.key_dim,), torch.float16)
            self._grow(f"value_{name}", values, (value_groups,), torch.float16)

    def _grow(self, name: str, count: int, rest: tuple[int, ...], dtype: torch.dtype) -> None:
        old = self.parts.get(name)
        if old is not None and old.shape[2] >= count:
            return
        fresh = torch.empty(self.batch, self.heads, count, *rest, dtype=dtype, device=self.device)
        if old is not None:
            fresh[:, :, : old.shape[2]] = old
        self.parts[name] = fresh
        self.stale = True

    def _select(self, choose: Any) -> None:
        if self.is_initialized:
            self.parts = {name: choose(part).contiguous() for name, part in self.parts.items()}
            self.batch = self.parts["key_window"].shape[0]
            self.stale = True

    def _append_plain(self, keys: Tensor, values: Tensor) -> None:
        count = keys.shape[2]
        slots = torch.arange(self.length, self.length + count, device=self.device)
        if self.sliding:
            slots, keys, values = (
                slots[-self.window :] % self.window,
                keys[:, :, -self.window :],
                values[:, :, -self.window :],
            )
        self.parts["key_window"][:, :, slots] = keys
        self.parts["value_window"][:, :, slots] = values

    def _append_packed(self, format: KvFormat, keys: Tensor, values: Tensor) -> None:
        parts, window, end = self.parts, self.window, self.length + keys.shape[2]
        first = format.packed_keys(self.length)
        recent = torch.cat([self._window("key_window"), keys], 2)  # tokens first .. end
        count = format.packed_keys(end) - first
        if count:
            codes, scale, low = format.pack_keys(recent[:, :, :count])
            parts["key_codes"][:, :, first // TILE : (first + count) // TILE] = codes
            groups = slice(first // format.group, (first + count) // format.group)
            parts["key_scale"][:, :, groups], parts["key_low"][:, :, groups] = scale, low
        parts["key_window"][:, :, : end - first - count] = recent[:, :, count:]
        first = format.packed_values(self.length)
        recent = torch.cat([self._window("value_window"), values], 2)
        count = format.packed_values(end) - first
        if count:
            packed = format.pack_values(recent[:, :, :count])
            for name, part in zip(("value_codes", "value_scale", "value_low"), packed):
                parts[name][:, :, first : first + count] = part
        slots = torch.arange(first + count, end, device=self.device) % window
        parts["value_window"][:, :, slots] = recent[:, :, count:]

    # -- attention ---------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor] | None,
        scaling: float,
        *,
        sliding: int = 0,
        softcap: float = 0.0,
        start: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one token a row over the cache.

        Args:
            query: (batch, query heads, 1, key_dim).
            new: the token's own keys and values, which are appended first; None: they are there already.
            scaling: what scores are multiplied by.
            sliding: how many of the newest tokens are seen; 0 is all.
            softcap: scores are ``softcap * tanh(score / softcap)``; 0 leaves them.
            start: (batch,) int64, the first token of a row that is no padding.
            sinks: (query heads,) scores that take part in the softmax and give nothing.

        Returns:
            (batch, 1, query heads, value_dim) in the query's dtype.
        """
        sliding = sliding or self.sliding
        if self.native is None or query.dtype != self.dtype:
            if new is not None:
                self.append(*new)
            return self._attend_in_torch(query, scaling, sliding, softcap, start, sinks)
        sinks = None if sinks is None else sinks.float().contiguous()
        self._prepare(query.shape[1], start, scaling, sliding, softcap, sinks, int(new is not None))
        native = self.native  # room for the token may have come with a new one
        if new is None:
            return kernel.attend(native, query)
        keys, values = new
        out = kernel.step(native, query, keys.contiguous(), values.contiguous())
        self.length += 1
        return out

    def takes(self, count: int) -> bool:
        """Whether one step of the kernels may bring so many tokens."""
        return count == 1 or (self.format is None and (not self.sliding or self.length + count <= self.sliding))

    def prepare_step(
        self, count: int, heads: int, start: Tensor | None, scaling: float, sliding: int = 0, softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Describe the cache for a step in which the kernels append ``count`` tokens and attend; arguments as of
        :meth:`attend`."""
        self._prepare(heads, start, scaling, sliding or self.sliding, softcap, sinks, count)

    def _prepare(
        self, heads: int, start: Tensor | None, scaling: float, sliding: int, softcap: float, sinks: Tensor | None,
        count: int,
    ) -> None:  # fmt: skip
        if count:
            self._reserve(count)
        native = self.native
        assert native is not None
        if self.stale or native.heads != heads:
            self._describe(heads)
        native.length, native.threads = self.length, torch.get_num_threads()
        native.scaling, native.softcap, native.sliding = scaling, softcap, sliding
        kernel.describe(native, {}, {"start": start, "sinks": sinks})

    def _describe(self, heads: int | None = None) -> None:
        native, format = self.native, self.format
        assert native is not None
        keys, values = self.parts.get("key_codes"), self.parts.get("value_codes")
        kernel.describe(
            native,
            {
                "batch": self.batch, "kv_heads": self.heads, "heads": heads or native.heads or self.heads,
                "key_dim": self.key_dim, "value_dim": self.value_dim, "bits": format.bits if format else 16,
                "group": format.group if format else TILE, "window": self.window, "length": self.length,
                "key_capacity": keys.shape[2] * TILE if keys is not None else 0,
                "value_capacity": values.shape[2] if values is not None else 0,
                "dtype": kernel.DTYPES[self.dtype], "threads": torch.get_num_threads(), "sliding": self.sliding,
            },
            {name: self.parts.get(name) for name in kernel.PARTS},
        )  # fmt: skip
        self.stale = False

    def _attend_in_torch(
        self, query: Tensor, scaling: float, sliding: int, softcap: float, start: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """:meth:`attend` over what :meth:`dense` gives, in float32."""
        keys, values = self.dense()
        batch, heads, _, dim = query.shape
        grouped = query.float().reshape(batch, self.heads, heads // self.heads, dim)
        scores = grouped @ keys.float().transpose(-1, -2) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        tokens = torch.arange(self.length - keys.shape[2], self.length, device=query.device)
        hidden = torch.zeros(batch, len(tokens), dtype=torch.bool, device=query.device)
        if start is not None:
            hidden |= tokens < start[:, None].to(query.device)
        if sliding:
            hidden |= tokens < self.length - sliding
        scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        if sinks is not None:
            column = sinks.float().reshape(1, self.heads, -1, 1).expand(batch, -1, -1, 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : keys.shape[2]]
        return (weights @ values.float()).reshape(batch, 1, heads, -1).to(query.dtype)


# -- whole caches --------------------------------------------------------------------------------------------------


def attention_layers(config: PretrainedConfig) -> dict[int, int]:
    """The layers whose keys and values a :class:`KvLayer` can hold → their sliding window, 0 for none.

    Layers of other kinds (linear attention, shared, chunked or indexed ones) keep transformers' own.
    """
    if config.is_encoder_decoder or not hasattr(config.get_text_config(decoder=True), "num_hidden_layers"):
        return {}
    text = config.get_text_config(decoder=True)
    chunked = {i for i, kind in enumerate(getattr(text, "layer_types", None) or ()) if kind == "chunked_attention"}
    found: dict[int, int] = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if index in chunked:
            continue
        if type(layer) is DynamicLayer:
            found[index] = 0
        elif type(layer) is DynamicSlidingWindowLayer:
            found[index] = layer.sliding_window
    return found


def kv_cache(
    config: PretrainedConfig, formats: Mapping[int, KvFormat], capacity: int | None = None, ours: bool = False
) -> Cache:
    """A cache for one call of a model.

    Args:
        config: of the model.
        formats: how layers are packed; those of sliding attention cannot be, and are bounded anyway.
        capacity: most tokens; None is any number.
        ours: whether the layers that are not packed are :class:`KvLayer` too, where they can be.

    Raises:
        InputError: a format is given for a layer that cannot be packed.
    """
    packable = attention_layers(config)
    for index in formats:
        if packable.get(index) != 0:
            raise InputError(refusal(config, index))
    layers = list(DynamicCache(config=config).layers)
    for index, sliding in packable.items():
        if index in formats or ours:
            layers[index] = KvLayer(formats.get(index), min(sliding, capacity or sliding), capacity)
    return Cache(layers=layers)


def refusal(config: PretrainedConfig, index: int | None = None) -> str:
    """Why a layer's keys and values, or any of the model's, cannot be packed."""
    family = config.model_type
    if config.is_encoder_decoder:
        return (
            f"A packed cache is not built for encoder-decoder models such as {family}: leave the cache out of the plan."
        )
    packable = attention_layers(config)
    if index is None or not packable:
        return f"{family} has no layer that keeps the keys and values of all tokens: leave the cache out of the plan."
    if packable.get(index):
        return (
            f"Layer {index} of {family} attends to a window of {packable[index]} tokens and is not packed: leave it "
            "out of the plan's cache."
        )
    return f"Layer {index} of {family} keeps no keys and values that can be packed: leave it out of the plan's cache."


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache has allocated for keys and values; states of linear attention are not counted."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, KvLayer):
            total += layer.nbytes
        elif isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            total += sum(part.nbytes for part in (layer.keys, layer.values) if isinstance(part, Tensor))
    return total
