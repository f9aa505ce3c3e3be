"""Activations in 8 bits: found, planned, written, run by plain transformers, proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from slimwright.errors import InputError, SlimwrightError
from slimwright.plan import Plan
from slimwright.runtime.modules import PackedLinear
from slimwright.weights.activations import Activations
from tests.families import FAMILIES
from tests.job.conftest import files, fitted, tiny

FEW: dict[str, Any] = {"calibration_tokens": 512, "calibration_length": 16, "data": None}
NOTHING_LINEAR = {"jetmoe", "llama4"}
QUICK = {"llama", "gpt2", "bert", "t5", "whisper", "mixtral", "falcon", "llava", "mamba"}


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(set(FAMILIES) - NOTHING_LINEAR)],
)
@pytest.mark.parametrize("spec", ["int8:token", "int8:tensor"])
def test_every_family_rounds_what_enters_its_linear_layers(name: str, spec: str, tmp_path: Path) -> None:
    options = {"data": "none"} if spec == "int8:token" else FEW
    report = fitted(tiny(name), tmp_path / "out", grid="int8:row:sym", activations=spec, **options)
    assert report["verified"]["ok"] and report["verified"]["logits_error"] <= 1e-4
    rounded = [line for line in report["ledger"] if line["activations"]]
    assert rounded and all(line["block"] for line in rounded)
    assert all(line["activations"].startswith(spec) for line in rounded)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert all(Activations.parse(written).ready for written in config["activations"])


class _Rounded(nn.Linear):
    """INT8 per token, written down again from the definition."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = x.to(torch.float32)
        scale = single.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-30) / 127
        return super().forward(((single / scale).round() * scale).to(x.dtype))


def test_the_model_computes_what_rounded_inputs_give(tmp_path: Path) -> None:
    fitted(tiny("llama"), tmp_path / "out", grid="int8:row:sym", activations="int8:token", data="none")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    rounding = {name for name, m in packed.named_modules() if isinstance(m, PackedLinear) and m.activations is not None}
    assert len(rounding) == 7 * packed.config.num_hidden_layers
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).dequantize()
    for name in rounding:
        module = dense.get_submodule(name)
        assert type(module) is nn.Linear
        module.__class__ = _Rounded
    ids = torch.arange(12)[None]
    with torch.no_grad():
        got, expected = packed(input_ids=ids).logits, dense(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_saving_again_keeps_the_rounding(tmp_path: Path) -> None:
    fitted(tiny("llama"), tmp_path / "out", grid="int8:row:sym", activations="fp8:tensor", **FEW)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert "activations=fp8:tensor=" in repr(again)


def test_gptq_sees_rounded_inputs(tmp_path: Path) -> None:
    options = {"grid": "int4:g32", "method": "quantize/gptq", **FEW}
    fitted(tiny("llama"), tmp_path / "plain", **options)
    report = fitted(tiny("llama"), tmp_path / "rounded", activations="int8:token", **options)
    assert report["verified"]["ok"] and files(tmp_path / "plain") != files(tmp_path / "rounded")


def test_smoothing_helps_static_scales(outliers: str, tmp_path: Path) -> None:
    """SmoothQuant's claim where one scale must do for all tokens: the distance to the source shrinks."""
    options: dict[str, Any] = {"calibration_tokens": 2048, "calibration_length": 128, "data": None}
    found = {
        fold: fitted(
            outliers, tmp_path / fold.split("/")[-1], grid="int8:row:sym", activations="int8:tensor",
            folds=[fold], **options,
        )["quality"]["kl"]["value"]
        for fold in ("none", "fold/smoothquant")
    }  # fmt: skip
    assert found["fold/smoothquant"] < 0.7 * found["none"]


def test_how_one_scale_is_found(tmp_path: Path) -> None:
    """Both other ways clip something where the largest magnitude does not."""
    scales: dict[str, dict[str, float]] = {}
    for how in ("absmax", "percentile", "mse"):
        report = fitted(
            tiny("qwen2"), tmp_path / how, grid="int8:row:sym", activations=f"int8:tensor,scale={how}", **FEW
        )
        plan = Plan.load(tmp_path / how / "plan.yaml")
        scales[how] = {group: Activations.parse(spec).scale or 0.0 for group, spec in plan.activations.items()}
        assert report["verified"]["ok"]
    assert len(scales["absmax"]) >= 8
    assert all(scales["percentile"][group] < scale for group, scale in scales["absmax"].items())
    assert all(scales["mse"][group] <= 1.01 * scale for group, scale in scales["absmax"].items())
    assert any(scales["mse"][group] < 0.99 * scale for group, scale in scales["absmax"].items())


def test_the_written_plan_does_the_same_again(tmp_path: Path) -> None:
    fitted(tiny("qwen2"), tmp_path / "a", grid="int8:row:sym", activations="int8:tensor", **FEW)
    plan = Plan.load(tmp_path / "a" / "plan.yaml")
    assert all(Activations.parse(spec).scale for spec in plan.activations.values())
    again = fitted(tiny("qwen2"), tmp_path / "b", plan=str(tmp_path / "a" / "plan.yaml"), method=None, data="none")
    assert again["verified"]["ok"] and files(tmp_path / "a") == files(tmp_path / "b")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]


