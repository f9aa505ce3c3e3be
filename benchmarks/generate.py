"""Generation with the cache of keys and values at 16, 8, 4 and 2 bits: bytes, speed, what it costs in quality.

``python -m benchmarks.generate [--layers 24] [--context 8192] [--tokens 8] [--packed DIR] [--compile]``

Speed is on the 0.5B shape of Qwen2 with random weights, dense in bfloat16 or those of a result of `fit`
(``--packed``); only the cache changes. transformers' own dynamic cache and forward stand beside it, runs alternated;
caches are filled without a prefill. The time of attention alone is given too: it is what the bits change. Quality is
on the bundled language model at its own 1024 tokens, held-out text: nats of KL per token against the same model with
an exact cache, every token seeing what decoding token by token would have packed by then. Time to first token is that
of ``generate`` for one token, and of the compiled step where ``--compile`` asks for it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation import CompileConfig

from benchmarks.common import exit_code, publish
from benchmarks.shapes import QWEN2_05B, make
from slimwright.directories import cache_directory
from slimwright.runtime import decode
from slimwright.runtime.generate import Generation
from slimwright.runtime.kv_cache import KvLayer, cache_nbytes, kv_cache
from slimwright.runtime.kv_format import KvFormat
from slimwright.runtime.kv_simulate import simulated
from slimwright.zoo import bundled_path
from slimwright.zoo.text import standard_library

BITS = (16, 8, 4, 2)


def shape(layers: int, packed: str | None = None) -> Any:
    """The 0.5B shape in bfloat16 with random weights, or a result of ``fit``."""
    if packed is not None:
        return AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16).eval()
    config = {**QWEN2_05B, "num_hidden_layers": layers}
    directory = make(config, cache_directory() / "bench" / f"qwen2-0.5b-{layers}")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()


def filled(model: Any, bits: int, context: int, step: int = 512) -> Any:
    """A cache of ``context`` random tokens."""
    count = model.config.num_hidden_layers
    formats = {} if bits == 16 else dict.fromkeys(range(count), KvFormat(bits))
    cache = kv_cache(model.config, formats, capacity=context + 256, ours=True)
    heads = model.config.num_key_value_heads
    dim = model.config.hidden_size // model.config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        for start in range(0, context, step):
            shape = (1, heads, min(step, context - start), dim)
            keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
            layer.append(keys, values) if layer.is_initialized else layer.update(keys, values)
    return cache


def dynamic(model: Any, source: Any) -> DynamicCache:
    """transformers' own cache with the tokens of another."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(source.layers):
        cache.update(*layer.dense(), index)
    return cache


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def speed(
    layers: int, context: int, tokens: int, rounds: int, packed: str | None = None, wait: bool = False
) -> list[dict[str, Any]]:
    """Decode speed at each width, alternated."""
    model = shape(layers, packed)
    assert not decode.supported(model), decode.supported(model)
    token, at = torch.tensor([[5]]), torch.tensor([[context]])
    caches: dict[Any, Any] = {bits: filled(model, bits, context) for bits in BITS}
    caches["transformers 16"] = dynamic(model, caches[16])
    found: dict[Any, list[tuple[float, float]]] = {name: [] for name in caches}
    alone: dict[Any, list[tuple[float, float]]] = {bits: [] for bits in BITS}
    query = torch.randn(1, model.config.num_attention_heads, 1, 64).bfloat16()

    decodings = {name: decode.Decoding(cache, None) for name, cache in caches.items()}

    def decode_with(name: Any) -> None:
        cache = caches[name]
        if isinstance(cache, DynamicCache):
            for _ in range(tokens):
                model(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True)
            return
        with decode.attention_by_cache(model):
            for _ in range(tokens):
                decode.decode(model, decodings[name], token, at)

    def attend_with(bits: int) -> None:
        for layer in caches[bits].layers:
            assert isinstance(layer, KvLayer)
            layer.attend(query, None, 0.125)

    for name in caches:
        decode_with(name)
    if wait:
        print("ready", flush=True)
        sys.stdin.readline()
    for _ in range(rounds):
        for name in caches:
            found[name].append(timed(lambda name=name: decode_with(name)))  # type: ignore[misc]
        for bits in BITS:
            alone[bits].append(timed(lambda bits=bits: attend_with(bits)))  # type: ignore[misc]
    rows = []
    for name, cache in caches.items():
        wall, cpu = (statistics.median(part) / tokens for part in zip(*found[name]))
        row = {
            "cache": f"{name} bits" if isinstance(name, int) else name, "context": context,
            "mb": cache_nbytes(cache) / 1e6, "tokens_per_second": 1 / wall, "cpu_ms_per_token": cpu * 1e3,
        }  # fmt: skip
        if name in alone:
            row["attention_ms"], row["attention_cpu_ms"] = (1e3 * statistics.median(p) for p in zip(*alone[name]))
        rows.append(row)
    return rows


