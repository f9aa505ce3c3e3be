"""What ``slimwright inspect`` shows: a tree that fits a screen, and everything as a JSON-able dict."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from slimwright.model.structure import ROLES, Block, Site, Structure

_KEPT_SHOWN = 8


def structure_json(structure: Structure) -> dict[str, Any]:
    """Everything that is known of the structure; sizes in bytes, names as on disk unless called ``module``."""
    return {
        "family": structure.family,
        "architecture": structure.architecture,
        "parameters": structure.parameters,
        "bytes": sum(structure.bytes.values()),
        "observed": structure.observed,
        "note": structure.note,
        "stacks": [
            {"module": stack.module, "blocks": [dataclasses.asdict(block) for block in stack.blocks]}
            for stack in structure.stacks
        ],
        "tensors": [
            {
                "name": name,
                "module": structure.to_module.get(name),
                "role": structure.roles[name],
                "bytes": nbytes,
                **(_site_json(structure.sites[name]) if name in structure.sites else {"kept": structure.kept[name]}),
            }
            for name, nbytes in structure.bytes.items()
        ],
        "choice_groups": _names(structure.choice_groups()),
        "gram_groups": _names(structure.gram_groups()),
        "ties": dict(structure.ties),
        "folds": [dataclasses.asdict(fold) for fold in structure.folds],
    }


def _names(groups: dict[str, tuple[Site, ...]]) -> dict[str, list[str]]:
    return {group: [site.name for site in sites] for group, sites in groups.items()}


def _site_json(site: Site) -> dict[str, Any]:
    return {
        "kind": site.kind,
        "shape": list(site.weight_shape),
        "transposed": site.transposed,
        "block": site.block,
        "expert": list(site.expert) if site.expert else None,
        "choice_group": site.choice_group,
        "gram_group": site.gram_group,
    }


def structure_tree(structure: Structure) -> Tree:
    """A tree by stack and block: identical blocks of a stack are shown once, and all experts of a layer as one line."""
    total = sum(structure.bytes.values())
    sites = sum(structure.bytes[name] for name in structure.sites)
    tree = Tree(
        f"[bold]{escape(structure.architecture)}[/] ({escape(structure.family)}): "
        f"{_count(structure.parameters)} parameters, {_size(total)}, {sites / max(1, total):.1%} of it compressible"
    )
    owners = _owners(structure)
    _add_members(tree, structure, [name for name, owner in owners.items() if owner is None], "")
    for stack in structure.stacks:
        _add_stack(tree, structure, stack.module, stack.blocks, owners)
    if structure.ties:
        ties = tree.add("[bold]tied[/]: one weight under two names")
        for name, owner in structure.ties.items():
            ties.add(f"{escape(name)} [dim]is[/] {escape(owner)}")
    _add_kept(tree, structure)
    if structure.note:
        tree.add(f"[yellow]note[/]: {escape(structure.note)}")
    return tree


def _owners(structure: Structure) -> dict[str, str | None]:
    """Disk name → module path of the block that holds it."""
    blocks = {block.module for stack in structure.stacks for block in stack.blocks}
    found: dict[str, str | None] = {}
    for name in structure.bytes:
        parts = structure.to_module.get(name, "").split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        found[name] = next((prefix for prefix in prefixes if prefix in blocks), None)
    return found


def _add_stack(
    tree: Tree, structure: Structure, module: str, blocks: Sequence[Block], owners: dict[str, str | None]
) -> None:
    members: dict[str, list[str]] = {block.module: [] for block in blocks}
    for name, owner in owners.items():
        if owner in members:
            members[owner].append(name)
    sizes = {path: sum(structure.bytes[name] for name in names) for path, names in members.items()}
    count = f"{len(blocks)} blocks" if len(blocks) > 1 else "1 block"
    branch = tree.add(f"[bold]{escape(module)}[/]: {count}, {_size(sum(sizes.values()))}")

    def kind(block: Block) -> tuple[Any, ...]:
        """Equal for blocks that look the same."""
        lines = [(line, role) for line, role, _ in _lines(structure, members[block.module], block.module)]
        return block.class_name, block.runs, sizes[block.module], tuple(lines)

    alike: dict[tuple[Any, ...], list[Block]] = {}
    for block in blocks:
        alike.setdefault(kind(block), []).append(block)
    for (class_name, runs, size, _), same in alike.items():
        times, each = (f"{len(same)} × ", " each") if len(same) > 1 else ("", "")
        again = f", run {runs} times" if runs > 1 else ""
        title = f"{'blocks' if times else 'block'} {_ranges([block.index for block in same])}"
        node = branch.add(f"{title}: {times}{escape(class_name)}, {_size(size)}{each}{again}")
        _add_members(node, structure, members[same[0].module], same[0].module)


def _ranges(indices: Sequence[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5; at most four ranges are named."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in ranges[:4]]
    return ", ".join(shown) + (", …" if len(ranges) > 4 else "")


def _lines(structure: Structure, names: Iterable[str], block: str) -> list[tuple[str, str, int]]:
    """(line, role, bytes) for every choice group among ``names``, the block's own prefix left out."""
    groups: dict[str, list[Site]] = {}
    for name in names:
        site = structure.sites.get(name)
        if site is not None:
            groups.setdefault(site.choice_group, []).append(site)
    lines = []
    for group, sites in groups.items():
        roles = "+".join(sorted({site.role for site in sites}, key=ROLES.index))
        shapes = Counter("×".join(map(str, site.weight_shape)) for site in sites)
        shown = ", ".join(f"{count} of {shape}" if count > 1 else shape for shape, count in list(shapes.items())[:3])
        size = sum(structure.bytes[site.name] for site in sites)
        lines.append((f"{_short(group, sites[0], structure, block)} \\[{roles}] {shown}, {_size(size)}", roles, size))
    return lines


