"""Target profiles: what another program can load, so that a plan is legal there before anything is written.

A profile says which grids a weight may be on and what a tensor weighs in the target's files. The search chooses among
those grids by those costs, so that an export only rearranges codes and never rounds again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from slimwright.checkpoint import TensorEntry, entry_cost, overhead_bound
from slimwright.errors import InputError
from slimwright.weights import Grid, parse_grid
from slimwright.weights.activations import Activations

KEEP = "keep"
_NAMED = 3


class Weight(Protocol):
    """What a profile asks of a site (:class:`slimwright.model.structure.Site` has it)."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


class TargetProfile(ABC):
    """What one target takes. Plain 16-bit floats and the weight as it is are legal everywhere."""

    name: ClassVar[str]
    """As ``--target`` and ``--to`` write it."""

    @abstractmethod
    def grids(self, site: Weight, rounding: Activations | None = None) -> tuple[Grid, ...]:
        """The packed grids that a weight may be on, given how what enters it is rounded (None: not)."""

    def substitute(self, site: Weight, grid: Grid) -> Grid | None:
        """What a weight gets instead of a grid of the target's that cannot hold it, or None where nothing does."""
        return None

    @abstractmethod
    def entries(self, site: Weight, grid: Grid, rounding: Activations | None = None) -> list[TensorEntry]:
        """The tensors of a weight on one of :meth:`grids`, in the target's files."""

    def kept(self, entry: TensorEntry) -> TensorEntry | None:
        """What becomes of a tensor that is not packed; None where the target has no place for it and needs none."""
        return entry

    def cost(self, entries: Iterable[TensorEntry], budget: int) -> int:
        """Bytes that tensors add to the target's files at most, the files together being of ``budget`` bytes."""
        return sum(entry_cost(entry, budget) for entry in entries)

    def overhead(self, budget: int, max_shard_bytes: int) -> int:
        """Bytes of the target's files that are no tensors' at most."""
        return overhead_bound(budget, max_shard_bytes)

    def illegal(self, site: Weight, spec: str, rounding: Activations | None = None) -> str | None:
        """Why a weight cannot be on a grid (or ``keep``) in this target, with what would be legal; None if it can."""
        if spec == KEEP or parse_grid(spec).plain:
            return None
        legal = self.grids(site, rounding)
        return None if parse_grid(spec) in legal else f"legal there: {shown_grids(legal)}"

    def check(self, plan: Mapping[str, str], sites: Sequence[Weight], rounded: Mapping[str, Activations]) -> None:
        """Refuse a plan that cannot be written.

        Args:
            plan: grid or ``keep`` by site.
            sites: all of the model's.
            rounded: how inputs are rounded, by site.

        Raises:
            InputError: naming the sites and what would be legal there.
        """
        wrong: dict[tuple[str, str], list[str]] = {}
        for site in sites:
            spec, rounding = plan.get(site.name, KEEP), rounded.get(site.name)
            reason = self.illegal(site, spec, rounding)
            if reason is not None:
                on = spec if rounding is None else f"{spec} with inputs in {rounding.kind}"
                wrong.setdefault((on, reason), []).append(site.name)
        if not wrong:
            return
        parts = []
        for (on, reason), names in list(wrong.items())[:_NAMED]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"'{names[0]}'{more} on {on} ({reason})")
        rest = f"; and {len(wrong) - _NAMED} other kinds" if len(wrong) > _NAMED else ""
        raise InputError(
            f"The plan cannot be written as {self.name}: {'; '.join(parts)}{rest}: fit with --target {self.name}."
        )


class PlainTensors(TargetProfile):
    """Dense safetensors, which everything loads: nothing is packed."""

    name: ClassVar[str] = "safetensors"

    def grids(self, site: Weight, rounding: Activations | None = None) -> tuple[Grid, ...]:
        return ()

    def entries(self, site: Weight, grid: Grid, rounding: Activations | None = None) -> list[TensorEntry]:
        raise InputError(f"'{site.name}' cannot be on {grid} in plain safetensors.")


def shown_grids(grids: Sequence[Grid]) -> str:
    """Grids in writing, ``keep`` and 16-bit floats among them."""
    return ", ".join([*(grid.spec for grid in grids), "bf16", "fp16", KEEP])


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 4 or 8 bits as little-endian streams in 32-bit words: (rows, columns) uint8 → (rows, words) int32.

    The columns are a multiple of the codes in a word.
    """
    data = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    return data.contiguous().view(torch.int32)
