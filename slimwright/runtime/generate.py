"""``generate`` of a loaded model: transformers' own in every argument, decoded by :mod:`slimwright.runtime.decode`.

transformers prepares everything (inputs, processors, stopping criteria, streamer, prefill); only the loop over new
tokens is ours. What that loop does not do (beams, assistants, scores to return, models whose attention is their own)
runs transformers' loop, with the packed cache of the plan where there is one.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMode, StoppingCriteriaList, StopStringCriteria

from slimwright.errors import InputError
from slimwright.runtime import decode
from slimwright.runtime.kv_cache import kv_cache
from slimwright.runtime.kv_format import KvFormat

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_ELSEWHERE = ("past_key_values", "cache_params", "cache_implementation", "assistant_model", "custom_generate",
              "synced_gpus", "prompt_lookup_num_tokens", "token_healing")  # fmt: skip
"""Arguments with which transformers generates by itself."""
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory", re.IGNORECASE)
_NO_COMPILER = re.compile(r"no working C\+\+ compiler", re.IGNORECASE)


class Generation:
    """Stands where a model's ``generate`` is looked up.

    Args:
        model: a transformers model that can generate.
        formats: how the layers of its cache are packed.
    """

    def __init__(self, model: Any, formats: dict[int, KvFormat] | None = None) -> None:
        self.model, self.formats = model, formats or {}
        self.__signature__ = inspect.signature(type(model).generate)

    def __reduce__(self) -> Any:
        return Generation, (self.model, self.formats)

    def cache(self, capacity: int | None = None) -> Cache:
        """An empty cache as the plan says, for ``past_key_values``.

        Args:
            capacity: most tokens that it may hold; None is any number.
        """
        return kv_cache(self.model.config, self.formats, capacity)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See ``GenerationMixin.generate``.

        Raises:
            InputError: the cache given holds too few tokens, or memory is not enough for this batch.
        """
        arguments = inspect.signature(type(self.model).generate).bind_partial(self.model, *args, **kwargs).arguments
        given = {**arguments, **arguments.get("kwargs", {})}
        try:
            if self._elsewhere(given):
                self._check_room(given)
                return type(self.model).generate(self.model, *args, **kwargs)
            return self._generate(given)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise self._no_memory(given) from error
        except RuntimeError as error:
            if _NO_MEMORY.search(str(error)):
                raise self._no_memory(given) from error
            if _NO_COMPILER.search(str(error)):
                raise InputError(
                    "compile_config asks for torch.compile, which finds no C++ compiler here: install g++, or leave it "
                    "out."
                ) from error
            raise

    def _elsewhere(self, given: dict[str, Any]) -> bool:
        """Whether transformers generates by itself."""
        config, own = given.get("generation_config"), self.model.generation_config
        asked = {name: given.get(name) for name in _ELSEWHERE}
        for one in (config, own):
            asked |= {name: value for name in asked if (value := getattr(one, name, None)) is not None}
        uncached = any(value is False for value in (given.get("use_cache"), getattr(config, "use_cache", None)))
        if own.cache_implementation == "hybrid" and asked["cache_implementation"] == "hybrid":
            asked["cache_implementation"] = None  # what Gemma's files say means nothing any more, to transformers too
        return uncached or bool(own.stop_strings) or any(value not in (None, False) for value in asked.values())

    def _generate(self, given: dict[str, Any]) -> Any:
        """transformers' ``generate`` with our loop. It hands neither streamer nor tokenizer to a loop that is given, so
        the loop gets the one from here, and the strings that end the text are made a criterion here."""
        config, criteria = given.get("generation_config"), given.get("stopping_criteria")
        strings = given.get("stop_strings", getattr(config, "stop_strings", None))
        more = {
            name: value for name, value in given.items() if name not in ("self", "kwargs", "stop_strings", "tokenizer")
        }
        if strings is not None:
            tokenizer = given.get("tokenizer")
            if tokenizer is None:
                raise InputError("stop_strings need the tokenizer: pass tokenizer= to generate.")
            criteria = [*(criteria or []), StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)]
            more["stopping_criteria"] = StoppingCriteriaList(criteria)
            if config is not None:
                more["generation_config"] = config = copy.deepcopy(config)
                config.stop_strings = None
        return type(self.model).generate(self.model, **more, custom_generate=_loop(self, given.get("streamer")))

    @staticmethod
    def _no_memory(given: dict[str, Any]) -> InputError:
        ids = _inputs(given)
        batch = f" of {ids.shape[0]} rows" if ids is not None else ""
        return InputError(
            f"There is not enough memory to generate for this batch{batch}: give fewer rows or a shorter prompt, or a "
            "cache of fewer bits (`slimwright fit --cache cache/kivi,bits=4`)."
        )

    @staticmethod
    def _check_room(given: dict[str, Any]) -> None:
        """Refuse more tokens than a cache that the user gave can hold."""
        cache, ids, config = given.get("past_key_values"), _inputs(given), given.get("generation_config")
        if not isinstance(cache, Cache) or ids is None or not cache.layers:
            return
        full = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
        room = max((layer.get_max_length() for layer in full), default=-1)
        new = given.get("max_new_tokens") or (config.max_new_tokens if config is not None else None)
        longest = given.get("max_length") or (config.max_length if config is not None else None)
        needed = ids.shape[1] + new - 1 if new else longest - 1 if longest else ids.shape[1]
        if 0 <= room < needed:
            raise InputError(
                f"The cache given holds {room} tokens, but a prompt of {ids.shape[1]} and the tokens asked for need "
                f"{needed}: make it larger, or ask for fewer."
            )


