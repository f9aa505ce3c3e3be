"""Merging beside mergekit: the same YAML files, the same inputs, in one run.

``agreement``: every method of mergekit's on small models in float32 and bfloat16, element by element. ``speed``: a 0.5B
Qwen2 shape (two fine-tunes and a base of 1 GB each), alternated with mergekit, the page cache warm for both.
``memory``: the same, and a shape of 13 GB, inside a cgroup of a bare import plus 1 GB and 1.5 GB. ``random``: methods
that draw masks, over 200 seeds: the same statistics entry by entry.

Names of methods behind these words (``speed ties``) restrict them to those methods.

mergekit lives in an environment of its own, named by SLIMWRIGHT_PEERS (DIR/b/bin/python); without it only our own
figures are taken, and the run says so.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.common import Row, exit_code, plain_copy, publish, scratch
from benchmarks.memory import bare_import, in_cgroup
from benchmarks.shapes import LLAMA_8B_24, QWEN2_05B, make
from slimwright.checkpoint import Checkpoint, CheckpointWriter, TensorEntry, plan_layout, write_json_atomic

SMALL = QWEN2_05B | {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2_000,
}  # fmt: skip
TINY = SMALL | {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 200}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {}, "task_arithmetic": {}, "slerp": {"t": 0.4}, "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5}, "dare_ties": {"density": 0.5}, "nuslerp": {}, "multislerp": {}, "karcher": {},
    "della": {"density": 0.5}, "della_linear": {"density": 0.5}, "breadcrumbs": {"density": 0.5},
    "breadcrumbs_ties": {"density": 0.5}, "model_stock": {}, "sce": {"select_topk": 0.3}, "arcee_fusion": {},
    "nearswap": {"t": 1e-3}, "ties rescaled": {"density": 0.5, "rescale": True},
    "breadcrumbs rescaled": {"density": 0.5, "rescale": True},
    "breadcrumbs_ties rescaled": {"density": 0.5, "rescale": True}, "ram": {"epsilon": 1e-3},
    "ramplus_tl": {"epsilon": 1e-3, "r": 0.3}, "ties slices": {"density": 0.5}, "linear modules": {},
}  # fmt: skip
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "cast": torch.bfloat16}
"""``cast``: bfloat16 inputs, arithmetic in float32, one cast, in both programs."""
NOISE = 1 << 22
"""Random numbers that a fine-tune repeats: how it is made must not take longer than what is measured."""
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SEEDS = 200
ELEMENTWISE = (
    "linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "nearswap", "ram", "ties slices",
    "linear modules",
)  # fmt: skip
"""Equal bits in float32, but where two magnitudes at the threshold are equal."""
TIMED = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
TWO_READS = ("slerp", "ties", "dare_ties")
"""Methods that must read their inputs more than once."""
_BASELESS = ("linear", "karcher", "nuslerp", "multislerp")
_PAIR = ("slerp", "arcee_fusion", "nearswap")
_WEIGHTED = ("linear", "nuslerp", "multislerp")
_RUN_PEER = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for seed, text, out in json.load(open(sys.argv[1])):
    options = MergeOptions(quiet=True, random_seed=seed)
    try:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)
    except Exception as error:
        print(out, repr(error), file=sys.stderr)
"""


def peer() -> Path | None:
    """mergekit's Python, or None."""
    root = os.environ.get("SLIMWRIGHT_PEERS")
    python = Path(root) / "b" / "bin" / "python" if root else None
    return python if python is not None and python.exists() else None


def fine_tune(base: Path, directory: Path, seed: int, shard_bytes: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A copy of a checkpoint with noise of 2 % of each tensor's mean magnitude; seed 0: the same in another dtype."""
    if (directory / "config.json").exists():
        return directory
    source = Checkpoint.open(base)
    entries = [TensorEntry(name, dtype, info.shape) for name, info in source.tensors.items()]
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed))
    directory.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(directory, plan_layout(entries, max_shard_bytes=shard_bytes)) as writer:
        for entry in entries:
            flat = source.read(entry.name).reshape(-1)
            for start in range(0, flat.numel(), NOISE):
                part = flat[start : start + NOISE].float()
                if seed:
                    part += noise[: part.numel()] * (0.02 * part.abs().mean())
                writer.write(entry.name, part.to(dtype), start * dtype.itemsize)
    write_json_atomic(directory / "config.json", {**source.config, "dtype": str(dtype).removeprefix("torch.")})
    return directory


