"""A result as a compressed-tensors checkpoint: codes rearranged, nothing rounded again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from slimwright.checkpoint import Checkpoint, TensorEntry, plan_layout, write_config_atomic
from slimwright.errors import InputError, SlimwrightError
from slimwright.formats.compressed_tensors import CompressedTensors, quantization_config
from slimwright.job.exports.proof import run_elsewhere
from slimwright.job.exports.written import TILE_BYTES, Result, Written, copy_tensor, fresh_writer
from slimwright.job.open import decoded
from slimwright.job.result import how_to_load
from slimwright.job.weights import site_tiles

_READER = "0.15.0"
"""Oldest version of the package that transformers takes."""


def write_compressed_tensors(
    result: Result, directory: Path, out: Path, max_shard_bytes: int, trust_remote_code: bool = False
) -> Written:
    """Write the weights and config.json, and prove them.

    Args:
        directory: where the model's files go; ``out``: what it will be called.

    Raises:
        InputError: the plan is not legal there; SlimwrightError: what was written is not what was meant.
    """
    profile, checkpoint, structure = CompressedTensors(), result.checkpoint, result.structure
    profile.check(result.plan(), list(structure.sites.values()), result.rounded)
    if not result.grids:
        raise InputError(f"{checkpoint.path} has no packed weights: as plain safetensors it loads everywhere.")
    entries: list[TensorEntry] = []
    for name, info in checkpoint.tensors.items():
        if name in result.grids:
            entries += profile.entries(structure.sites[name], result.grids[name], result.rounded.get(name))
        elif name not in structure.ties:
            entries.append(TensorEntry(name, info.dtype, info.shape))
    layout = plan_layout(entries, max_shard_bytes, total_parameters=structure.parameters)
    with fresh_writer(directory, layout) as writer:
        for done, name in enumerate(checkpoint.tensors):
            result.step(done, len(checkpoint.tensors))
            if name in result.grids:
                site = structure.sites[name]
                for rows in site_tiles(site, result.grids[name], TILE_BYTES):
                    codes, params = result.packed(site, rows)
                    tensors = profile.tensors(site, result.grids[name], codes, params, result.rounded.get(name))
                    for part, tensor in tensors.items():
                        by_rows = tensor.ndim == 2
                        if by_rows or rows.start == 0:
                            per_row = tensor[0].numel() * tensor.element_size() if by_rows else 0
                            writer.write(part, tensor, rows.start * per_row)
            elif name not in structure.ties:
                copy_tensor(checkpoint, name, writer)
    config = {**checkpoint.config, "quantization_config": _config(result)}
    write_config_atomic(directory / "config.json", config)
    compared = _read_back(result, directory)
    load = how_to_load(out, checkpoint.model_path.relative_to(checkpoint.path), checkpoint, packed=False)
    load = f"# needs: pip install 'compressed-tensors>={_READER}'; no slimwright\n{load}"
    proof = {
        "how": "read back from disk by the format's own reader",
        "weights_compared": compared,
        **_elsewhere(result, directory, trust_remote_code),
    }
    files = tuple(directory / shard.file_name for shard in layout.shards)
    what = "compressed-tensors, the codes of the compressed result"
    return Written(files, sum(entry.nbytes for entry in entries), load, what, proof)


def _config(result: Result) -> dict[str, Any]:
    structure = result.structure
    packed = {
        structure.sites[name].module: (grid, result.rounded.get(name))
        for name, grid in result.grids.items()
    }  # fmt: skip
    matrices = [name for name, info in result.checkpoint.tensors.items() if len(info.shape) == 2]
    others = {structure.to_module.get(name, name).removesuffix(".weight") for name in matrices if name not in packed}
    others |= {name.removesuffix(".weight") for name in structure.ties}
    return quantization_config(packed, (module for module in others if module not in packed), _READER)


def _read_back(result: Result, directory: Path) -> int:
    """Compare every packed weight with what it should be; how many there are."""
    written = decoded(Checkpoint.open(directory))
    for name, grid in result.grids.items():
        site = result.structure.sites[name]
        for rows in site_tiles(site, grid):
            codes, params = result.packed(site, rows)
            meant = grid.decode(codes, params).to(written.tensors[name].dtype)
            if not torch.equal(written.read(name, rows).float(), meant.float()):
                raise SlimwrightError(f"'{name}' was not written as it was meant: this is a defect of slimwright.")
    return len(result.grids)


_LOAD = """
import json, sys, torch, transformers, compressed_tensors
spec = json.load(open(sys.argv[1]))
model = getattr(transformers, spec["class"]).from_pretrained(spec["directory"], dtype=torch.float32).eval()
assert "slimwright" not in sys.modules
with torch.no_grad():
    logits = model(input_ids=torch.tensor(spec["tokens"])).logits
torch.save(logits, spec["result"])
print(f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}")
"""


def _elsewhere(result: Result, directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Load it without slimwright where the package is installed, and compare logits."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return {"program": "none: compressed-tensors is not installed here"}
    return run_elsewhere(result, directory, _LOAD, exact=not result.rounded, trust_remote_code=trust_remote_code)
