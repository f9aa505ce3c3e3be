"""``make bench``, ``python -m benchmarks.run [NAME ...]``: every benchmark, or those named, each in its own process.

Figures and checks go to bench-results/NAME.json; the exit code is 1 if any check failed.
"""

from __future__ import annotations

import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "families": "every family fit to 40 %, verified, loaded, generating, saved again",
    "model_types": "every other model type that transformers knows, made small and fit to 40 %",
    "drops": "sublayers and blocks dropped from every family, beside the zeroed model",
    "crashes": "killed anywhere, the same bytes",
    "hostile": "1,000 damaged checkpoints",
    "loading": "memory and time of loading a packed model",
    "grids": "error and speed of every grid",
    "merging": "agreement with mergekit, and speed beside it",
    "merge_quality": "what every merge method keeps of four tasks",
    "zoo": "trained models: figure, training time, what rounding costs",
    "solvers": "what every solver loses on the cards' synthetic setups",
    "allocators": "loss estimates and solvers of budgets; predicted against measured KL; mixed grids against one",
    "calibrated": "what every solver loses in whole jobs, on the bundled LM, the zoo and MiniLM",
    "low_rank": "low-rank forms against grids on the bundled LM",
    "memory": "13 GB models under 1.5 GB of memory",
    "products": "products with packed weights, one by one, beside dense ones",
    "decode": "decoding from packed weights beside dense models and peers",
    "embeddings": "embeddings per second of MiniLM, packed beside dense",
    "generate": "generation with caches of 16, 8, 4 and 2 bits, beside transformers'",
    "serving": "the server under load: answers, memory, hostile clients; beside llama-server where it is",
    "exports": "exports in the programs that load them, beside slimwright.load",
    "budgets": "fits to the bytes of llm-compressor, AutoRound and llama.cpp: who loses less",
    "gptq": "GPTQ beside llm-compressor's, and as a multiple of its floor",
}


def main() -> int:
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"There is no benchmark '{unknown[0]}'; there are: {', '.join(BENCHMARKS)}.", file=sys.stderr)
        return 2
    summary = Table(title="benchmarks")
    for heading in ("name", "what", "minutes", "ok"):
        summary.add_column(heading)
    failed = False
    for name in names:
        started = time.monotonic()
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
        failed |= status != 0
        minutes = f"{(time.monotonic() - started) / 60:.1f}"
        summary.add_row(name, BENCHMARKS[name], minutes, "yes" if status == 0 else f"NO (exit {status})")
    Console().print(summary)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
