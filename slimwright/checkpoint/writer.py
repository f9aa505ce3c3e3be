"""Weight files written in place, tile by tile, so that no tensor ever has to be whole in memory."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from slimwright.checkpoint import faults
from slimwright.checkpoint.files import rename, shown, sync_directory, write_json_atomic
from slimwright.checkpoint.layout import Layout, PlacedTensor
from slimwright.checkpoint.reader import INDEX_FILE
from slimwright.errors import InputError, SlimwrightError


class CheckpointWriter:
    """Writes a layout's tensors into the shard files of `directory`.

    A shard appears at its full size, with its header, in one rename; its data is zero until written. Opened on a
    directory that has the shards already, it keeps what they hold: `fresh` names the shards that were made now (units
    of a journal that wrote into one of those are void). Call `sync` before noting in a journal that something is
    written. `names` gives the layout's name of a tensor that `write` knows by another one. Safe to use from several
    threads. `with` closes it.

    Raises InputError if the directory holds other weights, or the disk has no room (nothing is kept in that case).
    """

    def __init__(self, directory: Path, layout: Layout, names: Mapping[str, str] | None = None) -> None:
        self.names = names or {}
        self.directory = directory
        self.layout = layout
        self._placed: dict[str, tuple[int, PlacedTensor]] = {}
        self._descriptors: list[int] = []
        self._unsynced: set[int] = set()
        self._lock = threading.Lock()
        fresh: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)
        files = {shard.file_name for shard in layout.shards}
        strangers = sorted(file.name for file in directory.glob("*.safetensors") if file.name not in files)
        if strangers:
            raise _not_of_this_plan(directory / strangers[0])
        try:
            for number, shard in enumerate(layout.shards):
                path = directory / shard.file_name
                if not path.exists():
                    _create(path, shard.head, shard.nbytes)
                    fresh.append(shard.file_name)
                descriptor = os.open(path, os.O_RDWR)
                self._descriptors.append(descriptor)
                head = os.pread(descriptor, len(shard.head), 0)
                if os.fstat(descriptor).st_size != shard.nbytes or head != shard.head:
                    raise _not_of_this_plan(path)
                for placed in shard.tensors:
                    self._placed[placed.entry.name] = (number, placed)
            if layout.index is not None:
                write_json_atomic(directory / INDEX_FILE, layout.index)
        except BaseException:
            self.close()
            raise
        self.fresh = tuple(fresh)

    def write(self, name: str, tensor: torch.Tensor, offset_bytes: int = 0) -> None:
        """Write the elements of `tensor`, in order, into tensor `name` from byte `offset_bytes` of its data.

        ValueError if the dtype is another than planned, or the bytes do not lie inside the planned tensor.
        SlimwrightError if the disk is full.
        """
        number, placed = self._placed[self.names.get(name, name)]
        entry = placed.entry
        nbytes = tensor.numel() * tensor.element_size()
        if tensor.dtype != entry.dtype:
            raise ValueError(f"{name} is planned as {entry.dtype}, not {tensor.dtype}")
        if offset_bytes < 0 or offset_bytes % entry.dtype.itemsize or offset_bytes + nbytes > entry.nbytes:
            raise ValueError(f"{name} has {entry.nbytes} bytes; {nbytes} at {offset_bytes} do not fit")
        if nbytes == 0:
            return
        flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
        flat = flat.view(torch.uint8)
        content = memoryview(flat.numpy().data)
        descriptor, position = self._descriptors[number], placed.start + offset_bytes
        faults.reach("write")
        faults.reach("torn-write", lambda: os.pwrite(descriptor, content[: nbytes // 2], position))
        with self._lock:
            self._unsynced.add(number)
        try:
            while content:
                written = os.pwrite(descriptor, content, position)
                content, position = content[written:], position + written
        except OSError as error:
            shard = self.directory / self.layout.shards[number].file_name
            raise SlimwrightError(
                f"{shown(shard)} cannot be written ({error.strerror}): run again to resume."
            ) from error

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        with self._lock:
            unsynced = sorted(self._unsynced)
            self._unsynced.clear()
        for number in unsynced:
            faults.reach("shard")
            os.fsync(self._descriptors[number])
            faults.reach("shard")

    def close(self) -> None:
        """Sync and close the files; closing twice is allowed."""
        if len(self._descriptors) == len(self.layout.shards):
            self.sync()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _create(path: Path, head: bytes, nbytes: int) -> None:
    """Make a file of `nbytes` with its space reserved and its head written, on the disk before it has its name."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _reserve(descriptor, nbytes)
        os.pwrite(descriptor, head, 0)
        os.fsync(descriptor)
    except OSError as error:
        temporary.unlink()
        raise InputError(
            f"{shown(path.parent)} has no room for {nbytes:,} bytes ({error.strerror}): free space or choose another "
            "--out."
        ) from error
    finally:
        os.close(descriptor)
    rename(temporary, path)
    sync_directory(path.parent)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Give an empty file its size, with blocks set aside where the system can, so that a full disk shows now."""
    status = os.fstatvfs(descriptor)
    if status.f_bavail * status.f_frsize < nbytes:
        raise OSError(28, "No space left on device")
    os.ftruncate(descriptor, nbytes)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno == 28:
                raise


def _not_of_this_plan(path: Path) -> InputError:
    return InputError(f"{shown(path)} is not of this job's plan: remove {shown(path.parent)} and start again.")
