"""compressed-tensors checkpoints (llm-compressor, vLLM): integers packed into words, and plain INT8 or FP8.

*pack-quantized*: ``X.weight_packed`` int32 (out, ceil(in * bits / 32)), a stream of codes with ``2**(bits-1)`` added;
``X.weight_scale`` (out, groups); ``X.weight_shape`` (2,); asymmetric also ``X.weight_zero_point`` int32, packed along
the outputs; with activation order ``X.weight_g_idx`` (in). *int-*, *float-* and *naive-quantized*: ``X.weight`` int8 or
float8 of the dense shape, ``X.weight_scale`` (out, groups), (out,), (1,) or a block's, ``X.weight_zero_point`` int8.
``w = scale * (code - zero)``. Scales of inputs, outputs and the KV cache are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.formats.quantized.float8 import FLOAT8
from slimwright.formats.quantized.weight import (
    FLOATS,
    ForeignWeight,
    Settings,
    checked,
    dense_dtype,
    spread,
    unpack_words,
)

_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_LEFT_OUT = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale")


@dataclass(frozen=True)
class PackedIntWeight(ForeignWeight):
    """See the module, pack-quantized. ``zero`` and ``index``: names of the zero points and of the inputs' groups, or
    empty."""

    bits: int = 4
    zero: str = ""
    index: str = ""

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        columns = self.shape[1]
        codes = unpack_words(checkpoint.read(self.parts[0], rows), self.bits, columns)
        scale = checkpoint.read(self.parts[1], rows).float()
        if self.zero:
            zero = unpack_words(checkpoint.read(self.zero).t(), self.bits, self.shape[0]).t()[rows]
        else:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.int32)
        if self.index:
            of = checkpoint.read(self.index).long()
            return (codes - zero[:, of]).float().mul_(scale[:, of])
        return (codes - spread(zero, columns)).float().mul_(spread(scale, columns))


@dataclass(frozen=True)
class PlainWeight(ForeignWeight):
    """See the module, the other formats. ``block``: rows and columns that share a scale; ``zero`` as above."""

    block: tuple[int, int] = (1, 1)
    zero: str = ""

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        out, columns = self.shape
        grid = (-(-out // self.block[0]), -(-columns // self.block[1]))
        codes = checkpoint.read(self.parts[0], rows).float()
        of = torch.arange(rows.start, rows.stop) // self.block[0]

        def each(name: str) -> Tensor:
            values = checkpoint.read(name).float().reshape(grid)
            return values.repeat_interleave(self.block[1], dim=1)[:, :columns][of]

        return (codes - each(self.zero) if self.zero else codes).mul_(each(self.parts[1]))


def compressed_tensors_weights(checkpoint: Checkpoint, settings: Settings) -> dict[str, ForeignWeight]:
    """The weights of a compressed-tensors checkpoint by dense name.

    Raises:
        InputError: one of its formats is not read, or the tensors do not fit together.
    """
    groups = [group for group in _members(settings.get("config_groups")) if isinstance(group, dict)]
    sparsity = settings.get("sparsity_config") or {}
    for kind in [settings.get("format"), *(group.get("format") for group in groups)]:
        if kind is not None and kind not in _READ:
            raise InputError(
                f"{checkpoint.path} is a compressed-tensors checkpoint in the format {kind!r}: only "
                f"{', '.join(_READ[:4])} are read."
            )
    if sparsity.get("format", "dense") != "dense":
        raise InputError(f"{checkpoint.path} is a sparse compressed-tensors checkpoint: only quantized ones are read.")
    if (settings.get("transform_config") or {}).get("config_groups"):
        raise InputError(
            f"{checkpoint.path} is a compressed-tensors checkpoint with transforms that run online, which are not read."
        )
    blocks = {
        tuple(args["block_structure"])
        for group in groups
        if isinstance(args := group.get("weights"), dict) and isinstance(args.get("block_structure"), list)
    }
    found: dict[str, ForeignWeight] = {}
    for name in list(checkpoint.tensors):
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            found[base] = _packed(checkpoint, base)
        elif name.endswith(".weight") and checkpoint.tensors[name].dtype in (torch.int8, *FLOAT8):
            found[name] = _plain(checkpoint, name, blocks)
    return found


def _members(value: Any) -> Iterator[Any]:
    yield from value.values() if isinstance(value, dict) else ()


def _extra(checkpoint: Checkpoint, base: str) -> list[str]:
    owner = base.rpartition(".")[0]
    return [name for part in _LEFT_OUT if (name := f"{owner}.{part}") in checkpoint.tensors]


def _packed(checkpoint: Checkpoint, base: str) -> PackedIntWeight:
    checked(checkpoint, f"{base}_shape", (torch.int64, torch.int32), (2,))
    out, columns = (int(size) for size in checkpoint.read(f"{base}_shape").tolist())
    rows, words = checked(checkpoint, f"{base}_packed", (torch.int32,))
    bits = next((bits for bits in range(1, 9) if -(-columns * bits // 32) == words), 0)
    if rows != out or not bits or columns < 1:
        raise InputError(
            f"The tensor '{base}_packed' of {checkpoint.path} has the shape ({rows}, {words}), which cannot hold "
            f"({out}, {columns}): the checkpoint is damaged."
        )
    scales = checked(checkpoint, f"{base}_scale", FLOATS)
    groups = scales[1] if len(scales) == 2 else 0
    index = f"{base}_g_idx" if f"{base}_g_idx" in checkpoint.tensors else ""
    if scales != (out, groups) or not groups or (columns % groups and not index):
        raise InputError(f"The tensor '{base}_scale' of {checkpoint.path} has the shape {scales}, not (rows, groups).")
    zero = f"{base}_zero_point" if f"{base}_zero_point" in checkpoint.tensors else ""
    if zero:
        checked(checkpoint, zero, (torch.int32,), (-(-out * bits // 32), groups))
    if index:
        checked(checkpoint, index, (torch.int32, torch.int64), (columns,))
        of = checkpoint.read(index)
        if int(of.min()) < 0 or int(of.max()) >= groups:
            raise InputError(f"The tensor '{index}' of {checkpoint.path} names groups that do not exist.")
    parts = [f"{base}_packed", f"{base}_scale", f"{base}_shape", *filter(None, [zero, index])]
    dtype = dense_dtype(checkpoint.config, checkpoint.tensors[f"{base}_scale"].dtype)
    return PackedIntWeight(
        (out, columns), dtype, (*parts, *_extra(checkpoint, base)), bits=bits, zero=zero, index=index
    )  # fmt: skip


def _plain(checkpoint: Checkpoint, name: str, blocks: set[tuple[int, ...]]) -> PlainWeight:
    shape = checkpoint.tensors[name].shape
    scales = checked(checkpoint, f"{name}_scale", FLOATS)
    if len(shape) != 2:
        raise InputError(f"The tensor '{name}' of {checkpoint.path} is no matrix, but quantized: it is damaged.")
    out, columns = shape
    sizes = [block for block in blocks if scales == (-(-out // block[0]), -(-columns // block[1]))]
    if scales in ((), (1,), (1, 1)):
        block = (out, columns)
    elif scales == (out,):
        block = (1, columns)
    elif len(scales) == 2 and scales[0] == out and columns % max(1, scales[1]) == 0:
        block = (1, columns // scales[1])
    elif len(sizes) == 1:
        block = (sizes[0][0], sizes[0][1])
    else:
        raise InputError(f"The tensor '{name}_scale' of {checkpoint.path} has the shape {scales}, which does not fit.")
    zero = f"{name}_zero_point" if f"{name}_zero_point" in checkpoint.tensors else ""
    if zero:
        checked(checkpoint, zero, (torch.int8, *FLOAT8), scales)
    dtype = dense_dtype(checkpoint.config, checkpoint.tensors[f"{name}_scale"].dtype)
    parts = [name, f"{name}_scale", *filter(None, [zero]), *_extra(checkpoint, name)]
    return PlainWeight(shape, dtype, tuple(parts), block=block, zero=zero)
