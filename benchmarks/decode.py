"""Decoding and prefill from packed weights: ``python -m benchmarks.decode [--rounds 3] [--threads N] [--parts ...]``.

Qwen2-0.5B's shape with random weights: linears on ``int4:g128``, the tied embedding and head on ``int8:g128``. Packed
and dense models, in bfloat16 and float32, take turns in one process, since the memory bandwidth of shared machines
drifts: each turn reads 256 MB before and after, and a speed is judged by the bandwidth of its own turn. Packed models
decode as ``generate`` does (the step of slimwright.runtime.decode), and also by the module (``modules``: transformers'
own forward around the packed products); dense ones by transformers' forward with its dynamic cache, greedily, from a
prompt of 32 tokens on. The products alone are what every packed module takes for one token, called in order. Peers that
have an environment take turns too, in processes of their own: in ``PEERS``/a torchao, optimum-quanto and compiled
dense models, in ``PEERS``/d llama.cpp. With one thread processor time counts instead of the clock on the wall, so that
other work on the machine disturbs less. ``--wait`` waits for a line on standard input when everything is loaded,
compiled and warm.

Parts: ``speed`` is all that takes turns; ``first`` the seconds from a loaded model to the second token of a prompt of
32, compilation and our check of the model included, each in a fresh process with an empty compile cache. Checks are
medians of the ratios in each round:

- at batch 1 at least 0.8 of the ratio of the bytes read per token over the best dense model and torchao int8, ahead of
  the int4 peers, at least 0.7 of llama.cpp with the same bits;
- at batches of 8 and 32 and in prefill never slower than the best dense model.
"""

from __future__ import annotations

import argparse
import contextlib
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
SETTLE_SECONDS = 0.5
"""Between turns: the threads of whoever came before go on waiting awake for a while (llama.cpp's some tenths of a
second), on the cores of whoever comes next."""
KINDS = {
    "dense-bfloat16-compiled": "a", "dense-float32-compiled": "a", "torchao-int8-compiled": "a",
    "torchao-int4-compiled": "a", "torchao-int4": "a", "quanto-int4": "a", "llama-q4_0": "d", "llama-q8_0": "d",
}  # fmt: skip
"""Peers and their environments."""
FIRST = """
import json, sys, time
import torch, transformers
transformers.utils.logging.disable_progress_bar()
if sys.argv[1] == "packed":
    import slimwright
    model = slimwright.load(sys.argv[2]).to(getattr(torch, sys.argv[3]))
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3])).eval()
ids, started = torch.randint(0, 1000, (1, 32)), time.perf_counter()
model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
print(json.dumps(time.perf_counter() - started))
"""
"""Seconds of two tokens in a fresh process: KIND MODEL DTYPE."""


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
        """Of one step, after one that does not count."""
        from transformers import DynamicCache

        from slimwright.runtime import decode
        from slimwright.runtime.kv_cache import kv_cache

        model, steps = self.model, 8 if batch == 1 else 4 if batch <= 8 else 2
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
        started = 0.0
        with decode.attention_by_cache(model) if self.ours else contextlib.nullcontext():
            for step in range(-1, steps):
                if step == 0:  # the one before wakes threads and brings what else has slept to the caches
                    started = clock()
                if self.ours:
                    at = torch.full((batch, 1), length + step + 1)
                    token = decode.decode(model, decoding, token, at).argmax(-1, keepdim=True)
                else:
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        seconds = (clock() - started) / steps
        state[2:] = token, length + steps + 1
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
    """A model of another library in a process of its own, told what to time on its standard input.

    Args:
        compiled: where its compiler keeps what it made; None is where it always does.
    """

    def __init__(self, python: Path, kind: str, source: Path, threads: int, compiled: Path | None = None) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        environment |= {} if compiled is None else {"TORCHINDUCTOR_CACHE_DIR": str(compiled)}
        environment.pop("PYTHONPATH", None)
        script = "decode_llama.py" if kind.startswith("llama") else "decode_torch.py"
        command = [str(python), str(Path(__file__).parent / "peers" / script), kind, str(source)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip
        self.name = kind
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The process of {self.name} ended early.")
        return json.loads(line)

    def ask(self, what: str, batch: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"what": what, "batch": batch}) + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def first_tokens(places: dict[str, Path], pythons: dict[str, Path], threads: int, empty: Path) -> list[Row]:
    """Seconds to the second token, each model in a process of its own."""
    rows: list[Row] = []
    for kind, place in places.items():
        for dtype in ("bfloat16", "float32"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST, kind, str(place), dtype], capture_output=True, text=True, check=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
            seconds = float(json.loads(done.stdout.strip().splitlines()[-1]))
            rows.append({"model": f"{kind}, {dtype}", "what": "first two tokens", "ms": seconds * 1e3})
    for kind, python in pythons.items():
        peer = Peer(python, kind, places["dense"], threads, empty / kind)
        rows.append({"model": kind, "what": "first two tokens", "ms": peer.ask("first", 1) * 1e3})
        peer.end()
    return rows


