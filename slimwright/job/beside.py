"""What a choice takes beside the weight files while the result runs: what a search counts under a ``--memory``.

Keys and values of a layer go where its attention is dropped; and a weight that is stored in 16 bits, but computed
with in more, is copied when it is loaded, while one that is stored as it is, or packed, stays in the mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from slimwright.checkpoint import Checkpoint
from slimwright.job.request import FitOptions
from slimwright.job.running import cache_by_block
from slimwright.model.structure import Structure
from slimwright.model.surgery import Drop
from slimwright.plan import CAST_GRIDS, cast_dtype
from slimwright.search import Option
from slimwright.search.tree import Node, all_nodes


@dataclass(frozen=True)
class Beside:
    """Bytes beside the weight files. Empty, it counts nothing.

    Attributes:
        cache: of keys and values, by module path of the block; only where parts may be dropped.
        copies: of a scope in the dtype of the source, by the key of an option that stores it in another.
    """

    cache: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Checkpoint, structure: Structure, asked: FitOptions) -> Beside:
        """What ``asked.running`` makes count."""
        if asked.running is None:
            return cls()
        scopes = {group: [site.name for site in sites] for group, sites in structure.choice_groups().items()}
        scopes |= {name: [name] for name in structure.castable}
        copies = {
            f"{scope}={grid}": sum(info.numel * info.dtype.itemsize for info in found if info.dtype != cast_dtype(grid))
            for scope, names in scopes.items()
            for found in [[source.tensors[name] for name in names]]
            for grid in CAST_GRIDS
        }
        return cls(cache_by_block(source, structure, asked) if "drop" in asked.families else {}, copies)

    @property
    def most(self) -> int:
        """Where nothing is dropped, nor stored in another dtype."""
        return sum(self.cache.values())

    def held(self, nodes: Sequence[Node]) -> dict[str, int]:
        """Bytes of keys and values that dropping a node alone frees, by its name."""
        found = {}
        for node in all_nodes(nodes):
            drop: Drop = node.drop.choice
            inside = drop.whole_block and any(child.drop.choice.attention for child in node.children)
            if not inside and (drop.attention or drop.whole_block):
                found[drop.name] = self.cache.get(drop.block, 0)
        return found

    def rest(self, nodes: Sequence[Node]) -> int:
        """What no choice decides."""
        return self.most - sum(self.held(nodes).values())

    def of_table(self, table: Mapping[str, list[Option]]) -> dict[str, list[Option]]:
        """The options, with the copy that comes with them."""
        return {
            scope: [replace(option, cost=option.cost + self._copy(option)) for option in options]
            for scope, options in table.items()
        }

    def of_nodes(self, nodes: Sequence[Node]) -> list[Node]:
        """The nodes, each with its keys and values where it is not dropped."""
        held = self.held(nodes)

        def counted(node: Node) -> Node:
            kept = node.kept + held.get(node.drop.scope, 0)
            return replace(node, kept=kept, children=tuple(map(counted, node.children)))

        return [counted(node) for node in nodes]

    def of_choices(self, choices: Mapping[str, Option], nodes: Sequence[Node]) -> int:
        """What an allocation takes beside the weight files."""
        gone = {
            inner.drop.scope for node in all_nodes(nodes) if node.drop.scope in choices for inner in all_nodes([node])
        }
        freed = sum(size for name, size in self.held(nodes).items() if name in gone)
        return self.most - freed + sum(map(self._copy, choices.values()))

    def _copy(self, option: Option) -> int:
        return self.copies.get(option.key, 0)
