"""The proof before publishing: what was written is read back, and compared with the plain-tensor method's result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimwright.checkpoint import Checkpoint
from slimwright.errors import SlimwrightError
from slimwright.job.merging.engine import Done, merged_tile, tile_ranges
from slimwright.job.merging.plan import MergePlan, Unit
from slimwright.job.parallel import in_order
from slimwright.methods.merging import BLOCK, State

RANDOM_TILES = 64
FIRST_ELEMENTS = 4096
SURVEYED_AGAIN = 16
"""Tensors whose surveys are made again, in one piece; small ones (up to one block)."""


@dataclass(frozen=True)
class Proof:
    """What was compared: tensors (their first rows), tiles, and surveys made again."""

    tensors: int
    tiles: int
    surveys: int

    def to_json(self) -> dict[str, Any]:
        how = "read back from disk; recomputed from the inputs by the plain-tensor method; equal bytes"
        return {"ok": True, "how": how, **self.__dict__}


def prove(
    plan: MergePlan, written: Path, done: Mapping[str, Done], seed: int, step: Callable[[int, int], None]
) -> Proof:
    """Compare the first rows of every tensor and 64 random tiles, byte by byte.

    Raises:
        SlimwrightError: a difference; nothing is to be published.
    """
    result = Checkpoint.open(written)
    planned = {unit.entry.name for unit in plan.units}
    if planned != set(result.tensors):
        raise SlimwrightError(
            f"The files' tensors are not those of the plan: {sorted(planned ^ set(result.tensors))[:3]}."
        )
    pieces = [(unit, 0, first_elements(unit)) for unit in plan.units] + random_tiles(plan, seed)
    again = [unit for unit in plan.units if _surveyed_alone(unit) and unit.site.numel <= BLOCK][:SURVEYED_AGAIN]

    def compare(piece: tuple[Unit, int, int]) -> None:
        unit, start, stop = piece
        if unit.method is None:
            expected = unit.origins[0].read(start, stop)
        else:
            expected = merged_tile(unit.method, unit, start, stop, done[unit.entry.name].state, seed)
        found = result.read(unit.entry.name).reshape(-1)[start:stop]
        if found.dtype != expected.dtype or not torch.equal(_bytes(found), _bytes(expected.reshape(-1))):
            raise SlimwrightError(
                f"'{unit.entry.name}' was not written as it should be (elements {start} to {stop}); nothing was "
                f"published, and what was written is left in {written}."
            )

    for number, _ in enumerate(in_order(compare, iter(pieces))):
        step(number + 1, len(pieces))
    for unit in again:
        _survey_again(unit, done[unit.entry.name].state, seed)
    return Proof(len(plan.units), len(pieces) - len(plan.units), len(again))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def first_elements(unit: Unit) -> int:
    """Elements of the first rows: at least one row where the method needs rows, all where it needs the tensor."""
    extent = unit.method.extent if unit.method else "element"
    if extent == "tensor":
        return unit.site.numel
    columns = unit.site.columns
    if extent == "row":
        return min(unit.site.numel, max(1, FIRST_ELEMENTS // columns) * columns)
    return min(unit.site.numel, FIRST_ELEMENTS)


def random_tiles(plan: MergePlan, seed: int) -> list[tuple[Unit, int, int]]:
    """64 tiles, each element of the model as likely as any other."""
    ends: list[int] = []
    for unit in plan.units:
        ends.append((ends[-1] if ends else 0) + max(1, unit.site.numel))
    tiles = []
    for number in range(RANDOM_TILES):
        digest = hashlib.sha256(f"proof\0{seed}\0{number}".encode()).digest()
        place = int.from_bytes(digest[:8], "little") % ends[-1]
        index = next(i for i, end in enumerate(ends) if place < end)
        unit = plan.units[index]
        inside = place - (ends[index] - max(1, unit.site.numel))
        tiles.append(next((unit, start, stop) for start, stop in tile_ranges(unit) if start <= inside < max(stop, 1)))
    return tiles


def _surveyed_alone(unit: Unit) -> bool:
    return unit.method is not None and unit.method.scope == "tensor" and unit.method.rounds > 0


def _survey_again(unit: Unit, state: State, seed: int) -> None:
    """Make a tensor's surveys again with the whole tensor in one piece, by :meth:`MergeMethod.prepare`."""
    assert unit.method is not None
    name = unit.entry.name
    models = [{name: origin.read(0, unit.site.numel).reshape(unit.site.shape)} for origin in unit.origins]
    base = None if unit.base is None else {name: unit.base.read(0, unit.site.numel).reshape(unit.site.shape)}
    found = unit.method.prepare(models, base=base, seed=seed)[name]
    if not _alike(found, state):
        raise SlimwrightError(
            f"The statistics of '{name}' are not what they were when it was merged; nothing was published."
        )


def _alike(first: Any, second: Any) -> bool:
    """Equal JSON values, floats within 1e-6 (sums in another order)."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_alike(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_alike(a, b) for a, b in zip(first, second))
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-12)
    return bool(first == second)
