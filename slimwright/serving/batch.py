"""Forwards of many requests at once, each with a cache of its own.

The linear layers see all rows together, so that weights are read once for all of them; attention is answered row by row
from each row's own cache (:class:`slimwright.runtime.kv_cache.KvLayer`), packed where the plan says so. So a row's keys
and values are those it would have alone, rows join and leave between any two tokens, and no token is computed for
padding. Where the kernels know the model (:mod:`slimwright.runtime.fused`), all that a turn brings, texts' next tokens
and parts of prompts, is one call of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from slimwright.errors import NotBuiltError
from slimwright.runtime import decode, fused
from slimwright.runtime.fused import Fused
from slimwright.runtime.generate import Generation
from slimwright.runtime.kv_cache import STEP, KvLayer, cache_nbytes, kv_cache
from slimwright.serving.adapters import Applied, ServedAdapter

CHUNK = 512
"""Tokens of a prompt that go through the model at once, so that others' next tokens need not wait for a long one."""

ROWS = (128, 64, 32, 16)
"""How many tokens one call of the kernels brings: the most that stay near the processor (of wide layers fewer do)."""


@dataclass(frozen=True)
class Part:
    """New tokens of one text.

    Attributes:
        cache: of the text.
        tokens: at least one.
        start: position of the first.
        adapter: what changes the model for it.
    """

    cache: Cache
    tokens: Sequence[int]
    start: int
    adapter: ServedAdapter | None = None


def positions(config: Any) -> int | None:
    """Tokens of context that a model's config states; None if it states none."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return min((value for value in found if isinstance(value, int) and value > 0), default=None)


def _scaled_by_length(config: Any) -> bool:
    """Whether rotary frequencies depend on how long a text is: of a batch, on its longest."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds)


class _Joint(Cache):
    """Stands for the caches of all rows: notes each layer's new keys and values for the attention that follows."""

    def __init__(self, decoding: _JointDecoding) -> None:
        super().__init__(layers=[])
        self._decoding = decoding

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self._decoding.offered[id(key_states)] = (layer_idx, key_states, value_states)  # type: ignore[assignment]
        return key_states, value_states


