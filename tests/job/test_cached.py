"""``fit --cache``: the plan's cache is written, loaded, proven, reported; what cannot be is refused before work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import slimwright
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, SlimwrightError
from slimwright.job.caching import cache_formats, check_cache
from slimwright.model.discover import discover
from slimwright.runtime import fused
from slimwright.runtime.generate import Generation
from slimwright.runtime.kv_cache import KvLayer, cache_nbytes
from slimwright.runtime.kv_format import KvFormat
from tests.job.conftest import fitted, tiny

KIVI = "cache/kivi,bits=4,residual_length=32"
FORMAT = KvFormat(4, 32, 32)
IDS = torch.arange(3, 73).reshape(1, 70)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "jamba"])
def test_written_loaded_and_reported(name: str, tmp_path: Path) -> None:
    """Hybrid and sliding layers stay as they are; plain from_pretrained and load give the same generation."""
    report = fitted(tiny(name), tmp_path / "out", grid="int4:g32", data="none", cache=KIVI)
    layers = {"qwen2": [0, 1], "gemma2": [1], "jamba": [1]}[name]
    assert report["verified"]["ok"] and report["cache"]["layers"] == {FORMAT.spec: layers}
    assert report["cache"]["bytes"] < report["cache"]["bytes_16bit"]
    plan = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert plan["cache"] == {"*": KIVI}
    assert ("cache: kl" in report["quality"]) == (name != "jamba")
    model = slimwright.load(tmp_path / "out", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.generate, Generation) and model.generate.formats == dict.fromkeys(layers, FORMAT)
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **how), again.generate(IDS, **how))
    cache = model.generate.cache()
    assert torch.equal(model.generate(IDS, **how, past_key_values=cache), model.generate(IDS, **how))
    kept = [layer for layer in cache.layers if isinstance(layer, KvLayer)]
    assert len(kept) == len(layers) and cache_nbytes(cache) >= sum(layer.nbytes for layer in kept) > 0
    model.save_pretrained(tmp_path / "saved")
    assert slimwright.load(tmp_path / "saved").generate.formats == model.generate.formats


def test_a_model_of_which_nothing_else_is_packed(tmp_path: Path) -> None:
    report = fitted(tiny(), tmp_path / "out", grid="bf16", data="none", cache=KIVI)
    assert "import slimwright" in report["how_to_load"]
    model = slimwright.load(tmp_path / "out")
    assert model.generate.formats == {0: FORMAT, 1: FORMAT}
    plain = fitted(tiny(), tmp_path / "plain", grid="bf16", data="none")
    assert "cache" not in plain.data and "quantization_config" not in json.loads(
        (tmp_path / "plain/config.json").read_text()
    )
    assert isinstance(slimwright.load(tmp_path / "plain").generate, Generation)


def formats(assignments: dict[str, str], name: str = "qwen2") -> dict[int, KvFormat]:
    source = Checkpoint.open(tiny(name))
    return cache_formats(assignments, source, discover(source))


def test_a_plan_says_layer_by_layer() -> None:
    """The most specific pattern wins, whatever the order."""
    two = "cache/kivi,bits=2"
    assert formats({"model.layers.1": two, "*": KIVI}) == {0: FORMAT, 1: KvFormat(2)}
    assert formats({"*": KIVI, "model.layers.0": "keep"}) == {1: FORMAT}
    assert formats({"model.layers.*": two}) == {0: KvFormat(2), 1: KvFormat(2)}
    assert formats({}) == {}


@pytest.mark.parametrize(
    ("name", "assignments", "message"),
    [
        ("qwen2", {"model.layers.7": KIVI}, "did you mean 'model.layers"),
        ("qwen2", {"*": "quantize/rtn"}, "not a method that packs the cache"),
        ("qwen2", {"*": "cache/kivy"}, "cache/kivi"),
        ("qwen2", {"*": "cache/kivi,bits=3"}, "one of 2, 4, 8"),
        ("qwen2", {"*": "cache/kivi,residual_length=40"}, "multiple of its group"),
        ("gemma2", {"model.layers.0": KIVI}, "window of 8 tokens"),
        ("jamba", {"model.layers.0": KIVI}, "jamba"),
        ("mamba", {"*": KIVI}, "mamba has no layer"),
        ("t5", {"*": KIVI}, "encoder-decoder models such as t5"),
    ],
)
def test_what_cannot_be_packed_is_one_sentence(name: str, assignments: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        formats(assignments, name)


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\n")
    with pytest.raises(InputError, match="write the cache into the plan"):
        fitted(tiny(), tmp_path / "out", plan=str(plan), cache=KIVI)
    with pytest.raises(InputError, match="one of 2, 4, 8"):
        fitted(tiny(), tmp_path / "out", grid="int4:g32", cache="cache/kivi,bits=16")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "cache",
    [["kv4:g32:w32"], {"kv4:g32:w32": "all"}, {"kv5:g32:w32": [0]}, {"kv4:g32:w32": [-1]}, {"kv4:g32:w32": [99]}],
)
def test_a_damaged_cache_in_config_json(cache: Any, tmp_path: Path) -> None:
    fitted(tiny(), tmp_path / "out", grid="int4:g32", data="none")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["cache"] = cache
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        slimwright.load(tmp_path / "out")


def test_verification_finds_a_wrong_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are off, attention that is off, another policy than planned: each is named, nothing is published."""
    fitted(tiny(), tmp_path / "out", grid="int4:g32", data="none", cache=KIVI)
    model = slimwright.load(tmp_path / "out", dtype=torch.float32)
    planned = {0: FORMAT, 1: FORMAT}
    assert check_cache(model, planned, IDS) == ""
    assert "otherwise than planned" in check_cache(model, {0: FORMAT}, IDS)
    own = KvLayer.attend
    with monkeypatch.context() as patch:
        patch.setattr(KvLayer, "attend", lambda self, *args, **how: own(self, *args, **how) * 1.01)
        patch.setattr(fused, "why_not", lambda model, batch: "it does not ask the layers")
        assert "attention over the packed cache differs" in check_cache(model, planned, IDS)
    dense = KvLayer.dense
    with monkeypatch.context() as patch:
        patch.setattr(KvLayer, "dense", lambda self, *args: tuple(part + 1e-3 for part in dense(self, *args)))
        assert "does not cache what" in check_cache(model, planned, IDS)
        with pytest.raises(SlimwrightError, match="does not cache what"):
            fitted(tiny(), tmp_path / "other", grid="int4:g32", data="none", cache=KIVI)
    assert not (tmp_path / "other").exists()
