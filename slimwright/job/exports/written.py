"""What every writer of a target starts from and gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slimwright.checkpoint import Checkpoint, CheckpointWriter, Layout
from slimwright.errors import InputError
from slimwright.job.open import DequantizedCheckpoint, derived
from slimwright.job.weights import site_rows
from slimwright.model.structure import Site, Structure
from slimwright.plan import KEEP
from slimwright.runtime.format import read_activations, read_cache, read_dropped
from slimwright.weights import Grid, unpack_rows
from slimwright.weights.activations import Activations
from slimwright.weights.grid import Params

TILE_BYTES = 16 << 20


@dataclass(frozen=True)
class Result:
    """What is to be written: a result of ours, or a plain model, of which nothing is packed.

    Attributes:
        checkpoint: seen dense.
        structure: of the model.
        grids: of packed weights, by disk name.
        rounded: how what enters weights is rounded, by disk name.
        unlike: what it has that only slimwright writes otherwise than dense; empty: nothing.
        step: told weights done and weights in all.
    """

    checkpoint: Checkpoint
    structure: Structure
    grids: Mapping[str, Grid]
    rounded: Mapping[str, Activations]
    unlike: str = ""
    step: Callable[[int, int], None] = lambda done, total: None

    @classmethod
    def of(cls, checkpoint: Checkpoint, structure: Structure, step: Callable[[int, int], None] | None = None) -> Result:
        """A checkpoint that was opened as a source.

        Raises:
            InputError: its plan packs the cache of keys and values, which no target of others carries.
        """
        grids: dict[str, Grid] = {}
        unlike = ""
        rounded: Mapping[str, Activations] = {}
        if isinstance(checkpoint, DequantizedCheckpoint):
            settings = checkpoint.settings
            if read_cache(settings):
                raise InputError(
                    f"{checkpoint.path} keeps its keys and values packed, which only slimwright does: fit without "
                    "--cache, and choose the cache's type in the other program."
                )
            if read_dropped(settings).tensors:
                unlike = f"{checkpoint.path} has dropped parts: export it to safetensors, or fit without --allow drop."
            for name, form in checkpoint.grids.items():
                if isinstance(form, Grid):
                    grids[name] = form
                else:
                    unlike = f"'{name}' of {checkpoint.path} is of the form {form}: export it to safetensors."
            rounded = read_activations(settings)
        return cls(checkpoint, structure, grids, rounded, unlike, *([step] if step else []))

    def plan(self) -> dict[str, str]:
        """Grid or ``keep`` of every site.

        Raises:
            InputError: it has what no target of others carries packed.
        """
        if self.unlike:
            raise InputError(self.unlike)
        return {
            name: self.grids[name].spec if name in self.grids else KEEP
            for name in self.structure.sites
        }  # fmt: skip

    def packed(self, site: Site, rows: slice | None = None) -> tuple[Tensor, Params]:
        """Codes and parameters of rows of a packed site (all by default), as the grid has them."""
        assert isinstance(self.checkpoint, DequantizedCheckpoint)
        return unpack_rows(self.grids[site.name], self.checkpoint.parts(site.name), site.weight_shape, rows)

    def dense(self, name: str, elements: int = TILE_BYTES // 4) -> Iterator[Tensor]:
        """A tensor that is not packed, by rows: those of the logical matrix of a site."""
        site = self.structure.sites.get(name)
        if site is None or derived(self.checkpoint, name):
            for rows in self.checkpoint.tiles(name, TILE_BYTES):
                yield self.checkpoint.read(name, rows)
            return
        step = max(1, elements // max(1, site.columns))
        for first in range(0, site.rows, step):
            yield site_rows(self.checkpoint, site, slice(first, min(first + step, site.rows)))


def fresh_writer(directory: Path, layout: Layout) -> CheckpointWriter:
    """A writer of weight files, in the place of what an export that was killed left there."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return CheckpointWriter(directory, layout)


def copy_tensor(checkpoint: Checkpoint, name: str, writer: CheckpointWriter) -> None:
    """Write a tensor as the checkpoint gives it, tile by tile."""
    info = checkpoint.tensors[name]
    per_row = info.numel * info.dtype.itemsize // max(1, info.shape[0]) if info.shape else 0
    for rows in checkpoint.tiles(name, TILE_BYTES):
        writer.write(name, checkpoint.read(name, rows).contiguous(), rows.start * per_row)


@dataclass(frozen=True)
class Written:
    """What a writer made.

    Attributes:
        files: the weight files.
        tensor_bytes: of the tensors' data in them.
        how_to_load: lines that load them in the other program.
        what: the weights in words.
        proof: what was checked, and in which program.
        notes: for the user.
    """

    files: tuple[Path, ...]
    tensor_bytes: int
    how_to_load: str
    what: str
    proof: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the weight files."""
        return sum(file.stat().st_size for file in self.files)
