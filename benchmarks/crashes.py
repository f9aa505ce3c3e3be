"""Killed anywhere, a job ends with the same bytes: ``python -m benchmarks.crashes [--every N] [--kills N]``.

Two parts. *Injected*: a crash at every point of slimwright.checkpoint.faults that a job reaches (journal commits, whole
and torn; renames; shard boundaries; writes, whole and torn; steps of publishing), on a small model in several shards,
through both walks. The jobs run in forked children of one process that has imported everything; their model's class is
registered in that process only, so that verification runs there too. *Killed*: kill -9 of real ``python -m slimwright
fit`` processes on the bundled LM, calibrated, at random instants: by turns of the whole run, of the walks that score
options, of the walk that builds, and of publishing; every other turn only the main process dies, and a verifying child
is left to itself.

Each time OUT must be absent or whole; the same command must then end well, with byte-identical weight files, plan and
config, and leave nothing else behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

from benchmarks.common import Row, exit_code, file_contents, forked, publish, scratch
from slimwright.checkpoint import faults
from slimwright.zoo import bundled_path

SEED = 7
WORKERS = 3
KILLED_AT_ONCE = 2
FAMILY = "home_made"
AIMS = ("", "score", "build", "publish")
"""The phases that kills are aimed at by turns: two with walks, one that random instants seldom meet; the whole run."""
COMMIT_BYTES = 4_000
"""The journal is committed this often in the injected part (256 MB otherwise), so that there are many commits."""


class Reference:
    """The result of a run that nothing disturbed, and whether another directory is the same."""

    def __init__(self, out: Path) -> None:
        self.files = {name: value for name, value in file_contents(out).items() if self._decided(name)}
        self.names = set(file_contents(out))

    @staticmethod
    def _decided(name: str) -> bool:
        """Whether the job alone decides a file's bytes (reports and events hold times)."""
        return name not in ("report.json", "report.html", "README.md", "events.jsonl")

    def difference(self, out: Path) -> str | None:
        """What is wrong with a result; None if nothing."""
        found = file_contents(out)
        if set(found) != self.names:
            return f"files {sorted(set(found) ^ self.names)}"
        changed = [name for name, value in self.files.items() if found[name] != value]
        if changed:
            return f"bytes of {changed[0]}"
        return None if json.loads(found["report.json"])["verified"]["ok"] else "not verified"


def settled(out: Path, reference: Reference, status: int) -> str | None:
    """What is wrong after a resumed run: its status, its result, or something left beside it."""
    if status != 0:
        return f"resuming ended with {status}"
    if problem := reference.difference(out):
        return f"resumed result differs: {problem}"
    left = sorted(p.name for p in out.parent.iterdir() if p.name.strip(".").startswith("out") and p != out)
    return f"left behind: {left}" if left else None


# -- injected ------------------------------------------------------------------------------------------------------


def injected(directory: Path, every: int) -> list[Row]:
    """One row per point; ``every`` > 1 tries only every Nth occurrence."""
    import slimwright.job.build
    from slimwright.job.fit import fit
    from tests.families import build

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    slimwright.job.build.COMMIT_BYTES = COMMIT_BYTES
    source = build(FAMILY, directory / "model", torch.bfloat16)

    def run(out: Path, **environment: str) -> int:
        def job() -> None:
            os.environ.update(environment)
            fit(
                str(source), str(out), size="40%", method="quantize/gptq", calibration_tokens=256,
                calibration_length=16, max_shard_bytes=20_000, statistics_cache="off", quiet=True,
            )  # fmt: skip

        child = forked(job, out.parent / "log.txt")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    first = directory / "undisturbed" / "out"
    first.parent.mkdir()
    if run(first, SLIMWRIGHT_COUNT_POINTS=str(directory / "points")) != 0:
        return [{"point": "undisturbed", "ok": False, "problem": (first.parent / "log.txt").read_text()[-500:]}]
    reference = Reference(first)
    points = Counter((directory / "points").read_text().split())
    todo = [(point, number) for point in faults.POINTS for number in range(1, points[point] + 1, every)]
    workers = [
        forked(lambda own=todo[worker::WORKERS], work=directory / f"worker-{worker}": _try(own, run, reference, work))
        for worker in range(WORKERS)
    ]
    if any([os.waitpid(worker, 0)[1] for worker in workers]):
        raise SystemExit("a worker failed")
    lines = [
        line for worker in range(WORKERS) for line in (directory / f"worker-{worker}.jsonl").read_text().splitlines()
    ]
    tried = [json.loads(line) for line in lines]
    rows: list[Row] = []
    for point in faults.POINTS:
        own = [found for found in tried if found["point"] == point]
        problems = [found["problem"] for found in own if found["problem"]]
        rows.append({
            "what": f"injected at {point}", "crashes": sum(found["reached"] for found in own), "of": points[point],
            "out_whole": sum(found["whole"] for found in own), "problem": "; ".join(problems[:3]),
            "ok": any(found["reached"] for found in own) and not problems,
        })  # fmt: skip
    shards = len(list(first.glob("*.safetensors")))
    rows.append({"what": f"shards of the result: {shards}", "ok": shards > 2})
    return rows


