"""Small checkpoints for the tests, written with the safetensors library, not with ours."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from slimwright.checkpoint import DTYPES


def sample_tensors() -> dict[str, torch.Tensor]:
    """A tensor of every dtype, and the awkward shapes: a scalar, no rows, no columns, odd sizes, three dimensions."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (name, dtype) in enumerate(DTYPES.items()):
        if name == "F8_E8M0":
            continue  # the safetensors library writes it but cannot read it
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (number + 1, 6 * dtype.itemsize), generator=generator)
        tensors[f"layers.{number}.{name}"] = raw.to(torch.uint8).view(dtype)
    tensors["scalar"] = torch.tensor(3.0)
    tensors["no_rows"] = torch.empty(0, 4)
    tensors["no_columns"] = torch.empty(4, 0, dtype=torch.float16)
    tensors["odd"] = torch.arange(7, dtype=torch.uint8)
    tensors["experts"] = torch.randn(3, 4, 16, generator=generator)
    tensors["embed"] = torch.randn(300, 64, generator=generator).bfloat16()
    return tensors


def save_checkpoint(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1, config: object = None) -> Path:
    """A model directory of these tensors, dealt out to `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "test"} if config is None else config))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (NaN equals NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(flat[0], flat[1])


def anonymous_bytes() -> int:
    """This process's anonymous resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("no RssAnon in /proc/self/status")