@torch.no_grad()
def divergence(documents: int = 8) -> dict[int, tuple[float, float]]:
    """Bits → (nats of KL per token, share of tokens whose best next token stays) on held-out text at 1024 tokens."""
    model = AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    length = model.config.max_position_embeddings
    pieces = []
    for document in standard_library("heldout"):
        ids = tokenizer(document.text, verbose=False).input_ids[:length]
        if len(ids) == length and len(pieces) < documents:
            pieces.append(ids)
    sums: dict[int, list[tuple[float, float]]] = {bits: [] for bits in BITS if bits < 16}
    for piece in pieces:
        ids = torch.tensor([piece])
        exact = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for bits, gathered in sums.items():
            formats = dict.fromkeys(range(model.config.num_hidden_layers), KvFormat(bits))
            with simulated(model, formats):
                got = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            kl = (exact.exp() * (exact - got)).sum(-1).mean()
            gathered.append((float(kl), float((exact.argmax(-1) == got.argmax(-1)).float().mean())))
    return {bits: tuple(statistics.mean(part) for part in zip(*gathered)) for bits, gathered in sums.items()}  # type: ignore[misc]


def first_token(layers: int, compiled: bool, packed: str | None = None) -> dict[str, float]:
    """Seconds to the first token of a prompt of 64, of a fresh model: transformers', ours, ours compiled to its
    second."""
    ids = torch.randint(5, 1000, (1, 64))
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    model = shape(layers, packed)
    theirs = functools.partial(type(model).generate, model)
    theirs(ids[:, :4], max_new_tokens=1, **how)  # pages of the weights are read
    found = {"transformers": timed(lambda: theirs(ids, max_new_tokens=1, **how))[0]}
    ours = Generation(model)
    found["ours, first call (with the check of the model)"] = timed(lambda: ours(ids, max_new_tokens=1, **how))[0]
    found["ours, later calls"] = timed(lambda: ours(ids, max_new_tokens=1, **how))[0]
    if compiled:
        options = {"compile_config": CompileConfig(), "min_new_tokens": 2}
        found["ours, two tokens, compiling"] = timed(lambda: ours(ids, max_new_tokens=2, **how, **options))[0]
        found["ours, two tokens, compiled"] = timed(lambda: ours(ids, max_new_tokens=2, **how, **options))[0]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--packed")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--wait", action="store_true", help="for a line on standard input when all is loaded")
    asked = parser.parse_args()
    started = time.time()
    kl = divergence()
    rows = speed(asked.layers, asked.context, asked.tokens, asked.rounds, asked.packed, asked.wait)
    for row in rows:
        bits = row["cache"].split()[0]
        row["kl"], row["same_best"] = kl.get(int(bits), (0.0, 1.0)) if bits.isdigit() else (0.0, 1.0)
    columns = {
        "cache": "cache", "context": "tokens", "mb": "MB", "tokens_per_second": "tokens/s",
        "cpu_ms_per_token": "CPU ms/token", "attention_ms": "attention ms", "attention_cpu_ms": "its CPU ms",
        "kl": "KL nats/token", "same_best": "same best token",
    }  # fmt: skip
    first = first_token(asked.layers, asked.compile, asked.packed)
    publish("generate", rows, columns, started, layers=asked.layers, first_token_seconds=first)
    for name, seconds in first.items():
        print(f"first token, {name}: {seconds:.3f} s")
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
