"""Edits that change a model's weights but not its function, made before weights are put on grids: the source seen
through them, tile by tile on demand, so that everything after (scores, walks, build, proof) works on it as on any
checkpoint.

A rotation is known as soon as the model is opened. The scales of folds are found on data, in a walk of their own
(:mod:`slimwright.job.fold_walk`).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from slimwright.checkpoint import Checkpoint, write_bytes_atomic
from slimwright.job.ledger import Entry
from slimwright.job.open import DerivedCheckpoint, derived
from slimwright.job.weights import site_rows
from slimwright.methods.folding import Folds
from slimwright.methods.rotation import RotationFold
from slimwright.model.dropped import DroppedForm
from slimwright.model.shorten import shortened
from slimwright.model.structure import Site, Structure
from slimwright.model.surgery import Drop, Droppable, droppable
from slimwright.plan import Edit, group_folds
from slimwright.runtime.format import Dropped

WHOLE_BYTES = 64 << 20
"""Float32 bytes of a matrix whose rows depend on all its rows up to which it is made whole; larger ones by ranges."""

Scales = Mapping[str, Tensor]
"""Factors of every fold group, (in,) float32, by the disk name of its producer."""


class EditedCheckpoint(DerivedCheckpoint):
    """A checkpoint in which some tensors have other values.

    Args:
        base: what it is made of.
        structure: of the result.

    Attributes:
        changed: disk names of the tensors that this edit changes.
        spec: the method's.
        tokens: that it saw; 0: it needs no data.
    """

    changed: frozenset[str]

    def __init__(self, base: Checkpoint, structure: Structure, spec: str, tokens: int = 0) -> None:
        self.__dict__.update(base.__dict__)
        self.base = base
        self.structure = structure
        self.spec = spec
        self.tokens = tokens

    def is_derived(self, name: str) -> bool:
        return name in self.changed or derived(self.base, name)

    @abstractmethod
    def edited_vector(self, name: str) -> Tensor:
        """Values of an edited tensor that is no site (a gain or a bias), (size,) in any float dtype."""

    @abstractmethod
    def edited_rows(self, site: Site, rows: slice) -> Tensor:
        """Rows of an edited site's logical matrix, (rows, columns) in any float dtype."""

    def weight_rows(self, name: str, rows: slice) -> Tensor:
        site = self.structure.sites.get(name) or self.structure.dropped[name]
        return (self.edited_rows(site, rows) if name in self.changed else site_rows(self.base, site, rows)).float()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As :meth:`Checkpoint.read`, edited values rounded to the dtype of the source."""
        if name not in self.changed:
            return self.base.read(name, rows)
        info, site = self.tensors[name], self.structure.sites.get(name)
        if site is None:
            return self.edited_vector(name)[rows or slice(None)].to(info.dtype)
        first, last = (rows or slice(None)).indices(info.shape[0])[:2]
        if site.transposed:
            return self.edited_rows(site, slice(0, site.rows)).t()[first:last].to(info.dtype)
        return self.edited_rows(site, slice(first, last)).to(info.dtype)


class FoldedCheckpoint(EditedCheckpoint):
    """A checkpoint with the scales of fold groups moved from producers to consumers."""

    def __init__(self, base: Checkpoint, structure: Structure, scales: Scales, spec: str, tokens: int) -> None:
        super().__init__(base, structure, spec, tokens)
        self._folds = Folds(structure, scales)
        self.changed = self._folds.changed

    def edited_vector(self, name: str) -> Tensor:
        return self._folds.vector(name, self.base.read(name))

    def edited_rows(self, site: Site, rows: slice) -> Tensor:
        return self._folds.rows(site.name, site_rows(self.base, site, rows), rows)


class RotatedCheckpoint(EditedCheckpoint):
    """A checkpoint whose residual stream is rotated.

    Args:
        base: what it is made of.
        structure: of ``base``; the result's (:attr:`structure`) has the head as a site of its own where it had to be
            untied.
        fold: makes the rotation.
        seed: of its matrices.

    Raises:
        InputError: the model cannot be rotated.
    """

    def __init__(self, base: Checkpoint, structure: Structure, fold: RotationFold, seed: int) -> None:
        super().__init__(base, structure, fold.spec)
        self._base_structure = structure
        shapes = {name: info.shape for name, info in base.tensors.items()}
        gains = {name: base.read(name) for name in structure.rms_norms if name in base.tensors}
        self._rotation = fold.rotation(structure, shapes, gains, seed)
        self.changed = frozenset([*self._rotation.turns, *self._rotation.fused])
        self._whole: tuple[str, Tensor] | None = None
        self._lock = threading.Lock()
        if self._rotation.untied is not None:
            self.structure = self._untie(self._rotation.untied, self._rotation.embedding)

    def _untie(self, head: str, embedding: str) -> Structure:
        """Give the head a tensor of its own, the embedding's size."""
        structure, info = self._base_structure, self.base.tensors[embedding]
        self.tensors = {**self.base.tensors, head: replace(info, name=head)}
        self.config = {**self.base.config, "tie_word_embeddings": False}
        module, _, parameter = head.rpartition(".")
        site = Site(
            head, module, parameter, "head", "linear", info.shape, gram_group=head, choice_group=head
        )  # fmt: skip
        return replace(
            structure,
            sites={**structure.sites, head: site},
            roles={**structure.roles, head: "head"},
            ties={name: owner for name, owner in structure.ties.items() if name != head},
            to_module={**structure.to_module, head: head},
            bytes={**structure.bytes, head: structure.bytes.get(embedding, info.nbytes)},
        )

    def edited_vector(self, name: str) -> Tensor:
        return self._rotation.turned(name, self.base.read(name))

    def edited_rows(self, site: Site, rows: slice) -> Tensor:
        turn = self._rotation.turns[site.name]
        origin = self._base_structure.sites[self._rotation.source(site.name)]
        if not turn.writes and turn.value_rows is None:
            return self._rotation.turned_rows(site.name, site_rows(self.base, origin, rows))
        if 4 * site.numel > WHOLE_BYTES and turn.writes:
            return self._some_written(site, origin, rows)
        with self._lock:  # tiles of one matrix are asked for one after another, by several threads
            if self._whole is None or self._whole[0] != site.name:
                whole = site_rows(self.base, origin, slice(0, site.rows))
                self._whole = site.name, self._rotation.turned_rows(site.name, whole).float()
            return self._whole[1][rows]

    def _some_written(self, site: Site, origin: Site, rows: slice) -> Tensor:
        """Some rows of a large matrix that writes the residual stream, from ranges of its rows."""
        step = max(1, WHOLE_BYTES // 8 // site.columns)
        total = torch.zeros(rows.stop - rows.start, site.columns, dtype=torch.float64)
        for first in range(0, site.rows, step):
            given = slice(first, min(first + step, site.rows))
            part = self._rotation.turned_rows(site.name, site_rows(self.base, origin, given), columns_only=True)
            total.addmm_(self._rotation.matrix[given, rows].t(), part)
        return total


class DroppedCheckpoint(EditedCheckpoint):
    """A checkpoint without some sublayers and blocks: the output projections of what was dropped read as zeros.

    The other tensors of it are there, but :attr:`structure` has no sites for them.

    Args:
        base: what it is made of.
        structure: of ``base``.
        drops: what is dropped → why.
        written: the config that the result has.

    Attributes:
        drops: likewise.
        reasons: why, for every tensor that is not written, by disk name.
    """

    def __init__(
        self,
        base: Checkpoint,
        structure: Structure,
        drops: Mapping[Drop, str],
        written: dict[str, Any],
        prefixes: dict[str, str],
    ) -> None:
        self.reasons = {
            name: f"dropped with {drop.name}" + (f": {why}" if why else "")
            for drop, why in sorted(drops.items(), key=lambda item: item[0].whole_block)
            for name in drop.tensors
        }
        super().__init__(base, _without(structure, frozenset(self.reasons), prefixes), "drop")
        self.drops = tuple(drops)
        self.written = written
        self.changed = frozenset(name for drop in drops for name in drop.outputs)
        self.marks = frozenset(drop.mark for drop in drops if drop.mark and not self._inside_block(drop))

    def _inside_block(self, drop: Drop) -> bool:
        return drop.whole_block or any(other.whole_block and other.block == drop.block for other in self.drops)

    def sublayers(self) -> list[Drop]:
        """The dropped sublayers of blocks that are still there."""
        return [drop for drop in self.drops if not self._inside_block(drop)]

    def blocks(self) -> list[Drop]:
        """The dropped blocks."""
        return [drop for drop in self.drops if drop.whole_block]

    def edited_vector(self, name: str) -> Tensor:
        return torch.zeros(())[None].expand(self.tensors[name].numel).reshape(self.tensors[name].shape)

    def edited_rows(self, site: Site, rows: slice) -> Tensor:
        return torch.zeros(rows.stop - rows.start, site.columns)


def _without(structure: Structure, gone: frozenset[str], prefixes: dict[str, str]) -> Structure:
    """The structure with some tensors no longer there to be treated."""
    folds = []
    for fold in structure.folds:
        consumers = tuple(name for name in fold.consumers if name not in gone)
        if fold.producer not in gone and consumers:
            folds.append(replace(fold, consumers=consumers))
    return replace(
        structure,
        sites={name: site for name, site in structure.sites.items() if name not in gone},
        folds=tuple(folds),
        castable=tuple(name for name in structure.castable if name not in gone),
        dropped={name: site for name, site in structure.sites.items() if name in gone},
        dropped_tensors=gone,
        prefixes=prefixes,
    )


def dropped(
    checkpoint: Checkpoint,
    structure: Structure,
    names: Mapping[str, str],
    found: Droppable | None = None,
    trust_remote_code: bool = False,
) -> tuple[Checkpoint, Structure]:
    """The checkpoint without what is dropped, and its structure.

    Args:
        names: what is dropped → why.
        found: what can be dropped of it, where that is known.

    Raises:
        InputError: a name that the model does not have, or something that it refuses to drop.
    """
    if not names:
        return checkpoint, structure
    found = found or droppable(checkpoint, structure, trust_remote_code)
    drops = {found.named(name): why for name, why in names.items()}
    blocks = {drop.block: drop.name for drop in drops if drop.whole_block}
    config, prefixes = dict(checkpoint.config), dict[str, str]()
    if blocks:
        gone = {name for drop in drops if drop.whole_block for name in drop.tensors}
        shorter = shortened(checkpoint, structure, blocks, gone, trust_remote_code)
        config, prefixes = shorter.config, shorter.prefixes
    view = DroppedCheckpoint(checkpoint, structure, drops, config, prefixes)
    return view, view.structure


def dropped_view(checkpoint: Checkpoint) -> DroppedCheckpoint | None:
    """The edit that dropped something; None where none did."""
    while isinstance(checkpoint, EditedCheckpoint):
        if isinstance(checkpoint, DroppedCheckpoint):
            return checkpoint
        checkpoint = checkpoint.base
    return None


def dropped_written(checkpoint: Checkpoint) -> Dropped:
    """What ``quantization_config`` says of the sublayers that were dropped, in the names of what is written."""
    view = dropped_view(checkpoint)
    if view is None:
        return Dropped()
    new = {block.module: block.module for stack in view.structure.stacks for block in stack.blocks}
    gone = {drop.block for drop in view.blocks()}
    for stack in view.structure.stacks:
        kept = [block.module for block in stack.blocks if block.module not in gone]
        new |= {module: f"{stack.module}.{index}" for index, module in enumerate(kept)}
    name = view.structure.written_name
    forms, tensors = dict[str, DroppedForm](), dict[str, tuple[str, tuple[int, ...]]]()
    for drop in view.sublayers():
        forms |= {new[drop.block] + path.removeprefix(drop.block): form for path, form in drop.forms.items()}
        infos = [view.tensors[tensor] for tensor in drop.tensors]
        tensors |= {name(info.name): (str(info.dtype).removeprefix("torch."), tuple(info.shape)) for info in infos}
    return Dropped(forms, tensors, tuple(name(mark) for mark in sorted(view.marks)))


class WrittenCheckpoint(Checkpoint):
    """What a job has written, seen under the source's names."""

    def __init__(self, written: Checkpoint, structure: Structure, names: Iterable[str]) -> None:
        self.__dict__.update(written.__dict__)
        self._written = written
        self._names = {name: structure.written_name(name) for name in names}
        self.tensors = {
            name: replace(written.tensors[new], name=name)
            for name, new in self._names.items()
            if new in written.tensors
        }

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self._written.read(self._names[name], rows)


def original(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint before all edits."""
    while isinstance(checkpoint, EditedCheckpoint):
        checkpoint = checkpoint.base
    return checkpoint


def edits_of(checkpoint: Checkpoint, name: str) -> list[EditedCheckpoint]:
    """The edits that changed a tensor, in order."""
    found: list[EditedCheckpoint] = []
    while isinstance(checkpoint, EditedCheckpoint):
        if name in checkpoint.changed:
            found.insert(0, checkpoint)
        checkpoint = checkpoint.base
    return found


def rotated(checkpoint: Checkpoint, structure: Structure, edits: Sequence[Edit]) -> tuple[Checkpoint, Structure]:
    """The checkpoint with the edits that need no data, and its structure.

    Raises:
        InputError: the model cannot be rotated.
    """
    for edit in edits:
        fold = None if edit.drop else edit.fold()
        if isinstance(fold, RotationFold):
            made = RotatedCheckpoint(checkpoint, structure, fold, edit.seed)
            checkpoint, structure = made, made.structure
    return checkpoint, structure


def save_scales(path: Path, scales: Scales, tokens: int) -> None:
    """Keep what a fold found; the file is there whole or not at all."""
    tensors = {name: scale.contiguous() for name, scale in scales.items()}
    write_bytes_atomic(path, save(tensors, {"tokens": str(tokens)}))


def folded(checkpoint: Checkpoint, structure: Structure, edits: Sequence[Edit], files: Sequence[Path]) -> Checkpoint:
    """The checkpoint with the edits whose scales were found on data and lie in these files, in order."""
    for (edit, _), file in zip(group_folds(edits), files):
        with safe_open(file, framework="pt") as opened:
            scales = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
            tokens = int(opened.metadata()["tokens"])
        checkpoint = FoldedCheckpoint(checkpoint, structure, scales, edit.method, tokens)
    return checkpoint


def with_edits(line: Entry, source: Checkpoint) -> Entry:
    """The ledger's line of a tensor, telling of the edits before it was written."""
    edits = edits_of(source, line.site)
    if line.state == "dropped":
        return line
    if line.site not in original(source).tensors:
        line = replace(line, bytes_before=0)
    if not edits:
        return line
    specs = ", ".join(edit.spec for edit in edits)
    if line.state != "kept":
        return replace(line, reason=f"{line.reason}; after {specs}")
    tokens = max(edit.tokens for edit in edits)
    return replace(
        line, state="calibrated" if tokens else "data-free", method=specs, tokens=tokens,
        reason=f"its scale or direction changed with its neighbours' ({line.reason})",
    )  # fmt: skip
