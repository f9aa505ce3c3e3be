"""MXFP4 checkpoints of gpt-oss: experts' matrices as blocks of 32 elements with a power of two each (OCP MX v1.0).

``NAME_blocks`` uint8 (experts, out, blocks, 16), the even element in the low nibble; ``NAME_scales`` uint8 (experts,
out, blocks), the exponent + 127. The dense tensor ``NAME`` is (experts, in, out).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.formats.quantized.weight import ForeignWeight, Settings, checked, dense_dtype
from slimwright.weights.mxfp4 import MAGNITUDES

_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])


@dataclass(frozen=True)
class MXFP4Weight(ForeignWeight):
    """See the module."""

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        blocks, scales = self.parts
        codes = checkpoint.read(blocks).flatten(0, 1)[rows]
        values = _VALUES[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2).int()]
        exponent = checkpoint.read(scales).flatten(0, 1)[rows].int() - 127
        return torch.ldexp(values.double(), exponent.unsqueeze(-1)).float().flatten(1)


def mxfp4_weights(checkpoint: Checkpoint, settings: Settings) -> dict[str, ForeignWeight]:
    """The weights of a gpt-oss checkpoint by dense name.

    Raises:
        InputError: tensors that do not fit together.
    """
    found: dict[str, ForeignWeight] = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_BLOCKS)]:
        base = name.removesuffix(_BLOCKS)
        if base + _SCALES not in checkpoint.tensors:
            continue
        shape = checked(checkpoint, name, (torch.uint8,))
        checked(checkpoint, name, (torch.uint8,), (*shape[:3], 16))
        checked(checkpoint, base + _SCALES, (torch.uint8,), shape[:3])
        experts, out, blocks = shape[:3]
        found[base] = MXFP4Weight(
            (experts, out, 32 * blocks),
            dense_dtype(checkpoint.config, torch.bfloat16),
            (name, base + _SCALES),
            transposed=True,
        )
    return found
