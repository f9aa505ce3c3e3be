"""How long a merge will take and how much memory, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from slimwright.job.merging.engine import TILE_ELEMENTS
from slimwright.job.merging.plan import MergePlan
from slimwright.methods.selection import GATHERED, ROUNDS

READ_BYTES_PER_SECOND = 1.5e9
"""Of one thread that reads a tile, converts it and does a survey's or a merge's arithmetic on it: measured 1.2 to 2.4
on the machine that docs/merging.md names."""
WRITE_BYTES_PER_SECOND = 1.2e9
TENSORS_A_TILE = 8
"""Float32 tensors of a tile's size that a method holds at once, beside its inputs."""
GATHERED_BYTES = 12
"""Of each element about a threshold that a selection keeps until its round ends."""


@dataclass(frozen=True)
class MergeForecast:
    """Bytes, seconds and memory of a merge.

    Attributes:
        read_bytes: from the inputs, every survey counted.
        write_bytes: weight files of the result.
        memory_bytes: anonymous memory above a bare import.
        phases: seconds by phase.
    """

    read_bytes: int
    write_bytes: int
    memory_bytes: int
    phases: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(self.phases.values())

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**self.__dict__, "seconds": self.seconds}


def forecast(plan: MergePlan, write_bytes: int, verify: bool) -> MergeForecast:
    """What a plan will cost."""
    threads = torch.get_num_threads()
    passes = [(unit, 1 + (unit.method.rounds if unit.method is not None else 0)) for unit in plan.units]
    read = sum(unit.read_bytes * count for unit, count in passes)
    largest = gathered = 0
    for unit in plan.units:
        extent = unit.method.extent if unit.method is not None else "element"
        elements = min(unit.site.numel, max(TILE_ELEMENTS, unit.site.columns))
        elements = unit.site.numel if extent == "tensor" else elements
        largest = max(largest, elements * 4 * (len(unit.origins) + 1 + TENSORS_A_TILE))
        if unit.method is not None and unit.method.rounds >= ROUNDS:
            gathered = max(gathered, min(unit.site.numel, GATHERED) * GATHERED_BYTES * len(unit.origins))
    phases = {"merge": read / READ_BYTES_PER_SECOND / threads + write_bytes / WRITE_BYTES_PER_SECOND}
    if verify:
        phases["verify"] = 0.2 + 64 * TILE_ELEMENTS * 8 / READ_BYTES_PER_SECOND / threads
    return MergeForecast(read, write_bytes, 40_000_000 + gathered + largest * (threads + 2), phases)
