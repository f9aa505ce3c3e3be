"""Checkpoints quantized by others as the source of jobs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slimwright.job.open import DerivedCheckpoint, open_source
from tests.families import cached
from tests.formats.test_quantized import directory, stream
from tests.job.conftest import fitted


def test_a_quantized_model_is_the_source_of_a_job(tmp_path: Path) -> None:
    """A GPTQ checkpoint of a tiny Llama: the same job on the dense model that it stands for gives the same bytes."""
    source = cached("llama", torch.float32)
    tensors, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = dense[name] = tensor
            continue
        base, scale = name.removesuffix(".weight"), torch.full((1, tensor.shape[0]), 1 / 32, dtype=torch.float16)
        codes = (tensor * 32 + 8).round().clamp(0, 15).int()
        tensors[f"{base}.qweight"] = torch.tensor([stream(row, 4) for row in codes.tolist()], dtype=torch.int32).t()
        tensors[f"{base}.qzeros"] = torch.full((1, tensor.shape[0] // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{base}.scales"] = scale
        dense[name] = (codes - 8) / 32
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "dense").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    packed = directory(tmp_path / "packed", tensors, {"quant_method": "gptq", "bits": 4, "group_size": -1}, **config)
    assert isinstance(open_source(str(packed)), DerivedCheckpoint)
    one = fitted(str(packed), tmp_path / "one", size="30%")
    two = fitted(str(tmp_path / "dense"), tmp_path / "two", size="30%")
    assert one["verified"]["ok"] and one["hash"] == two["hash"]
