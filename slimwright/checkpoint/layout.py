"""Where every tensor will lie, and what the files will weigh to the byte, before anything is written.

**Alignment.** safetensors allows no hole between tensors, so data can start at a multiple of 64 bytes only by two
means, both used here: the header is padded with spaces (which the format allows) until the data section begins at a
multiple of 64; and inside a shard the tensors are ordered by the largest power of two, up to 64, that divides their
size: multiples of 64 first, in the order given, then those of 32, 16, 8, 4, 2 and 1. So every tensor whose size is a
multiple of 64 (all that matter for speed) is aligned to 64 bytes, and every other one at least to the power of two in
its size, which its dtype divides.

**Additive cost.** A search over sizes needs costs that add up. `entry_cost` is a tensor's data plus an upper bound on
its part of the header, where each of its two offsets counts as many digits as the budget has; `overhead_bound` is the
rest: per shard, the length prefix, the metadata and up to 63 bytes of padding. So tensors with
`sum(entry_cost) + overhead_bound <= budget` never exceed the budget. The header itself is written without spare
digits, so the true size lies below that sum, by at most 63 bytes a shard and the digits that early offsets lack: some
tens of bytes in a model of 100 kB. `Layout.total_bytes` is the true size.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slimwright.checkpoint.header import DTYPE_NAMES, MAX_HEADER_BYTES
from slimwright.errors import InputError

ALIGNMENT = 64
MAX_SHARD_BYTES = 5_000_000_000
METADATA: Mapping[str, str] = {"format": "pt"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: its name on disk, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor in a shard; its bytes are `start` to `stop` of the file (counted from the file's beginning)."""

    entry: TensorEntry
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One weight file: its name, all that comes before the data (`head`: length prefix and padded header), its tensors
    in the order of their data, its size in bytes."""

    file_name: str
    head: bytes = field(repr=False)
    tensors: tuple[PlacedTensor, ...]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The weight files of a checkpoint. `total_bytes` is what they will weigh, headers included, to the byte.

    `index` is the content of model.safetensors.index.json, or None where one file holds everything. The index is no
    weight file: its bytes do not count.
    """

    shards: tuple[Shard, ...]
    total_bytes: int
    index: dict[str, Any] | None


def plan_layout(
    entries: Sequence[TensorEntry],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] = METADATA,
    total_parameters: int | None = None,
) -> Layout:
    """Place tensors into shards in the order given, each shard filled before the next and of at most `max_shard_bytes`.

    Only a tensor that is larger by itself makes a larger file. `total_parameters` goes into the index as transformers
    writes it. ValueError for no tensors, two of the same name, a dtype that safetensors lacks, or a name that is empty.
    """
    if not entries:
        raise ValueError("no tensors to place")
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("two tensors have the same name")
    groups: list[list[TensorEntry]] = [[]]
    room = max_shard_bytes
    largest = min(max_shard_bytes, sum(entry.nbytes for entry in entries))
    for entry in entries:
        if not entry.name or entry.name == "__metadata__" or "\0" in entry.name or min(entry.shape, default=0) < 0:
            raise ValueError(f"{entry!r} cannot be written")
        cost = entry_cost(entry, largest)
        if groups[-1] and cost > room:
            groups.append([])
        if not groups[-1]:
            room = max_shard_bytes - _shard_overhead(metadata)
        groups[-1].append(entry)
        room -= cost
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    shards = tuple(_place(name, group, metadata) for name, group in zip(names, groups))
    index = None
    if count > 1:
        about: dict[str, int] = {} if total_parameters is None else {"total_parameters": total_parameters}
        about["total_size"] = sum(entry.nbytes for entry in entries)
        where = {placed.entry.name: shard.file_name for shard in shards for placed in shard.tensors}
        index = {"metadata": about, "weight_map": {entry.name: where[entry.name] for entry in entries}}
    return Layout(shards, sum(shard.nbytes for shard in shards), index)


def entry_cost(entry: TensorEntry, budget: int = MAX_SHARD_BYTES) -> int:
    """Bytes that a tensor adds to the weight files at most: its data, and its header entry with full-width offsets.

    `budget` bounds the bytes of all tensors together, or of one shard; the tighter it is, the tighter the cost.
    """
    largest = max(budget, entry.nbytes)
    return entry.nbytes + len(_header_entry(entry, largest, largest)) + 1


def overhead_bound(budget: int, max_shard_bytes: int = MAX_SHARD_BYTES, metadata: Mapping[str, str] = METADATA) -> int:
    """What to take off a budget before spending it on `entry_cost`s: the most that all shards' own bytes can be.

    Two neighbouring shards together weigh more than `max_shard_bytes`, so there are fewer than
    2 × budget / max_shard_bytes + 1 of them.
    """
    shards = 1 if budget <= max_shard_bytes else 2 * budget // max_shard_bytes + 1
    return shards * _shard_overhead(metadata)


def _shard_overhead(metadata: Mapping[str, str]) -> int:
    return 8 + len(_header_text([], metadata)) + ALIGNMENT - 1


def _place(file_name: str, entries: list[TensorEntry], metadata: Mapping[str, str]) -> Shard:
    ordered = sorted(entries, key=lambda entry: -math.gcd(entry.nbytes, ALIGNMENT))  # stable; gcd(0, 64) = 64
    offsets = [0]
    for entry in ordered:
        offsets.append(offsets[-1] + entry.nbytes)
    texts = [_header_entry(entry, offsets[i], offsets[i + 1]) for i, entry in enumerate(ordered)]
    header = _header_text(texts, metadata)
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    if len(header) > MAX_HEADER_BYTES:
        raise InputError(f"{file_name} would need a header of {len(header):,} bytes: ask for smaller shards.")
    head = len(header).to_bytes(8, "little") + header
    placed = [
        PlacedTensor(entry, len(head) + offsets[i], len(head) + offsets[i + 1]) for i, entry in enumerate(ordered)
    ]
    return Shard(file_name, head, tuple(placed), len(head) + offsets[-1])


def _header_entry(entry: TensorEntry, begin: int, end: int) -> bytes:
    if entry.dtype not in DTYPE_NAMES:
        raise ValueError(f"safetensors has no dtype for {entry.dtype}")
    value = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    return _json(entry.name) + b":" + _json(value)


def _header_text(entries: Sequence[bytes], metadata: Mapping[str, str]) -> bytes:
    about = [b'"__metadata__":' + _json(dict(metadata))] if metadata else []
    return b"{" + b",".join([*about, *entries]) + b"}"


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
