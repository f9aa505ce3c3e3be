"""What stands in a model where a sublayer was dropped: modules without parameters that compute nothing.

A dropped sublayer *means* that its output projection, weight and bias, is zero. What stands for it must therefore give
zeros, and keep the length of its slot in the cache of keys and values true: masks and positions are made from it.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimwright.errors import InputError

PASS = "pass"
_CACHES = ("past_key_values", "layer_past", "past_key_value", "cache_params")
_FORM = re.compile(r"zeros:(\d{1,9}):(\d{1,2})")


@dataclass(frozen=True)
class DroppedForm:
    """What a dropped module gives.

    Attributes:
        width: size of the last dimension of the zeros that it gives; None: it gives its input on, as it is.
        outputs: 0 for a tensor; else the length of the tuple that it gives, of which the zeros are the first and the
            rest is None.
    """

    width: int | None = None
    outputs: int = 0

    @property
    def spec(self) -> str:
        """``zeros:896:2`` or ``pass``."""
        return PASS if self.width is None else f"zeros:{self.width}:{self.outputs}"

    @classmethod
    def parse(cls, spec: str) -> DroppedForm:
        """Inverse of :attr:`spec`.

        Raises:
            InputError: not of that form.
        """
        match = _FORM.fullmatch(spec)
        if spec != PASS and not match:
            raise InputError(f"quantization_config.dropped has '{spec[:60]}', which is no form: the file is damaged.")
        return cls() if match is None else cls(int(match[1]), int(match[2]))


def keeps_state(module: nn.Module) -> bool:
    """Whether a module is given a cache."""
    return any(name in inspect.signature(type(module).forward).parameters for name in _CACHES)


def is_dropped(module: nn.Module) -> bool:
    """Whether the module stands for one that was dropped."""
    return "dropped_form" in module.__dict__


def drop_module(module: nn.Module, form: DroppedForm) -> None:
    """Let a module give what ``form`` says and hold nothing. It stays of its own class, whose settings others read."""
    module.__class__ = _dropped_class(type(module))  # type: ignore[arg-type]
    module.__dict__["dropped_form"] = form
    for held in (module._modules, module._parameters, module._buffers):
        held.clear()
    module._non_persistent_buffers_set.clear()
    module._is_hf_initialized = True  # type: ignore[assignment]


@functools.cache
def _dropped_class(own: Any) -> type[nn.Module]:
    """The subclass of ``own`` that computes nothing."""
    parameters = list(inspect.signature(own.forward).parameters)[1:]
    first = parameters[0] if parameters else ""
    cache = next((name for name in _CACHES if name in parameters), None)
    place = parameters.index(cache) if cache is not None else -1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[first]
        form = self.dropped_form
        if form.width is None:
            return x
        if cache is not None and kwargs.get("key_value_states") is None:
            kept = kwargs[cache] if cache in kwargs else args[place] if place < len(args) else None
            index = getattr(self, "layer_idx", None)
            if kept is not None and index is not None:
                _pass_tokens(kept, index, x)
        zeros = x.new_zeros(*x.shape[:-1], form.width)
        return (zeros, *[None] * (form.outputs - 1)) if form.outputs else zeros

    namespace = {"forward": forward, "own_class": own, "__module__": own.__module__}
    return type(f"Dropped{own.__name__}", (own,), namespace)


def _pass_tokens(cache: Any, index: int, x: Tensor) -> None:
    """Let the tokens of ``x`` (batch, tokens, hidden) pass the slot of a layer that keeps no keys and values.

    transformers counts a slot's tokens by the shape of its keys, and finds none in an empty tensor: the slot gets one
    head of one channel, or what it has allocated already. Our own slots only count.
    """
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder's two
    slot = cache.layers[index] if index < len(cache.layers) else None
    count = getattr(slot, "pass_tokens", None)
    if count is not None:
        count(x.shape[1])
        return
    keys, values = (1, 1), (1, 1)
    if slot is not None and slot.is_initialized and slot.keys.ndim == 4:
        keys, values = (slot.keys.shape[1], slot.keys.shape[3]), (slot.values.shape[1], slot.values.shape[3])
    made = [x.new_zeros(x.shape[0], heads, x.shape[1], channels) for heads, channels in (keys, values)]
    cache.update(*made, index)


def restored(model: nn.Module, whole: nn.Module, dtype: torch.dtype | None) -> None:
    """Put dense modules back whose every weight is zero, which is what a dropped sublayer means.

    Args:
        model: with dropped modules; changed in place.
        whole: the same model without them, on the meta device.
        dtype: of the weights; None is that of the model's.
    """
    at = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = dtype or (at.dtype if at is not None else torch.float32)
    device = at.device if at is not None else torch.device("cpu")
    for path in [path for path, module in model.named_modules() if is_dropped(module)]:
        fresh = whole.get_submodule(path).to_empty(device=device)
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            nn.init.zeros_(tensor)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fresh.to(dtype))
