"""The header of a safetensors file, checked before a byte of it is believed.

Layout of the file (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the header's length n in
little-endian; n bytes of UTF-8 JSON that begin with `{` and may end with spaces; then the data, which the entries'
offsets must cover without a hole or an overlap. The header is walked member by member, so what is held in memory stays
proportional to the number of tensors, whatever the JSON looks like.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import torch

from slimwright.checkpoint.files import LFS_POINTER, shown, unique_keys
from slimwright.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
MAX_TENSORS = 500_000  # in one file; the largest checkpoints have about 100,000 in all their shards
MAX_DIMENSIONS = 64  # as numpy
_MAX_ENTRY_CHARACTERS = 4096
_MAX_INTEGER = 2**63

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is, and which bytes of which file hold it (`start`, `stop` from the file's
    beginning)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(descriptor: int, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file in the order of their data, and its `__metadata__`.

    `descriptor` is open for reading, `file` the path that the results and messages name. InputError for anything that
    the format does not allow, a dtype that torch lacks, a file cut short, or a git-lfs pointer in the file's place.
    """
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, len(LFS_POINTER), 0)
    if start == LFS_POINTER:
        raise InputError(f"{shown(file)} is a git-lfs pointer, not the weights: run `git lfs pull` in its repository.")
    if len(start) < 8:
        raise _broken(file, f"it has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(file, f"its header claims {length:,} bytes, so it is not a safetensors file")
    if 8 + length > size:
        raise _broken(file, f"its header claims {length:,} bytes but the file has only {size:,}")
    raw = os.pread(descriptor, length, 8)
    try:
        entries, metadata = _parse(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else shown(error)
        raise _broken(file, f"its header cannot be read ({reason})") from error
    tensors = [_tensor(name, entry, file, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise _broken(file, f"the data of tensor {shown(tensor.name)!r} {what}")
        position = tensor.stop
    if position > size:
        raise _broken(file, f"it is truncated: the header needs {position:,} bytes and the file has {size:,}")
    if position < size:
        raise _broken(file, f"{size - position:,} bytes follow its last tensor")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _tensor(name: str, entry: dict[str, Any], file: Path, data: int) -> TensorInfo:
    """The tensor of one header entry; its offsets count from `data`. InputError unless the entry is sound in itself."""
    label = f"tensor {shown(name)!r}"
    if not name or "\0" in name:
        raise _broken(file, f"{label} has an empty name or a NUL in it")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _broken(file, f"{label} has a name that is not valid Unicode") from error
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, f"{label} must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise InputError(
            f"{shown(file)}: {label} has dtype {shown(dtype_name)!r}, which cannot be read here "
            f"(known are {', '.join(DTYPES)}): convert the checkpoint to one of them."
        )
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _broken(file, f"{label} has a shape that is no list of at most {MAX_DIMENSIONS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(file, f"{label} has data_offsets that are no [begin, end]")
    dtype = DTYPES[dtype_name]
    if math.prod(dimension or 1 for dimension in shape) * dtype.itemsize >= _MAX_INTEGER:
        raise _broken(file, f"{label} has an impossible shape")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise _broken(file, f"{label} of shape {shape} and dtype {dtype_name} does not fit its data_offsets {offsets}")
    return TensorInfo(name, dtype, tuple(shape), file, data + offsets[0], data + offsets[1])


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < _MAX_INTEGER for size in value)


def _broken(file: Path, reason: str) -> InputError:
    return InputError(f"{shown(file)} is damaged: {reason}; download or write it again.")


class _Scanner:
    """A position in a JSON text; every method skips white space first and raises ValueError where it does not fit."""

    _SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def skip(self) -> None:
        match = self._SPACE.match(self.text, self.position)
        assert match is not None
        self.position = match.end()

    def take(self, character: str) -> bool:
        self.skip()
        found = self.text.startswith(character, self.position)
        self.position += found
        return found

    def expect(self, character: str) -> None:
        if not self.take(character):
            raise ValueError(f"{character!r} expected at character {self.position}")

    def string(self) -> str:
        self.expect('"')
        value, self.position = scanstring(self.text, self.position, True)
        return str(value)

    def small_object(self) -> dict[str, Any]:
        """An object without objects in it, of at most _MAX_ENTRY_CHARACTERS."""
        self.skip()
        end = self.text.find("}", self.position, self.position + _MAX_ENTRY_CHARACTERS)
        if end < 0 or self.text[self.position] != "{":
            raise ValueError(f"a small object expected at character {self.position}")
        value = json.loads(self.text[self.position : end + 1], object_pairs_hook=unique_keys)
        self.position = end + 1
        assert isinstance(value, dict)
        return value

    def string_map(self) -> dict[str, str]:
        """An object of strings."""
        values: dict[str, str] = {}
        self.expect("{")
        if self.take("}"):
            return values
        while True:
            key = self.string()
            self.expect(":")
            if key in values:
                raise ValueError("a key comes twice in __metadata__")
            values[key] = self.string()
            if self.take("}"):
                return values
            self.expect(",")


def _parse(text: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The entries and the metadata of a header; ValueError or RecursionError where it is not a header's JSON."""
    entries: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] | None = None
    scanner = _Scanner(text)
    if not text.startswith("{"):
        raise ValueError("it does not begin with an object")
    scanner.expect("{")
    if not scanner.take("}"):
        while True:
            name = scanner.string()
            scanner.expect(":")
            if name == "__metadata__":
                if metadata is not None:
                    raise ValueError("__metadata__ comes twice")
                metadata = scanner.string_map()
            else:
                if name in entries:
                    raise ValueError(f"tensor {name!r} comes twice")
                if len(entries) == MAX_TENSORS:
                    raise ValueError(f"more than {MAX_TENSORS:,} tensors")
                entries[name] = scanner.small_object()
            if scanner.take("}"):
                break
            scanner.expect(",")
    scanner.skip()
    if scanner.position != len(text):
        raise ValueError("something follows the object")
    return entries, metadata or {}
