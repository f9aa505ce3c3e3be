"""Embeddings per second of all-MiniLM-L6-v2, packed beside dense float32: ``python -m benchmarks.embeddings``.

The encoder (22.7 million parameters) is packed on several grids; sentences are the beginnings of the standard library's
held-out modules, cut at 128 tokens. Models take turns at batches of 1 and 32; the median of the ratios to the dense
model's time in the same turn counts. With one thread processor time counts instead of the clock on the wall. ``--wait``
waits for a line on standard input when everything is loaded and warm.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.zoo import minilm_path
from slimwright.zoo.text import standard_library

BATCHES = (1, 32)
SENTENCES = 32


def sentences() -> list[str]:
    """The first lines of held-out modules, some tens of words each."""
    return [module.text[:600] for module in standard_library("heldout")[:SENTENCES]]


def seconds(model: Any, inputs: list[Any]) -> float:
    """Of embedding all batches."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    with torch.inference_mode():
        for batch in inputs:
            model(batch)
    return clock() - started


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="int8:row,int4:g32,int4:g128")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from sentence_transformers import SentenceTransformer

    import slimwright

    started, source = time.time(), minilm_path()
    with scratch("embeddings") as directory:
        models: dict[str, Any] = {"dense, float32": SentenceTransformer(str(source), device="cpu").float()}
        for grid in options.grids.split(","):
            out = directory / grid.replace(":", "-")
            fit = ["fit", str(source), "--grid", grid, "--data", "none", "--method", "quantize/rtn", "--out", str(out)]
            subprocess.run([sys.executable, "-m", "slimwright", *fit], stdout=subprocess.DEVNULL, check=True)
            models[f"packed, {grid}"] = slimwright.load(out).float()
        dense = models["dense, float32"]
        dense.max_seq_length = 128
        texts = sentences()
        inputs = {
            batch: [dense.tokenize(texts[at : at + batch]) for at in range(0, SENTENCES, batch)] for batch in BATCHES
        }
        taken: dict[tuple[str, int], list[float]] = {(name, batch): [] for batch in BATCHES for name in models}
        for name, batch in taken:
            seconds(models[name], inputs[batch])
        if options.wait:
            print("ready", flush=True)
            sys.stdin.readline()
        for _ in range(options.rounds):
            for (name, batch), times in taken.items():
                times.append(seconds(models[name], inputs[batch]))
    rows: list[Row] = []
    for (name, batch), times in taken.items():
        beside = taken["dense, float32", batch]
        ratio = statistics.median(dense / own for dense, own in zip(beside, times))
        rate = SENTENCES / statistics.median(times)
        rows.append({"model": name, "batch": batch, "per_second": rate, "of_dense": ratio, "ok": ratio >= 0.97})
    columns = {"model": "model", "batch": "batch", "per_second": "embeddings/s", "of_dense": "x dense",
               "ok": "never slower"}  # fmt: skip
    return publish("embeddings", rows, columns, started, rounds=options.rounds, threads=options.threads)


if __name__ == "__main__":
    sys.exit(exit_code(main()))