class _JointDecoding(decode.Decoding):
    """One more token of every row.

    Args:
        caches: of the rows, whose layers are all :class:`KvLayer` with at least one token.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        super().__init__(_Joint(self), None)
        self.rows = [cache.layers for cache in caches]
        self.steps = {len(caches): None}  # module by module

    def attend(self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, **how: Any) -> Tensor:
        index, own_keys, own_values = self.offered.get(id(keys), (None, None, None))
        if index is None or own_keys is not keys or own_values is not values or query.shape[2] != 1:
            raise decode.NotSupportedError(f"{type(module).__name__} changes keys and values after caching them.")
        fresh = id(keys) not in self.taken
        self.taken.add(id(keys))
        found = [
            layers[index].attend(  # type: ignore[call-overload]
                query[row : row + 1], (keys[row : row + 1], values[row : row + 1]) if fresh else None, **how
            )
            for row, layers in enumerate(self.rows)
        ]  # fmt: skip
        return torch.cat(found)


class Batcher:
    """Runs a causal language model for the engine.

    Args:
        model: on the CPU, in evaluation mode.

    Raises:
        NotBuiltError: the model does not take a cache of keys and values.
    """

    def __init__(self, model: Any) -> None:
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted or model.config.is_encoder_decoder:
            raise NotBuiltError(f"{type(model).__name__} is not served in this version: causal language models are.")
        self.model = model
        self.applied = Applied(model)
        generate = model.generate
        self._formats = generate.formats if isinstance(generate, Generation) else {}
        self._positions = "position_ids" in accepted
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.whole: Fused | None = None
        """What runs all parts of a turn in one call; None where there are no kernels for the model."""
        self.why_single = self._why_single()
        """Why rows go through the model one by one; empty where they go together."""
        self.token_bytes = self._token_bytes()
        """Bytes of the cache a token."""

    def cache(self) -> Cache:
        """An empty cache for one request."""
        return kv_cache(self.model.config, self._formats, ours=not self.why_single)

    def take(self, tokens: int, fed: int, room: int) -> int:
        """How many of a prompt's tokens to feed now.

        Args:
            tokens: of the prompt.
            fed: of these, those fed before.
            room: tokens that this turn has left; at least one.
        """
        if self._formats:
            return tokens  # a packed cache takes it whole: its tokens attend to each other exactly
        return min(tokens - fed, room if self.whole else CHUNK)

    def room(self, rows: int) -> int:
        """Tokens of prompts that a turn has room for beside so many next tokens."""
        return max(ROWS[-1], self._rows - rows) if self.whole and not self._formats else CHUNK

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Logits (parts, vocabulary) float32 after the last token of each part; parts are of different texts."""
        whole = [i for i, part in enumerate(parts) if self.whole and part.adapter is None and self._fits(part)]
        following = [i for i, part in enumerate(parts) if i not in whole and self._is_next(part)]
        found: dict[int, Tensor] = {}
        for many, how in ((whole, self._together), (following, self._next)):
            if many:
                found |= zip(many, how([parts[index] for index in many]))
        return torch.stack([found[i] if i in found else self._alone(part) for i, part in enumerate(parts)])

    def intact(self, part: Part) -> bool:
        """Whether a run that failed has left the text's cache as it was."""
        return all(isinstance(layer, KvLayer) and layer.length == part.start for layer in part.cache.layers)

    def _fits(self, part: Part) -> bool:
        return all(isinstance(layer, KvLayer) and layer.takes(len(part.tokens)) for layer in part.cache.layers)

    def _is_next(self, part: Part) -> bool:
        return not self.why_single and len(part.tokens) == 1 and part.start > 0

    def _together(self, parts: Sequence[Part]) -> Tensor:
        """All parts in one call of the kernels."""
        assert self.whole is not None
        tokens = torch.tensor([token for part in parts for token in part.tokens])[:, None]
        places = torch.cat([torch.arange(part.start, part.start + len(part.tokens)) for part in parts])[:, None]
        layers: Any = [part.cache.layers for part in parts]
        return self.whole(tokens, places, layers, counts=[len(part.tokens) for part in parts])

    def _next(self, parts: Sequence[Part]) -> Tensor:
        """The next token of each text, the modules seeing all rows together."""
        tokens = torch.tensor([list(part.tokens) for part in parts])
        places = torch.tensor([[part.start] for part in parts])
        decoding = _JointDecoding([part.cache for part in parts])
        with decode.attention_by_cache(self.model), self.applied.rows([part.adapter for part in parts]):
            return decode.decode(self.model, decoding, tokens, places).float()

    def _alone(self, part: Part) -> Tensor:
        """Any part by itself: (vocabulary,)."""
        more = self._where(torch.arange(part.start, part.start + len(part.tokens))[None])
        with self.applied.rows([part.adapter]):
            out = self.model(
                input_ids=torch.tensor([list(part.tokens)]), past_key_values=part.cache, use_cache=True,
                return_dict=True, **more, **self._last,
            )  # fmt: skip
        return out.logits[0, -1].float()

    def _where(self, positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions} if self._positions else {}

    @torch.no_grad()
    def _why_single(self) -> str:
        model = self.model
        if reason := decode.supported(model):
            return reason
        if not self._positions:
            return f"{type(model).__name__} counts positions itself"
        if _scaled_by_length(model.config):
            return "the longest text would scale the positions of the others"
        if not all(isinstance(layer, KvLayer) for layer in kv_cache(model.config, self._formats, ours=True).layers):
            return f"{type(model).__name__} has layers of another kind"
        self.why_single = ""
        try:
            together = self._as_alone()
            self._rows = next((rows for rows in ROWS if not fused.why_not(model, rows)), 0)
            if together and self._rows and not fused.why_not(model, 1):
                self.whole = Fused(model, fused.asked(model))
                self.whole = self.whole if self._as_alone() else None
        except decode.NotSupportedError as error:
            return str(error)
        return "" if together else f"{type(model).__name__} gives other logits for rows together"

    @torch.no_grad()
    def _token_bytes(self) -> int:
        """As a text of 256 tokens has it, or of all that the model takes, rounded up."""
        tokens = min(STEP, positions(self.model.config) or STEP)
        cache = self.cache()
        self._alone(Part(cache, [0] * tokens, 0))
        return -(-max(1, cache_nbytes(cache)) // tokens)

    def _as_alone(self) -> bool:
        """Whether rows of different lengths, one of them new, give the logits together that they give alone."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        texts = [[7, 14, 3, 2], [5, 6], [9, 4, 11, 8]]

        def parts() -> list[Part]:
            found = []
            for text, fed in zip(texts, (3, 1, 0)):
                tokens, cache = [token % vocabulary for token in text], self.cache()
                if fed:
                    self._alone(Part(cache, tokens[:fed], 0))
                found.append(Part(cache, tokens[fed:], fed))
            return found

        got, expected = self.run(parts()), torch.stack([self._alone(part) for part in parts()])
        bound = 1e-4 if self.model.dtype == torch.float32 else 0.05
        return bool((got - expected).abs().max() <= bound * expected.abs().max())
