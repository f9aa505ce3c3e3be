"""Decoding and prefill from packed weights: ``python -m benchmarks.decode [--rounds 5] [--threads N]``.

Qwen2-0.5B's shape with random weights: linears on ``int4:g128``, the tied embedding and head on ``int8:g128``. Packed
and dense models, in bfloat16 and float32, take turns in one process, since the memory bandwidth of shared machines
drifts: each turn reads 256 MB before and after, and a speed is judged by the bandwidth of its own turn. Packed models
decode as ``generate`` does (the step of slimwright.runtime.decode), and also by the module (``modules``: transformers'
own forward around the packed products); dense ones by transformers' forward with its dynamic cache, greedily, from a
prompt of 32 tokens on. The products alone are what every packed module takes for one token, called in order. Peers that
have an environment take turns too, in processes of their own: in ``PEERS``/a torchao, optimum-quanto and a compiled
dense model, in ``PEERS``/d llama.cpp. With one thread processor time counts instead of the clock on the wall, so that
other work on the machine disturbs less. ``--wait`` waits for a line on standard input when everything is loaded,
compiled and warm.
"""

from __future__ import annotations

import argparse
import functools
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
PROMPT, PREFILL, ROOM = 32, 512, 256
KINDS = {
    "dense-compiled": "a", "torchao-int4": "a", "torchao-int4-compiled": "a", "torchao-int8-compiled": "a",
    "quanto-int4": "a", "llama-q4_0": "d", "llama-q8_0": "d",
}  # fmt: skip
"""Peers and their environments."""


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def bandwidth(buffer: torch.Tensor) -> float:
    """Bytes per second of summing a buffer that no cache holds."""
    started = clock()
    buffer.sum()
    return buffer.numel() * buffer.element_size() / (clock() - started)


class Decoder:
    """A model and a cache for each batch, in which decoding goes on from turn to turn."""

    def __init__(self, model: Any, ours: bool, fused: bool = True) -> None:
        self.model, self.ours, self.fused = model, ours, fused
        self.states: dict[int, Any] = {}

    @torch.inference_mode()
    def seconds(self, batch: int) -> float:
        """Of one step."""
        from transformers import DynamicCache

        from slimwright.runtime import decode
        from slimwright.runtime.kv_cache import kv_cache

        model, steps = self.model, 8 if batch == 1 else 4
        if batch not in self.states:
            ids = torch.randint(0, 1000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
            reason = decode.supported(model) if self.ours else ""
            assert not reason, reason
            cache = kv_cache(model.config, {}, ROOM, ours=True) if self.ours else DynamicCache()
            token = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            decoding = decode.Decoding(cache, None)
            if not self.fused:
                decoding.steps[batch] = None
            self.states[batch] = [cache, decoding, token, PROMPT]
        state = self.states[batch]
        cache, decoding, token, length = state
        started = clock()
        if self.ours:
            with decode.attention_by_cache(model):
                for step in range(steps):
                    at = torch.full((batch, 1), length + step)
                    token = decode.decode(model, decoding, token, at).argmax(-1, keepdim=True)
        else:
            for _ in range(steps):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        seconds = (clock() - started) / steps
        state[2:] = token, length + steps
        return seconds


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
        environment.pop("PYTHONPATH", None)
        script = "decode_llama.py" if kind.startswith("llama") else "decode_torch.py"
        command = [str(python), str(Path(__file__).parent / "peers" / script), kind, str(source)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
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
    parser.add_argument("--peers", default=",".join(KINDS))
    parser.add_argument("--wait", action="store_true")
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
        pythons = {kind: Path(os.environ.get("PEERS", "/tmp/peers")) / place / "bin" / "python"
                   for kind, place in KINDS.items() if kind in options.peers.split(",")}  # fmt: skip
        peers = {
            kind: Peer(python, kind, source, options.threads) for kind, python in pythons.items() if python.exists()
        }
        works: dict[tuple[str, str], Callable[[], float]] = {}
        for name, model in contenders.items():
            ours = name.startswith("packed")
            decoders = {name: Decoder(model, ours)}
            if ours:
                decoders[f"{name}, modules"] = Decoder(model, ours, fused=False)
            for batch in batches:
                for key, decoder in decoders.items():
                    works[key, f"decode, batch {batch}"] = functools.partial(decoder.seconds, batch)
                if ours:
                    works[name, f"products, batch {batch}"] = functools.partial(product_seconds, model, batch)
            works[name, "prefill"] = functools.partial(prefill_seconds, model)
        for name, peer in peers.items():
            for batch in batches:
                if batch <= 8 or "compiled" not in name:
                    works[name, f"decode, batch {batch}"] = functools.partial(peer.ask, "decode", batch)
            works[name, "prefill"] = functools.partial(peer.ask, "prefill", 1)
        for _ in range(2):  # warms up, and lets compile what is compiled
            for work in works.values():
                work()
        if options.wait:
            print("ready", flush=True)
            sys.stdin.readline()
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in works}
        for _ in range(options.rounds):
            for key, work in works.items():
                speed = bandwidth(buffer)
                seconds = work()
                taken[key].append((seconds, max(speed, bandwidth(buffer))))
        rows = []
        for (name, what), found in taken.items():
            batch = int(what.rpartition(" ")[2]) if "batch" in what else 1
            tokens = PREFILL if what == "prefill" else batch
            seconds = statistics.median(second for second, _ in found)
            row: Row = {"model": name, "what": what, "tokens_per_second": tokens / seconds, "ms": seconds * 1e3}
            if name in contenders or name.endswith("modules"):
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
        best = {row["what"]: row["tokens_per_second"] for row in rows if row["model"] == "packed, bfloat16"}
        for row in rows:
            if row["model"] not in contenders and row["what"] in best:
                row["ours"] = best[row["what"]] / row["tokens_per_second"]
            if row["model"] == "packed, bfloat16" and not row["what"].startswith("products"):
                row["ok"] = row["of_best_dense"] >= (0.95 if row["what"] == "prefill" else 1.0)
        for peer in peers.values():
            peer.process.kill()
    columns = {
        "model": "model", "what": "what", "tokens_per_second": "tokens/s", "ms": "ms", "weights_mb": "weights, MB",
        "of_bandwidth": "of the bandwidth", "of_best_dense": "x best dense", "ours": "packed bfloat16 / it",
        "ok": "never slower than dense",
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
