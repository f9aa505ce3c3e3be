"""bitsandbytes checkpoints: NF4 and FP4 with their quantization state, and LLM.int8's rows.

4 bits: ``X.weight`` holds the row-major codes of the flattened matrix, the first of two in the high nibble;
``X.weight.absmax`` one statistic per ``blocksize`` elements, ``X.weight.quant_map`` the 16 levels;
``X.weight.quant_state.bitsandbytes__nf4`` is JSON in bytes with shape and dtype. Where statistics are quantized
themselves, ``absmax = nested_quant_map[code] * nested_absmax[block] + nested_offset``.

8 bits: ``X.weight`` int8 (out, in) and ``X.SCB`` float32 (out), the rows' largest magnitudes: ``w = code * SCB / 127``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.formats.quantized.weight import ForeignWeight, Settings, checked, dense_dtype

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_LONGEST_STATE = 1 << 16


@dataclass(frozen=True)
class FourBitWeight(ForeignWeight):
    """See the module. ``block``: elements per statistic; ``nested``: statistics per statistic of theirs, 0 where they
    are plain; ``offset``: added to them."""

    block: int = 64
    nested: int = 0
    offset: float = 0.0

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        weight, absmax, table = self.parts[:3]
        columns = self.shape[1]
        first, last = rows.start * columns, rows.stop * columns
        data = checkpoint.read(weight).reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        codes = torch.stack([data >> 4, data & 15], dim=1).flatten()[first % 2 :][: last - first]
        blocks = slice(first // self.block, -(-last // self.block))
        size = checkpoint.read(absmax).reshape(-1)[blocks]
        if self.nested:
            outer, levels = (checkpoint.read(part).float() for part in self.parts[3:5])
            of = torch.arange(blocks.start, blocks.stop) // self.nested
            size = levels[size.int()] * outer[of] + self.offset
        each = size.float().repeat_interleave(self.block)[first - blocks.start * self.block :][: last - first]
        return (checkpoint.read(table).float()[codes.int()] * each).view(-1, columns)


@dataclass(frozen=True)
class EightBitWeight(ForeignWeight):
    """See the module."""

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        weight, largest = self.parts[:2]
        return checkpoint.read(weight, rows).float().mul_(checkpoint.read(largest, rows).unsqueeze(1) / 127)


def bitsandbytes_weights(checkpoint: Checkpoint, settings: Settings) -> dict[str, ForeignWeight]:
    """The weights of a bitsandbytes checkpoint by dense name.

    Raises:
        InputError: the files do not carry the quantization state, or it does not fit the tensors.
    """
    found: dict[str, ForeignWeight] = {}
    for name in list(checkpoint.tensors):
        if name.endswith(_STATES):
            weight = name.rpartition(".quant_state.")[0]
            found[weight] = _four_bit(checkpoint, weight, name)
        elif name.endswith(".SCB"):
            base = name.removesuffix(".SCB")
            shape = checked(checkpoint, f"{base}.weight", (torch.int8,))
            checked(checkpoint, name, (torch.float32,), shape[:1])
            layout = f"{base}.weight_format"
            parts = [f"{base}.weight", name]
            if layout in checkpoint.tensors:
                if int(checkpoint.read(layout).flatten()[0]) != 0:
                    raise InputError(f"'{base}.weight' of {checkpoint.path} is not stored by rows: save it again.")
                parts.append(layout)
            found[f"{base}.weight"] = EightBitWeight(
                shape, dense_dtype(checkpoint.config, torch.float16), tuple(parts)
            )  # fmt: skip
    return found


def _four_bit(checkpoint: Checkpoint, weight: str, state: str) -> FourBitWeight:
    shape, block, said = _state(checkpoint, state)
    elements, blocks = math.prod(shape), -(-math.prod(shape) // block)
    info = checkpoint.tensors.get(weight)
    if info is None or info.nbytes != -(-elements // 2):
        raise InputError(f"The tensor '{weight}' of {checkpoint.path} does not hold the {shape} of its state: damaged.")
    parts, nested, offset = [weight, f"{weight}.absmax", f"{weight}.quant_map"], 0, 0.0
    if f"{weight}.nested_absmax" in checkpoint.tensors:
        nested, offset = int(said["nested_blocksize"]), float(said["nested_offset"])
        checked(checkpoint, f"{weight}.absmax", (torch.uint8,), (blocks,))
        checked(checkpoint, f"{weight}.nested_absmax", (torch.float32,), (-(-blocks // nested),))
        checked(checkpoint, f"{weight}.nested_quant_map", (torch.float32,), (256,))
        parts += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
    else:
        checked(checkpoint, f"{weight}.absmax", (torch.float32, torch.float16, torch.bfloat16), (blocks,))
    checked(checkpoint, f"{weight}.quant_map", (torch.float32,), (16,))
    dtype = dense_dtype({"dtype": said.get("dtype")}, dense_dtype(checkpoint.config))
    return FourBitWeight(shape, dtype, (*parts, state), block=block, nested=nested, offset=offset)


def _state(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], int, Mapping[str, Any]]:
    """Shape of the matrix, elements per statistic, and the whole state."""
    if checkpoint.tensors[name].nbytes <= _LONGEST_STATE:
        try:
            said = json.loads(bytes(checkpoint.read(name).flatten().tolist()))
            shape, block = tuple(int(size) for size in said["shape"]), int(said["blocksize"])
            nested = int(said.get("nested_blocksize", 1)), float(said.get("nested_offset", 0.0))
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        else:
            if len(shape) == 2 and min(*shape, block, nested[0]) > 0 and math.isfinite(nested[1]):
                return shape, block, said
    raise InputError(f"The quantization state '{name}' of {checkpoint.path} cannot be read: the checkpoint is damaged.")
