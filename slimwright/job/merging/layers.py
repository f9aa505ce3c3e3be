"""Stacks of layers, from the names of tensors alone: which layer a tensor lies in, and its name in another layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_COUNTS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "depth",
)  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """Layers whose tensors are named ``prefix + index + "." + rest``."""

    prefix: str
    count: int


def find_stacks(names: Iterable[str]) -> list[Stack]:
    """The stacks of a model, the one with the most tensors first.

    A stack is a prefix that is followed by every number from 0 to its count, with the same set of names behind most of
    them. Of numbers inside numbers (the experts of a layer) the outermost are the layers.
    """
    found: dict[str, dict[int, int]] = {}
    for name in names:
        match = re.match(r"(.*?(?:^|\.))([0-9]+)\.", name)
        if match:
            layers = found.setdefault(match[1], {})
            layers[int(match[2])] = layers.get(int(match[2]), 0) + 1
    stacks = [
        (sum(layers.values()), Stack(prefix, len(layers)))
        for prefix, layers in found.items()
        if sorted(layers) == list(range(len(layers)))
    ]
    return [stack for _, stack in sorted(stacks, key=lambda item: -item[0])]


def layer_of(name: str, stacks: Iterable[Stack]) -> tuple[Stack, int] | None:
    """The stack and the layer that a tensor lies in; None outside of all."""
    for stack in stacks:
        if name.startswith(stack.prefix):
            match = re.match(r"([0-9]+)\.", name[len(stack.prefix) :])
            if match:
                return stack, int(match[1])
    return None


def renamed(name: str, stack: Stack, layer: int) -> str:
    """The name of the same tensor in another layer of its stack."""
    rest = name[len(stack.prefix) :].partition(".")[2]
    return f"{stack.prefix}{layer}.{rest}"


def main_stack(config: Mapping[str, Any], stacks: list[Stack]) -> Stack | None:
    """The stack that slices speak of: the one whose count is config.json's number of layers, else the largest."""
    texts = [config, *(part for part in config.values() if isinstance(part, dict))]
    counts = {part[key] for part in texts for key in _COUNTS if isinstance(part.get(key), int)}
    return next((stack for stack in stacks if stack.count in counts), stacks[0] if stacks else None)


def resized_config(config: Mapping[str, Any], chosen: list[int], old: int) -> dict[str, Any]:
    """config.json for another choice of layers: the count, and every list with one entry a layer.

    Args:
        config: of the model that the result is like.
        chosen: the source's layer for each layer of the result.
        old: how many layers the source has.
    """
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key in _COUNTS and value == old:
            new[key] = len(chosen)
        elif isinstance(value, dict):
            new[key] = resized_config(value, chosen, old)
        elif isinstance(value, list) and len(value) == old and old > 1 and key not in ("architectures",):
            new[key] = [value[layer] for layer in chosen]
        elif key in ("max_window_layers",) and isinstance(value, int) and value >= old:
            new[key] = len(chosen)
        else:
            new[key] = value
    return new


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers stands before them (embeddings), by its name; else it stands behind."""
    return re.search(r"embed|wte|wpe|patch|conv_?in|word_embeddings|position", name.lower()) is not None