def _inputs(given: dict[str, Any]) -> Tensor | None:
    ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
    return ids if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _loop(generation: Generation, streamer: Any) -> Any:
    """The function that transformers calls with everything prepared, in place of its own decoding loops."""

    def slimwright_decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        inputs_tensor: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        mode = generation_config.get_generation_mode(None)
        simple = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        cached = isinstance(model_kwargs.get("past_key_values"), Cache) and generation_config.use_cache is not False
        ours = (
            simple
            and cached
            and not generation_config.return_dict_in_generate
            and not generation_config.output_attentions
            and not generation_config.output_hidden_states
            and not {name for name, value in model_kwargs.items() if value is not None} - _KNOWN
            and _starts(model_kwargs.get("attention_mask")) is not None
            and not decode.supported(model)
        )
        if cached and (ours or generation.formats):
            capacity = generation_config.max_length - 1 if ours else None
            model_kwargs["past_key_values"] = kv_cache(model.config, generation.formats, capacity, ours=ours)
        if ours:
            return _decode(
                model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
        method = getattr(type(model), _method(mode))
        more = {"streamer": streamer} if streamer is not None else {}
        if "inputs_tensor" in inspect.signature(method).parameters:
            more["inputs_tensor"] = inputs_tensor
        return method(
            model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            generation_config=generation_config, **more, **model_kwargs,
        )  # fmt: skip

    return slimwright_decode


def _starts(mask: Tensor | None) -> Tensor | tuple[()] | None:
    """The first token of each row that counts, where all padding is on the left: (batch,) int64. None where it is not;
    nothing for no mask at all."""
    if mask is None:
        return ()
    start = (mask == 0).sum(1)
    padded_left = torch.arange(mask.shape[1], device=mask.device) >= start[:, None]
    return start if torch.equal(mask != 0, padded_left) and bool((start < mask.shape[1]).all()) else None


def _method(mode: GenerationMode) -> str:
    from slimwright.runtime.transformers_private import GENERATION_MODES_MAPPING

    return GENERATION_MODES_MAPPING[mode]


def _decode(
    model: Any, input_ids: Tensor, processor: Any, criteria: Any, config: GenerationConfig, streamer: Any,
    model_kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Greedy search or sampling: (batch, prompt and new tokens) int64."""
    batch, length = input_ids.shape
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    start = None if mask is None else _starts(mask)
    assert isinstance(start, Tensor | None)
    sequences = input_ids.new_empty(batch, config.max_length)
    sequences[:, :length] = input_ids
    pad = config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    unfinished = torch.ones(batch, dtype=torch.long)
    cache = model_kwargs["past_key_values"]
    logits = model._prefill(input_ids, config, model_kwargs).logits[:, -1]
    decoding = decode.Decoding(cache, start)
    step = None
    if config.compile_config is not None and not config.disable_compile and positions is not None:
        step = decode.compiled_step(model, config.compile_config.to_dict())
    last = None if positions is None else positions[..., -1:]
    with decode.attention_by_cache(model):
        while True:
            scores = processor(sequences[:, :length], logits.float())
            if config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if pad is not None and ends:
                tokens = tokens * unfinished + pad * (1 - unfinished)
            sequences[:, length] = tokens
            length += 1
            if streamer is not None:
                streamer.put(tokens)
            unfinished = unfinished & ~criteria(sequences[:, :length], None)
            if not unfinished.any():
                break
            last = None if last is None else last + 1
            logits = decode.decode(model, decoding, tokens[:, None], last, step)
    if streamer is not None:
        streamer.end()
    return sequences[:, :length]
