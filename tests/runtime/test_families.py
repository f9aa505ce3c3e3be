"""Every family, packed with a mixed choice of grids: plain ``from_pretrained`` equals the dense model with the same
weights, is complete, generates the same with and without a cache, saves again unchanged, and goes back to dense."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

import slimwright
from slimwright.model.inputs import dummy_inputs
from slimwright.runtime.modules import PackedExpertLeaf, PackedExperts, PackedModule
from tests.families import FAMILIES
from tests.runtime.packing import Packed, packed_family

EVERY = pytest.mark.parametrize("name", list(FAMILIES))


@cache
def loaded(name: str) -> tuple[Packed, PreTrainedModel, PreTrainedModel]:
    """A family packed, its packed model and its dense twin, both in float32."""
    packed, cls = packed_family(name), FAMILIES[name].model_class
    model, info = cls.from_pretrained(packed.directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return packed, model, cls.from_pretrained(packed.dense, dtype=torch.float32)


def outputs(model: PreTrainedModel, **inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found = model(**inputs)
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@EVERY
def test_equals_the_dense_model(name: str) -> None:
    packed, model, dense = loaded(name)
    inputs = dummy_inputs(dense)
    got, wanted = outputs(model, **inputs), outputs(dense, **inputs)
    assert got.keys() == wanted.keys() and got
    for key, tensor in wanted.items():
        assert torch.isfinite(got[key]).all() and relative(got[key], tensor) < 1e-4, key
    assert model.dtype == torch.float32
    stored = {name for name, grid in packed.grids.items()}
    held = sum(len(m.packed) for m in model.modules() if isinstance(m, PackedModule))
    assert held == len(stored), "a weight on a grid was not packed, or a dense copy of one exists"


@EVERY
def test_reacts_to_every_packed_weight(name: str) -> None:
    """The comparison above means something: with one payload byte flipped per weight the outputs differ."""
    _, model, dense = loaded(name)
    inputs = dummy_inputs(dense)
    wanted = outputs(dense, **inputs)
    touched = [m for m in model.modules() if isinstance(m, PackedModule) and m.packed][:3]
    for module in touched:
        parameter = next(iter(module.packed))
        payload = module.payload(parameter)
        before = payload.clone()
        view = payload.view(torch.uint8)
        with torch.no_grad():
            view.copy_(255 - view if payload.dtype == torch.uint8 else view)
            if payload.dtype != torch.uint8:
                payload.neg_()
            got = outputs(model, **inputs)
            payload.copy_(before)
        if not isinstance(module, (PackedExpertLeaf, PackedExperts)):  # an expert may see no token
            assert any(not torch.equal(got[key], wanted[key]) for key in wanted)
    assert all(relative(value, wanted[key]) < 1e-4 for key, value in outputs(model, **inputs).items())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_generation_cached_and_uncached(name: str) -> None:
    _, model, dense = loaded(name)
    inputs = {key: value for key, value in dummy_inputs(dense).items() if key != "decoder_input_ids"}
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    uncached = model.generate(**inputs, **length, use_cache=False)
    assert torch.equal(uncached, dense.generate(**inputs, **length, use_cache=False))
    if name != "home_made":  # which has no cache
        assert torch.equal(model.generate(**inputs, **length, use_cache=True), uncached)


@EVERY
def test_saves_again_unchanged(name: str, tmp_path: Path) -> None:
    """Tensors and config are those of the files, but for what plain transformers itself changes of the dense twin."""
    packed, cls = packed_family(name), FAMILIES[name].model_class
    for directory, out in ((packed.directory, "packed"), (packed.dense, "dense")):
        cls.from_pretrained(directory).save_pretrained(tmp_path / out)
    before, after = (load_file(d / "model.safetensors") for d in (packed.directory, tmp_path / "packed"))
    plain_before, plain_after = (load_file(d / "model.safetensors") for d in (packed.dense, tmp_path / "dense"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        recast = (
            key in plain_before
            and plain_before[key].shape == tensor.shape
            and key not in packed.grids
            and plain_before[key].dtype != plain_after[key].dtype
        )
        assert recast or after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key].to(tensor.dtype), tensor), key
    configs = [json.loads((d / "config.json").read_text()) for d in (packed.directory, tmp_path / "packed")]
    plain = [json.loads((d / "config.json").read_text()) for d in (packed.dense, tmp_path / "dense")]
    for key in configs[0].keys() | configs[1].keys():
        assert configs[0].get(key) == configs[1].get(key) or plain[0].get(key) != plain[1].get(key), key
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["dtype"] == configs[1]["dtype"] == "bfloat16"


@EVERY
def test_base_model_without_its_head(name: str) -> None:
    if name == "home_made":
        pytest.skip("has no base model")
    packed = packed_family(name)
    model = AutoModel.from_pretrained(packed.directory, dtype=torch.float32)
    dense = AutoModel.from_pretrained(packed.dense, dtype=torch.float32)
    inputs = dummy_inputs(dense)
    with torch.no_grad():
        got, wanted = model(**inputs)[0], dense(**inputs)[0]
    assert relative(got, wanted) < 1e-4


@EVERY
def test_dequantize_gives_the_dense_model_back(name: str, tmp_path: Path) -> None:
    packed, cls = packed_family(name), FAMILIES[name].model_class
    dense = cls.from_pretrained(packed.dense, dtype=torch.float32)
    model = cls.from_pretrained(packed.directory, dtype=torch.float32).dequantize()
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    state, wanted = model.state_dict(), dense.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in state.items())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(packed.dense / "model.safetensors").keys()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "vit", "mixtral", "home_made"])
def test_load_finds_the_class(name: str) -> None:
    packed, model, _ = loaded(name)
    found = slimwright.load(packed.directory, dtype=torch.float32)
    assert type(found) is type(model) and not found.training
    inputs = dummy_inputs(model)
    for key, tensor in outputs(found, **inputs).items():
        assert torch.equal(tensor, outputs(model, **inputs)[key])
