"""A model much larger than the memory: fit to 4 bits inside a cgroup, and its time against plain reading and writing.

``python -m benchmarks.memory [llama|experts|small|calibrated ...]``. The checkpoints (13 GB each, random bf16, sharded)
are made and removed here. *calibrated* is one of 2.2 GB, by GPTQ on 16,384 random tokens, under 2 GB. Memory is limited
to a bare import of slimwright and its verbs plus the cap; where no cgroup can be made, a watcher kills the job at the
same sum of anonymous memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.common import plain_copy
from benchmarks.shapes import GPT_OSS_13GB, LLAMA_1B, LLAMA_8B_24, QWEN2_05B, make

CAP = 1_500_000_000
DATA_FREE = (
    ["--grid", "int4:g128", "--method", "quantize/rtn,clip=none"],
    ["--grid", "int4:g128", "--data", "none"],
    ["--size", "4.25bit", "--data", "none"],
)
CALIBRATED = (["--grid", "int4:g128", "--method", "quantize/gptq"],)
CASES = {
    "llama": (LLAMA_8B_24, CAP, DATA_FREE),
    "experts": (GPT_OSS_13GB, CAP, DATA_FREE),
    "small": (QWEN2_05B, CAP, DATA_FREE),
    "calibrated": (LLAMA_1B, 2_000_000_000, CALIBRATED),
}
"""Shape, bytes of memory above a bare import, arguments of each job."""
CGROUP = Path("/sys/fs/cgroup/memory")


def bare_import(module: str = "slimwright.job.fit") -> int:
    """Anonymous bytes of a process that has imported a job."""
    code = f"import {module}; from slimwright.job.memory import anonymous_bytes; print(anonymous_bytes())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def in_cgroup(limit: int) -> tuple[Callable[[], None] | None, Path | None]:
    """A function for the child to call before it starts, which limits it; None where no cgroup can be made."""
    group = CGROUP / f"slimwright-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        return None, None
    return lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None, group


def floor(model: Path, written: int) -> float:
    """Seconds to read the source's weight files and to write ``written`` bytes with fsync."""
    return plain_copy(sorted(model.glob("*.safetensors")), written, model.parent / "floor.bin")


def run(name: str, root: Path, arguments: list[str]) -> dict[str, object]:
    """One case: the job inside the limit, the floor before and after it."""
    shape, cap, _ = CASES[name]
    model = make(shape, root / name)
    out = root / f"{name}-out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    limit = bare_import() + cap
    enter, group = in_cgroup(limit)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    before = floor(model, size * 26 // 100)
    command = [
        sys.executable, "-m", "slimwright", "fit", str(model), "--out", str(out), "--json",
        "--job-memory", str(cap), *arguments,
    ]  # fmt: skip
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)  # noqa: PLW1509
    if enter is None:
        _watch(child, limit)
    output, _ = child.communicate()
    seconds = time.perf_counter() - started
    result: dict[str, object] = {"case": name, "arguments": " ".join(arguments), "exit": child.returncode}
    if group is not None:
        result["cgroup_peak"] = int((group / "memory.max_usage_in_bytes").read_text())
        result["cgroup_failcnt"] = int((group / "memory.failcnt").read_text())
        group.rmdir()
    if child.returncode == 0:
        report = json.loads(output)
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        starts = {e["phase"]: e["time"] for e in reversed(events) if e.get("phase")}
        order = sorted(starts.items(), key=lambda item: item[1])
        ends = [moment for _, moment in order[1:]] + [events[-1]["time"]]
        result["phases"] = {phase: round(end - start, 1) for (phase, start), end in zip(order, ends, strict=True)}
        written = report["size"]["after"]
        floors = (before, floor(model, written))
        result |= {
            "bytes_in": size, "bytes_out": written, "seconds": seconds, "floor_seconds": floors,
            "multiple": seconds / (sum(floors) / 2),
            "build_multiple": result["phases"]["build"] / (sum(floors) / 2),  # type: ignore[index]
            "peak_memory_bytes": report["job"]["peak_memory_bytes"], "predicted": report["job"]["predicted"],
            "verified": report["verified"],
        }  # fmt: skip
        shutil.rmtree(out)
    return result


def _watch(child: subprocess.Popen[str], limit: int) -> None:
    """Kill the job when the anonymous memory of its processes passes the limit."""
    import threading

    from slimwright.job.memory import anonymous_bytes

    def watch() -> None:
        while child.poll() is None:
            tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
            if sum(anonymous_bytes(process.pid) for process in tree) > limit:
                for process in tree:
                    process.kill()
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()


def main(names: list[str], root: Path) -> list[dict[str, object]]:
    """All cases named, each with its arguments."""
    results = []
    for name in names:
        for arguments in CASES[name][2]:
            result = run(name, root, arguments)
            results.append(result)
            print(json.dumps(result), flush=True)
        if os.environ.get("KEEP_SHAPES") != "1":
            shutil.rmtree(root / name)
    return results


if __name__ == "__main__":
    found = main(
        sys.argv[1:] or ["llama", "experts", "calibrated"], Path(os.environ.get("BENCH_DIRECTORY", "/tmp/shapes"))
    )
    sys.exit(any(result["exit"] != 0 for result in found))
