"""What a result takes while it runs: its weights, the cache of keys and values at a context, and workspace.

Run as ``python -m slimwright.job.running SPEC.json``: one model, loaded and run in a process of its own, so that what
it takes is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, SlimwrightError
from slimwright.heap import return_large_buffers
from slimwright.job.caching import layer_names, parse_policy
from slimwright.job.memory import PeakWatch
from slimwright.job.open import model_of
from slimwright.job.request import FitOptions
from slimwright.model.structure import Structure
from slimwright.plan import KEEP
from slimwright.sizes import parse_bytes

USUAL_CONTEXT = 4096
NEW_TOKENS = 4
"""Tokens generated behind the prompt that fills the context."""

MODULES = 60_000_000
"""Anonymous bytes that a loaded model's Python objects and torch's heap take, as a first guess (seen: 30 to 90 MB)."""

SMALL = 150_000_000
"""Bytes of a run below which what runs of one result differ by, 1 to 10 MB, is a part of it that counts."""

RUNS = 5
"""Runs of a small result."""


@dataclass(frozen=True)
class Running:
    """Memory of one run, in bytes above a bare import.

    Attributes:
        context: tokens of a sequence; ``batch``: sequences.
        weights: the weight files, mapped.
        cache: keys and values (or states) at that context; they are part of ``anonymous``.
        anonymous: peak of everything else: cache, workspace, objects; of several runs the largest.
        runs: how many; ``spread``: how far their peaks lie apart.
    """

    context: int
    batch: int
    weights: int
    cache: int
    anonymous: int
    runs: int = 1
    spread: int = 0

    @property
    def total(self) -> int:
        """What the machine needs."""
        return self.weights + self.anonymous


def context_of(config: Any, asked: FitOptions) -> tuple[int, int]:
    """(tokens, sequences) that the running result is to hold.

    Raises:
        InputError: more tokens than the model has positions.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if asked.context is not None and longest and asked.context > longest:
        raise InputError(f"--context {asked.context} is more than the {longest} positions that this model has.")
    return asked.context or min(USUAL_CONTEXT, longest or USUAL_CONTEXT), asked.batch or 1


def check_running(source: Checkpoint, asked: FitOptions) -> Running:
    """Refuse before work what cannot run within ``--memory``; of what can, a guess of its run without the weights.

    Raises:
        InputError: more context than positions, a model that reads no text, or a cache that is larger than the memory.
    """
    assert asked.memory is not None
    cls, config = model_of(source, asked.trust_remote_code)
    if cls.main_input_name != "input_ids":
        raise InputError(
            f"--memory runs a model on text, but {cls.__name__} reads '{cls.main_input_name}': give --size."
        )
    context, batch = context_of(config, asked)
    cache, rest = first_guess(source, asked)
    if cache >= parse_bytes(asked.memory, "--memory") and "drop" not in asked.families:
        raise InputError(
            f"--memory {asked.memory} cannot hold this model: the KV cache alone takes {cache / 1e6:.3g} MB at this "
            "context."
        )
    return Running(context, batch, 0, cache, cache + rest)


def first_guess(source: Checkpoint, asked: FitOptions) -> tuple[int, int]:
    """Bytes beside the weights, before anything has run: those of the cache, found on the meta device, and about how
    many activations of the prompt and what a process has may take."""
    cls, config = model_of(source, asked.trust_remote_code)
    context, batch = context_of(config, asked)
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0) or 1024)
    ffn = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    size = source_dtype(source).itemsize
    workspace = batch * context * size * (4 * hidden + 3 * ffn)
    return sum(cache_bytes(cls, config, context, batch, size, asked.cache)), MODULES + workspace


def source_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's values have, which its model computes in."""
    counts: dict[torch.dtype, int] = {}
    for info in source.tensors.values():
        if info.dtype.is_floating_point:
            counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def cache_bytes(cls: Any, config: Any, context: int, batch: int, size: int, policy: str | None) -> list[int]:
    """Bytes of keys and values by layer: one token on the meta device shows every layer's shapes. Empty where that
    cannot be found.

    Args:
        size: bytes of a value.
        policy: the cache policy that is asked for, applied to every layer that keeps all tokens.
    """
    if not hasattr(cls, "can_generate") or not cls.can_generate():
        return []
    with torch.device("meta"):
        model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    try:
        with torch.no_grad():
            made = model(**inputs, use_cache=True)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return []  # the measured candidate will tell
    cache = getattr(made, "past_key_values", None)
    found = []
    format = None if policy in (None, KEEP) else parse_policy(str(policy)).format()
    for layer in getattr(getattr(cache, "self_attention_cache", cache), "layers", []):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            found.append(0)
            continue
        sliding = getattr(layer, "sliding_window", None) or 0
        tokens = min(context, sliding) if sliding else context
        if format is not None and not sliding:
            found.append(format.nbytes(tokens, batch, keys.shape[1], keys.shape[-1], values.shape[-1], size))
        else:
            found.append(batch * tokens * keys.shape[1] * (keys.shape[-1] + values.shape[-1]) * size)
    return found


