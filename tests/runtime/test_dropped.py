"""Every family without some of its sublayers: plain ``from_pretrained`` gives a model that equals the one whose output
projections are zero; of some families also cached, padded, with a static cache and generating (of all of them
``python -m benchmarks.drops`` shows it)."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from slimwright.errors import InputError
from slimwright.model.dropped import is_dropped
from tests.families import FAMILIES, cached
from tests.runtime import dropping
from tests.runtime.packing import edit_config

NOTHING = {"jetmoe", "mamba"}
"""Families of which no sublayer can be dropped."""
ALIKE = {
    "llama_tied", "mistral", "smollm3", "granite", "phi3", "qwen3", "gemma2", "olmoe", "roberta", "electra", "deit",
    "flan_t5", "codegen", "stablelm", "clip",
}  # fmt: skip
"""Families built like another that is tested here; the benchmark has them all."""
WHOLLY = ("llama", "gemma3", "gpt2", "mixtral", "bart", "falcon", "qwen3_next", "deepseek_v3")
"""Families that are compared in every way; the others in one forward."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALIKE])
def test_equals_the_model_with_zero_projections(name: str, tmp_path: Path) -> None:
    drops = dropping.some(dropping.found(name).drops.values())
    assert bool(drops) == (name not in NOTHING)
    if not drops:
        return
    directory, dense = dropping.write(cached(name, torch.float32), tmp_path, drops)
    model = dropping.check(name, directory, dense, generate=name in WHOLLY)
    held = [m for m in model.modules() if is_dropped(m)]
    assert len(held) >= len(drops) and sum(p.numel() for m in held for p in m.parameters()) <= len(drops)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Without the first attention and the last MLP, and the dense model that it must equal; never write to them."""
    drops = dropping.some(dropping.found("llama").drops.values())
    return dropping.write(cached("llama", torch.float32), tmp_path_factory.mktemp("llama"), drops)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(12)[None] + 5).logits


def test_the_cache_keeps_one_number_a_token(llama: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama[0])
    with torch.no_grad():
        cache = model(torch.arange(12)[None], use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    assert [layer.keys.numel() + layer.values.numel() for layer in cache.layers] == [2 * 12, 2 * 12 * 2 * 16]


def test_ecosystem(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float32)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(llama[0], device_map="auto", dtype=torch.float32)), wanted
    )
    spread = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "model.layers.0": "disk", "model.layers.1": "cpu"}  # fmt: skip
    offloaded = AutoModelForCausalLM.from_pretrained(
        llama[0], device_map=spread, offload_folder=tmp_path / "off", dtype=torch.float32
    )
    assert torch.allclose(logits(offloaded), wanted, atol=1e-6)
    base = AutoModel.from_pretrained(llama[0], dtype=torch.float32)
    assert sum(is_dropped(m) for m in base.modules()) == sum(is_dropped(m) for m in model.modules())
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (llama[0], tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    sections = [
        json.loads((d / "config.json").read_text())["quantization_config"] for d in (llama[0], tmp_path / "again")
    ]
    assert sections[0]["dropped"] == sections[1]["dropped"]
    whole = model.dequantize()
    assert torch.allclose(logits(whole), logits(AutoModelForCausalLM.from_pretrained(llama[1], dtype=torch.float32)))


def test_adapters_train(llama: tuple[Path, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    ids = torch.arange(12)[None]
    adapted(ids, labels=ids).loss.backward()
    adapters = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert any("layers.1.self_attn.q_proj" in name for name in adapters)
    assert not any("layers.0.self_attn" in name or "layers.1.mlp" in name for name in adapters)


def test_without_slimwright_transformers_stops(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Without the quantization_config, as for a transformers that does not know it: the mark has another shape."""
    shutil.copytree(llama[0], tmp_path / "plain")
    edit_config(tmp_path / "plain", lambda config: config.pop("quantization_config"))
    with pytest.raises(RuntimeError, match=r"o_proj|size"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["modules"].update({"zeros:64": ["model.layers.0.self_attn"]}), "is no form"),
        (lambda d: d["modules"].update({"pass": ["model.layers.7.mlp"]}), "which LlamaForCausalLM does not have"),
        (lambda d: d.update(tensors=3), "damaged"),
        (lambda d: d.update(marks=["lm_head.weight"]), "damaged"),
        (lambda d: d["modules"].pop("zeros:64:2"), "No weight file holds 'model.layers.0.self_attn.k_proj.weight'"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused(llama: tuple[Path, Path], tmp_path: Path, edit: Any, said: str) -> None:
    shutil.copytree(llama[0], tmp_path / "bad")
    edit_config(tmp_path / "bad", lambda config: edit(config["quantization_config"]["dropped"]))
    with pytest.raises(InputError, match=said):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")
