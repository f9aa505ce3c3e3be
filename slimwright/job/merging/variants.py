"""One store, many models: a merged model, its base, and a mask for each of the models that went into it (TALL-masks).

``OUT`` is the merged model (the base plus the sum of all task vectors), plain; ``OUT/variants/base`` is the base, plain
too; ``OUT/variants/NAME`` holds one bit for each entry of every merged tensor: 1 takes it from the merged model, 0 from
the base. So a restored model needs no arithmetic, and is byte for byte what ``method: tall`` with that ``task`` makes.
It is read as ``OUT+NAME`` wherever a merge takes a model.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Layout,
    TensorEntry,
    plan_layout,
    write_config_atomic,
    write_json_atomic,
)
from slimwright.errors import InputError, SlimwrightError
from slimwright.job.merging.engine import TILE_ELEMENTS, Done, merged_tile, read_tile
from slimwright.job.merging.plan import MergePlan, Unit
from slimwright.job.merging.sources import (
    BASE,
    MASK_FILE,
    VARIANT_FILE,
    VARIANTS,
    ModelReference,
    SelectedTensor,
    open_masks,
)
from slimwright.job.parallel import in_order
from slimwright.methods.merge.tall import Tall

FORMAT_VERSION = 1


def is_store(plan: MergePlan) -> bool:
    """Whether the result keeps a mask for each model.

    Raises:
        InputError: some tensors are to be one model's, others all models'.
    """
    wanted = {unit.method.task is None for unit in plan.units if isinstance(unit.method, Tall)}
    if len(wanted) > 1:
        raise InputError("merge/tall: 'task' is given for some tensors only: give it for all, or for none.")
    return wanted == {True}


def layouts(plan: MergePlan) -> tuple[Layout, Layout]:
    """Of the base's copy, and of each model's masks."""
    merged = [unit for unit in plan.units if unit.method is not None]
    masks = [TensorEntry(unit.entry.name, torch.uint8, (-(-unit.site.numel // 8),)) for unit in merged]
    return plan_layout([unit.entry for unit in plan.units]), plan_layout(masks, max_shard_bytes=1 << 60)


def extra_bytes(plan: MergePlan) -> int:
    """What the store needs beside the merged model; 0 where there is none."""
    if not is_store(plan):
        return 0
    base, masks = layouts(plan)
    return base.total_bytes + masks.total_bytes * _models(plan)


def _models(plan: MergePlan) -> int:
    return max(len(unit.origins) for unit in plan.units if unit.method is not None)


def names_of(models: Sequence[ModelReference]) -> list[str]:
    """A short name for each model: the last part of its path, numbered where two are alike."""
    found: list[str] = []
    for model in models:
        last = (model.adapter or model.path).rstrip("/").rpartition("/")[2].partition("@")[0]
        name = plain = re.sub(r"[^A-Za-z0-9._-]", "-", last).strip(".") or "model"
        number = 2
        while name in found or name == BASE:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found


def write_variants(
    plan: MergePlan, folder: Path, config: dict[str, Any], done: Mapping[str, Done], seed: int
) -> dict[str, Any]:
    """Write the base and the masks into a result's folder.

    Args:
        config: the result's config.json.
        done: of every tensor, with the state that the masks need.

    Returns:
        What the report says: names, bytes, and the share of entries that each model takes from the merged one.
    """
    first = next(unit for unit in plan.units if unit.method is not None)
    names = names_of(first.models[: len(first.origins)])
    root = folder / VARIANTS
    shutil.rmtree(root, ignore_errors=True)  # of a run that was killed: all of it is made in one go
    base_layout, mask_layout = layouts(plan)
    ones = dict.fromkeys(names, 0)
    total = 0
    with ExitStack() as stack:
        base = stack.enter_context(CheckpointWriter(root / BASE, base_layout))
        writers = [stack.enter_context(CheckpointWriter(root / name, mask_layout)) for name in names]

        def write(piece: tuple[Unit, int, int]) -> list[int]:
            unit, start, stop = piece
            if unit.method is None:
                base.write(unit.entry.name, unit.origins[0].read(start, stop), start * unit.entry.dtype.itemsize)
                return []
            assert isinstance(unit.method, Tall)
            tile = read_tile(unit, start, stop, seed)
            assert tile.base is not None
            base.write(unit.entry.name, tile.base.reshape(-1).to(unit.entry.dtype), start * unit.entry.dtype.itemsize)
            masks = [mask.reshape(-1) for mask in unit.method.masks(tile, done[unit.entry.name].state)]
            for writer, mask in zip(writers, masks):
                writer.write(unit.entry.name, packed(mask), start // 8)
            return [int(mask.sum()) for mask in masks]

        for (unit, start, stop), counts in in_order(write, _pieces(plan)):
            total += stop - start if unit.method is not None else 0
            for name, count in zip(names, counts):
                ones[name] += count
    for name in names:
        _rename_single(root / name)
        write_json_atomic(root / name / VARIANT_FILE, {"format_version": FORMAT_VERSION, "kind": "tall-mask"})
    write_config_atomic(root / BASE / "config.json", config)
    return {
        "names": names, "bytes": base_layout.total_bytes + mask_layout.total_bytes * len(names),
        "share_of_entries": {name: count / max(1, total) for name, count in ones.items()},
    }  # fmt: skip


def _rename_single(folder: Path) -> None:
    """Masks are no model: their file has a name that no loader takes for one."""
    (folder / "model.safetensors").rename(folder / MASK_FILE)


def _pieces(plan: MergePlan) -> Iterator[tuple[Unit, int, int]]:
    """Ranges that begin at a whole byte of bits."""
    for unit in plan.units:
        numel, columns = unit.site.numel, max(1, unit.site.columns)
        extent = unit.method.extent if unit.method is not None else "element"
        step = TILE_ELEMENTS
        if extent == "row":
            step = max(8, TILE_ELEMENTS // columns // 8 * 8) * columns
        elif extent == "tensor":
            step = max(1, numel)
        for start in range(0, max(1, numel), step):
            yield unit, start, min(start + step, numel)


def packed(mask: Tensor) -> Tensor:
    """(n,) bool as (n / 8,) uint8, the first in the lowest bit."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def prove_variants(
    plan: MergePlan, folder: Path, names: Sequence[str], done: Mapping[str, Done], seed: int,
    pieces: Sequence[tuple[Unit, int, int]],
) -> None:  # fmt: skip
    """Compare what is restored from the written files with what ``task = 0, 1, ...`` makes of the inputs.

    Raises:
        SlimwrightError: a difference; nothing is to be published.
    """
    merged, base = Checkpoint.open(folder), Checkpoint.open(folder / VARIANTS / BASE)
    for number, name in enumerate(names):
        masks = open_masks(folder / VARIANTS / name)
        for unit, start, stop in pieces:
            if unit.method is None:
                continue
            assert isinstance(unit.method, Tall)
            alone = replace(unit.method, task=number)
            expected = merged_tile(alone, unit, start, stop, done[unit.entry.name].state, seed)
            found = SelectedTensor(merged, base, masks, unit.entry.name).read(start, stop)
            if not torch.equal(found, expected):
                raise SlimwrightError(
                    f"The mask of {name} does not restore '{unit.entry.name}' (elements {start} to {stop}); nothing "
                    f"was published, and what was written is left in {folder}."
                )