def configuration(method: str, models: list[Path], dtype: str) -> dict[str, Any]:
    """mergekit's YAML for a method: ``models`` are a base and two fine-tunes."""
    base, first, second = map(str, models)
    name = method.partition(" ")[0]
    config: dict[str, Any] = {"merge_method": name, "dtype": dtype, "parameters": dict(METHODS[method])}
    if name in _PAIR:
        return config | {"base_model": first, "models": [{"model": first}, {"model": second}]}
    entries: list[dict[str, Any]] = [{"model": first}, {"model": second}]
    if name in _WEIGHTED or name not in (*_BASELESS, "model_stock", "sce", "ram", "ramplus_tl"):
        for entry, weight in zip(entries, (0.6, 0.4)):
            entry["parameters"] = {"weight": weight}
    if name not in _BASELESS:
        config["base_model"] = base
    if method.endswith("modules"):
        return config | {"modules": {"default": {"models": entries}}}
    if not method.endswith("slices"):
        return config | {"models": entries}
    if name not in _BASELESS:
        entries.insert(0, {"model": base})
    ranges = [[{**entry, "layer_range": [first, first + 2]} for entry in entries] for first in (0, 2)]
    return config | {"slices": [{"sources": sources} for sources in ranges]}


# -- agreement ---------------------------------------------------------------------------------------------------------


def _ulps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between, for bfloat16."""

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(found) - ordered(expected)).abs()


def tied(method: str, start: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Where a magnitude equals one at which a method cuts, so that either program may take either."""
    magnitudes = (tuned.float() - start.float()).abs()
    numel = magnitudes.numel()
    ordered = magnitudes.flatten().sort(descending=True).values
    keep, top = int(0.5 * numel), int(0.01 * numel) if method.startswith("breadcrumbs") else 0
    found = torch.zeros_like(magnitudes, dtype=torch.bool)
    for place in (top, keep + top):
        if 0 < place < numel:
            found |= magnitudes == ordered[place - 1]
    return found


def compared(ours: Path, theirs: Path, models: list[Path], method: str = "") -> Row:
    """Element by element: how many equal bits, how many within one unit in the last place (bf16), relative error, and
    of those that are further apart how many have no magnitude at a threshold."""
    base, tuned = models[1 if method in _PAIR else 0], [Checkpoint.open(model) for model in models[1:]]
    a, b, start = Checkpoint.open(ours), Checkpoint.open(theirs), Checkpoint.open(base)
    equal = near = count = unexplained = 0
    error = norm = change = change_norm = 0.0
    for name in a.tensors:
        x, y, z = a.read(name), b.read(name), start.read(name).float()
        if x.shape != y.shape or x.dtype != y.dtype:
            return {"note": f"{name}: {tuple(x.shape)} {x.dtype} here, {tuple(y.shape)} {y.dtype} there"}
        count += x.numel()
        equal += int((x == y).sum())
        close = _ulps(x, y) <= 1 if x.dtype == torch.bfloat16 else x == y
        near += int(close.sum())
        if method.startswith(("ties", "breadcrumbs")):
            for model in tuned:
                close = close | tied(method, z, model.read(name))
        unexplained += int((~close).sum())
        error += float((x.double() - y.double()).square().sum())
        norm += float(y.double().square().sum())
        change += float((x.double() - z).square().sum())
        change_norm += float((y.double() - z).square().sum())
    return {
        "equal": equal / count, "within_1_ulp": near / count, "unexplained": unexplained,
        "relative_error": (error / norm) ** 0.5,
        "change_ratio": (change / change_norm) ** 0.5 if change_norm else 1.0,
    }  # fmt: skip


