"""What a checkpoint is (fingerprint, lineage), what its files are (hash), and whether they changed (state)."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimwright.checkpoint.header import DTYPE_NAMES
from slimwright.checkpoint.reader import Checkpoint
from slimwright.errors import InputError

PAGE = 4096
WHOLE_BELOW = 1 << 20
SAMPLED_PAGES = 64
_CHUNK = 4 << 20
_MAX_GENERATIONS = 100


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) of the weights: name, dtype, shape and content of every tensor, in the order of the names.

    It depends neither on config.json nor on how the tensors lie in files. The content of a tensor of more than 1 MB is
    a *sample*: its first and last 4 KiB and 64 pages of 4 KiB evenly between. So it takes seconds where reading all
    takes minutes, and any training, merging or conversion shows, because these change nearly every element; an edit of
    a few elements may not. Where every byte must count, use `weights_hash`.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        content = hashlib.sha256(b"".join(checkpoint.read_pages(name, _sampled(info.nbytes))))
        record = [name, DTYPE_NAMES[info.dtype], list(info.shape), content.hexdigest()]
        digest.update(json.dumps(record).encode() + b"\n")
    return digest.hexdigest()


def weights_hash(directory: str | Path) -> str:
    """SHA-256 (hex) over all bytes of the weight files of a model directory, in the order of the reader's `files`."""
    return files_hash(Checkpoint.open(directory).files)


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over all bytes of files, in order."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def source_state(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) of config.json, every tensor's place, and every weight file's size and time of change.

    For the key of a journal: it costs nothing, and changes whenever the source's files do.
    """
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    tensors = [
        (info.name, DTYPE_NAMES[info.dtype], info.shape, info.file.name, info.start, info.stop)
        for info in checkpoint.tensors.values()
    ]
    record = [checkpoint.config, files, tensors]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sampled(nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the parts of a tensor's data that its fingerprint reads."""
    if nbytes <= WHOLE_BELOW:
        yield 0, nbytes
        return
    last = nbytes - PAGE
    for index in range(SAMPLED_PAGES + 2):
        yield last * index // (SAMPLED_PAGES + 1), PAGE


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from: its own fingerprint, its parents' lineages, and the edits that made it of them.

    An edit is a JSON object that says what was done and to which tensors. A model with no known parent has neither.
    """

    fingerprint: str
    parents: tuple["Lineage", ...] = ()
    edits: tuple[dict[str, Any], ...] = ()

    def edits_since(self, ancestor: str) -> tuple[dict[str, Any], ...] | None:
        """The edits between the ancestor with this fingerprint and this model, oldest first; None if it is none.

        An adapter of the ancestor fits this model if none of them touches what it adapts.
        """
        if self.fingerprint == ancestor:
            return ()
        for parent in self.parents:
            earlier = parent.edits_since(ancestor)
            if earlier is not None:
                return (*earlier, *self.edits)
        return None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return {
            "fingerprint": self.fingerprint,
            "parents": [parent.to_json() for parent in self.parents],
            "edits": [dict(edit) for edit in self.edits],
        }

    @classmethod
    def from_json(cls, value: object, generations: int = _MAX_GENERATIONS) -> "Lineage":
        """Read what `to_json` gave. InputError if it is anything else, or more than 100 generations deep."""
        fields = value if isinstance(value, dict) else {}
        name, parents, edits = fields.get("fingerprint"), fields.get("parents", []), fields.get("edits", [])
        if (
            generations == 0
            or not isinstance(name, str)
            or not isinstance(parents, list)
            or not isinstance(edits, list)
            or not all(isinstance(edit, dict) for edit in edits)
        ):
            raise InputError("the model's lineage is malformed: restore the file that holds it, or remove its lineage.")
        return cls(name, tuple(cls.from_json(parent, generations - 1) for parent in parents), tuple(edits))
