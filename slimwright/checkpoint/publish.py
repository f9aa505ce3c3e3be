"""Claiming an output directory, and publishing it in one rename: OUT exists only when it is whole.

A job works in `OUT.partial`, beside OUT. `OUT.partial/job.json` says which job; it stays in OUT, which is how a
finished job is recognised when it is run again. What only the job needs (journal, spilled statistics) lives in
`Claim.scratch`, inside the partial directory, and never reaches OUT. Publishing syncs everything, moves the scratch
aside, renames OUT.partial to OUT, and removes the scratch; a crash between any two of these steps is repaired by the
next claim.
"""

import fcntl
import os
import shlex
import shutil
from pathlib import Path
from typing import Literal

from slimwright.checkpoint import faults
from slimwright.checkpoint.files import exists, read_json_object, rename, shown, sync_directory, write_json_atomic
from slimwright.errors import InputError, SlimwrightError

JOB_FILE = "job.json"
FORMAT_VERSION = 1
_SCRATCH = ".scratch"


class InUseError(InputError):
    """Another process holds the claim."""


def partial_directory(out: Path) -> Path:
    """Where a job for `out` works until it is done."""
    return out.with_name(out.name + ".partial")


class Claim:
    """The right to produce one output directory, held by this process until `release` or `publish`.

    Attributes:
        status: "new", "resumed" (a partial directory of the same job was found) or "finished" (nothing to do).
        out: the directory to be produced, absolute.
        partial: where it is produced.
        scratch: a directory for the job's own files, kept over crashes and removed at the end.
    """

    def __init__(
        self, out: Path, job_key: str, status: Literal["new", "resumed", "finished"], lock: int | None
    ) -> None:
        self.out = out
        self.job_key = job_key
        self.status = status
        self.partial = partial_directory(out)
        self.scratch = self.partial / _SCRATCH
        self._lock = lock

    def publish(self) -> None:
        """Make OUT of the partial directory: everything on the disk first, then one rename. Releases the claim.

        SlimwrightError if OUT has been filled by another meanwhile; the partial directory then stays.
        """
        if self._lock is None:
            raise ValueError("the claim is not held")
        for leftover in self.partial.glob("**/.*.new"):
            leftover.unlink()
        faults.reach("publish")
        _sync_tree(self.partial, self.scratch)
        faults.reach("publish")
        retired = _retired_scratch(self.out)
        _remove_retired(retired)
        rename(self.scratch, retired)
        faults.reach("publish")
        try:
            rename(self.partial, self.out)  # replaces an empty directory, and nothing else
        except OSError as error:
            rename(retired, self.scratch)
            raise SlimwrightError(
                f"{shown(self.out)} cannot be put in place ({error.strerror}): the result is whole in "
                f"{shown(self.partial)}; free the name and run again."
            ) from error
        faults.reach("publish")
        _remove_retired(retired)
        faults.reach("publish")
        self.release()

    def release(self) -> None:
        """Let another process claim the same output. What has been written stays, to be resumed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def claim(out: str | Path, job_key: str) -> Claim:
    """Claim `out` for the job `job_key`, continuing what the same job began.

    InputError if OUT is a file, a mount point, or holds anything but the result of this very job; if OUT.partial is
    another job's (naming the command that removes it); if another process holds the claim (InUseError); or if it cannot
    be made.
    """
    path = Path(os.path.realpath(Path(out).expanduser()))
    while True:
        if exists(path) and not os.path.isdir(path):
            raise InputError(f"{shown(path)} is a file: choose another --out.")
        if _filled(path):
            if _job_of(path) != job_key:
                raise InputError(f"{shown(path)} is not empty: remove it, or choose another --out.")
            _remove_retired(_retired_scratch(path))
            return Claim(path, job_key, "finished", None)
        if os.path.ismount(path):
            raise InputError(f"{shown(path)} is a mount point: choose a directory inside it as --out.")
        lock = _lock(partial_directory(path))
        if lock is None:
            continue  # it was published or removed between the two looks: look again
        try:
            status = _begin(path, job_key)
        except BaseException:
            os.close(lock)
            raise
        return Claim(path, job_key, status, lock)


def _filled(path: Path) -> bool:
    """Whether there is a directory with anything in it."""
    try:
        return bool(os.listdir(path))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be used ({error.strerror}): choose another --out.") from error


def _lock(partial: Path) -> int | None:
    """A locked descriptor of the partial directory, made if need be; None if it is no longer at that path."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{shown(partial)} cannot be made ({error.strerror}): choose another --out.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
            return descriptor
    except BlockingIOError as error:
        os.close(descriptor)
        raise InUseError(
            f"{shown(partial)} is in use by another process: wait for it to end, or choose another --out."
        ) from error
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def _begin(out: Path, job_key: str) -> Literal["new", "resumed"]:
    """Bring the partial directory, which is locked, to where the job can start or go on."""
    partial = partial_directory(out)
    scratch, retired = partial / _SCRATCH, _retired_scratch(out)
    found = _job_of(partial)
    if exists(retired) and _job_of(retired) is None:
        raise InputError(f"{shown(retired)} is in the way: move it, or choose another --out.")
    if found is None:
        if any(name != f".{JOB_FILE}.new" for name in os.listdir(partial)):
            raise _foreign(partial)
        write_json_atomic(partial / JOB_FILE, {"format_version": FORMAT_VERSION, "job": job_key})
    elif found != job_key:
        raise _foreign(partial)
    if not scratch.is_dir() and found is not None and _job_of(retired) == job_key:
        rename(retired, scratch)  # the crash came between the two renames of publishing
    scratch.mkdir(exist_ok=True)
    if _job_of(scratch) is None:
        write_json_atomic(scratch / JOB_FILE, {"format_version": FORMAT_VERSION, "job": job_key})
    return "new" if found is None else "resumed"


def _foreign(partial: Path) -> InputError:
    return InputError(
        f"{shown(partial)} is left of another job: remove it with `rm -r {shlex.quote(str(partial))}`, or choose "
        "another --out."
    )


def _retired_scratch(out: Path) -> Path:
    return out.with_name(f".{out.name}.scratch")


def _job_of(directory: Path) -> str | None:
    """The job that made a directory, or None if it does not say."""
    if not directory.is_dir() or not exists(directory / JOB_FILE):
        return None
    try:
        job = read_json_object(directory, directory / JOB_FILE, 1 << 20).get("job")
    except InputError:
        return None
    return job if isinstance(job, str) else None


def _remove_retired(directory: Path) -> None:
    """Remove a retired scratch directory, this job's or an earlier one's for the same OUT; never anything else.

    The file that marks it goes last, so that a crash on the way leaves it recognisable.
    """
    if directory.is_symlink() or _job_of(directory) is None:
        return
    for path in directory.iterdir():
        if path.name != JOB_FILE:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _sync_tree(directory: Path, excluded: Path) -> None:
    """fsync every file and directory below `directory`, and itself, leaving out `excluded`."""
    for folder, names, files in os.walk(directory, topdown=True):
        names[:] = [name for name in names if Path(folder, name) != excluded]
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_directory(Path(folder))
