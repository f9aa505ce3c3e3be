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
from slimwright.methods import SiteStatistics, method, solver_for
from slimwright.model.discover import discover
from slimwright.model.structure import Site
from slimwright.plan import cannot_hold, method_on
from slimwright.runtime.format import DenseForm, write_config
from slimwright.weights import Dense, Form, Grid, Quantized, parse_form
from tests.families import cached

MIXED = ("int4:g32", "nf4", "int3:g64", "lowrank:r4:int8:row", "int8:row", "mxfp4", "int5:g32:real", "fp8",
         "int4:g32+lowrank:r3", "int2:g32:sym", "bf16", "q4_0", "int3:g32+lowrank:r4:int4:row",
         "lowrank:r16")  # fmt: skip
"""Dealt out to the choice groups in turn; a form that cannot hold a weight gives way to the next."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed model on disk, the dense model with the same weights, and what was packed how (disk names)."""

    directory: Path
    dense: Path
    grids: dict[str, Form]
    sites: dict[str, Site]


def prompts(rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens, the second row padded on the left."""
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


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
        turned = [parse_form(spec) for spec in (*specs[number % len(specs) :], *specs)]
        grid = next(g for g in turned if not any(cannot_hold(g, site) for site in sites))
        for site in sites:
            if only is not None and not only(site):
                continue
            matrix = tensors[site.name].float()
            matrix = (matrix.transpose(-1, -2) if site.transposed else matrix).reshape(site.rows, site.columns)
            if isinstance(grid, Grid):
                value = method("quantize/rtn", grid=grid).solve(matrix, SiteStatistics.none())
                value = (
                    Dense(value.dense().to(value.save()[""].dtype).reshape(site.weight_shape))
                    if grid.plain
                    else Quantized(grid, value.codes, value.params, site.weight_shape)
                )
                whole, parts = value.dense(), value.save()
            else:
                whole, parts = factored(site, matrix, grid)
            dense[site.name] = oriented(site, whole)
            del packed[site.name]
            for suffix, part in parts.items():
                packed[site.name + suffix] = oriented(site, part) if grid.plain else part
            grids[site.name] = grid
            forms[site.name] = DenseForm(str(tensors[site.name].dtype)[6:], site.shape, site.transposed)
    for directory, content in ((out / "packed", packed), (out / "dense", dense)):
        shutil.copytree(source, directory)
        content = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(out / "packed", lambda config: config.update(quantization_config=write_config(grids, "test", forms)))
    return Packed(out / "packed", out / "dense", grids, structure.sites)


def factored(site: Site, matrix: Tensor, form: Form) -> tuple[Tensor, dict[str, Tensor]]:
    """A site's weight as it stands in a low-rank form, and its tensors by suffix; experts one by one."""
    solver = solver_for(str(method_on(form.spec, "quantize/rtn")), form)
    values = [solver.solve(one, SiteStatistics.none()) for one in matrix.split(site.weight_shape[-2])]
    saved = [value.save() for value in values]
    parts = {
        s: torch.cat([own[s] for own in saved]).reshape(p.shape) for s, p in form.parts_of(site.weight_shape).items()
    }
    return torch.cat([value.dense() for value in values]).reshape(site.weight_shape), parts


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
