"""Which tensors a merge will have, and of which tensors each is made: whole models, modules, or chosen layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slimwright.checkpoint.files import shown
from slimwright.checkpoint.reader import natural_key
from slimwright.errors import InputError
from slimwright.job.merging.config import MergeConfig, Slice, SliceSource
from slimwright.job.merging.layers import Stack, find_stacks, is_before_layers, layer_of, main_stack, renamed
from slimwright.job.merging.modules import belongs, members
from slimwright.job.merging.sources import MergeInput, ModelReference

Inputs = Mapping[ModelReference, MergeInput]


@dataclass(frozen=True)
class Layers:
    """The layers of the result: the stack they are in, the source's layer of each, how many layers the model has that
    the result is like, and the module where the configuration names modules."""

    stack: Stack
    chosen: tuple[int, ...]
    count: int
    module: str | None = None


@dataclass(frozen=True)
class Target:
    """A tensor of the result before its inputs are resolved; of no slice where it is copied from the leader."""

    name: str
    part: Slice | None
    sources: tuple[tuple[SliceSource, str], ...]
    base: tuple[ModelReference, str] | None
    depth: float
    block: int | None
    blocks: int


def like(config: MergeConfig) -> ModelReference:
    """The model whose names, config.json and side files the result has: the base, else the first."""
    return config.base or config.slices[0].sources[0].model


def tied_heads(config: MergeConfig, inputs: Inputs) -> set[str]:
    """Heads that some inputs store although they are tied to the embedding: the result has them once."""
    leader = inputs[like(config)]
    if not _ties(leader.checkpoint.config):
        return set()
    found = set()
    for given in inputs.values():
        for name in given.names:
            if name.rpartition(".")[0].rpartition(".")[2] in ("lm_head", "embed_out") and name.endswith(".weight"):
                found.add(name)
    return found


def _ties(config: Mapping[str, Any]) -> bool:
    texts = [config, *(part for part in config.values() if isinstance(part, dict))]
    given = [part["tie_word_embeddings"] for part in texts if "tie_word_embeddings" in part]
    return bool(given and given[0])


def targets_of(
    config: MergeConfig, inputs: Inputs, leader: MergeInput, tied: set[str]
) -> tuple[list[Target], tuple[Layers, ...]]:
    """Every tensor of the result, module by module."""
    names = [name for name in leader.names if name not in tied]
    asked = list(dict.fromkeys(part.module for part in config.slices))
    modules = [module for module in asked if module is not None]
    targets: list[Target] = []
    layers: list[Layers] = []
    within = members(names, modules) if modules else {}
    for module in asked:
        parts = [part for part in config.slices if part.module == module]
        own = within[module] if module is not None else names

        def has(name: str, module: str | None = module) -> bool:
            return module is None or next((m for m in modules if belongs(name, m)), None) == module

        if parts[0].whole:
            targets += _whole(parts[0], inputs, own, tied, has)
        else:
            found, chosen = _sliced(parts, inputs, leader, own, has)
            targets += found
            layers.append(chosen)
    here = {name for own in within.values() for name in own} if modules else set(names)
    targets += [Target(name, None, (), None, 0.0, None, 0) for name in names if name not in here]
    return sorted(targets, key=lambda target: natural_key(target.name)), tuple(layers)


def _whole(part: Slice, inputs: Inputs, names: list[str], tied: set[str], has: Callable[[str], bool]) -> list[Target]:
    """The tensors of models (or of a module of theirs) that are merged one by one."""
    _same_names(part, inputs, names, tied, has)
    stacks = find_stacks(names)
    return [
        Target(name, part, tuple((source, name) for source in part.sources), (part.base, name) if part.base else None,
                *_depth(name, stacks))
        for name in names
    ]  # fmt: skip


def _sliced(
    parts: list[Slice], inputs: Inputs, leader: MergeInput, names: list[str], has: Callable[[str], bool]
) -> tuple[list[Target], Layers]:
    """The tensors of a model (or of a module of it) whose layers are chosen."""
    stack = main_stack(leader.checkpoint.config, find_stacks(names))
    if stack is None:
        raise InputError(f"{leader.reference} has no layers that slices could choose from: use 'models'.")
    targets: list[Target] = []
    for name in [name for name in names if layer_of(name, [stack]) is None]:
        part = parts[0] if is_before_layers(name) else parts[-1]
        targets.append(
            Target(name, part, tuple((source, name) for source in part.sources),
                    (part.base, name) if part.base else None, 0.0, None, 0)
        )  # fmt: skip
    chosen: list[int] = []
    total = sum((part.sources[0].stop or 0) - (part.sources[0].start or 0) for part in parts)
    for part in parts:
        first = part.sources[0]
        assert first.start is not None and first.stop is not None
        pattern = inputs[first.model]
        for source in part.sources:
            count = main_count(inputs[source.model], stack)
            if source.stop is None or source.stop > count:
                raise InputError(
                    f"{source.model} has {count} layers, so layer_range [{source.start}, {source.stop}] is too long."
                )
        span = first.stop - first.start
        for offset in range(span):
            index = len(chosen)
            chosen.append(first.start + offset)
            depth = offset / (span - 1) if span > 1 else 1.0
            for name in pattern.names:
                place = layer_of(name, [stack])
                if place is None or place[1] != first.start + offset or not has(name):
                    continue
                here = tuple((source, renamed(name, stack, (source.start or 0) + offset)) for source in part.sources)
                base = None
                if part.base is not None:
                    own = next((s for s in part.sources if s.model == part.base), first)
                    base = (part.base, renamed(name, stack, (own.start or 0) + offset))
                targets.append(Target(renamed(name, stack, index), part, here, base, depth, index, total))
    return targets, Layers(stack, tuple(chosen), main_count(leader, stack), parts[0].module)


def main_count(given: MergeInput, stack: Stack) -> int:
    """How many layers a model has in a stack.

    Raises:
        InputError: it has no such stack.
    """
    found = next((s for s in find_stacks(given.names) if s.prefix == stack.prefix), None)
    if found is None:
        raise InputError(
            f"{given.reference} has no layers named '{stack.prefix}N': its architecture is another, or it was saved "
            "without its head; save it again with the class that config.json names."
        )
    return found.count


def _depth(name: str, stacks: list[Stack]) -> tuple[float, int | None, int]:
    place = layer_of(name, stacks)
    if place is None:
        return 0.0, None, 0
    stack, layer = place
    return (layer / (stack.count - 1) if stack.count > 1 else 1.0), layer, stack.count


def _same_names(part: Slice, inputs: Inputs, names: list[str], tied: set[str], has: Callable[[str], bool]) -> None:
    """Every model has exactly the leader's tensors (of a module, those that it has), ties aside.

    Raises:
        InputError: naming the first that is missing or too much.
    """
    wanted = set(names)
    for reference in [source.model for source in part.sources] + ([part.base] if part.base else []):
        own = {name for name in inputs[reference].names if has(name)} - tied
        missing, extra = sorted(wanted - own, key=natural_key), sorted(own - wanted, key=natural_key)
        if missing or extra:
            lacks = f"lacks the tensor '{shown(missing[0])}'" if missing else f"has a tensor '{shown(extra[0])}'"
            others = "that the others have" if missing else "that the others lack"
            raise InputError(
                f"{reference} {lacks} {others} ({len(missing)} missing, {len(extra)} too many): the models must have "
                "the same architecture and have been saved with the same class."
            )
