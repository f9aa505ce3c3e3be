"""From the tensor names of a checkpoint to the parameter names of its transformers model.

The mapping is transformers' own (renamings, converters, the base model's prefix), applied to names and shapes alone: on
the meta device, without reading a weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from transformers import PreTrainedModel

from slimwright.errors import InputError
from slimwright.runtime.transformers_private import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)

How = Literal["plain", "expert", "converted"]


class HasShape(Protocol):
    """What a name map needs of a tensor on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Target:
    """Where one tensor of the checkpoint ends in the model.

    Attributes:
        name: the parameter or buffer, in module names; the first of them if transformers makes several of the tensor.
        how: ``plain``: the tensor is the parameter; ``expert``: it is a part of a parameter that stacks all experts;
            ``converted``: transformers computes the parameter from it in another way.
        expert: for ``expert``: (index of the expert, position among the tensors concatenated along the output
            dimension of that expert, how many are).
    """

    name: str
    how: How = "plain"
    expert: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class NameMap:
    """The two name spaces of one model.

    Attributes:
        targets: disk name → target, for every tensor that the model uses.
        unexpected: disk names that the model does not use.
        missing: module names of parameters and buffers that no tensor fills and nothing excuses: neither a tie, nor the
            model's own list of what may be absent, nor being a buffer of integers (computed when the model is made).
        ties: module name of a tied parameter → module name of the one that is on disk.
        stored_twice: those of ``ties`` that are on disk all the same: tied if and only if their bytes are equal.
        mismatched: module name → (shape on disk, after conversion; shape in the model), where they differ.
        unconvertible: module name → why transformers' conversion of the tensors for it fails.
    """

    targets: dict[str, Target]
    unexpected: tuple[str, ...]
    missing: tuple[str, ...]
    ties: dict[str, str]
    stored_twice: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unconvertible: dict[str, str]

    @property
    def to_module(self) -> dict[str, str]:
        """Disk name → module name."""
        return {name: target.name for name, target in self.targets.items()}

    def check(self) -> None:
        """Raise unless the checkpoint fills the model.

        Raises:
            InputError: a parameter is missing, has another shape, or cannot be converted; the first ones are named.
        """
        for name, reason in self.unconvertible.items():
            raise InputError(f"transformers cannot make '{name}' of the checkpoint's tensors: {reason}.")
        if self.missing:
            more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
            raise InputError(
                f"The checkpoint lacks {', '.join(self.missing[:3])}{more}, which its architecture needs: is a shard "
                "missing, or is `architectures` in config.json wrong?"
            )
        for name, (found, wanted) in self.mismatched.items():
            raise InputError(
                f"'{name}' has shape {list(found)} in the checkpoint, but config.json says {list(wanted)}: one of the "
                "two is wrong."
            )