def agreement(folder: Path, methods: Sequence[str]) -> list[Row]:
    """Every method of mergekit's, in both dtypes."""
    python = peer()
    if python is None:
        print("mergekit is not here (SLIMWRIGHT_PEERS): no agreement measured.")
        return []
    work, rows = [], []
    for kind, dtype in KINDS.items():
        stored = str(dtype).removeprefix("torch.")
        seedling = make(dict(SMALL), folder / "small-source")
        models = [fine_tune(seedling, folder / f"small-{stored}-{i}", i, 5_000_000_000, dtype) for i in range(3)]
        for method in methods:
            config = configuration(method, models, "float32" if kind == "cast" else stored)
            if kind == "cast":
                config["out_dtype"] = "bfloat16"
            work.append((method, kind, config, models))
    jobs = [
        (0, yaml.safe_dump(config), str(folder / f"theirs-{method}-{kind}".replace(" ", "-")))
        for method, kind, config, _ in work
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([str(python), "-c", _RUN_PEER, str(folder / "jobs.json")], check=True)
    import slimwright

    for method, kind, config, models in work:
        theirs, ours = (
            folder / f"theirs-{method}-{kind}".replace(" ", "-"),
            folder / f"ours-{method}-{kind}".replace(" ", "-"),
        )
        if not (theirs / "config.json").exists():
            rows.append({"method": method, "dtype": kind, "note": "mergekit failed", "ok": True})
            continue
        slimwright.merge(config, ours, quiet=True)
        found = compared(ours, theirs, models, method)
        rows.append({"method": method, "dtype": kind, **found, "ok": _agrees(method, kind, found)})
    return rows


def _agrees(method: str, kind: str, found: Row) -> bool:
    """What is asked of each kind of method."""
    if "note" in found:  # mergekit writes these two in float32, whatever the dtype
        return method in ("arcee_fusion", "ramplus_tl") and kind == "bfloat16"
    if method in RANDOM:
        return abs(found["change_ratio"] - 1) < 0.02
    if kind == "bfloat16" or method == "arcee_fusion":  # mergekit rounds every step; its divergence is rounding noise
        return bool(found["relative_error"] < 0.01)
    if method in ELEMENTWISE:
        return found["unexplained"] == 0
    if "rescaled" in method:  # by the sums of what is kept, which differ where magnitudes tie at the threshold
        return bool(found["relative_error"] < (2e-5 if kind == "float32" else 0.01))
    if method == "sce" and kind == "cast":  # variances tie too
        return bool(found["relative_error"] < 0.01)
    return bool(found["relative_error"] < 2e-6 if kind == "float32" else found["within_1_ulp"] > 0.9999)


# -- random masks ------------------------------------------------------------------------------------------------------


def random_masks(folder: Path, methods: Sequence[str], seeds: int = SEEDS) -> list[Row]:
    """Merges under many seeds in both programs: what an entry is on average, how it varies, how often it is dropped.

    ``z``: root mean square, over the entries, of the difference of the two means in its standard errors, 1 where both
    programs draw from one distribution. ``deviation``: the same ratio for ours alone between odd and even seeds, which
    is 1 where draws of different seeds do not depend on each other. ``neighbours``: correlation of entries beside each
    other, 0 where their draws do not depend on each other.
    """
    python = peer()
    if python is None:
        print("mergekit is not here (SLIMWRIGHT_PEERS): no statistics of random masks compared.")
        return []
    import slimwright

    seedling = make(dict(TINY), folder / "tiny-source")
    models = [fine_tune(seedling, folder / f"tiny-{i}", i, 5_000_000_000, torch.float32) for i in range(3)]
    configs = {method: configuration(method, models, "float32") for method in methods}
    jobs = [
        (seed, yaml.safe_dump(config), str(folder / f"theirs-{method}-{seed}"))
        for method, config in configs.items()
        for seed in range(seeds)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([str(python), "-c", _RUN_PEER, str(folder / "jobs.json")], check=True)
    rows = []
    for method, config in configs.items():
        for seed in range(seeds):
            slimwright.merge(config, folder / f"ours-{method}-{seed}", seed=seed, verify=False, quiet=True)
        ours, theirs = (
            torch.stack([changes(folder / f"{side}-{method}-{seed}", models[0]) for seed in range(seeds)])
            for side in ("ours", "theirs")
        )
        rows.append({"method": method, "seeds": seeds, "entries": ours.shape[1], **statistics_of(ours, theirs)})
    return rows


def changes(merged: Path, base: Path) -> torch.Tensor:
    """float64: the differences of a merge's matrices to the base's, a row after the other."""
    a, b = Checkpoint.open(merged), Checkpoint.open(base)
    return torch.cat(
        [
            (a.read(name).double() - b.read(name).double()).flatten()
            for name in sorted(b.tensors)
            if len(b.tensors[name].shape) == 2
        ]
    )


def statistics_of(ours: torch.Tensor, theirs: torch.Tensor) -> Row:
    """What two sets of draws [seeds, entries] have in common."""

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        errors = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        drawn = errors > 0
        return float(((a.mean(0) - b.mean(0))[drawn] / errors[drawn]).square().mean().sqrt())

    centred = ours - ours.mean(0)
    neighbours = float((centred[:, 1:] * centred[:, :-1]).sum() / centred[:, 1:].square().sum())
    row: Row = {
        "z": apart(ours, theirs), "deviation": apart(ours[::2], ours[1::2]), "neighbours": neighbours,
        "variance_ratio": float(ours.var(0).sum() / theirs.var(0).sum()),
        "dropped": float((ours == 0).double().mean()), "dropped_mergekit": float((theirs == 0).double().mean()),
    }  # fmt: skip
    row["ok"] = (
        abs(row["z"] - 1) < 0.05
        and abs(row["deviation"] - 1) < 0.05
        and abs(row["variance_ratio"] - 1) < 0.02
        and abs(row["neighbours"]) < 0.01
        and abs(row["dropped"] - row["dropped_mergekit"]) < 0.002
    )
    return row


# -- speed -------------------------------------------------------------------------------------------------------------


def raw_copy(models: list[Path], out: Path) -> float:
    """Seconds that the same reads and writes take without any arithmetic: every byte read, one model written, fsync."""
    files = [sorted(model.glob("*.safetensors")) for model in models]
    return plain_copy([file for group in files for file in group], sum(f.stat().st_size for f in files[0]), out)


def timed(command: list[str], out: Path) -> tuple[float, int]:
    """Wall seconds and peak anonymous bytes of a command that writes ``out``, which is removed first."""
    from slimwright.job.memory import anonymous_bytes

    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.01)
    if child.returncode:
        raise RuntimeError(f"{command} failed")
    return time.perf_counter() - started, peak


def speed(folder: Path, timed_methods: Sequence[str] = TIMED, repeats: int = 3) -> list[Row]:
    """Wall time and memory of methods, with verification and without, beside mergekit."""
    base = make(QWEN2_05B, folder / "base", 500_000_000)
    models = [base, *(fine_tune(base, folder / f"tuned-{seed}", seed, 500_000_000) for seed in (1, 2))]
    python = peer()
    rows = []
    for method in timed_methods:
        config = configuration(method, models, "bfloat16")
        file = folder / f"{method}.yaml"
        file.write_text(yaml.safe_dump(config))
        used = models if "base_model" in config and method not in _PAIR else models[1:]
        ours = [sys.executable, "-m", "slimwright", "merge", str(file), "--out", str(folder / "out")]
        commands = {"ours": [*ours, "--no-verify"], "verified": ours}
        if python is not None:
            commands["mergekit"] = [str(python.parent / "mergekit-yaml"), str(file), str(folder / "out")]
        seconds: dict[str, list[float]] = {name: [] for name in (*commands, "copy")}
        peaks: dict[str, int] = {}
        for _ in range(repeats):
            seconds["copy"].append(raw_copy(used, folder / "copy.bin"))
            for name, command in commands.items():
                wall, peak = timed(command, folder / "out")
                seconds[name].append(wall)
                peaks[name] = max(peak, peaks.get(name, 0))
        median = {name: statistics.median(values) for name, values in seconds.items()}
        limit = (2.5 if method in TWO_READS else 1.25) * median["copy"] + 2
        rows.append(
            {
                "method": method, "seconds": median["ours"], "verified_seconds": median["verified"],
                "copy_seconds": median["copy"], "limit_seconds": limit, "memory_bytes": peaks["ours"],
                "mergekit_seconds": median.get("mergekit"), "mergekit_memory_bytes": peaks.get("mergekit"),
                "multiple": median["mergekit"] / median["ours"] if python is not None else None,
                "ok": median["ours"] <= limit and peaks["ours"] < 1_000_000_000,
            }
        )  # fmt: skip
    return rows


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(folder: Path) -> list[Row]:
    """Merges inside a cgroup whose limit is a bare import plus the cap; without a cgroup, under the watcher alone."""
    rows: list[Row] = []
    for name, shape, size, cap, methods in (
        ("0.5B", QWEN2_05B, 988_000_000, 1_000_000_000, TIMED),
        ("13 GB", LLAMA_8B_24, 13_100_000_000, 1_500_000_000, ("dare_ties",)),
    ):
        free = shutil.disk_usage(folder).free
        if free < 4.1 * size:
            note = f"skipped: {4.1 * size / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} GB are free"
            rows.append({"shape": name, "note": note})
            continue
        base = make(shape, folder / name / "base", 500_000_000 if size < 1 << 30 else 2_000_000_000)
        models = [base, *(fine_tune(base, folder / name / f"tuned-{seed}", seed, 2_000_000_000) for seed in (1, 2))]
        for method in methods:
            file = folder / f"{method}.yaml"
            file.write_text(yaml.safe_dump(configuration(method, models, "bfloat16")))
            rows.append({"shape": name, "method": method, "cap": cap, **limited(file, folder / "out", cap)})
        shutil.rmtree(folder / name)
    return rows


def limited(file: Path, out: Path, cap: int) -> Row:
    """One merge inside a cgroup."""
    shutil.rmtree(out, ignore_errors=True)
    limit = bare_import("slimwright.job.merge") + cap
    enter, group = in_cgroup(limit)
    command = [sys.executable, "-m", "slimwright", "merge", str(file), "--out", str(out), "--json"]
    command += ["--job-memory", str(cap)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)  # noqa: PLW1509
    output, _ = child.communicate()
    row: Row = {"seconds": time.perf_counter() - started, "cgroup": group is not None, "ok": child.returncode == 0}
    if group is not None:
        row["cgroup_limit"] = limit
        group.rmdir()
    if child.returncode == 0:
        report = json.loads(output)
        row |= {
            "peak": report["job"]["peak_memory_bytes"], "forecast": report["forecast"]["memory_bytes"],
            "bytes_read": report["forecast"]["read_bytes"], "verified": report["verified"]["ok"],
        }  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    return row


def main() -> int:
    started = time.time()
    parts = ("agreement", "random", "speed", "memory")
    only = [word for word in sys.argv[1:] if word not in parts]
    wanted = [word for word in sys.argv[1:] if word in parts] or parts
    with scratch("merging") as folder:
        found: list[Row] = []
        if "agreement" in wanted:
            columns = {"method": "method", "dtype": "dtype", "equal": "equal bits", "within_1_ulp": "within 1 ulp",
                       "unexplained": "untied beyond",
                       "relative_error": "relative error", "change_ratio": "size of change", "note": "note",
                       "ok": "ok"}  # fmt: skip
            found += publish("merging-agreement", agreement(folder, only or list(METHODS)), columns, started)
        if "random" in wanted:
            columns = {"method": "method", "seeds": "seeds", "entries": "entries", "z": "z of means",
                       "deviation": "z, odd and even seeds", "variance_ratio": "variances",
                       "neighbours": "neighbours", "dropped": "dropped", "dropped_mergekit": "dropped by mergekit",
                       "ok": "ok"}  # fmt: skip
            found += publish("merging-random", random_masks(folder, only or RANDOM), columns, started)
        if "speed" in wanted:
            columns = {"method": "method", "seconds": "s", "verified_seconds": "s verified", "copy_seconds": "s copy",
                       "limit_seconds": "s limit", "mergekit_seconds": "s mergekit", "multiple": "multiple",
                       "memory_bytes": "bytes", "mergekit_memory_bytes": "bytes mergekit", "ok": "ok"}  # fmt: skip
            found += publish("merging-speed", speed(folder, only or TIMED), columns, started)
        if "memory" in wanted:
            columns = {"shape": "shape", "method": "method", "seconds": "s", "peak": "peak bytes", "cap": "allowed",
                       "forecast": "forecast", "cgroup": "in a cgroup", "note": "note", "ok": "ok"}  # fmt: skip
            found += publish("merging-memory", memory(folder), columns, started)
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