def test_a_rounding_that_is_not_as_planned_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimwright.job import work

    original = work.write_config

    def other(grids: Any, fingerprint: str, dense: Any, activations: Any, *more: Any) -> dict[str, Any]:
        return original(grids, fingerprint, dense, {name: Activations("fp8") for name in activations}, *more)

    monkeypatch.setattr(work, "write_config", other)
    with pytest.raises(SlimwrightError, match="differ from the reference"):
        fitted(tiny("llama"), tmp_path / "out", grid="int8:row:sym", activations="int8:token", data="none")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"activations": "int4:token"}, "int8:token, fp8:token"),
        ({"activations": "int8:tensor", "data": "none"}, "needs data for its scales"),
        ({"activations": "int8:tensor=0.1"}, "scales are found on data"),
        ({"activations": "int8:token", "grid": "fp16"}, "has nothing to round"),
    ],
)
def test_bad_activations(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        fitted(tiny("llama"), tmp_path / "out", **{"grid": "int8:row:sym", "data": "none", **options})


@pytest.mark.parametrize(
    ("name", "spec", "sentence"),
    [
        ("model.layers.0.self_attn.qkw", "int8:token", "which this model does not have"),
        ("model.embed_tokens", "int8:token", "only what enters linear layers"),
        ("", "int7:token", "Activations are written"),
    ],
)
def test_bad_plans(name: str, spec: str, sentence: str, tmp_path: Path) -> None:
    fitted(tiny("llama_tied"), tmp_path / "a", grid="int8:row:sym", activations="int8:token", data="none")
    plan = yaml.safe_load((tmp_path / "a" / "plan.yaml").read_text())
    plan["activations"][name or next(iter(plan["activations"]))] = spec
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(InputError, match=sentence):
        fitted(tiny("llama_tied"), tmp_path / "b", plan=str(tmp_path / "plan.yaml"), method=None)


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    fitted(tiny("bert"), tmp_path / "out", grid="int8:row:sym", activations="int8:token", data="none")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    names = config["quantization_config"]["activations"]
    embedding = next(n for ns in config["quantization_config"]["grids"].values() for n in ns if "embed" in n)
    for broken, sentence in (
        ({"int8:tensor": names["int8:token"]}, "without its scale"),
        ({"int8:token": ["no.such.weight"]}, "not packed"),
        ({"int8:token": [embedding]}, "no linear layer's"),
    ):
        config["quantization_config"]["activations"] = broken
        file.write_text(json.dumps(config))
        with pytest.raises(InputError, match=sentence):
            AutoModel.from_pretrained(tmp_path / "out")
