"""``modules``: the parts of a model merged each in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slimwright
from slimwright.job.merging.modules import belongs, resized_module
from tests.checkpoint.samples import save_checkpoint

CONFIG = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 3, "dtype": "float32"}


def tensors(seed: int) -> dict[str, Tensor]:
    """An encoder and a decoder of three blocks, a shared table, a head."""
    generator = torch.Generator().manual_seed(seed)
    names = ["shared.weight", "lm_head.weight", "encoder.norm.weight", "decoder.norm.weight"]
    names += [f"{part}.block.{i}.{kind}.weight" for part in ("encoder", "decoder") for i in range(3) for kind in "qk"]
    return {name: torch.randn(6, 4, generator=generator) for name in names}


A, B = tensors(0), tensors(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, content in (("a", A), ("b", B)):
        save_checkpoint(root / name, content, 1, CONFIG)
    return str(root / "a"), str(root / "b")


def merged(config: dict[str, Any], out: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    report = slimwright.merge(config, out, quiet=True)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text()), report["notes"]


def test_each_module_has_its_own_parameters_and_layers(models: tuple[str, str], tmp_path: Path) -> None:
    a, b = models

    def weighted(first: float, second: float) -> list[dict[str, Any]]:
        return [{"model": a, "parameters": {"weight": first}}, {"model": b, "parameters": {"weight": second}}]

    ranges = [{"sources": [{"model": a, "layer_range": [0, 2]}]}, {"sources": [{"model": b, "layer_range": [1, 3]}]}]
    config = {
        "merge_method": "linear", "parameters": {"weight": 1.0},
        "modules": {
            "encoder": {"models": weighted(3, 1)},
            "decoder": {"slices": ranges},
            "shared": {"models": weighted(0, 1)},
        },
    }  # fmt: skip
    found, written, notes = merged(config, tmp_path / "out")
    for name, tensor in found.items():
        if name.startswith("encoder"):
            expected = (3 * A[name] + B[name]) / 4
        elif name == "decoder.norm.weight":
            expected = B[name]  # behind the layers: of the last slice
        elif name.startswith("decoder"):
            layer = int(name.split(".")[2])
            expected = A[name] if layer < 2 else B[name.replace(f".{layer}.", f".{layer - 1}.")]
        else:
            expected = B[name]
        assert torch.allclose(tensor, expected, atol=1e-6), name
    assert len(found) == len(A) + 2
    assert written["num_decoder_layers"] == 4 and written["num_layers"] == 3
    assert not any("module" in note for note in notes)


def test_what_no_module_names_is_the_first_models_and_said(models: tuple[str, str], tmp_path: Path) -> None:
    a, b = models
    given = [{"model": a}, {"model": b}]
    config = {"method": "linear", "dtype": "bfloat16", "modules": {"decoder": {"models": given}}}
    found, written, notes = merged(config, tmp_path / "out")
    for name, tensor in found.items():
        expected = (A[name] + B[name]) / 2 if name.startswith("decoder") else A[name]
        assert torch.equal(tensor, expected.bfloat16()), name
    assert any(note.startswith("9 tensors") and "in no module" in note for note in notes)
    assert written["num_layers"] == 3
    parameters = {"weight": [{"filter": "encoder.block", "value": 1.0}, {"value": 0.0}]}
    listed = [{"model": a, "parameters": parameters}, {"model": b, "parameters": {"weight": 1.0}}]
    whole, _, _ = merged({"merge_method": "linear", "modules": {"default": {"models": listed}}}, tmp_path / "default")
    assert torch.allclose(
        whole["encoder.block.1.q.weight"], (A["encoder.block.1.q.weight"] + B["encoder.block.1.q.weight"]) / 2
    )
    assert torch.equal(whole["shared.weight"], B["shared.weight"])


def test_parts_of_models_of_images_and_text() -> None:
    names = {
        "model.language_model.layers.0.mlp.up_proj.weight": "text_decoder",
        "language_model.model.embed_tokens.weight": "text_decoder",
        "lm_head.weight": "text_decoder",
        "model.visual.blocks.3.attn.qkv.weight": "vision_tower",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "vision_tower",
        "model.visual.merger.linear_fc1.weight": "multi_modal_projector",
        "multi_modal_projector.linear_1.weight": "multi_modal_projector",
    }
    for name, module in names.items():
        parts = ("text_decoder", "vision_tower", "multi_modal_projector")
        assert [part for part in parts if belongs(name, part)] == [module], name
        assert belongs(name, "default")
    config = {"num_hidden_layers": 4, "text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}}
    text = resized_module(config, "text_decoder", [0, 1], 4)
    assert text == {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 4}}
    seen = resized_module(config, "vision_tower", [0, 1], 4)
    assert seen == {**config, "vision_config": {"depth": 2}}
