"""GPTQ of a 92M-parameter Llama shape beside llm-compressor's, and as a multiple of what it must at least take.

``python -m benchmarks.gptq``. 32 sequences of 512 tokens, others in every run, 4 bits symmetric, groups of 128, damping
0.01, columns by activation with static groups, ranges from minimum and maximum, the head and the embedding left alone:
the same in both. Loading and saving are excluded in both (ours writes its result as it goes, which is included);
memory is anonymous, imports and model included. The held-out error is that of the logits, the mean over the runs: in
one run it hangs on the draw, so that two solvers that do every layer equally well differ by a percent or so, either
way. CPU seconds are those of the timed part of the last run: on a busy machine they say more than the wall time.
``PEERS`` names the directory of the peers' environments (``c`` has llm-compressor); without it ours is timed alone.
Runs alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Row, publish
from benchmarks.shapes import make
from slimwright.zoo import bundled_path

LLAMA_92M = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 2048,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
RUNS = int(os.environ.get("RUNS", "3"))
SEQUENCES, LENGTH = 32, 512
METHOD = "quantize/gptq,clip=none,damp=0.01,act_order=true"
CHILD = """
import json, sys, threading, time, torch
import slimwright.job.calibration as calibration
from slimwright.calibrate.tokens import Samples
from slimwright.calibrate.walk import Batch
from slimwright.job.fit import fit
from slimwright.job.memory import anonymous_bytes
from slimwright.job.work import Work
build, found, running = Work._build, {"peak_bytes": 0}, threading.Event()
def watch():
    while not running.wait(0.02):
        found["peak_bytes"] = max(found["peak_bytes"], anonymous_bytes())
def watched(self, state):
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, spent = time.perf_counter(), time.process_time()
    build(self, state)
    found["seconds"], found["cpu_seconds"] = time.perf_counter() - started, time.process_time() - spent
    running.set()
    watcher.join()
Work._build = watched
rows = torch.load(sys.argv[2])
batches = tuple(Batch({"input_ids": part}) for part in rows.split(4))
calibration.samples = lambda *a, **k: Samples(batches, rows.numel(), "random tokens", "0" * 64)
fit(sys.argv[1], sys.argv[3], grid="int4:g128:sym", method=sys.argv[4], rules=["embed: keep"], quiet=True)
print(json.dumps(found))
"""


def ours(model: Path, tokens: Path, heldout: Path, out: Path) -> tuple[Row, torch.Tensor]:
    """One run, and the logits of what it wrote."""
    from transformers import AutoModelForCausalLM

    import slimwright  # noqa: F401 - registers the format

    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(model), str(tokens), str(out), METHOD],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    return json.loads(ran.stdout.splitlines()[-1]), logits_of(loaded, torch.load(heldout))


def peer(python: Path, model: Path, tokens: Path, heldout: Path, out: Path) -> tuple[Row, torch.Tensor]:
    """One run of llm-compressor."""
    script = Path(__file__).with_name("peers") / "gptq_llmcompressor.py"
    ran = subprocess.run(
        [str(python), str(script), str(model), str(tokens), str(heldout), str(out), str(bundled_path())],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(ran.stdout.splitlines()[-1]), torch.load(out)


def logits_of(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits.float() for row in rows])


def floor() -> Row:
    """Seconds of the parts that any GPTQ of this shape needs, each at the rate of this machine's own products now:
    two forwards and half of the Grams' products in bfloat16, Cholesky factors and updates in float32. Taken before and
    after the runs; the better one counts."""
    tokens, hidden, inner, kv, blocks = SEQUENCES * LENGTH, 1024, 2816, 256, 8
    weights = blocks * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    grams = blocks * (3 * hidden**2 + inner**2)
    cubes = blocks * (3 * hidden**3 + inner**3)
    updates = blocks * ((2 * hidden + 2 * kv) * hidden**2 + 2 * inner * hidden**2 + hidden * inner**2)

    def rate(dtype: torch.dtype) -> float:
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        best = float("inf")
        for _ in range(12):
            started = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - started)
        return 2 * 2048**3 / best

    low, full = rate(torch.bfloat16), rate(torch.float32)
    return {
        "bf16_flops": low, "fp32_flops": full,
        "seconds": (2 * 2 * tokens * weights + tokens * grams) / low + (cubes / 3 + updates) / full,
    }  # fmt: skip


def main() -> int:
    started = time.time()
    root = Path(os.environ.get("PEERS", "/tmp/peers"))
    python = root / "c" / "bin" / "python"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model = make(LLAMA_92M, directory / "model")
        from transformers import AutoModelForCausalLM

        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        seconds: dict[str, list[float]] = {"slimwright": [], "llm-compressor": []}
        errors: dict[str, list[float]] = {name: [] for name in seconds}
        facts: dict[str, Row] = {}
        least = floor()
        for run in range(RUNS):
            generator = torch.Generator().manual_seed(run)
            files = {name: directory / f"{name}{run}.pt" for name in ("tokens", "heldout")}
            for name, count in (("tokens", SEQUENCES), ("heldout", 8)):
                torch.save(torch.randint(0, 2048, (count, LENGTH), generator=generator), files[name])
            dense = logits_of(original, torch.load(files["heldout"]))
            given = (model, files["tokens"], files["heldout"])
            found = {"slimwright": partial(ours, *given, directory / f"o{run}")}
            if python.exists():
                found["llm-compressor"] = partial(peer, python, *given, directory / "logits.pt")
            for name, go in found.items():
                result, logits = go()
                seconds[name].append(result["seconds"])
                errors[name].append(float((logits - dense).norm() / dense.norm()))
                facts[name] = {key: result[key] for key in ("peak_bytes", "cpu_seconds")}
        least = min(least, floor(), key=lambda found: found["seconds"])
        for name, times in seconds.items():
            if times:
                median = statistics.median(times)
                rows.append(
                    {"name": name, "seconds": median, "fastest": min(times), "slowest": max(times)}
                    | {"error": statistics.mean(errors[name]), "errors": errors[name]}
                    | facts[name]
                    | {"of_floor": median / least["seconds"]}
                )
    if len(rows) == 2:
        us, them = rows
        us["faster"] = them["seconds"] / us["seconds"]
        us["ok"] = us["faster"] >= 2 and us["error"] <= 1.01 * them["error"] and us["peak_bytes"] <= them["peak_bytes"]
    columns = {
        "name": "", "seconds": "seconds", "fastest": "fastest", "slowest": "slowest", "cpu_seconds": "CPU s",
        "error": "held-out error",
        "peak_bytes": "peak bytes", "of_floor": "x floor", "faster": "times faster",
    }  # fmt: skip
    publish("gptq", rows, columns, started, floor=least, runs=RUNS)
    return int(any(row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
