"""Writes packed directories with safetensors alone, beside the dense model that they must equal."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.methods import SiteStatistics, method
from slimwright.model.discover import discover
from slimwright.model.structure import Site
from slimwright.runtime.format import DenseForm, write_config
from slimwright.weights import Dense, Grid, Quantized, parse_grid
from tests.families import cached

MIXED = ("int4:g32", "nf4", "int3:g64", "int8:row", "mxfp4", "int5:g32:real", "fp8", "int2:g32:sym", "bf16", "q4_0")
"""Dealt out to the choice groups in turn; a grid that cannot hold a weight gives way to the next."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed model on disk, the dense model with the same weights, and what was packed how (disk names)."""

    directory: Path
    dense: Path
    grids: dict[str, Grid]
    sites: dict[str, Site]


def oriented(site: Site, weight: Tensor) -> Tensor:
    """A logical weight as it lies on disk."""
    return weight.transpose(-1, -2).contiguous() if site.transposed else weight


def pack(source: Path, out: Path, specs: tuple[str, ...] = MIXED, only: Any = None) -> Packed:
    """Round every site of a checkpoint to nearest and write it packed to ``out/packed`` and dense to ``out/dense``."""
    checkpoint = Checkpoint.open(source)
    structure = discover(checkpoint)
    tensors = load_file(source / "model.safetensors")
    packed, dense, grids, forms = dict(tensors), dict(tensors), {}, {}
    for number, sites in enumerate(structure.choice_groups().values()):
        turned = [parse_grid(spec) for spec in (*specs[number % len(specs) :], *specs)]
        grid = next(g for g in turned if not any(g.illegal(site.rows, site.columns) for site in sites))
        for site in sites:
            if only is not None and not only(site):
                continue
            matrix = tensors[site.name].float()
            matrix = (matrix.transpose(-1, -2) if site.transposed else matrix).reshape(site.rows, site.columns)
            value = method("quantize/rtn", grid=grid).solve(matrix, SiteStatistics.none())
            value = (
                Dense(value.dense().to(value.save()[""].dtype).reshape(site.weight_shape))
                if grid.plain
                else Quantized(grid, value.codes, value.params, site.weight_shape)
            )
            dense[site.name] = oriented(site, value.dense())
            del packed[site.name]
            for suffix, part in value.save().items():
                packed[site.name + suffix] = oriented(site, part) if grid.plain else part
            grids[site.name] = grid
            forms[site.name] = DenseForm(str(tensors[site.name].dtype)[6:], site.shape, site.transposed)
    for directory, content in ((out / "packed", packed), (out / "dense", dense)):
        shutil.copytree(source, directory)
        content = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(out / "packed", lambda config: config.update(quantization_config=write_config(grids, "test", forms)))
    return Packed(out / "packed", out / "dense", grids, structure.sites)


def edit_config(directory: Path, edit: Any) -> None:
    """Change config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@cache
def packed_family(name: str, dtype: torch.dtype = torch.bfloat16, specs: tuple[str, ...] = MIXED) -> Packed:
    """One family, packed once per process: never write to it."""
    source = cached(name, dtype)
    return pack(source, source.parent / f"{source.name}-{abs(hash(specs))}", specs)
