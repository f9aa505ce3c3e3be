"""The blocks of a model: its module lists of transformer layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn
from transformers import GradientCheckpointingLayer, PreTrainedModel

from slimwright.model.structure import Block, Stack


def find_stacks(
    model: PreTrainedModel, sites: Collection[str], order: Sequence[str], runs: dict[str, int]
) -> tuple[Stack, ...]:
    """Stacks of blocks in forward order.

    A stack is a ModuleList whose children are ``GradientCheckpointingLayer`` or named in ``_no_split_modules``; where
    such lists nest (Swin's stages), the inner ones. A model that marks no layer (ALBERT) has as stacks the lists whose
    children are of one class and hold sites, again the inner ones where they hold all of a child's sites.

    Args:
        model: the model.
        sites: module paths that own a compressible weight.
        order: module paths in the order of their first call; empty if not observed.
        runs: module path → how often one forward called it.
    """
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    unsplit = set(model._no_split_modules or ())
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            unsplit |= set(module._no_split_modules or ())

    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit

    def holding(path: str) -> set[str]:
        return {site for site in sites if site.startswith(path + ".")}

    found = [path for path, children in lists.items() if all(map(is_layer, children)) and holding(path)]
    if not found:
        uniform = [
            path
            for path, children in lists.items()
            if len({type(child) for child in children}) == 1
            and all(holding(f"{path}.{index}") for index in range(len(children)))
        ]
        outer = [path for path in uniform if not any(path.startswith(other + ".") for other in uniform)]
        for path in outer:
            inside = [other for other in uniform if other.startswith(path + ".")]
            whole = {site for other in inside for site in holding(other)} == holding(path)
            found += inside if inside and whole else [path]
    found = [path for path in found if not any(other.startswith(path + ".") for other in found)]
    first = {path: position for position, path in enumerate(order)}
    found.sort(key=lambda path: min(first.get(f"{path}.{i}", len(first)) for i in range(len(lists[path]))))
    return tuple(
        Stack(
            path,
            tuple(
                Block(f"{path}.{index}", type(child).__name__, index, max(1, runs.get(f"{path}.{index}", 1)))
                for index, child in enumerate(lists[path])
            ),
        )
        for path in found
    )
