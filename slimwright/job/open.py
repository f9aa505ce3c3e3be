"""Opening what the user names as a source: plain checkpoints, and quantized ones as if they were plain."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slimwright.checkpoint import Checkpoint, TensorInfo
from slimwright.checkpoint.reader import natural_key
from slimwright.errors import InputError
from slimwright.formats.quantized import foreign_weights
from slimwright.model.skeleton import skeleton
from slimwright.runtime.format import DenseForm, read_config, read_dense, read_dropped
from slimwright.weights import Form, decode_rows, disk_shapes

ZOO = "zoo:"


class DerivedCheckpoint(Checkpoint):
    """A checkpoint some of whose weights are computed from others rather than read."""

    @abstractmethod
    def is_derived(self, name: str) -> bool:
        """Whether :meth:`weight_rows` gives this weight."""

    @abstractmethod
    def weight_rows(self, name: str, rows: slice) -> Tensor:
        """Rows of the logical matrix (experts stacked) of such a weight, (rows, columns) float32."""


def derived(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a weight is computed rather than read."""
    return isinstance(checkpoint, DerivedCheckpoint) and checkpoint.is_derived(name)


class DecodedCheckpoint(DerivedCheckpoint):
    """A quantized checkpoint seen as the dense one it stands for, decoded tile by tile on demand.

    ``tensors`` has the dense names, dtypes and shapes; ``config`` has no quantization_config. Offsets in the
    :class:`TensorInfo` of a packed weight are those of its payload.

    Args:
        packed: the checkpoint as it lies on the disk.
        forms: how each packed weight is dense, by name.
        parts: names of the tensors that each takes the place of, the payload first.
    """

    def __init__(self, packed: Checkpoint, forms: Mapping[str, DenseForm], parts: Mapping[str, Sequence[str]]) -> None:
        self.__dict__.update(packed.__dict__)
        self._packed = packed
        self._forms = dict(forms)
        self.config = _without_quantization(packed.config)
        tensors = dict(packed.tensors)
        payloads = {name: packed.tensors[names[0]] for name, names in parts.items()}
        for names in parts.values():
            for name in names:
                tensors.pop(name, None)
        for name, form in self._forms.items():
            info = payloads[name]
            tensors[name] = TensorInfo(name, getattr(torch, form.dtype), form.shape, info.file, info.start, info.stop)
        self.tensors = {name: tensors[name] for name in sorted(tensors, key=natural_key)}

    def is_derived(self, name: str) -> bool:
        return name in self._forms

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As :meth:`Checkpoint.read`; a packed weight is decoded whole if it is stored transposed, else only the rows
        asked for, and rounded to the dtype it had in the source."""
        if name not in self._forms:
            return self._packed.read(name, rows)
        info, form = self.tensors[name], self._forms[name]
        rows = slice(*(rows or slice(None)).indices(form.shape[0])[:2])
        if form.transposed and len(form.shape) == 2:
            return self.weight_rows(name, slice(0, form.shape[1])).t()[rows].to(info.dtype)
        per = math.prod(form.weight_shape[1:-1])
        values = self.weight_rows(name, slice(rows.start * per, rows.stop * per))
        values = values.reshape(-1, *form.weight_shape[1:]).to(info.dtype)
        return values.transpose(-1, -2) if form.transposed else values

    def tiles(self, name: str, max_bytes: int = 64 << 20, multiple: int = 1) -> Iterator[slice]:
        if name in self._forms and self._forms[name].transposed and len(self._forms[name].shape) == 2:
            yield slice(0, self._forms[name].shape[0])
            return
        yield from super().tiles(name, max_bytes, multiple)

    def read_pages(self, name: str, pages: Iterable[tuple[int, int]]) -> list[bytes]:
        """Bytes of the dense tensor (for fingerprints), from the rows that hold them."""
        if name not in self._forms:
            return self._packed.read_pages(name, pages)
        return [self._page(name, offset, nbytes) for offset, nbytes in pages]

    def _page(self, name: str, offset: int, nbytes: int) -> bytes:
        info = self.tensors[name]
        per_row = math.prod(info.shape[1:]) * info.dtype.itemsize
        first, last = offset // per_row, -(-(offset + nbytes) // per_row)
        content = self.read(name, slice(first, last)).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return content[offset - first * per_row : offset - first * per_row + nbytes]


class DequantizedCheckpoint(DecodedCheckpoint):
    """A result of ours."""

    def __init__(self, packed: Checkpoint) -> None:
        settings = packed.quantization or {}
        self._grids: dict[str, Form] = read_config(settings)
        forms = read_dense(settings)
        parts: dict[str, list[str]] = {}
        for name, grid in self._grids.items():
            form = forms[name]
            dtype = getattr(torch, form.dtype, None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise InputError(f"quantization_config.dense names the dtype '{form.dtype}', which no weight has.")
            if grid.misfit(form.weight_shape):
                raise InputError(f"quantization_config puts '{name}' on {grid}, which cannot hold {form.shape}.")
            for suffix, part in disk_shapes(grid, form.weight_shape).items():
                found = packed.tensors.get(name + suffix)
                if found is None or found.shape != part.shape or found.dtype != part.dtype:
                    raise InputError(
                        f"The tensor '{name + suffix}' of {packed.path} is missing or not {part.dtype} {part.shape}, "
                        "as its grid needs: the result is damaged; make it again."
                    )
                parts.setdefault(name, []).append(name + suffix)
        super().__init__(packed, {name: forms[name] for name in self._grids}, parts)
        self._zeros = read_dropped(settings).tensors
        anywhere = next(iter(packed.tensors.values()))
        for name, (dtype_name, shape) in self._zeros.items():
            dtype = getattr(torch, dtype_name, None)
            if not isinstance(dtype, torch.dtype):
                raise InputError(f"quantization_config.dropped names the dtype '{dtype_name}', which no weight has.")
            info = TensorInfo(name, dtype, shape, anywhere.file, 0, math.prod(shape) * dtype.itemsize)
            self.tensors = {**self.tensors, name: info}

    def is_derived(self, name: str) -> bool:
        return name in self._zeros or super().is_derived(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._zeros:
            return super().read(name, rows)
        zeros = torch.zeros((), dtype=self.tensors[name].dtype).expand(self.tensors[name].shape)
        return zeros[rows] if rows is not None else zeros

    def read_pages(self, name: str, pages: Iterable[tuple[int, int]]) -> list[bytes]:
        return [bytes(nbytes) for _, nbytes in pages] if name in self._zeros else super().read_pages(name, pages)

    @property
    def settings(self) -> dict[str, Any]:
        """The ``quantization_config``."""
        return self._packed.quantization or {}

    @property
    def grids(self) -> Mapping[str, Form]:
        """Grid of every packed weight."""
        return self._grids

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of a packed weight by suffix, as they lie on the disk."""
        shape = self._forms[name].weight_shape
        return {suffix: self._packed.read(name + suffix) for suffix in disk_shapes(self._grids[name], shape)}

    def weight_rows(self, name: str, rows: slice) -> Tensor:
        if name in self._zeros:
            return torch.zeros(rows.stop - rows.start, self._zeros[name][1][-1])
        return decode_rows(self._grids[name], self.parts(name), self._forms[name].weight_shape, rows)


