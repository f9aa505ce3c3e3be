"""Whole blocks taken out of a model: its config without them, and the new names of the blocks after them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slimwright.checkpoint import Checkpoint, TensorInfo
from slimwright.errors import InputError
from slimwright.model.names import name_map
from slimwright.model.skeleton import skeleton
from slimwright.model.structure import Stack, Structure

_COUNT = re.compile(r"layers?$|depth$|n_blocks?$|num_blocks$")
_INDICES = re.compile(r"layers?(_ids|_idxs?|_indices)?$|idxs?$|indices$")
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
"""Settings that count the blocks before some point."""
_BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers", "vision_feature_layer")
"""Settings whose meaning depends on a block's number in a way that names cannot follow."""


@dataclass(frozen=True)
class Shortened:
    """A model without some of its blocks.

    Attributes:
        config: contents of its config.json.
        prefixes: disk prefix of every block that stays and has another number now → its new prefix, both with a dot
            at the end.
    """

    config: dict[str, Any]
    prefixes: dict[str, str]


def shortened(
    checkpoint: Checkpoint,
    structure: Structure,
    blocks: Mapping[str, str],
    gone: Collection[str],
    trust_remote_code: bool = False,
) -> Shortened:
    """Take blocks out.

    The config is right if the model that transformers builds of it is the old one without these blocks: same classes
    and settings, block by block, and every tensor has its place. That is checked, not assumed.

    Args:
        blocks: module path of each block that goes → its prefix in disk names.
        gone: disk names of their tensors.

    Raises:
        InputError: no config says so, or a block of another number would do something else.
    """
    config, prefixes = dict(checkpoint.config), dict[str, str]()
    first = next(iter(blocks.values()))
    for key, value in _settings(config):
        if key in _BY_NUMBER and value:
            raise InputError(f"'{first}' cannot be dropped: this model's `{key}` depends on the numbers of its blocks.")
    for stack in structure.stacks:
        removed = {block.index for block in stack.blocks if block.module in blocks}
        if not removed:
            continue
        if len(removed) == len(stack.blocks):
            raise InputError(f"All {len(removed)} blocks of '{stack.module}' cannot be dropped: keep one at least.")
        start = next(blocks[b.module] for b in stack.blocks if b.module in blocks).rpartition(".")[0]
        kept = [block.index for block in stack.blocks if block.index not in removed]
        prefixes |= {f"{start}.{index}.": f"{start}.{new}." for new, index in enumerate(kept) if index != new}
        places = {f"{stack.module}.{new}": f"{stack.module}.{index}" for new, index in enumerate(kept)}
        config = _without(checkpoint, config, stack, removed, places, trust_remote_code)
    result = Shortened(config, prefixes)
    renamed = replace(structure, prefixes=prefixes).written_name
    tensors = {renamed(name): info for name, info in checkpoint.tensors.items() if name not in gone}
    _check_names(result, checkpoint, tensors, trust_remote_code, first)
    return result


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield key, value
            yield from _settings(value)


def _without(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    stack: Stack,
    removed: Collection[int],
    places: Mapping[str, str],
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The config of the model without some blocks of one stack."""
    count = len(stack.blocks)
    old = skeleton(config, checkpoint.model_path, None, trust_remote_code)
    full = old.config.to_dict()
    for path in _counts(full, count):
        candidate = copy.deepcopy(config)
        _edit(_at(candidate, path[:-1]), _at(full, path[:-1]), path[-1], count, sorted(removed))
        try:
            new = skeleton(candidate, checkpoint.model_path, None, trust_remote_code)
        except InputError:
            continue
        if not _difference(old, new, places, stack, removed):
            return candidate
    raise InputError(
        f"Blocks of '{stack.module}' cannot be dropped: no config of a {type(old).__name__} describes the model "
        "without them; drop their sublayers instead."
    )


def _counts(config: Mapping[str, Any], count: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the numbers in a config that may be how many blocks there are."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, count, (*path, key))
        elif type(value) is int and value == count and _COUNT.search(key):
            yield (*path, key)


def _at(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        config = config.setdefault(key, {})
    return config


def _edit(config: dict[str, Any], full: Mapping[str, Any], key: str, count: int, removed: list[int]) -> None:
    """Change a config in place: the number of blocks, every list with an entry or an index per block, and the settings
    that count the first ones. What only transformers fills in (``layer_types``) is written out."""
    config[key] = count - len(removed)
    kept = [index for index in range(count) if index not in removed]
    for name, value in full.items():
        if isinstance(value, (list, tuple)) and value:
            numbers = all(type(item) is int and 0 <= item < count for item in value)
            if numbers and _INDICES.search(name) and len(set(value)) == len(value):
                config[name] = [kept.index(item) for item in value if item in kept]
            elif len(value) == count:
                config[name] = [value[index] for index in kept]
        elif name in _FIRST_LAYERS and type(value) is int and value <= count:
            config[name] = value - sum(index < value for index in removed)


def _difference(
    old: PreTrainedModel, new: PreTrainedModel, places: Mapping[str, str], stack: Stack, removed: Collection[int]
) -> str:
    """Where the new model is not the old one without the blocks; empty if nowhere."""
    before = dict(old.named_modules(remove_duplicate=False))
    after = dict(new.named_modules(remove_duplicate=False))
    dropped = tuple(f"{stack.module}.{index}" for index in removed)
    wanted = {path for path in before if not any(path == d or path.startswith(f"{d}.") for d in dropped)}
    seen = set()
    for path, module in after.items():
        block = next((b for b in places if path == b or path.startswith(f"{b}.")), None)
        origin = path if block is None else places[block] + path.removeprefix(block)
        seen.add(origin)
        if origin not in before or type(before[origin]) is not type(module):
            return path
        if block is not None and _settings_of(before[origin]) != _settings_of(module):
            return path
    return "" if seen == wanted else next(iter(seen ^ wanted))


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, without a block's number."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, (bool, int, float, str, type(None))) and not re.fullmatch(r"_?layer_?(idx|id|index)", name)
    }


def _check_names(
    result: Shortened, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], trust_remote_code: bool, first: str
) -> None:
    try:
        model = skeleton(result.config, checkpoint.model_path, tensors, trust_remote_code)
        name_map(model, tensors).check()
    except InputError as error:
        raise InputError(f"'{first}' cannot be dropped: the blocks after it do not fit its number ({error})") from None
