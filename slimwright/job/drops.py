"""Drops as options beside the grids: which parts of a model the search may drop, what that leaves, and what it costs.

A drop's loss is the probe's own formula with ΔW = -W of the output projection; a block's is that of its sublayers
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from slimwright.checkpoint import Checkpoint, TensorEntry, entry_cost
from slimwright.errors import InputError
from slimwright.job.edits import dropped
from slimwright.job.options import kept_entry
from slimwright.model.shorten import shortened
from slimwright.model.structure import Structure
from slimwright.model.surgery import Drop, Droppable
from slimwright.plan import ZERO, Assignment
from slimwright.search.options import Option
from slimwright.search.tree import DROP, Node, all_nodes

ZEROED = Assignment(grid=ZERO)
"""The choice that stands for a group's output projections at zero while losses are found."""


def drop_nodes(
    source: Checkpoint,
    structure: Structure,
    found: Droppable,
    bound: Mapping[str, str],
    budget: int,
    trust_remote_code: bool = False,
) -> list[Node]:
    """What the search may drop: blocks with their sublayers inside, and sublayers of blocks that must stay.

    Left out is what holds a weight that a rule binds, or a part of a group that reaches beyond it; and blocks without
    which no config describes the model.

    Args:
        found: what can be dropped.
        bound: choice by group that the user's rules fix.
        budget: bytes, for the width of offsets in the header.
    """
    tree = _Tree(source, structure, bound, budget)
    drops = found.drops.values()
    sublayers = [drop for drop in drops if not drop.whole_block and tree.closed(drop)]
    nodes: dict[str, Node] = {drop.name: tree.node(drop, ()) for drop in sublayers}
    fits: dict[tuple[int, int], bool] = {}
    for drop in drops:
        inside = [name for name in drop.sublayers if name in nodes]
        if not drop.whole_block or len(inside) < len(drop.sublayers) or not inside or not tree.closed(drop):
            continue
        kind = len(drop.tensors), len(inside)
        if kind not in fits:
            fits[kind] = _removable(source, structure, drop, trust_remote_code)
        if fits[kind]:
            nodes[drop.name] = tree.node(drop, [nodes.pop(name) for name in inside])
    return list(nodes.values())


def _removable(source: Checkpoint, structure: Structure, drop: Drop, trust_remote_code: bool) -> bool:
    try:
        shortened(source, structure, {drop.block: drop.name}, drop.tensors, trust_remote_code)
    except InputError:
        return False
    return True


class _Tree:
    """Which scopes of the table lie in what."""

    def __init__(self, source: Checkpoint, structure: Structure, bound: Mapping[str, str], budget: int) -> None:
        self.source, self.structure, self.bound, self.budget = source, structure, bound, budget
        self.groups = structure.choice_groups()
        self.castable = set(structure.castable)

    def scopes(self, drop: Drop) -> list[str]:
        names = set(drop.tensors)
        found = [group for group, sites in self.groups.items() if any(site.name in names for site in sites)]
        return found + [name for name in drop.tensors if name in self.castable]

    def closed(self, drop: Drop) -> bool:
        """Whether no rule binds anything in it, and no group reaches beyond it."""
        names = set(drop.tensors)
        inside = [site.name for scope in self.scopes(drop) for site in self.groups.get(scope, ())]
        return names.issuperset(inside) and not any(scope in self.bound for scope in self.scopes(drop))

    def node(self, drop: Drop, children: Sequence[Node]) -> Node:
        below = {name for child in children for name in child.drop.choice.tensors}
        voided = {scope for child in children for scope in child.inside()}
        rest = [name for name in drop.tensors if name not in below and name not in self.castable]
        kept = sum(
            entry_cost(kept_entry(self.source, name), self.budget)
            for name in rest
            if name not in self.structure.sites and name not in self.structure.ties
        )
        if children:  # as much as its sublayers leave, which are dropped where no config can be without it
            left = kept + sum(child.drop.cost for child in children)
        else:
            left = entry_cost(TensorEntry(drop.mark, torch.uint8, (1,)), self.budget) if drop.mark else 0
        option = Option(drop.name, DROP, left, 0.0, choice=drop)
        return Node(option, tuple(scope for scope in self.scopes(drop) if scope not in voided), tuple(children), kept)


def kept_bytes(nodes: Sequence[Node]) -> int:
    """Bytes of what leaves no choice inside the nodes where nothing is dropped."""
    return sum(node.kept for node in all_nodes(nodes))


def voided_tensors(nodes: Sequence[Node]) -> set[str]:
    """Disk names of everything inside the nodes."""
    return {name for node in nodes for name in node.drop.choice.tensors}


def zeroed_sites(nodes: Sequence[Node]) -> frozenset[str]:
    """Disk names of the output projections of all sublayers."""
    return frozenset(name for node in all_nodes(nodes) if not node.children for name in node.drop.choice.outputs)


def with_drop_choices(
    table: Mapping[str, list[Option]], structure: Structure, nodes: Sequence[Node]
) -> dict[str, list[Option]]:
    """The table with one choice more for every group that holds an output projection: to have it at zero."""
    zeroed = zeroed_sites(nodes)
    groups = structure.choice_groups()
    holding = {group for group, sites in groups.items() if any(site.name in zeroed for site in sites)}
    return {
        group: [*options, Option(group, ZERO, 0, 0.0, choice=ZEROED)] if group in holding else options
        for group, options in table.items()
    }


def with_drop_losses(
    table: Mapping[str, list[Option]], nodes: Sequence[Node]
) -> tuple[dict[str, list[Option]], list[Node]]:
    """The table as it was before :func:`with_drop_choices`, and the nodes with their losses."""
    zeroed = {group: option for group, options in table.items() for option in options if option.label == ZERO}
    plain = {group: [option for option in options if option.label != ZERO] for group, options in table.items()}

    def known(node: Node) -> Node:
        children = tuple(known(child) for child in node.children)
        parts = [child.drop for child in children]
        if not children:
            parts = [zeroed[scope] for scope in node.scopes if scope in zeroed]
        loss, error = sum(part.loss for part in parts), sum(part.error for part in parts)  # in the order of a front
        return replace(node, drop=replace(node.drop, loss=loss, error=error), children=children)

    return plain, [known(node) for node in nodes]


def with_drops(
    source: Checkpoint, structure: Structure, found: Droppable, chosen: Mapping[str, str], trust_remote_code: bool
) -> tuple[Checkpoint, Structure, dict[str, str]]:
    """The model without what the search chose to drop, and the drops: of blocks that no config can be without together,
    their sublayers."""
    try:
        return *dropped(source, structure, chosen, found, trust_remote_code), dict(chosen)
    except InputError:
        parts = {
            name: why for block, why in chosen.items() for name in (found.drops[block].sublayers or (block,))
        }  # fmt: skip
        return *dropped(source, structure, parts, found, trust_remote_code), parts
