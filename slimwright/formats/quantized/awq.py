"""AWQ checkpoints in the GEMM layout (AutoAWQ): 4-bit codes packed along the outputs in an interleaved order.

``X.qweight`` int32 (in, out / 8), ``X.qzeros`` int32 (groups, out / 8), ``X.scales`` (groups, out);
``w = scale * (code - zero)``. From its low bits up a word holds the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.formats.quantized.weight import FLOATS, ForeignWeight, Settings, checked, dense_dtype, spread

_SUFFIX = ".qweight"
_PLACE = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word each of its eight outputs lies."""


def _unpacked(words: Tensor) -> Tensor:
    """(n, words) int32 → (n, 8 * words) int32."""
    return ((words.unsqueeze(-1) >> (4 * _PLACE).to(torch.int32)) & 15).flatten(1)


@dataclass(frozen=True)
class AWQWeight(ForeignWeight):
    """See the module."""

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        weight, zeros, scales = self.parts
        words = slice(rows.start // 8, -(-rows.stop // 8))
        cut = slice(rows.start - 8 * words.start, rows.stop - 8 * words.start)
        codes = _unpacked(checkpoint.read(weight)[:, words])[:, cut].t()
        zero = _unpacked(checkpoint.read(zeros)[:, words])[:, cut].t()
        scale = checkpoint.read(scales)[:, rows].t().float()
        columns = self.shape[1]
        return (codes - spread(zero, columns)).float().mul_(spread(scale, columns))


def awq_weights(checkpoint: Checkpoint, settings: Settings) -> dict[str, ForeignWeight]:
    """The weights of an AWQ checkpoint by dense name.

    Raises:
        InputError: another layout or another number of bits, or tensors that do not fit together.
    """
    layout, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit", 4))
    if layout != "gemm" or bits != 4:
        raise InputError(
            f"{checkpoint.path} is an AWQ checkpoint in the layout {layout!r} with {bits} bits: only gemm with 4 is "
            "read."
        )
    found: dict[str, ForeignWeight] = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_SUFFIX)]:
        base = name.removesuffix(_SUFFIX)
        columns, words = checked(checkpoint, name, (torch.int32,))
        groups, _ = checked(checkpoint, f"{base}.qzeros", (torch.int32,))
        checked(checkpoint, f"{base}.qzeros", (torch.int32,), (groups, words))
        checked(checkpoint, f"{base}.scales", FLOATS, (groups, 8 * words))
        if groups == 0 or columns % groups:
            raise InputError(f"'{base}' of {checkpoint.path} has {columns} inputs in {groups} groups.")
        found[f"{base}.weight"] = AWQWeight(
            (8 * words, columns),
            dense_dtype(checkpoint.config, checkpoint.tensors[f"{base}.scales"].dtype),
            (name, f"{base}.qzeros", f"{base}.scales"),
        )
    return found
