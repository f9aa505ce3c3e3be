"""Random masks that depend on nothing but (seed, tensor, model, element): a counter-based generator on int32 lanes.

Every element's number is a hash of its index under keys drawn from SHA-256 of (seed, purpose, tensor's name, model,
block of 2**18 elements). So a mask does not depend on tiles, shards, threads or the order of work, and can be made
again for any piece. The hash is two rounds of xor, odd multiplication and shift on the index's own avalanche hash
(constants after Wellons' "lowbias32"); it is tested for uniformity and for correlation between neighbours, blocks and
models, and is not meant for cryptography.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from slimwright.methods.merging import BLOCK


def _signed(value: int) -> int:
    """A 32-bit number as int32 sees it."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


@functools.cache
def _mixed_indices() -> Tensor:
    """(BLOCK,) int32: an avalanche hash of 0, 1, 2, ..."""
    x = torch.arange(BLOCK, dtype=torch.int64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x ^= x >> 16
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32)


def block_words(seed: int, name: str, model: int, first: int, count: int) -> Tensor:
    """(count, 3) int32: the keys of blocks ``first``, ``first + 1``, ..."""
    words = []
    for block in range(first, first + count):
        key = hashlib.sha256(f"{seed}\0{name}\0{model}\0{block}".encode()).digest()
        words.append([_signed(int.from_bytes(key[i : i + 4], "little")) for i in (0, 4, 8)])
    return torch.tensor(words, dtype=torch.int32).reshape(count, 3)


def random_integers(seed: int, name: str, model: int, start: int, count: int) -> Tensor:
    """``count`` independent int32, uniform over 0 .. 2**31 - 1, for elements ``start``, ``start + 1``, ...

    Args:
        seed: the job's seed.
        name: the tensor's name.
        model: which of the models' masks.
        start: index of the first element in the flattened tensor.
        count: how many.
    """
    out = torch.empty(count, dtype=torch.int32)
    table = _mixed_indices()
    at = 0
    while at < count:
        block, first = divmod(start + at, BLOCK)
        size = min(BLOCK - first, count - at)
        words = block_words(seed, name, model, block, 1)[0].tolist()
        x = out[at : at + size]
        torch.bitwise_xor(table[first : first + size], words[0], out=x)
        x *= words[1] | 1
        x ^= x >> 15
        x *= words[2] | 1
        x ^= x >> 16
        x *= _signed(0x846CA68B)
        at += size
    return out.bitwise_and_(0x7FFFFFFF)


def keep_randomly(values: Tensor, probability: float | Tensor, numbers: Tensor) -> Tensor:
    """``values`` where a number of :func:`random_integers` lies below its probability, else 0; in the values' memory.

    Args:
        values: flat float32 (other floats work, slower).
        probability: one for all, or one an element; resolved to 2**-31.
        numbers: one an element, written into.
    """
    limit: int | Tensor
    if isinstance(probability, Tensor):
        limit = (probability.double() * 2.0**31).clamp_(0, 2**31 - 1).to(torch.int32)
    else:
        if probability >= 1:
            return values
        limit = round(max(0.0, probability) * 2.0**31)
    if limit is not None and values.dtype == torch.float32:
        numbers -= limit  # negative, and so all ones after the shift, where the element is kept
        numbers >>= 31
        values.view(torch.int32).bitwise_and_(numbers)
        return values
    return values.mul_((numbers < limit).to(values.dtype))