def cache_by_block(source: Checkpoint, structure: Structure, asked: FitOptions) -> dict[str, int]:
    """Bytes of the keys and values of each block (by module path) of a decoder at ``asked.running``."""
    assert asked.running is not None
    cls, config = model_of(source, asked.trust_remote_code)
    if config.is_encoder_decoder:  # its decoder's blocks attend twice
        return {}
    found = cache_bytes(cls, config, *asked.running, source_dtype(source).itemsize, asked.cache)
    names = layer_names(config, structure) if found else {}
    return {name: found[index] for name, index in names.items() if index < len(found)}


def measure_running(directory: Path, asked: FitOptions, scratch: Path, low_memory: bool = False) -> Running:
    """Run a model at the context and batch that were asked for, in fresh processes: a small one :data:`RUNS` times,
    since the addresses that the system draws decide what its heap can use again. What it takes is the model's, and
    not counted as the job's.

    Args:
        scratch: where what the processes are told and answer is for a while.
        low_memory: whether the process returns large buffers to the system, as it does anyway where the model says so.

    Raises:
        SlimwrightError: a process failed.
    """
    source = Checkpoint.open(directory)
    config = model_of(source, asked.trust_remote_code)[1]
    context, batch = context_of(config, asked)
    spec = {
        "directory": str(directory), "context": context, "batch": batch, "threads": torch.get_num_threads(),
        "trust_remote_code": asked.trust_remote_code, "seed": asked.seed, "low_memory": low_memory,
    }  # fmt: skip
    found = [_measured_once(spec, scratch)]
    if found[0].total < SMALL:
        with ThreadPoolExecutor(min(RUNS - 1, os.cpu_count() or 1)) as pool:
            found += pool.map(lambda _: _measured_once(spec, scratch), range(RUNS - 1))
    largest, smallest = max(one.anonymous for one in found), min(one.anonymous for one in found)
    return replace(found[0], anonymous=largest, runs=len(found), spread=largest - smallest)


def _measured_once(spec: dict[str, Any], scratch: Path) -> Running:
    spec_path = scratch / f"running-{uuid.uuid4().hex}.json"
    result = spec_path.with_suffix(".result")
    spec_path.write_text(json.dumps(spec | {"result": str(result)}))
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.pop("SLIMWRIGHT_CRASH_AT", None)
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "slimwright.job.running", str(spec_path)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        try:
            said = child.communicate()[1]
        except BaseException:
            child.kill()
            child.wait()
            raise
        if child.returncode != 0 or not result.exists():
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise SlimwrightError(f"The result could not be run (exit {child.returncode}): {last}")
        return Running(**json.loads(result.read_text()))
    finally:
        spec_path.unlink(missing_ok=True)
        result.unlink(missing_ok=True)


def run(spec: dict[str, Any]) -> Running:
    """Load and run one model; its cache at the end and its peak above a bare import."""
    from slimwright.runtime.loading import loaded

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    context, batch = spec["context"], spec["batch"]
    if spec["low_memory"]:
        return_large_buffers()
    with PeakWatch() as watch, torch.inference_mode():
        checkpoint = Checkpoint.open(spec["directory"])
        model = loaded(checkpoint, trust_remote_code=spec["trust_remote_code"])
        inner = model[0].auto_model if hasattr(model, "encode") else model
        vocabulary = inner.config.get_text_config().vocab_size
        cache = 0
        if inner.can_generate():
            decoder = inner.config.is_encoder_decoder
            prompt = torch.randint(0, vocabulary, (batch, context if decoder else max(1, context - NEW_TOKENS)))
            made = inner.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                do_sample=False, return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
            cache = _nbytes(getattr(made, "past_key_values", None))
        else:
            inner(input_ids=torch.randint(0, vocabulary, (batch, context)))
    weights = checkpoint.total_bytes
    return Running(context, batch, weights, cache, watch.peak)


def _nbytes(cache: Any) -> int:
    """Bytes of the tensors that a cache's layers hold."""
    found: dict[int, int] = {}
    parts = [cache, getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)]
    for part in parts:
        for layer in getattr(part, "layers", []):
            own = [*vars(layer).values(), *getattr(layer, "parts", {}).values()]
            for value in own:
                if isinstance(value, torch.Tensor):
                    found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(found.values())


def main(argv: list[str]) -> int:
    """Run a spec file."""
    spec = json.loads(Path(argv[1]).read_text())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        found = run(spec)
    except SlimwrightError as error:
        print(error, file=sys.stderr)
        return 1
    Path(spec["result"]).write_text(json.dumps(found.__dict__))
    return 0


__all__ = ["Running", "cache_by_block", "check_running", "measure_running"]

if __name__ == "__main__":
    sys.exit(main(sys.argv))
