"""FP8 checkpoints with a scale per block (DeepSeek-V3's layout), per row or per tensor.

``NAME`` is float8_e4m3fn of the dense shape, ``NAME_scale_inv`` its scales, (ceil(out / 128), ceil(in / 128)) for
blocks of ``weight_block_size``. Despite the name the scale multiplies: ``w = scale * code``. ``activation_scale`` and
``input_scale`` tensors belong to how inputs would be rounded and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.formats.quantized.weight import ForeignWeight, Settings, checked, dense_dtype

_SUFFIX = "_scale_inv"
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class BlockFloat8Weight(ForeignWeight):
    """See the module; ``block`` is (rows, columns) of a block."""

    block: tuple[int, int] = (128, 128)

    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        weight, scales = self.parts[:2]
        codes = checkpoint.read(weight).reshape(-1, self.shape[-1])[rows].float()
        scale = checkpoint.read(scales).float().reshape(-1, -(-self.shape[-1] // self.block[1]))
        # blocks do not cross experts, whose rows are stacked
        out = self.shape[-2]
        index = torch.arange(rows.start, rows.stop)
        of = index // out * -(-out // self.block[0]) + index % out // self.block[0]
        return codes.mul_(scale.repeat_interleave(self.block[1], dim=1)[:, : self.shape[-1]][of])


def float8_weights(checkpoint: Checkpoint, settings: Settings) -> dict[str, ForeignWeight]:
    """The weights of an FP8 checkpoint by dense name.

    Raises:
        InputError: tensors that do not fit together.
    """
    block = settings.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise InputError(f"{checkpoint.path}: weight_block_size in config.json is not two positive numbers: repair it.")
    found: dict[str, ForeignWeight] = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_SUFFIX)]:
        base = name.removesuffix(_SUFFIX)
        shape = checked(checkpoint, base, FLOAT8)
        scales = checked(checkpoint, name, _SCALES)
        if len(shape) < 2:
            raise InputError(f"The tensor '{base}' of {checkpoint.path} is no matrix, but has scales: it is damaged.")
        size = _block(shape, scales, block)
        if size is None:
            raise InputError(
                f"The tensor '{name}' of {checkpoint.path} has the shape {scales}, which does not fit {shape} in "
                f"blocks of {block}: the checkpoint is damaged."
            )
        owner = base.rpartition(".")[0]
        extra = [f"{owner}.{part}" for part in ("activation_scale", "input_scale")]
        dtype = dense_dtype(checkpoint.config, checkpoint.tensors[name].dtype, torch.bfloat16)
        weight = BlockFloat8Weight(shape, dtype, (base, name), block=size)
        found[base] = replace(weight, parts=(*weight.parts, *(part for part in extra if part in checkpoint.tensors)))
    return found


def _block(shape: tuple[int, ...], scales: tuple[int, ...], block: list[int] | None) -> tuple[int, int] | None:
    """Rows and columns of a block, or None where the scales fit neither blocks, rows nor the whole."""
    *experts, out, columns = shape
    if block is not None and scales == (*experts, -(-out // block[0]), -(-columns // block[1])):
        return block[0], block[1]
    if scales in ((*experts, out, 1), (*experts, out)):
        return 1, columns
    if scales in ((*experts, 1, 1), tuple(experts) or (1,), ()):
        return out, columns
    return None
