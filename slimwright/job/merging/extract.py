"""Writing what LoRA extraction finds as an adapter in PEFT's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint import CheckpointWriter, TensorEntry, plan_layout, write_json_atomic
from slimwright.checkpoint.files import rename
from slimwright.errors import InputError
from slimwright.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from slimwright.job.merging.layers import find_stacks, layer_of
from slimwright.job.merging.plan import MergePlan, Unit
from slimwright.methods.merge.lora_extract import LoraExtract


def extract_adapter(plan: MergePlan, folder: Path, base: str) -> dict[str, Any]:
    """Factor every changed matrix of the layers; keep every other changed tensor whole. Matrix by matrix.

    Returns:
        What the report says: modules, ranks, tensors kept whole, and the squared relative error of the changes.

    Raises:
        InputError: a bias changed, which PEFT's format cannot hold beside a low-rank change, or nothing did.
    """
    stacks = find_stacks([unit.entry.name for unit in plan.units])
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole: list[str] = []
    error = norm = 0.0
    for unit in plan.units:
        weight, start = _both(unit)
        if torch.equal(weight, start):
            continue
        name = unit.entry.name
        module, _, kind = name.rpartition(".")
        method = unit.method
        assert isinstance(method, LoraExtract)
        if kind == "bias":
            raise InputError(f"The bias '{name}' changed, which an adapter cannot hold: only weights can be extracted.")
        if weight.ndim == 2 and layer_of(name, stacks) is not None and kind == "weight":
            up, down = method.factors(weight, start)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
            ranks[module] = len(down)
            change = (weight - start).double()
            error += float((change - (up @ down).double()).square().sum())
            norm += float(change.square().sum())
        else:
            tensors[f"base_model.model.{name}"] = weight
            whole.append(module)
    if not tensors:
        raise InputError("The model equals its base: there is nothing to extract.")
    largest = max(ranks.values(), default=1)
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "r": largest, "lora_alpha": largest,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": sorted(ranks), "modules_to_save": sorted(whole) or None,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != largest},
        "alpha_pattern": {module: rank for module, rank in ranks.items() if rank != largest},
    }  # fmt: skip
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with CheckpointWriter(folder, plan_layout(entries, max_shard_bytes=1 << 60)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    rename(folder / "model.safetensors", folder / WEIGHTS_FILE)
    write_json_atomic(folder / CONFIG_FILE, config)
    return {
        "modules": len(ranks), "rank": {"largest": largest, "mean": sum(ranks.values()) / max(1, len(ranks))},
        "whole": whole, "relative_error": error / norm if norm else 0.0,
        "bytes": sum(entry.nbytes for entry in entries),
    }  # fmt: skip


def _both(unit: Unit) -> tuple[Tensor, Tensor]:
    """The whole tensor of the model and of the base, float32 of their own."""
    assert unit.base is not None
    shape, numel = unit.site.shape, unit.site.numel
    return (
        unit.origins[0].read(0, numel).float().clone().reshape(shape),
        unit.base.read(0, numel).float().clone().reshape(shape),
    )