def _short(group: str, site: Site, structure: Structure, block: str) -> str:
    """The group's name without what all names of its block begin with."""
    if block:
        tail = "." + structure.to_module[site.name].removeprefix(block + ".")
        prefix = site.name[: -len(tail)] + "." if site.name.endswith(tail) else ""
        if not prefix:  # other names on disk: cut after the block's index
            index = block.rpartition(".")[2]
            head, found, _ = site.name.partition(f".{index}.")
            prefix = head + found
        group = group.removeprefix(prefix)
    return escape(group)


def _add_members(node: Tree, structure: Structure, names: Iterable[str], block: str) -> None:
    names = list(names)
    for line, _, _ in _lines(structure, names, block):
        node.add(line)
    kept = [name for name in names if name in structure.kept]
    if kept and block:
        size = sum(structure.bytes[name] for name in kept)
        reasons = ", ".join(f"{count} {reason}" for reason, count in _reasons(structure, kept).items())
        node.add(f"[dim]kept: {escape(reasons)}, {_size(size)}[/]")


def _reasons(structure: Structure, names: Iterable[str]) -> Counter[str]:
    return Counter(structure.kept[name].partition(":")[0] for name in names)


def _add_kept(tree: Tree, structure: Structure) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in structure.kept.items():
        by_reason.setdefault(reason, []).append(name)
    if not by_reason:
        return
    size = sum(structure.bytes[name] for name in structure.kept)
    branch = tree.add(f"[bold]kept as they are[/]: {len(structure.kept)} tensors, {_size(size)}")
    ordered = sorted(by_reason.items(), key=lambda item: -sum(structure.bytes[name] for name in item[1]))
    for reason, names in ordered[:_KEPT_SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        size = sum(structure.bytes[name] for name in names)
        branch.add(f"{escape(reason)}: {escape(names[0])}{more}, {_size(size)}")
    rest = sum(len(names) for _, names in ordered[_KEPT_SHOWN:])
    if rest:
        branch.add(f"[dim]{rest} more tensors for {len(ordered) - _KEPT_SHOWN} other reasons (--json names them)[/]")


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def _count(number: float) -> str:
    for unit in ("", "k", "M", "B"):
        if number < 1000 or unit == "B":
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    raise AssertionError