def linear_bytes(bits: float) -> float:
    """Bytes that a token reads of the shape's matrices at so many bits a weight, the head among them."""
    hidden, inner, layers = 896, 4864, 24
    block = 2 * hidden * hidden + 2 * hidden * 128 + 3 * hidden * inner
    return (layers * block + 151_936 * hidden) * bits / 8


def checks(taken: dict[tuple[str, str], list[tuple[float, float]]], ours_bytes: float) -> list[Row]:
    """The promises that these measurements can tell of."""

    def ratio(other: str, what: str, ours: str = "packed, bfloat16") -> float | None:
        """How many times as fast as another model ours is."""
        if (ours, what) not in taken or (other, what) not in taken:
            return None
        pairs = zip(taken[other, what], taken[ours, what])
        return statistics.median(theirs / own for (theirs, _), (own, _) in pairs)

    names = dict.fromkeys(name for name, _ in taken)
    dense = {name: 4 if "float32" in name else 2 for name in names if name.startswith("dense")}
    rows: list[Row] = []

    def row(check: str, other: str, what: str, found: float | None, wanted: float) -> None:
        if found is not None:
            rows.append({
                "model": f"packed, bfloat16 / {other}", "what": f"{what}: {check}", "found": found, "wanted": wanted,
                "ok": found >= wanted,
            })  # fmt: skip

    def slowest(what: str) -> str | None:
        """Of the dense models the one that ours is the least ahead of."""
        found = {name: own for name in dense if (own := ratio(name, what)) is not None}
        return min(found, key=lambda name: found[name]) if found else None

    whats = dict.fromkeys(what for _, what in taken if not what.startswith("products"))
    for what in whats:
        best = slowest(what)
        if best is None:
            continue
        if what == "decode, batch 1":
            bytes_ratio = linear_bytes(8 * dense[best]) / ours_bytes
            row("0.8 of the bytes' ratio", best, what, ratio(best, what), 0.8 * bytes_ratio)
        else:
            row("never slower", best, what, ratio(best, what), 1.0)
    what = "decode, batch 1"
    eight = "torchao-int8-compiled"
    row("0.8 of the bytes' ratio", eight, what, ratio(eight, what), 0.8 * linear_bytes(8) / ours_bytes)
    for peer in ("torchao-int4-compiled", "torchao-int4", "quanto-int4"):
        row("ahead", peer, what, ratio(peer, what), 1.0)
    row("0.7 of it", "llama-q4_0", what, ratio("llama-q4_0", what), 0.7)
    return rows


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--packed", type=Path, help="a result of an earlier fit, instead of fitting again")
    parser.add_argument("--peers", default=",".join(KINDS))
    parser.add_argument("--parts", default="speed,first")
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import transformers

    from slimwright.kernels import packed

    transformers.utils.logging.disable_progress_bar()
    started, buffer, dtypes = time.time(), torch.randn(64 << 20), options.dtypes.split(",")
    batches = [int(batch) for batch in options.batches.split(",")]
    chosen = [kind for kind in options.peers.split(",") if kind]
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"there is no peer {sorted(unknown)[0]}")
    pythons = {kind: Path(os.environ.get("PEERS", "/tmp/peers")) / KINDS[kind] / "bin" / "python" for kind in chosen}
    pythons = {kind: python for kind, python in pythons.items() if python.exists()}
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    rows: list[Row] = []
    with scratch("decode") as directory:
        source, out = make(QWEN2_05B, SHAPES), options.packed or directory / "out"
        rules = ["--grid", "int4:g128", "--rule", "embed: int8:g128", "--method", "quantize/rtn", "--data", "none"]
        fit = [sys.executable, "-m", "slimwright", "fit", str(source), *rules, "--out", str(out)]
        if options.packed is None:
            subprocess.run(fit, stdout=subprocess.DEVNULL, check=True)
        places = {"packed": out, "dense": source}
        sizes = {kind: sum(file.stat().st_size for file in place.glob("*.safetensors"))
                 for kind, place in places.items()}  # fmt: skip
        if "speed" in options.parts:
            taken = take_turns(places, dtypes, batches, pythons, options, buffer)
            rows = [speed_row(key, found, taken, sizes) for key, found in taken.items()]
            rows += checks(taken, sizes["packed"])
        if "first" in options.parts:
            rows += first_tokens(places, pythons, options.threads, directory)
    columns = {
        "model": "model", "what": "what", "tokens_per_second": "tokens/s", "ms": "ms", "weights_mb": "weights, MB",
        "of_bandwidth": "of the bandwidth", "ours": "packed bfloat16 / it", "found": "found", "wanted": "wanted",
        "ok": "as promised",
    }  # fmt: skip
    library = packed.library()
    facts = {"isa": library.name if library else packed.why_not(), "on": library.threads if library else None}
    speeds = [speed / 1e9 for found in taken.values() for _, speed in found]
    bandwidths = {"least": min(speeds), "median": statistics.median(speeds), "most": max(speeds)} if speeds else None
    if bandwidths:
        print("memory, GB/s:", *(f"{name} {speed:.1f}" for name, speed in bandwidths.items()))
    return publish(
        "decode", rows, columns, started, rounds=options.rounds, threads=options.threads, kernels=facts,
        bandwidth_gb_per_second=bandwidths,
    )  # fmt: skip


