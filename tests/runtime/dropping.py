"""Writes directories with dropped sublayers by hand, beside the dense model whose output projections are zero."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.model.surgery import Drop, Droppable, droppable
from slimwright.runtime.format import Dropped, write_config
from tests.families import FAMILIES, cached
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


@torch.no_grad()
def outputs(model: Any, **inputs: Any) -> dict[str, Tensor]:
    found = model(**inputs)
    return {name: t for name, t in found.items() if isinstance(t, Tensor) and t.is_floating_point()}


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got and got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.isfinite(got[name]).all()
        assert float((got[name] - tensor).abs().max()) <= 1e-5 * max(1.0, float(tensor.abs().max())), name


@torch.no_grad()
def continued(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the second half of ``ids``, computed on the cache of the first."""
    half = ids.shape[1] // 2
    first = {} if mask is None else {"attention_mask": mask[:, :half]}
    cache = model(ids[:, :half], use_cache=True, **first).past_key_values
    more = {} if mask is None else {"attention_mask": mask}
    return model(ids[:, half:], past_key_values=cache, use_cache=True, **more).logits


def check(name: str, directory: Path, dense: Path, generate: bool = True) -> Any:
    """Compare the two models in every way that the family has, and give the first."""
    cls = FAMILIES[name].model_class
    model, info = cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    wanted = cls.from_pretrained(dense, dtype=torch.float32)
    inputs = dummy_inputs(wanted)
    close(outputs(model, **inputs), outputs(wanted, **inputs))
    if not FAMILIES[name].generates or not generate:
        return model
    ids = inputs.get("input_ids")
    if ids is not None and list(inputs) == ["input_ids"] and not getattr(model, "_is_stateful", False):
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        counted = mask.bool()
        got, expected = (m(ids, attention_mask=mask).logits for m in (model, wanted))
        close({"padded": got[counted]}, {"padded": expected[counted]})
        if name != "home_made":
            half = ids.shape[1] // 2
            close({"cached": continued(model, ids)}, {"cached": continued(wanted, ids)})
            close({"cached": continued(model, ids)}, {"cached": model(ids).logits[:, half:]})
            close({"padded": continued(model, ids, mask)}, {"padded": continued(wanted, ids, mask)})
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    uncached = wanted.generate(**given, **length, use_cache=False)
    assert torch.equal(model.generate(**given, **length, use_cache=False), uncached)
    if name != "home_made":
        assert torch.equal(model.generate(**given, **length), uncached)
        try:
            static = wanted.generate(**given, **length, cache_implementation="static")
        except Exception:  # not every family has a static cache
            return model
        assert torch.equal(model.generate(**given, **length, cache_implementation="static"), static)
    return model
