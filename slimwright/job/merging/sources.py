"""What a merge reads: checkpoints, our own compressed results, adapters on a base; any range of a tensor's elements."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint, source_state
from slimwright.checkpoint.files import exists, read_json_object, regular, shown
from slimwright.checkpoint.header import read_header
from slimwright.errors import InputError
from slimwright.formats.peft import Adapter, is_adapter, read_adapter

VARIANTS, BASE = "variants", "base"
"""Folders of a store of many models: of what is beside the merged one, and in it of the base."""
VARIANT_FILE, MASK_FILE = "variant.json", "mask.safetensors"


@dataclass(frozen=True, order=True)
class ModelReference:
    """A model as a configuration names it: a directory or hub id, and an adapter on it (or, of a store of many models,
    the name of one of them), or None."""

    path: str
    adapter: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelReference:
        """``model`` or ``model+adapter``; a directory whose own name has a ``+`` is that directory.

        Raises:
            InputError: more than one adapter, or an empty name.
        """
        if os.path.isdir(text) or "+" not in text:
            parts = [text]
        else:
            parts = text.split("+")
            for count in range(len(parts) - 1, 0, -1):  # a directory whose name has a "+", with an adapter behind it
                if os.path.isdir("+".join(parts[:count])):
                    parts = ["+".join(parts[:count]), "+".join(parts[count:])]
                    break
        if len(parts) > 2 or not all(parts):
            raise InputError(f"'{shown(text)}' is not of the form MODEL or MODEL+ADAPTER.")
        return cls(*parts)

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


class Origin(ABC):
    """One tensor of one input, readable in any range of elements.

    Attributes:
        shape: of the tensor.
        dtype: it has on disk (what it is read as may be wider).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @abstractmethod
    def rows(self, rows: slice) -> Tensor:
        """Rows along the first dimension (a scalar has one); any float dtype, perhaps mapped and so not to be written
        into."""

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor."""
        per = math.prod(self.shape[1:])
        if not self.shape or not per:
            return self.rows(slice(0, 1)).reshape(-1)[start:stop]
        first, last = start // per, -(-stop // per)
        return self.rows(slice(first, last)).reshape(-1)[start - first * per : stop - first * per]


class StoredTensor(Origin):
    """A tensor as it lies in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.tensors[name]
        self.shape, self.dtype = info.shape, info.dtype
        self._checkpoint, self._name = checkpoint, name

    def rows(self, rows: slice) -> Tensor:
        return self._checkpoint.read(self._name, rows if self.shape else None)

    def read(self, start: int, stop: int) -> Tensor:
        if type(self._checkpoint) is Checkpoint:  # mapped: the whole costs nothing
            return self._checkpoint.read(self._name).reshape(-1)[start:stop]
        return super().read(start, stop)


class AdaptedTensor(Origin):
    """A tensor with an adapter's change, in float32."""

    def __init__(self, origin: Origin, adapter: Adapter, name: str) -> None:
        self.shape, self.dtype = origin.shape, origin.dtype
        self._origin, self._change = origin, adapter.changes[name]
        if self.shape != self._change.shape:
            raise InputError(
                f"{shown(adapter.path)} changes '{shown(name)}' as {self._change.shape}, but it is {self.shape} in the "
                "base model: use the base that the adapter was made for."
            )

    def rows(self, rows: slice) -> Tensor:
        return self._change.applied(self._origin.rows(rows).float(), rows)


