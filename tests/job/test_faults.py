"""A job that is killed at any point continues, ends with the same bytes, and leaves no half-written output.

The job runs in a forked child of the test process, which needs no new start of Python. Forking is safe as long as this
process has started no thread that the child would need: the job's own pool is made anew in the child.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from slimwright.checkpoint import faults
from slimwright.errors import InputError, SlimwrightError
from slimwright.job import parallel
from slimwright.job.fit import FitOptions
from slimwright.job.work import Work
from tests.job.conftest import files, fitted, in_forked_child, tiny

JOB = {"size": "40%", "max_shard_bytes": 40_000}
"""A search, and three shards: every kind of point is reached."""

COMMIT_BYTES = 8_000
"""So that the small job commits several times."""


@pytest.fixture(autouse=True)
def many_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimwright.job.build.COMMIT_BYTES", COMMIT_BYTES)
    monkeypatch.setattr("slimwright.job.choosing.COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(parallel, "_pool", None)  # threads do not survive a fork


def in_child(out: Path, **environment: str) -> int:
    """The exit status of the job in a forked child (137: killed by the injected crash)."""
    return in_forked_child(lambda: fitted(tiny("llama"), out, **JOB), **environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Counter[str]]:
    """The weight files of an undisturbed run, and how often it reaches each point."""
    folder = tmp_path_factory.mktemp("whole")
    tiny("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimwright.job.build.COMMIT_BYTES", COMMIT_BYTES)
        patch.setattr("slimwright.job.choosing.COMMIT_SECONDS", -1.0)
        patch.setattr(parallel, "_pool", None)
        assert in_child(folder / "out", SLIMWRIGHT_COUNT_POINTS=str(folder / "points")) == 0
    return files(folder / "out"), Counter((folder / "points").read_text().split())


def test_every_point_is_reached(whole: tuple[dict[str, bytes], Counter[str]]) -> None:
    weights, points = whole
    assert set(points) == set(faults.POINTS) and len(weights) > 2
    assert points["journal"] >= 8 and points["shard"] >= 8 and points["write"] >= 30


def crash_and_resume(folder: Path, where: str, weights: dict[str, bytes]) -> None:
    out = folder / "out"
    assert in_child(out, SLIMWRIGHT_CRASH_AT=where) == faults.CRASH_STATUS, where
    assert not out.exists() or files(out) == weights, f"{where}: half-written"
    assert in_child(out) == 0, where
    assert files(out) == weights, where
    assert json.loads((out / "report.json").read_text())["verified"]["ok"], where
    assert [path.name for path in folder.iterdir()] == ["out"], where
    shutil.rmtree(out)


@pytest.mark.parametrize("point", faults.POINTS)
def test_a_crash_in_the_middle(point: str, tmp_path: Path, whole: tuple[dict[str, bytes], Counter[str]]) -> None:
    weights, points = whole
    crash_and_resume(tmp_path, f"{point}:{max(1, points[point] * 2 // 3)}", weights)


@pytest.mark.slow
@pytest.mark.parametrize("point", faults.POINTS)
def test_a_crash_anywhere(point: str, tmp_path: Path, whole: tuple[dict[str, bytes], Counter[str]]) -> None:
    weights, points = whole
    for number in range(1, points[point] + 1):
        crash_and_resume(tmp_path, f"{point}:{number}", weights)


def test_crash_after_crash(tmp_path: Path, whole: tuple[dict[str, bytes], Counter[str]]) -> None:
    weights, _ = whole
    out = tmp_path / "out"
    for where in ("torn-journal:1", "torn-write:9", "journal:5", "publish:3", "publish:2"):
        assert in_child(out, SLIMWRIGHT_CRASH_AT=where) == faults.CRASH_STATUS, where
        assert not out.exists(), where
    assert in_child(out) == 0
    assert files(out) == weights


def interrupt(monkeypatch: pytest.MonkeyPatch, out: Path, error: BaseException, after: int = 8) -> None:
    """Run the job and raise ``error`` in its build."""
    from slimwright.job import build as building

    honest, seen = building.build, 0

    def build(source: Any, structure: Any, units: Any, writer: Any, journal: Any, step: Any, *data: Any) -> Any:
        def failing(done: int, total: int) -> None:
            nonlocal seen
            seen += 1
            if seen == after:
                raise error
            step(done, total)

        return honest(source, structure, units, writer, journal, failing, *data)

    with monkeypatch.context() as patch:
        patch.setattr("slimwright.job.work.build", build)
        with pytest.raises(type(error)):
            fitted(tiny("llama"), out, **JOB)


def kept_units(capfd: pytest.CaptureFixture[str], out: Path) -> str:
    """What a resuming run logs."""
    capfd.readouterr()
    fitted(tiny("llama"), out, **JOB, quiet=False)
    return capfd.readouterr().err


def test_an_interrupted_job_keeps_what_is_finished(
    tmp_path: Path,
    whole: tuple[dict[str, bytes], Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, out, KeyboardInterrupt())
    assert not out.exists() and out.with_name("out.partial").is_dir()
    assert "finished units are kept" in kept_units(capfd, out)
    assert files(out) == whole[0]
    again = fitted(tiny("llama"), out, **JOB)
    assert any("finished result of this same job" in note for note in again["notes"])
    assert again["hash"] == json.loads((out / "report.json").read_text())["hash"]


def test_another_number_of_threads_starts_the_units_over_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, out, KeyboardInterrupt())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert "threads, instruction set, torch or slimwright differ" in kept_units(capfd, out)
    finally:
        torch.set_num_threads(threads)


def test_the_partial_directory_of_another_job_is_refused_with_the_command_that_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, out, KeyboardInterrupt())
    with pytest.raises(InputError, match=r"`rm -r .*out\.partial`"):
        fitted(tiny("llama"), out, size="50%")
    with pytest.raises(InputError, match="not empty"):
        fitted(tiny("llama"), tmp_path, **JOB)


def test_the_time_limit_stops_the_job_which_then_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[dict[str, bytes], Counter[str]]
) -> None:
    out = tmp_path / "out"
    clock = time.monotonic
    ahead = 0.0
    monkeypatch.setattr("slimwright.job.fit.time.monotonic", lambda: clock() + ahead)
    honest = Work._build

    def late(job: Work, *given: Any) -> Any:
        nonlocal ahead
        ahead = 10_000.0
        return honest(job, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_build", late)
        with pytest.raises(SlimwrightError, match="--job-time 1000 s is over; run the same command again"):
            fitted(tiny("llama"), out, **JOB, job_time=1000.0)
    fitted(tiny("llama"), out, **JOB)
    assert files(out) == whole[0]


def test_the_memory_cap_stops_the_job_which_then_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[dict[str, bytes], Counter[str]]
) -> None:
    """While the weights are built, something takes more than the cap allows."""
    out = tmp_path / "out"
    honest, hoard = Work._build, []

    def greedy(job: Work, *given: Any) -> Any:
        hoard.append(torch.ones(((job.watch.cap or 0) >> 2) + (16 << 20)))
        deadline = time.monotonic() + 60
        while not job.watch.exceeded and time.monotonic() < deadline:
            time.sleep(0.001)
        return honest(job, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_build", greedy)
        with pytest.raises(SlimwrightError, match="--job-memory allows 800 MB; run the same command with a larger"):
            fitted(tiny("llama"), out, **JOB, job_memory="800MB")
    hoard.clear()
    assert not out.exists() and out.with_name("out.partial").is_dir()
    report = fitted(tiny("llama"), out, **JOB, job_memory="3GB")
    assert files(out) == whole[0]
    assert 0 < report["job"]["peak_memory_bytes"] < 3e9


def test_what_does_not_change_the_bytes_is_no_part_of_the_job() -> None:
    """A job that was stopped for want of memory or time is the same job with more of it."""
    asked = FitOptions("m", size="40%")
    assert asked.recipe() == FitOptions("m", size="40%", job_memory="3GB", job_time=5.0, quiet=True).recipe()
    assert asked.recipe() != FitOptions("m", size="41%").recipe() != FitOptions("m", size="41%", seed=1).recipe()
