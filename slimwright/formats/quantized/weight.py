"""What every format of others gives: weights that know their dense shape and compute rows of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError

Settings = Mapping[str, Any]
"""The ``quantization_config`` of a config.json."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of dense weights, and of scales where a format leaves them open."""


@dataclass(frozen=True)
class ForeignWeight(ABC):
    """A weight that lies on the disk in a format of others.

    Attributes:
        shape: (out, in), or (experts, out, in).
        dtype: of the dense weight, to which its values are rounded.
        parts: names of the tensors that it takes the place of, the one with the codes first.
        transposed: whether the dense tensor's two last dimensions are (in, out) on disk.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    transposed: bool = False

    @abstractmethod
    def rows(self, checkpoint: Checkpoint, rows: slice) -> Tensor:
        """Rows of the logical matrix (experts stacked; start and stop set), (rows, columns) float32."""


def dense_dtype(config: Mapping[str, Any], *others: torch.dtype) -> torch.dtype:
    """The dtype that a model's dense weights have: its config's, else the first float of others, else float32."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(part.get(key)).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    return next((dtype for dtype in others if dtype in FLOATS), torch.float32)


def checked(
    checkpoint: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape of a tensor that a format needs.

    Raises:
        InputError: it is missing, of another dtype, or of none of ``shapes`` where some are given.
    """
    info = checkpoint.tensors.get(name)
    if info is None:
        raise InputError(f"The tensor '{name}' of {checkpoint.path} is missing: download the checkpoint again.")
    if info.dtype not in dtypes or (shapes and info.shape not in shapes):
        wanted = " or ".join(f"{shape}" for shape in shapes) or "any shape"
        raise InputError(
            f"The tensor '{name}' of {checkpoint.path} is {info.dtype} {info.shape}, but its format needs "
            f"{dtypes[0]} {wanted}: the checkpoint is damaged."
        )
    return info.shape


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes from a little-endian stream of bits in 32-bit words: (rows, words) int32 → (rows, count) int32.

    Codes of 3, 5, 6 and 7 bits may lie across two words; those of 1, 2, 4 and 8 bits never do.
    """
    start = torch.arange(count, dtype=torch.int64) * bits
    index, offset = start // 32, start % 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    low = wide[:, index] >> offset
    if 32 % bits:
        following = wide[:, (index + 1).clamp_(max=wide.shape[1] - 1)]
        low |= following << (32 - offset)  # beyond the code's own bits it may hold anything: cut off below
    return (low & ((1 << bits) - 1)).to(torch.int32)


def spread(scale: Tensor, columns: int) -> Tensor:
    """(rows, groups) → (rows, columns): each group's value for its columns, the last group possibly short."""
    groups = scale.shape[1]
    if groups in (1, columns):
        return scale.expand(-1, columns)
    return scale.repeat_interleave(-(-columns // groups), dim=1)[:, :columns]
