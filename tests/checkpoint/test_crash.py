"""A job that is killed at any point continues, ends with the same bytes, and leaves no half-written output."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from slimwright.checkpoint import CheckpointWriter, Journal, TensorEntry, claim, faults, plan_layout
from slimwright.errors import InputError, SlimwrightError

UNITS = 4
ENTRIES = [TensorEntry(f"w.{unit}", torch.float32, (8, 3)) for unit in range(UNITS)]


def job(out: Path, log: Path) -> None:
    """A whole job in miniature: each unit writes one tensor in two tiles, made from what the unit before noted."""
    with claim(out, "key") as claimed:
        if claimed.status == "finished":
            return
        layout = plan_layout(ENTRIES, max_shard_bytes=500)
        journal = Journal.open(claimed.scratch / "journal.jsonl", "key")
        with journal, CheckpointWriter(claimed.partial, layout) as writer:
            seed = 1
            for unit in range(UNITS):
                if f"unit {unit}" not in journal.done or writer.fresh:
                    with open(log, "a") as file:
                        file.write(f"{unit}\n")
                    tensor = torch.arange(24.0).view(8, 3) * seed
                    writer.write(f"w.{unit}", tensor[:4])
                    writer.write(f"w.{unit}", tensor[4:], 4 * 3 * 4)
                    writer.sync()
                    journal.append(f"unit {unit}", {"seed": seed * 3})
                    journal.commit()
                seed = journal.done[f"unit {unit}"]["seed"]
        (claimed.partial / "config.json").write_text("{}")
        claimed.publish()


def in_child(out: Path, log: Path, **environment: str) -> int:
    """The exit status of the job in a forked child (137: killed by the injected crash)."""
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(environment)
            job(out, log)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Counter[str]]:
    """The files of a run without a crash, and how often it reaches each point."""
    folder = tmp_path_factory.mktemp("reference")
    assert in_child(folder / "out", folder / "log", SLIMWRIGHT_COUNT_POINTS=str(folder / "points")) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["log", "out", "points"]
    return content(folder / "out"), Counter((folder / "points").read_text().split())


def test_every_point_is_reached(reference: tuple[dict[str, bytes], Counter[str]]) -> None:
    files, points = reference
    assert set(points) == set(faults.POINTS)
    assert points["journal"] == 2 * UNITS and points["write"] == 2 * UNITS
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(files) == ["config.json", "job.json", *shards]


def test_a_crash_anywhere(tmp_path: Path, reference: tuple[dict[str, bytes], Counter[str]]) -> None:
    files, points = reference
    for point, count in points.items():
        for number in range(1, count + 1):
            where = f"{point}:{number}"
            folder = tmp_path / where
            folder.mkdir()
            out, log = folder / "out", folder / "log"
            assert in_child(out, log, SLIMWRIGHT_CRASH_AT=where) == faults.CRASH_STATUS, where
            assert not out.exists() or content(out) == files, where
            before = len(log.read_text().split()) if log.exists() else 0
            assert in_child(out, log) == 0, where
            assert content(out) == files, where
            assert {path.name for path in folder.iterdir()} == {"out", "log"}, where
            assert len(log.read_text().split()) <= UNITS + 1, f"{where}: finished units were done again"
            assert before <= UNITS
            shutil.rmtree(folder)


def test_two_crashes_in_a_row(tmp_path: Path, reference: tuple[dict[str, bytes], Counter[str]]) -> None:
    files, _ = reference
    out, log = tmp_path / "out", tmp_path / "log"
    for where in ("torn-journal:2", "journal:3", "rename:2", "torn-write:1", "publish:3", "publish:2"):
        assert in_child(out, log, SLIMWRIGHT_CRASH_AT=where) == faults.CRASH_STATUS, where
        assert not out.exists()
    assert in_child(out, log) == 0
    assert content(out) == files


def test_claims(tmp_path: Path) -> None:
    out = tmp_path / "small model"
    with claim(out, "key") as first:
        assert (first.status, out.exists()) == ("new", False)
        assert first.partial == tmp_path / "small model.partial"
        (first.partial / "data").write_text("x")
        (first.scratch / "spill").write_text("y")
    with claim(out, "key") as again:
        assert again.status == "resumed"
        assert (again.partial / "data").read_text() == "x"
    with pytest.raises(InputError, match=r"`rm -r '.*small model\.partial'`"):
        claim(out, "other")
    out.mkdir()
    with claim(out, "key") as last:  # an empty directory is as good as none
        last.publish()
    assert sorted(path.name for path in out.iterdir()) == ["data", "job.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["small model"]
    finished = claim(out, "key")
    assert finished.status == "finished"
    with pytest.raises(ValueError, match="not held"):
        finished.publish()
    with pytest.raises(InputError, match="not empty"):
        claim(out, "other")


def test_what_is_not_ours_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="rm -r"):
        claim(tmp_path / "a", "key")
    (tmp_path / "b").write_text("")
    with pytest.raises(InputError, match="is a file"):
        claim(tmp_path / "b", "key")
    (tmp_path / ".c.scratch").mkdir()
    (tmp_path / ".c.scratch" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="in the way"):
        claim(tmp_path / "c", "key")
    (tmp_path / "d.partial").symlink_to(tmp_path / "a.partial")
    with pytest.raises(InputError, match="cannot be made"):
        claim(tmp_path / "d", "key")
    with pytest.raises(InputError, match="cannot be used"):
        claim(tmp_path / "b" / "below", "key")
    with pytest.raises(InputError, match="not empty"):
        claim("/proc", "key")
    assert (tmp_path / "a.partial" / "thesis.txt").exists() and (tmp_path / ".c.scratch" / "thesis.txt").exists()


def test_an_output_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    claimed = claim(tmp_path / "out", "key")
    (claimed.partial / "data").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("y")
    with pytest.raises(SlimwrightError, match="cannot be put in place"):
        claimed.publish()
    claimed.release()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "y"
    (tmp_path / "out" / "thesis.txt").unlink()
    with claim(tmp_path / "out", "key") as again:
        again.publish()
    assert (tmp_path / "out" / "data").read_text() == "x"


def test_two_processes_never_work_on_one_output(tmp_path: Path) -> None:
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go[1])  # so that the parent's end, however it comes, ends the wait below
        held = claim(tmp_path / "out", "key")
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        held.release()
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(InputError, match="in use by another process"):
            claim(tmp_path / "out", "key")
    finally:
        os.close(go[1])
        os.waitpid(child, 0)
    claim(tmp_path / "out", "key").release()