def _try(todo: list[tuple[str, int]], run: Callable[..., int], reference: Reference, work: Path) -> None:
    """Crash at each of these points and resume; one line of JSON each."""
    with open(work.with_suffix(".jsonl"), "w", encoding="utf-8") as file:
        for point, number in todo:
            work.mkdir()
            out, where, problem = work / "out", f"{point}:{number}", None
            status = run(out, SLIMWRIGHT_CRASH_AT=where)
            whole = out.exists()
            # How many shards a commit syncs depends on the threads, so that the last points may not be reached.
            reached = status == faults.CRASH_STATUS
            if not reached and status != 0:
                problem = f"not crashed but {status}"
            elif whole and (difference := reference.difference(out)):
                problem = f"OUT is half-written: {difference}"
            problem = problem or settled(out, reference, run(out))
            if problem:
                problem = f"{where}: {problem}: {(work / 'log.txt').read_text()[-300:]}"
            found = {"point": point, "reached": reached, "whole": whole and reached, "problem": problem}
            file.write(json.dumps(found) + "\n")
            file.flush()
            shutil.rmtree(work)


# -- killed --------------------------------------------------------------------------------------------------------


def killed(directory: Path, count: int) -> list[Row]:
    """One row per kill -9 of a real process."""
    model = str(bundled_path())

    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "slimwright", "fit", model, "--size", "40%", "--out", str(out),
            "--calibration-tokens", "8192", "--statistics-cache", "off",
        ]  # fmt: skip

    def run(out: Path) -> tuple[int, str]:
        done = subprocess.run(command(out), capture_output=True, text=True, check=False)
        return done.returncode, done.stderr[-300:]

    first = directory / "undisturbed" / "out"
    first.parent.mkdir()
    started = time.monotonic()
    status, message = run(first)
    seconds = time.monotonic() - started
    if status != 0:
        return [{"what": "undisturbed", "ok": False, "problem": message}]
    reference = Reference(first)
    times = [json.loads(line) for line in (first / "events.jsonl").read_text().splitlines()]
    begun = {phase: next(t["time"] for t in times if t["phase"] == phase) for phase in ("score", "build", "publish")}
    ended = {"score": begun["build"], "build": next(t["time"] for t in times if t["phase"] == "verify")}
    ended["publish"] = times[-1]["time"] + 0.3

    def kill(number: int) -> Row:
        out = directory / f"kill-{number}" / "out"
        choose, aimed = random.Random(SEED * 1000 + number), AIMS[number % len(AIMS)]
        events = out.with_name("out.partial") / "events.jsonl"
        shorter = 1.0
        while True:
            out.parent.mkdir()
            delay = shorter * choose.uniform(0, ended[aimed] - begun[aimed] if aimed else seconds)
            job = subprocess.Popen(
                command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            while aimed and job.poll() is None and _last_event(events).get("phase") != aimed:
                time.sleep(0.002)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(delay)
            if job.poll() is None:
                break
            shorter *= 0.9  # that instant lay after the end: another is drawn
            shutil.rmtree(out.parent)
        (os.killpg if number // len(AIMS) % 2 else os.kill)(job.pid, signal.SIGKILL)
        job.wait()
        phase, there = _phase(events, out), out.exists()
        problem = reference.difference(out) if there else None
        problem = f"OUT is half-written: {problem}" if problem else None
        status, message = run(out)
        problem = problem or settled(out, reference, status)
        shutil.rmtree(out.parent, ignore_errors=True)
        return {
            "what": f"kill -9 after {delay:.2f} s" + (f" of {aimed}" if aimed else ""), "phase": phase, "crashes": 1,
            "of": 1, "out_whole": int(there), "ok": not problem, "problem": f"{problem}: {message}" if problem else "",
        }  # fmt: skip

    with ThreadPoolExecutor(KILLED_AT_ONCE) as pool:
        return list(pool.map(kill, range(count)))


def _last_event(events: Path) -> dict[str, object]:
    try:
        return dict(json.loads(events.read_text().splitlines()[-1]))
    except (OSError, ValueError, IndexError):
        return {}


def _phase(events: Path, out: Path) -> str:
    return "done" if out.exists() else str(_last_event(events).get("phase") or "start")


def main() -> list[Row]:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--every", type=int, default=1, help="try every Nth occurrence of a point (0: none)")
    arguments.add_argument("--kills", type=int, default=20)
    options = arguments.parse_args()
    started = time.time()
    with scratch("crashes") as directory:
        for part in ("injected", "killed"):
            (directory / part).mkdir()
        # First, since it forks and must not have started threads.
        rows = injected(directory / "injected", options.every) if options.every else []
        rows += killed(directory / "killed", options.kills) if options.kills else []
    columns = {
        "what": "crash", "phase": "phase", "crashes": "tried", "of": "of", "out_whole": "OUT already whole", "ok": "ok",
        "problem": "problem",
    }  # fmt: skip
    return publish("crashes", rows, columns, started, seed=SEED, family=FAMILY)


if __name__ == "__main__":
    sys.exit(exit_code(main()))