def name_map(model: PreTrainedModel, tensors: Mapping[str, HasShape]) -> NameMap:
    """Map a checkpoint's tensors to the parameters of ``model`` as ``from_pretrained`` would.

    Args:
        model: the model, best on the meta device. A base model takes the checkpoint of a model with a head, and the
            other way round.
        tensors: by disk name.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    targets: dict[str, Target] = {}
    unexpected: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    collected: dict[str, list[tuple[str, str]]] = {}  # module name → (disk name, source pattern), in loading order
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:  # as the loader does: a name that needed no renaming
            renamed, pattern = name, None
        if renamed not in state:
            unexpected.append(name)
        elif pattern is not None:
            collected.setdefault(renamed, []).append((name, pattern))
        elif renamed in shapes:
            raise InputError(f"Two tensors of the checkpoint both end in '{renamed}', the second is '{name}'.")
        else:
            targets[name] = Target(renamed)
            shapes[renamed] = tuple(tensors[name].shape)

    unconvertible: dict[str, str] = {}
    for renamed, parts in collected.items():
        converter = by_pattern[parts[0][1]]
        made = _converted_shapes(model, converter, renamed, parts, tensors)
        if isinstance(made, str):
            unconvertible[renamed] = made
            continue
        shapes |= made
        experts = _experts(converter, parts)
        for name, _ in parts:
            targets[name] = Target(renamed, "expert", experts[name]) if experts else Target(renamed, "converted")

    ties, stored_twice = _ties(model, set(shapes))
    return NameMap(
        targets={name: targets[name] for name in tensors if name in targets},
        unexpected=tuple(name for name in tensors if name in set(unexpected)),
        missing=_missing(model, state, set(shapes) | set(ties) | set(unconvertible)),
        ties=ties,
        stored_twice=stored_twice,
        mismatched={
            name: (shape, tuple(state[name].shape))
            for name, shape in shapes.items()
            if name in state and shape != tuple(state[name].shape)
        },
        unconvertible=unconvertible,
    )


def _converted_shapes(
    model: PreTrainedModel,
    converter: Any,
    renamed: str,
    parts: list[tuple[str, str]],
    tensors: Mapping[str, HasShape],
) -> dict[str, tuple[int, ...]] | str:
    """Shapes by module name of what the converter makes of these tensors; or why it fails."""
    fresh = copy.deepcopy(converter)
    for name, pattern in parts:
        info = tensors[name]
        fresh.add_tensor(renamed, name, pattern, torch.empty(tuple(info.shape), dtype=info.dtype, device="meta"))
    try:
        made = fresh.convert(renamed, model=model, config=model.config)
    except Exception as error:  # whatever a conversion raises on shapes that are not what it expects
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return {name: tuple((tensor[0] if isinstance(tensor, list) else tensor).shape) for name, tensor in made.items()}


def _experts(converter: Any, parts: list[tuple[str, str]]) -> dict[str, tuple[int, int, int]] | None:
    """Disk name → place in the stacked parameter; None if the converter does more than stack and concatenate."""
    operations = converter.operations
    stacks = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    patterns = converter.source_patterns
    joins = len(operations) == 2 and isinstance(operations[1], Concatenate) and operations[1].dim == 1
    if not stacks or not (len(operations) == 1 == len(patterns) or joins):
        return None
    places: dict[str, tuple[int, int, int]] = {}
    counts = dict.fromkeys(patterns, 0)
    for name, pattern in parts:
        index = counts[pattern]
        counts[pattern] += 1
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if not numbers or int(numbers[-1]) != index:  # an expert is missing, or the numbers mean something else
            return None
        places[name] = (index, patterns.index(pattern), len(patterns))
    return places if len(set(counts.values())) == 1 else None


def _ties(model: PreTrainedModel, present: set[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Ties to what is on disk, and those of them that are on disk too.

    Ties are what the model declares (its config decides) and parameters that are one object under two names.
    """
    groups: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            groups.setdefault(source, [source]).append(name)
    for target, source in model.all_tied_weights_keys.items():
        members = groups.pop(target, [target])
        known = next((key for key, names in groups.items() if source in names), source)
        into = groups.setdefault(known, [known])
        into += [name for name in (source, *members) if name not in into]
    declared = set(model.all_tied_weights_keys.values())
    ties: dict[str, str] = {}
    stored_twice: list[str] = []
    for members in groups.values():
        on_disk = [name for name in members if name in present]
        if not on_disk:
            continue
        owner = next((name for name in on_disk if name in declared), on_disk[0])
        for name in members:
            if name != owner:
                ties[name] = owner
                if name in present:
                    stored_twice.append(name)
    return ties, tuple(stored_twice)


def _missing(model: PreTrainedModel, state: Mapping[str, torch.Tensor], filled: set[str]) -> tuple[str, ...]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return tuple(
        name
        for name, tensor in state.items()
        if name not in filled
        and not any(pattern.search(name) for pattern in ignored)
        and (name in parameters or tensor.is_floating_point())
    )
