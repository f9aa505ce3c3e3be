"""Decoding and prefill from packed weights: ``python -m benchmarks.decode [--rounds 5] [--threads N]``.

Qwen2-0.5B's shape with random weights: linears on ``int4:g128``, the tied embedding and head on ``int8:g128``. Packed
and dense models, in bfloat16 and float32, take turns in one process, since the memory bandwidth of shared machines
drifts: each turn reads 256 MB first, and a speed is judged by the bandwidth of its own turn. Decoding is a hand-written
greedy loop after a prompt of 32 tokens; the products alone are what every packed module of the model takes for one
token, called in order. Peers that have an environment (``PEERS``/a: torchao, optimum-quanto) take turns too, in
processes of their own. With one thread processor time counts instead of the clock on the wall, so that other work on
the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, exit_code, publish, scratch
from benchmarks.shapes import QWEN2_05B, make

SHAPES = Path("/tmp/shapes/q05")
PROMPT, STEPS, PREFILL = 32, 8, 512
KINDS = ("torchao-int4", "torchao-int8", "quanto-int4")
PEER = Path(__file__).parent / "peers" / "decode_torch.py"


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def bandwidth(buffer: torch.Tensor) -> float:
    """Bytes per second of summing a buffer that no cache holds."""
    started = clock()
    buffer.sum()
    return buffer.numel() * buffer.element_size() / (clock() - started)


@torch.inference_mode()
def decode_seconds(model: Any, batch: int) -> float:
    """Seconds of one decoding step."""
    from transformers import DynamicCache

    ids = torch.randint(0, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    started = clock()
    for _ in range(STEPS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return (clock() - started) / STEPS


@torch.inference_mode()
def prefill_seconds(model: Any) -> float:
    ids = torch.randint(0, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    started = clock()
    model(ids, logits_to_keep=1)
    return clock() - started


@torch.inference_mode()
def product_seconds(model: Any, batch: int) -> float:
    """Seconds of all packed products of one token, and nothing else."""
    from slimwright.runtime.modules import PackedModule

    todo: list[Any] = [m for m in model.modules() if isinstance(m, PackedModule) and "weight" in m.packed]
    inputs = {m: torch.randn(batch, 1, m.packed["weight"].shape[-1]).to(model.dtype) for m in todo}
    started = clock()
    for module in todo:
        module.project(inputs[module], getattr(module, "bias", None))
    return clock() - started


class Peer:
    """A model of another library in a process of its own, told what to time on its standard input."""

    def __init__(self, python: Path, kind: str, source: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [str(python), str(PEER), kind, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A peer's process ended early.")
        return json.loads(line)

    def ask(self, what: str, batch: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"what": what, "batch": batch}) + "\n")
        self.process.stdin.flush()
        return float(self.answer())


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--packed", type=Path, help="a result of an earlier fit, instead of fitting again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import transformers

    from slimwright.kernels import packed

    transformers.utils.logging.disable_progress_bar()
    started, buffer, dtypes = time.time(), torch.randn(64 << 20), options.dtypes.split(",")
    batches = [int(batch) for batch in options.batches.split(",")]
    with scratch("decode") as directory:
        source, out = make(QWEN2_05B, SHAPES), options.packed or directory / "out"
        rules = ["--grid", "int4:g128", "--rule", "embed: int8:g128", "--method", "quantize/rtn", "--data", "none"]
        fit = [sys.executable, "-m", "slimwright", "fit", str(source), *rules, "--out", str(out)]
        if options.packed is None:
            subprocess.run(fit, stdout=subprocess.DEVNULL, check=True)
        contenders: dict[str, Any] = {
            f"{kind}, {dtype}": transformers.AutoModelForCausalLM.from_pretrained(
                place, dtype=getattr(torch, dtype)
            ).eval()
            for dtype in dtypes
            for kind, place in (("packed", out), ("dense", source))
        }
        python = Path(os.environ.get("PEERS", "/tmp/peers")) / "a" / "bin" / "python"
        peers = {
            kind: Peer(python, kind, source, options.threads) for kind in KINDS
        } if python.exists() else {}  # fmt: skip
        works: dict[tuple[str, str], Callable[[], float]] = {}
        for name, model in contenders.items():
            for batch in batches:
                works[name, f"decode, batch {batch}"] = lambda m=model, b=batch: decode_seconds(m, b)  # type: ignore[misc]
                if name.startswith("packed"):
                    works[name, f"products, batch {batch}"] = lambda m=model, b=batch: product_seconds(m, b)  # type: ignore[misc]
            works[name, "prefill"] = lambda m=model: prefill_seconds(m)  # type: ignore[misc]
        for name, peer in peers.items():
            for batch in batches:
                works[name, f"decode, batch {batch}"] = lambda p=peer, b=batch: p.ask("decode", b)  # type: ignore[misc]
            works[name, "prefill"] = lambda p=peer: p.ask("prefill", 1)  # type: ignore[misc]
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in works}
        for number in range(options.rounds + 1):
            for key, work in works.items():
                speed = bandwidth(buffer)
                seconds = work()
                if number:  # the first round warms up
                    taken[key].append((seconds, max(speed, bandwidth(buffer))))
        rows = []
        for (name, what), found in taken.items():
            batch = int(what.rpartition(" ")[2]) if "batch" in what else 1
            tokens = PREFILL if what == "prefill" else batch
            seconds = statistics.median(second for second, _ in found)
            row: Row = {"model": name, "what": what, "tokens_per_second": tokens / seconds, "ms": seconds * 1e3}
            if name in contenders:
                place = out if name.startswith("packed") else source
                size = sum(file.stat().st_size for file in place.glob("*.safetensors"))  # read once per token
                row["weights_mb"] = size / 1e6
                if what != "prefill":
                    row["of_bandwidth"] = statistics.median(size / second / speed for second, speed in found)
            beside = [
                statistics.median(second for second, _ in taken[other, what])
                for other in contenders
                if other.startswith("dense") and (other, what) in taken
            ]
            if beside and not name.startswith("dense"):
                row["of_best_dense"] = min(beside) / seconds
            rows.append(row)
        for row in rows:
            if row["model"] == "packed, bfloat16" and not row["what"].startswith("products"):
                row["ok"] = row["of_best_dense"] >= (0.95 if row["what"] == "prefill" else 1.0)
        for peer in peers.values():
            peer.process.kill()
    columns = {
        "model": "model", "what": "what", "tokens_per_second": "tokens/s", "ms": "ms", "weights_mb": "weights, MB",
        "of_bandwidth": "of the bandwidth", "of_best_dense": "x best dense", "ok": "never slower than dense",
    }  # fmt: skip
    library = packed.library()
    facts = {"isa": library.name if library else packed.why_not(), "on": library.threads if library else None}
    speeds = [speed for found in taken.values() for _, speed in found]
    return publish(
        "decode", rows, columns, started, rounds=options.rounds, threads=options.threads, kernels=facts,
        bandwidth_gb_per_second={
            "least": min(speeds) / 1e9, "median": statistics.median(speeds) / 1e9, "most": max(speeds) / 1e9,
        },
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main()))