class SelectedTensor(Origin):
    """A tensor of a model that was merged with others, restored: a bit says of each entry whether it is the merged
    model's or the base's (:mod:`slimwright.job.merging.variants`).

    Args:
        merged: the merged model.
        base: its base.
        masks: from :func:`open_masks`.
        name: of the tensor; one without a mask is the base's.

    Raises:
        InputError: the three do not fit together.
    """

    def __init__(self, merged: Checkpoint, base: Checkpoint, masks: Checkpoint, name: str) -> None:
        info, start, mask = merged.tensors[name], base.tensors.get(name), masks.tensors.get(name)
        self.shape, self.dtype = info.shape, info.dtype
        if (
            start is None
            or (start.shape, start.dtype) != (info.shape, info.dtype)
            or (mask is not None and (mask.dtype, mask.shape) != (torch.uint8, (-(-self.numel // 8),)))
        ):
            raise InputError(
                f"{shown(masks.path)} does not fit {shown(merged.path)} ('{shown(name)}'): merge the models again."
            )
        self._merged, self._base = StoredTensor(merged, name), StoredTensor(base, name)
        self._mask = None if mask is None else masks.read(name)

    def rows(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0] if self.shape else 1)
        per = math.prod(self.shape[1:])
        return self.read(first * per, last * per).reshape(last - first, *self.shape[1:])

    def read(self, start: int, stop: int) -> Tensor:
        base = self._base.read(start, stop)
        if self._mask is None:
            return base
        packed = self._mask[start // 8 : -(-stop // 8)]
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        chosen = bits.reshape(-1)[start % 8 : start % 8 + stop - start].bool()
        return torch.where(chosen, self._merged.read(start, stop), base)


def open_masks(folder: Path) -> Checkpoint:
    """The masks of one model in a store.

    Raises:
        InputError: they are missing or damaged, or of a later version.
    """
    file = folder / MASK_FILE
    about = read_json_object(folder, folder / VARIANT_FILE, 1 << 20)
    if about.get("format_version") != 1 or about.get("kind") != "tall-mask":
        raise InputError(f"{shown(folder / VARIANT_FILE)} is of a later version: update slimwright.")
    if not exists(file):
        raise InputError(f"{shown(file)} is missing: merge the models again.")
    return open_tensors(file)


def open_tensors(file: Path) -> Checkpoint:
    """A safetensors file that is no model.

    Raises:
        InputError: it is damaged.
    """
    folder = file.parent
    descriptor = os.open(regular(folder, file)[0], os.O_RDONLY)
    try:
        tensors = read_header(descriptor, file)[0]
    finally:
        os.close(descriptor)
    return Checkpoint(folder, folder, {}, tensors=tensors, files=[file], hub_id=None)


class HeldTensor(Origin):
    """A tensor in memory."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        self.shape, self.dtype = tuple(tensor.shape), dtype or tensor.dtype
        self._tensor = tensor

    def rows(self, rows: slice) -> Tensor:
        return self._tensor[rows] if self.shape else self._tensor


class GatheredRows(Origin):
    """Rows of another tensor in another order; rows that it lacks come from a filler.

    Args:
        origin: the table.
        index: (rows,) int64, which row each is; -1 where the filler has it.
        filler: gives the rows for -1, by row of the result; None for zeros.
    """

    def __init__(self, origin: Origin, index: Tensor, filler: Callable[[int], Tensor | None]) -> None:
        self.shape, self.dtype = (len(index), *origin.shape[1:]), origin.dtype
        self._origin, self._index, self._filler = origin, index, filler

    def rows(self, rows: slice) -> Tensor:
        index = self._index[rows]
        known = index >= 0
        rows = slice(*rows.indices(len(self._index))[:2])
        if bool(known.all()) and len(index) and int(index[-1] - index[0]) == len(index) - 1 and _ascends(index):
            return self._origin.rows(slice(int(index[0]), int(index[-1]) + 1))
        out = torch.zeros((len(index), *self.shape[1:]), dtype=torch.float32)
        if bool(known.any()):
            found = index[known]
            first = int(found.min())
            span = int(found.max()) + 1 - first
            if span <= 4 * len(index):
                out[known] = self._origin.rows(slice(first, first + span))[found - first].float()
            else:
                out[known] = torch.cat([self._origin.rows(slice(r, r + 1)).float() for r in found.tolist()])
        for place in (~known).nonzero().flatten().tolist():
            row = self._filler(place + rows.start)
            if row is not None:
                out[place] = row.float()
        return out


def _ascends(index: Tensor) -> bool:
    return len(index) == 1 or bool((index[1:] - index[:-1] == 1).all())


class MergeInput:
    """One input: a checkpoint, with an adapter or without.

    Attributes:
        reference: how it was named.
        checkpoint: the (base) checkpoint, dequantized if it is a compressed result of ours.
        adapter: or None.
        masks: of the model in a store of many that is meant, or None.
        names: of its tensors, in natural order.
    """

    def __init__(self, reference: ModelReference) -> None:
        self.reference = reference
        self.checkpoint = _open(reference.path)
        self.masks: Checkpoint | None = None
        self.adapter: Adapter | None = None
        folder = _variant(reference)
        if folder is not None:
            self.masks, self._start = open_masks(folder), Checkpoint.open(folder.parent / BASE)
        elif reference.adapter is not None:
            self.adapter = read_adapter(reference.adapter)
        self.names = list(self.checkpoint.tensors)
        if self.adapter is not None:
            self._map_adapter(self.adapter)

    def _map_adapter(self, adapter: Adapter) -> None:
        """Give the adapter's changes the names that the tensors have on disk.

        A tied head that is not on disk cannot be changed by itself.
        """
        known = set(self.names)
        renamed: dict[str, str] = {}
        for name in (*adapter.changes, *adapter.replaced):
            # A model saved without its head (AutoModel) lacks the first word of the names, or has it too much.
            candidates = [name, name.partition(".")[2], *(k for k in (f"model.{name}",) if k in known)]
            found = next((candidate for candidate in candidates if candidate in known), None)
            if found is None:
                raise InputError(
                    f"{shown(adapter.path)} changes '{shown(name)}', which {self.reference.path} does not have: use "
                    "the base that the adapter was made for."
                )
            renamed[name] = found
        self.adapter = Adapter(
            adapter.path,
            {renamed[name]: change for name, change in adapter.changes.items()},
            {renamed[name]: tensor for name, tensor in adapter.replaced.items()},
            adapter.base_model,
        )

    def origin(self, name: str) -> Origin:
        """A tensor by its name on disk."""
        if self.masks is not None:
            return SelectedTensor(self.checkpoint, self._start, self.masks, name)
        found: Origin = StoredTensor(self.checkpoint, name)
        if self.adapter is None:
            return found
        if name in self.adapter.replaced:  # an embedding may be saved whole beside its change
            found = HeldTensor(self.adapter.replaced[name], found.dtype)
        return AdaptedTensor(found, self.adapter, name) if name in self.adapter.changes else found

    def state(self) -> str:
        """What decides its content, for the key of a journal."""
        parts = [source_state(self.checkpoint)]
        if self.masks is not None:
            parts += [source_state(self.masks), source_state(self._start)]
        if self.adapter is not None:
            for file in sorted(self.adapter.path.glob("adapter_*")):
                status = file.stat()
                parts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _variant(reference: ModelReference) -> Path | None:
    """The folder of the model's masks where one of a store is meant.

    Raises:
        InputError: a store has none of that name.
    """
    store = Path(reference.path) / VARIANTS
    if reference.adapter is None or os.path.isdir(reference.adapter) or not os.path.isdir(store):
        return None
    if not exists(store / reference.adapter / VARIANT_FILE):
        known = ", ".join(sorted(path.parent.name for path in store.glob(f"*/{VARIANT_FILE}"))) or "none"
        raise InputError(f"{shown(reference.path)} keeps no model '{shown(reference.adapter)}'; it has: {known}.")
    return store / reference.adapter


def _open(path: str) -> Checkpoint:
    if is_adapter(path):
        raise InputError(f"{shown(path)} is an adapter: write BASE+{shown(path)}, with the model that it is for.")
    checkpoint = Checkpoint.open(Path(path) if os.path.isdir(path) else path)
    if checkpoint.quantization is None:
        return checkpoint
    from slimwright.job.open import decoded  # imports transformers, which plain inputs do not need

    return decoded(checkpoint)