def take_turns(
    places: dict[str, Path], dtypes: list[str], batches: list[int], pythons: dict[str, Path], options: Any,
    buffer: torch.Tensor,
) -> dict[tuple[str, str], list[tuple[float, float]]]:  # fmt: skip
    """Seconds and the bandwidth beside them, by model and what was timed, a pair for each round."""
    import transformers

    contenders: dict[str, Any] = {
        f"{kind}, {dtype}": transformers.AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)).eval()
        for dtype in dtypes
        for kind, place in places.items()
    }
    peers = {kind: Peer(python, kind, places["dense"], options.threads) for kind, python in pythons.items()}
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
            time.sleep(SETTLE_SECONDS)
            speed = bandwidth(buffer)
            seconds = work()
            taken[key].append((seconds, max(speed, bandwidth(buffer))))
    for peer in peers.values():
        peer.end()
    return taken


def speed_row(
    key: tuple[str, str], found: list[tuple[float, float]], taken: dict[tuple[str, str], list[tuple[float, float]]],
    sizes: dict[str, int],
) -> Row:  # fmt: skip
    """Medians of one model at one thing."""
    name, what = key
    batch = int(what.rpartition(" ")[2]) if "batch" in what else 1
    tokens = PREFILL if what == "prefill" else batch
    seconds = statistics.median(second for second, _ in found)
    row: Row = {"model": name, "what": what, "tokens_per_second": tokens / seconds, "ms": seconds * 1e3}
    size = sizes.get(name.partition(",")[0])  # bytes read once per token
    if size is not None:
        row["weights_mb"] = size / 1e6
        if what != "prefill":
            row["of_bandwidth"] = statistics.median(size / second / speed for second, speed in found)
    best = taken.get(("packed, bfloat16", what))
    if best is not None and name != "packed, bfloat16":
        row["ours"] = statistics.median(other / own for (other, _), (own, _) in zip(found, best))
    return row


if __name__ == "__main__":
    sys.exit(exit_code(main()))
