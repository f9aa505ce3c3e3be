"""Loading a packed model: memory and time, ``python -m benchmarks.loading [--grid int4:g128] [--packed DIR]``.

Qwen2-0.5B's shape (988 MB of random bf16) is fit to one grid. Fresh processes, alternating, then load the result and
the dense source with plain ``from_pretrained``, and read the same bytes; files are in the page cache for all. Memory is
anonymous memory above that after the imports, at most a tenth of the files; imports and loading take at most twice as
long as imports and reading.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import Row, exit_code, publish, scratch
from benchmarks.shapes import QWEN2_05B, make

SHAPES = Path("/tmp/shapes/q05")
RUNS = 5
LOAD = """
import time
began = time.perf_counter()
import json, sys
import slimwright, torch, transformers
from transformers import Qwen2ForCausalLM
from slimwright.job.memory import anonymous_bytes
transformers.utils.logging.disable_progress_bar()
base, started = anonymous_bytes(), time.perf_counter()
imports = started - began
model = Qwen2ForCausalLM.from_pretrained(sys.argv[1])
seconds, memory = time.perf_counter() - started, anonymous_bytes() - base
with torch.no_grad():
    model(torch.arange(16)[None])
print(json.dumps({"seconds": seconds, "memory": memory, "imports": imports,
                  "after_forward": anonymous_bytes() - base}))
"""
READ = """
import json, sys, time
from pathlib import Path
buffer, started = bytearray(16 << 20), time.perf_counter()
for path in Path(sys.argv[1]).glob("*.safetensors"):
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def fresh(code: str, directory: Path) -> dict[str, float]:
    """Run code in a fresh process on a directory; the object it prints."""
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> list[Row]:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--grid", default="int4:g128")
    arguments.add_argument("--packed", type=Path, help="a result of an earlier fit, instead of fitting again")
    arguments.add_argument("--runs", type=int, default=RUNS)
    options = arguments.parse_args()
    started, rows = time.time(), []
    with scratch("loading") as directory:
        source, out = make(QWEN2_05B, SHAPES), options.packed or directory / "out"
        fit = [sys.executable, "-m", "slimwright", "fit", str(source), "--grid", options.grid, "--out", str(out)]
        if options.packed is None:
            subprocess.run(fit, stdout=subprocess.DEVNULL, check=True)
        places = {f"packed, {options.packed or options.grid}": out, "dense, bfloat16": source}
        found: dict[str, list[tuple[dict[str, float], float]]] = {name: [] for name in places}
        for _ in range(options.runs):
            for name, place in places.items():
                reading = fresh(READ, place)["seconds"]
                found[name].append((fresh(LOAD, place), reading))
        for name, place in places.items():
            size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
            loads, reads = [load for load, _ in found[name]], [read for _, read in found[name]]
            seconds = statistics.median(load["seconds"] for load in loads)
            reading, imports = statistics.median(reads), statistics.median(load["imports"] for load in loads)
            ratio = statistics.median((load["imports"] + load["seconds"]) / (load["imports"] + read)
                                      for load, read in zip(loads, reads))  # fmt: skip
            memory = statistics.median(load["memory"] for load in loads)
            rows.append({
                "what": name, "file_mb": size / 1e6, "memory_mb": memory / 1e6, "memory_share": memory / size,
                "after_forward_mb": statistics.median(load["after_forward"] for load in loads) / 1e6,
                "seconds": seconds, "read_seconds": reading, "import_seconds": imports, "ratio": ratio,
            })  # fmt: skip
        rows[0]["ok"] = rows[0]["memory_share"] < 0.1 and rows[0]["ratio"] < 2
    columns = {
        "what": "model", "file_mb": "files, MB", "memory_mb": "anonymous, MB", "memory_share": "of the files",
        "after_forward_mb": "after a forward, MB", "seconds": "load, s", "read_seconds": "read, s",
        "import_seconds": "imports, s", "ratio": "imports + load / imports + read", "ok": "as promised",
    }  # fmt: skip
    return publish("loading", rows, columns, started, runs=options.runs)


if __name__ == "__main__":
    sys.exit(exit_code(main()))
