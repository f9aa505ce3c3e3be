"""Writes directories with dropped sublayers by hand, beside the dense model whose output projections are zero."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slimwright.checkpoint import Checkpoint
from slimwright.model.discover import discover
from slimwright.model.surgery import Drop, Droppable, droppable
from slimwright.runtime.format import Dropped, write_config
from tests.families import cached
from tests.runtime.packing import edit_config


@cache
def found(name: str, dtype: torch.dtype = torch.float32) -> Droppable:
    """What can be dropped of a family."""
    checkpoint = Checkpoint.open(cached(name, dtype))
    return droppable(checkpoint, discover(checkpoint))


def some(drops: Iterable[Drop]) -> list[Drop]:
    """The first block's attention of every stack, and every stack's last MLP."""
    chosen: dict[tuple[str, bool], Drop] = {}
    for drop in drops:
        key = drop.block.rpartition(".")[0], drop.attention
        if not drop.whole_block and not (drop.attention and key in chosen):
            chosen[key] = drop
    return list(chosen.values())


def write(source: Path, out: Path, drops: Iterable[Drop]) -> tuple[Path, Path]:
    """Directories of the model without these sublayers, and of the dense model that it must equal."""
    tensors = load_file(source / "model.safetensors")
    forms = {path: form for drop in drops for path, form in drop.forms.items()}
    gone = {name for drop in drops for name in drop.tensors}
    zeros = {name for drop in drops for name in drop.outputs}
    marks = tuple(drop.mark for drop in drops if drop.mark)
    dense = {name: torch.zeros_like(tensor) if name in zeros else tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    kept |= {name: torch.zeros(1, dtype=torch.uint8) for name in marks}
    for directory, content in ((out / "dropped", kept), (out / "dense", dense)):
        shutil.copytree(source, directory)
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    shapes = {name: (str(tensors[name].dtype)[6:], tuple(tensors[name].shape)) for name in gone}
    section = write_config({}, "test", {}, dropped=Dropped(forms, shapes, marks))
    edit_config(out / "dropped", lambda config: config.update(quantization_config=section))
    return out / "dropped", out / "dense"