class ForeignCheckpoint(DecodedCheckpoint):
    """A checkpoint in a quantized format of others (:mod:`slimwright.formats.quantized`).

    A weight's values are its format's in float32, rounded once to the dtype of the dense model.
    """

    def __init__(self, packed: Checkpoint) -> None:
        self._weights = foreign_weights(packed)
        forms = {}
        for name, weight in self._weights.items():
            shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2]) if weight.transposed else weight.shape
            forms[name] = DenseForm(str(weight.dtype).removeprefix("torch."), shape, weight.transposed)
        super().__init__(packed, forms, {name: weight.parts for name, weight in self._weights.items()})

    def weight_rows(self, name: str, rows: slice) -> Tensor:
        weight = self._weights[name]
        return weight.rows(self._packed, rows).to(weight.dtype).float()


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as that of the dense model."""
    keys = ("quantization_config", "compression_config")
    return {
        key: {inner: member for inner, member in value.items() if inner not in keys}
        if isinstance(value, dict)
        else value
        for key, value in config.items()
        if key not in keys
    }


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as the dense one that it stands for.

    Raises:
        InputError: damaged, or quantized in a form that is not read.
    """
    if checkpoint.quantization is None:
        return checkpoint
    ours = checkpoint.quantization.get("quant_method") == "slimwright"
    return DequantizedCheckpoint(checkpoint) if ours else ForeignCheckpoint(checkpoint)


def model_of(source: Checkpoint, trust_remote_code: bool = False) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The transformers class of a checkpoint, and its config without a quantization_config.

    Raises:
        InputError: as :func:`slimwright.model.skeleton.skeleton`.
    """
    model = skeleton(source.config, source.model_path, source.tensors, trust_remote_code)
    return type(model), model.config


def located(model: str) -> str:
    """The directory of `zoo:NAME`, a model that is trained if it is not in the cache; anything else as it is.

    Raises:
        InputError: the zoo has no such model (with the nearest name), or the cache cannot be written.
    """
    if not model.startswith(ZOO):
        return model
    from slimwright import zoo

    return str(zoo.model(model.removeprefix(ZOO)))


def open_source(path: str) -> Checkpoint:
    """Open a model directory, a hub id or a model of the zoo (`zoo:gpt2`); what is quantized is dequantized by tiles.

    Raises:
        InputError: not a model, damaged, quantized in a form that is not read, or unknown to the zoo.
    """
    return decoded(Checkpoint.open(located(path)))
