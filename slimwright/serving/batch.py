"""Forwards of many requests at once, each with a cache of its own.

The linear layers see all rows together, so that weights are read once for all of them; attention is answered row by row
from each row's own cache (:class:`slimwright.runtime.kv_cache.KvLayer`), packed where the plan says so. So a row's keys
and values are those it would have alone, rows join and leave between any two tokens, and no token is computed for
padding. Where the kernels know the model (:mod:`slimwright.runtime.fused`), a token of all rows is one call of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from slimwright.errors import NotBuiltError
from slimwright.runtime import decode
from slimwright.runtime.fused import Fused
from slimwright.runtime.generate import Generation
from slimwright.runtime.kv_cache import STEP, KvLayer, cache_nbytes, kv_cache

CHUNK = 512
"""Tokens of a prompt that go through the model at once, so that others' next tokens need not wait for a long one."""


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
        steps: see :class:`Decoding`; kept from one step to the next.
    """

    def __init__(self, caches: Sequence[Cache], steps: dict[int, Fused | None]) -> None:
        super().__init__(_Joint(self), None)
        self.caches = [cache.layers for cache in caches]  # type: ignore[misc]
        self.steps = steps

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
            for row, layers in enumerate(self.caches)
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
        generate = model.generate
        self._formats = generate.formats if isinstance(generate, Generation) else {}
        self._positions = "position_ids" in accepted
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._steps: dict[int, Fused | None] = {}
        self.why_single = self._why_single()
        """Why rows go through the model one by one; empty where they go together."""
        self.token_bytes = self._token_bytes()
        """Bytes of the cache a token."""

    def cache(self) -> Cache:
        """An empty cache for one request."""
        return kv_cache(self.model.config, self._formats, ours=not self.why_single)

    def chunks(self, tokens: int) -> list[slice]:
        """How a prompt is cut. It depends on the prompt alone, so that its logits do too. A packed cache takes it
        whole: its tokens attend to each other exactly."""
        size = tokens if self._formats else CHUNK
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def prefill(self, cache: Cache, tokens: Sequence[int], start: int) -> Tensor:
        """Some of a prompt's tokens, the first of which is its ``start``-th: logits (vocabulary,) float32 after the
        last."""
        more = self._where(torch.arange(start, start + len(tokens))[None])
        out = self.model(
            input_ids=torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, return_dict=True, **more,
            **self._last,
        )  # fmt: skip
        return out.logits[0, -1].float()

    def step(
        self, caches: Sequence[Cache], tokens: Sequence[int], positions: Sequence[int], watched: bool = False
    ) -> Tensor:
        """Logits (rows, vocabulary) float32 after one more token of each row.

        Args:
            caches: of the rows: one, where they do not go together.
            tokens: that follow.
            positions: of these tokens.
            watched: whether every module must run by itself, because something hangs on some of them.
        """
        ids, places = torch.tensor(tokens)[:, None], torch.tensor(positions)[:, None]
        if self.why_single:
            (cache,) = caches
            more = self._where(places)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, return_dict=True, **more)
            return out.logits[:, -1].float()
        with decode.attention_by_cache(self.model):
            steps: dict[int, Fused | None] = {len(caches): None} if watched else self._steps
            return decode.decode(self.model, _JointDecoding(caches, steps), ids, places).float()

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
            same = self._same_as_alone()
        except decode.NotSupportedError as error:
            return str(error)
        return "" if same else f"{type(model).__name__} gives other logits for rows together"

    @torch.no_grad()
    def _token_bytes(self) -> int:
        """As a text of 256 tokens has it, or of all that the model takes, rounded up."""
        tokens = min(STEP, positions(self.model.config) or STEP)
        cache = self.cache()
        self.prefill(cache, [0] * tokens, 0)
        return -(-max(1, cache_nbytes(cache)) // tokens)

    def _same_as_alone(self) -> bool:
        """Whether two rows of different lengths give the logits together that they give alone."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        prompts = [[7 % vocabulary, 14 % vocabulary, 3 % vocabulary], [5 % vocabulary]]
        more, places = [2 % vocabulary, 6 % vocabulary], [3, 1]

        def filled() -> list[Cache]:
            caches = [self.cache() for _ in prompts]
            for cache, prompt in zip(caches, prompts):
                self.prefill(cache, prompt, 0)
            return caches

        got, rows = self.step(filled(), more, places), list(zip(filled(), more, places))
        with decode.attention_by_cache(self.model):
            alone = [
                decode.decode(
                    self.model, decode.Decoding(cache, None), torch.tensor([[token]]), torch.tensor([[place]])
                )
                for cache, token, place in rows
            ]
        expected = torch.cat(alone).float()
        bound = 1e-4 if self.model.dtype == torch.float32 else 0.05
        return bool((got - expected).abs().max() <= bound * expected.abs().max())
