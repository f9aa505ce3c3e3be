"""GPTQ checkpoints (AutoGPTQ, GPTQModel): codes packed along the inputs, in either of the two conventions for zeros.

``X.qweight`` int32 (in * bits / 32, out), ``X.qzeros`` int32 (groups, out * bits / 32), ``X.scales`` (groups, out),
``X.g_idx`` int32 (in): the group of each input. ``w = scale * (code - zero)``. In ``checkpoint_format`` "gptq" (the
older, and the default) zeros are stored less one; in "gptq_v2" as they are. Packing them less one turns a zero of 0
into all ones, so the sum is taken modulo ``2**bits``, as exllama's kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.formats.quantized.weight import FLOATS, ForeignWeight, Settings, checked, dense_dtype, unpack_words

_SUFFIX = ".qweight"


@dataclass(frozen=True)
class GPTQWeight(ForeignWeight):
    """See the module. ``bits``: of a code; ``offset``: added to stored zeros; ``group``: inputs of a group where there
    is no ``g_idx``."""

    bits: int = 4
    offset: int = 1
    group: int = 0

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        weight, zeros, scales, *index = self.parts
        columns = self.shape[1]
        codes = unpack_words(checkpoint.read(weight)[:, rows].t(), self.bits, columns)
        zero = unpack_words(checkpoint.read(zeros), self.bits, self.shape[0])[:, rows]
        zero = (zero + self.offset) & (2**self.bits - 1)
        of = checkpoint.read(index[0]).long() if index else torch.arange(columns) // self.group
        scale = checkpoint.read(scales)[:, rows].float()
        return (codes - zero[of].t()).float().mul_(scale[of].t())


def gptq_weights(checkpoint: Checkpoint, settings: Settings) -> dict[str, ForeignWeight]:
    """The weights of a GPTQ checkpoint by dense name.

    Raises:
        InputError: another layout, or tensors that do not fit together.
    """
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(
            f"{checkpoint.path} is a GPTQ checkpoint in the layout {layout!r}: only gptq and gptq_v2 are read."
        )
    found: dict[str, ForeignWeight] = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_SUFFIX)]:
        base = name.removesuffix(_SUFFIX)
        scales = checked(checkpoint, f"{base}.scales", FLOATS)
        words, out = checked(checkpoint, name, (torch.int32,))
        indexed = f"{base}.g_idx" in checkpoint.tensors
        given = settings.get("bits")
        bits = given if isinstance(given, int) and 2 <= given <= 8 else 4
        columns = words * 32 // bits
        if indexed:  # the bits of single weights may differ from the config's: the index says how many inputs there are
            (columns,) = checked(checkpoint, f"{base}.g_idx", (torch.int32, torch.int64))
            bits = words * 32 // columns
        if bits not in range(2, 9) or bits * columns != words * 32:
            raise InputError(f"The tensor '{name}' of {checkpoint.path} has {words} words for {columns} inputs.")
        groups = scales[0]
        checked(checkpoint, f"{base}.scales", FLOATS, (groups, out))
        checked(checkpoint, f"{base}.qzeros", (torch.int32,), (groups, -(-out * bits // 32)))
        parts = [name, f"{base}.qzeros", f"{base}.scales"]
        if indexed:
            index = checkpoint.read(f"{base}.g_idx")
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= groups):
                raise InputError(f"The tensor '{base}.g_idx' of {checkpoint.path} names groups that do not exist.")
            parts.append(f"{base}.g_idx")
        found[f"{base}.weight"] = GPTQWeight(
            (out, columns),
            dense_dtype(checkpoint.config, checkpoint.tensors[f"{base}.scales"].dtype),
            tuple(parts),
            bits=bits,
            offset=1 if layout == "gptq" else 0,
            group=-(-columns // groups),
        )
    return found
