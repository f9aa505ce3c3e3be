"""LoRA extraction as a job: matrix by matrix into scratch files, then one adapter in PEFT's format, and its proof."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint import CheckpointWriter, Journal, TensorEntry, plan_layout, write_json_atomic
from slimwright.checkpoint.files import rename
from slimwright.errors import InputError, SlimwrightError
from slimwright.formats.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from slimwright.job.merging.layers import Stack, find_stacks, layer_of
from slimwright.job.merging.plan import MergePlan, Unit
from slimwright.job.merging.sources import open_tensors
from slimwright.methods.merge.lora_extract import LoraExtract

Found = Mapping[str, Any]
"""Of one tensor: ``kind`` (``unchanged``, ``factored`` or ``whole``), and of a factored one ``rank``, the squared norm
of its change, and the squared norm of what the factors miss of it."""
FACTORED_AGAIN = 8
"""Matrices whose factors the proof computes again."""
_PREFIX = "base_model.model."


def extract_factors(
    plan: MergePlan, folder: Path, journal: Journal, step: Callable[[int, int], None]
) -> dict[str, Found]:
    """Factor every changed matrix of the layers, keep every other changed tensor whole; what the journal has is kept.

    Args:
        folder: for one directory a tensor.

    Raises:
        InputError: a bias changed, which PEFT's format cannot hold beside a low-rank change, or nothing did.
    """
    stacks = find_stacks([unit.entry.name for unit in plan.units])
    for number, unit in enumerate(plan.units):
        key = f"extract:{unit.entry.name}"
        if key not in journal.done:
            journal.append(key, _extract(unit, folder / str(number), stacks))
            journal.commit()
        step(number + 1, 2 * len(plan.units))
    found = {unit.entry.name: journal.done[f"extract:{unit.entry.name}"] for unit in plan.units}
    if all(one["kind"] == "unchanged" for one in found.values()):
        raise InputError("The model equals its base: there is nothing to extract.")
    return found


def _extract(unit: Unit, folder: Path, stacks: Sequence[Stack]) -> Found:
    weight, start = _both(unit)
    if torch.equal(weight, start):
        return {"kind": "unchanged"}
    name, method = unit.entry.name, unit.method
    assert isinstance(method, LoraExtract)
    if name.endswith(".bias"):
        raise InputError(f"The bias '{name}' changed, which an adapter cannot hold: only weights can be extracted.")
    if weight.ndim != 2 or layer_of(name, stacks) is None or not name.endswith(".weight"):
        _write(folder, {"whole": weight})
        return {"kind": "whole"}
    up, down = method.factors(weight, start)
    _write(folder, {"lora_A": down.contiguous(), "lora_B": up.contiguous()})
    return {"kind": "factored", "rank": len(down), **_sizes(weight, start, up, down)}


def _sizes(weight: Tensor, start: Tensor, up: Tensor, down: Tensor) -> dict[str, float]:
    change = (weight - start).double()
    return {
        "norm": float(change.square().sum()),
        "error": float((change - (up @ down).double()).square().sum()),
    }


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter(folder, plan_layout(entries, max_shard_bytes=1 << 60)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def write_adapter(plan: MergePlan, found: Mapping[str, Found], parts: Path, folder: Path, base: str) -> dict[str, Any]:
    """Put the factors of all tensors together as PEFT has them.

    Args:
        found: from :func:`extract_factors`, whose folder is ``parts``.
        folder: of the adapter.
        base: the base model, as PEFT will look for it.

    Returns:
        What the report says: modules, ranks, tensors kept whole, and the squared relative error of the changes.
    """
    written = {unit.entry.name: open_tensors(parts / str(number) / "model.safetensors")
               for number, unit in enumerate(plan.units) if found[unit.entry.name]["kind"] != "unchanged"}  # fmt: skip
    places: dict[str, tuple[str, str]] = {}  # in the adapter: of which tensor, and which of its parts
    for name, kept in written.items():
        module = name.rpartition(".")[0]
        for part in kept.tensors:
            places[_PREFIX + (name if part == "whole" else f"{module}.{part}.weight")] = (name, part)
    ranks = {name.rpartition(".")[0]: one["rank"] for name, one in found.items() if one["kind"] == "factored"}
    whole = [name.rpartition(".")[0] for name, one in found.items() if one["kind"] == "whole"]
    largest = max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "r": largest, "lora_alpha": largest,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": sorted(ranks), "modules_to_save": sorted(whole) or None,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != largest},
        "alpha_pattern": {module: rank for module, rank in ranks.items() if rank != largest},
    }  # fmt: skip
    for file in folder.glob("*.safetensors"):  # of a run that was killed while it wrote
        file.unlink()
    entries = [
        TensorEntry(place, torch.float32, written[name].tensors[part].shape) for place, (name, part) in places.items()
    ]
    with CheckpointWriter(folder, plan_layout(entries, max_shard_bytes=1 << 60)) as writer:
        for place, (name, part) in places.items():
            writer.write(place, written[name].read(part))
    rename(folder / "model.safetensors", folder / WEIGHTS_FILE)
    write_json_atomic(folder / CONFIG_FILE, config)
    factored = [one for one in found.values() if one["kind"] == "factored"]
    norm = math.fsum(one["norm"] for one in factored)
    return {
        "modules": len(ranks), "rank": {"largest": largest, "mean": sum(ranks.values()) / max(1, len(ranks))},
        "whole": whole, "relative_error": math.fsum(one["error"] for one in factored) / norm if norm else 0.0,
        "bytes": sum(entry.nbytes for entry in entries),
    }  # fmt: skip


def prove_adapter(
    plan: MergePlan, found: Mapping[str, Found], folder: Path, seed: int, step: Callable[[int, int], None]
) -> dict[str, Any]:
    """Read the adapter back as any reader does, and compare it with the inputs.

    Every change must miss of the model's what was noted when it was factored, a tensor kept whole must be the model's,
    and the factors of eight matrices are computed again and must be equal bytes.

    Raises:
        SlimwrightError: a difference; nothing is to be published.
    """
    adapter = read_adapter(folder)
    matrices = [unit.entry.name for unit in plan.units if found[unit.entry.name]["kind"] == "factored"]
    again = sorted(matrices, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:FACTORED_AGAIN]
    if set(adapter.changes) != set(matrices):
        raise SlimwrightError(f"{folder} does not hold the changes that were found; nothing was published.")
    for number, unit in enumerate(plan.units):
        name, one = unit.entry.name, found[unit.entry.name]
        weight, start = _both(unit)
        good = one["kind"] == "unchanged"
        if one["kind"] == "whole":
            good = torch.equal(adapter.replaced[name], weight)
        elif one["kind"] == "factored":
            change = adapter.changes[name]
            sizes = _sizes(weight, start, change.up, change.down)
            good = change.scale == 1 and all(math.isclose(sizes[key], one[key], rel_tol=1e-6) for key in sizes)
            if name in again:
                assert isinstance(unit.method, LoraExtract)
                up, down = unit.method.factors(weight, start)
                good = good and torch.equal(up, change.up) and torch.equal(down, change.down)
        if not good:
            raise SlimwrightError(
                f"'{name}' was not written as it should be; nothing was published, and what was written is left in "
                f"{folder}."
            )
        step(len(plan.units) + number + 1, 2 * len(plan.units))
    how = "read back as an adapter; every change misses what was noted; factors computed again are equal bytes"
    return {"ok": True, "how": how, "tensors": len(plan.units), "tiles": 0, "surveys": 0, "factored_again": len(again)}


def adapter_ledger(plan: MergePlan, found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """One line a tensor: factored, whole, or unchanged."""
    lines = []
    for unit in plan.units:
        one = found[unit.entry.name]
        shape = unit.site.shape
        numel = one["rank"] * sum(shape) if one["kind"] == "factored" else unit.site.numel
        lines.append(
            {
                "tensor": unit.entry.name,
                "state": {"factored": "merged", "whole": "copied", "unchanged": "unchanged"}[one["kind"]],
                "reason": {
                    "factored": f"rank {one.get('rank')}", "whole": "no matrix of a layer: kept whole",
                    "unchanged": "equals the base: not in the adapter",
                }[one["kind"]],
                "method": unit.method.spec if unit.method is not None else None,
                "from": [f"{model}: {name}" for model, name in zip(unit.models, unit.names)],
                "dtype": "float32", "shape": list(shape), "bytes": 0 if one["kind"] == "unchanged" else 4 * numel,
            }
        )  # fmt: skip
    return lines


def _both(unit: Unit) -> tuple[Tensor, Tensor]:
    """The whole tensor of the model and of the base, float32 of their own."""
    assert unit.base is not None
    shape, numel = unit.site.shape, unit.site.numel
    return (
        unit.origins[0].read(0, numel).float().clone().reshape(shape),
        unit.base.read(0, numel).float().clone().reshape(shape),
    )
