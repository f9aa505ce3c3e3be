"""Files of an untrusted directory: read only inside it, only regular ones, up to a size; and atomic small writes."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from slimwright.checkpoint import faults
from slimwright.errors import InputError

LFS_POINTER = b"version https://git-lfs"


def inside(root: Path, path: Path) -> Path:
    """The real path of `path`, which must lie inside `root` once every symlink is followed.

    A snapshot in the hub's cache (`models--NAME/snapshots/REVISION`) links to `models--NAME/blobs`, so there the bound
    is the repository's folder. InputError if the path leads outside, or through a loop of links.
    """
    bound = root.resolve()
    if bound.parent.name == "snapshots" and bound.parent.parent.name.startswith("models--"):
        bound = bound.parent.parent
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be resolved ({error}): replace it by the file itself.") from error
    if not real.is_relative_to(bound):
        raise InputError(f"{shown(path)} leads outside {bound}: copy the file it links to into the directory.")
    return real


def regular(root: Path, path: Path) -> tuple[Path, os.stat_result]:
    """The real path and status of a file inside `root`; InputError unless it is a regular file (a pipe would hang)."""
    real = inside(root, path)
    try:
        status = real.stat()
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} is missing or cannot be read: complete the download.") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{shown(path)} is not a regular file: replace it by the file itself.")
    return real, status


def exists(path: Path) -> bool:
    """Whether there is anything at `path`, a broken link included (which `regular` then reports)."""
    return os.path.lexists(path)


def read_bytes(root: Path, path: Path, limit: int) -> bytes:
    """The content of a regular file inside `root`, of at most `limit` bytes; InputError otherwise."""
    real, status = regular(root, path)
    if status.st_size > limit:
        raise InputError(
            f"{shown(path)} has {status.st_size:,} bytes, more than the {limit:,} such a file may have: replace it."
        )
    try:
        with open(real, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read ({error.strerror}): check its permissions.") from error
    if content.startswith(LFS_POINTER):
        raise InputError(f"{shown(path)} is a git-lfs pointer, not the file: run `git lfs pull` in its repository.")
    return content


def read_json(root: Path, path: Path, limit: int) -> Any:
    """The JSON value in a UTF-8 file inside `root`; InputError if it is not JSON or nests too deep.

    Of a key that comes twice the last counts, as for transformers.
    """
    content = read_bytes(root, path, limit)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(path)} is not valid JSON ({_reason(error)}): download it again.") from error


def read_json_object(root: Path, path: Path, limit: int) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object."""
    value = read_json(root, path, limit)
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)} holds a JSON {type(value).__name__}, not an object: download it again.")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs (json's object_pairs_hook); ValueError if a key comes twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return value


def plain_name(name: object) -> bool:
    """Whether `name` is the name of a file in this very directory, and nothing cleverer."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
        and name.isprintable()
        and len(name.encode()) <= 255
    )


def shown(value: object) -> str:
    """A path or name for an error message: control characters escaped, length bounded."""
    try:
        text = str(value)
    except RecursionError:
        return "…"
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:400])
    return escaped if len(text) <= 400 else escaped + "…"


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees the old file or the new one, whole and on the disk."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def write_json_atomic(path: Path, value: object) -> None:
    """Put `value` at `path` as indented JSON with a newline at its end, atomically (see `write_bytes_atomic`)."""
    content = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomic(path, content.encode("utf-8"))


def write_config_atomic(path: Path, config: dict[str, Any]) -> None:
    """Put a config.json at `path`, atomically. Infinity and NaN, and halves of surrogate pairs, stay what they were.

    Real configs have Infinity (Mamba 2's time_step_limit), which Python and transformers read.
    """
    write_bytes_atomic(path, (json.dumps(config, indent=2) + "\n").encode("ascii"))


def rename(source: Path, target: Path) -> None:
    """Rename and sync the directories, so that the new name outlives a power cut."""
    faults.reach("rename")
    os.rename(source, target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)
    faults.reach("rename")


def sync_directory(path: Path) -> None:
    """fsync a directory: its entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return "it nests too deep" if isinstance(error, RecursionError) else shown(error)
