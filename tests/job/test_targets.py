"""Results in the form of others: what is written, what it weighs, what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimwright.checkpoint import Checkpoint, faults
from slimwright.errors import InputError
from slimwright.formats.gguf import tensor_name
from slimwright.job import parallel
from slimwright.job.export import export
from slimwright.job.open import open_source
from slimwright.plan import Plan
from tests.families import FAMILIES, cached
from tests.job.conftest import files, fitted, in_forked_child, tiny

IDS = torch.arange(3, 27).reshape(2, 12)


def logits(name: str, directory: Path | str) -> torch.Tensor:
    model = FAMILIES[name].model_class.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("grid", ["int4:g32:sym", "int8:row:sym", "fp8"])
def test_compressed_tensors_holds_the_same_weights(grid: str, tmp_path: Path) -> None:
    """Read back by the reader of the format, which has its own tests, it is the model that the result stands for."""
    packed, out = tmp_path / "packed", tmp_path / "ct"
    fitted(str(cached("qwen3", torch.float32)), packed, grid=grid, rules=("embed: keep",))
    report = export(str(packed), to="compressed-tensors", out=str(out))
    assert report["size"]["after"] == (out / "model.safetensors").stat().st_size
    assert "compressed-tensors" in report["verified"]["program"] or "installed" in report["verified"]["program"]
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and "lm_head" in settings["ignore"]
    here, there = open_source(str(packed)), open_source(str(out))
    for name in here.tensors:
        assert torch.equal(here.read(name), there.read(name)), name
    again = export(str(packed), to="compressed-tensors", out=str(out))
    assert again["hash"] == report["hash"] and again["verified"] == report["verified"]


def test_inputs_that_are_rounded_are_written_as_a_scheme(tmp_path: Path) -> None:
    model = str(cached("llama", torch.float32))
    fitted(
        model,
        tmp_path / "packed",
        grid="int8:row:sym",
        rules=("embed: keep", "lm_head: keep"),
        activations="int8:token",
    )
    export(str(tmp_path / "packed"), to="compressed-tensors", out=str(tmp_path / "ct"))
    settings = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "int-quantized"
    (group,) = settings["config_groups"].values()
    assert group["input_activations"]["strategy"] == "token" and group["input_activations"]["dynamic"] is True
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_gguf_holds_the_plans_blocks(name: str, tmp_path: Path) -> None:
    """The other package's own dequantization gives the result's weights, rows of Llama's q and k in its order."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    packed, out = tmp_path / "packed", tmp_path / "gguf"
    rules = ("wpe: keep", "mlp.c_proj: q8_0") if name == "gpt2" else ("down: q8_0",)
    fitted(str(cached(name, torch.float32)), packed, grid="q4_0", rules=rules)
    report = export(str(packed), to="gguf", out=str(out))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert report["size"]["tensors"] == sum(int(tensor.n_bytes) for tensor in tensors.values())
    source, config = open_source(str(packed)), json.loads((packed / "config.json").read_text())
    qk = re.compile(r"blk\.\d+\.attn_([qk])\.")
    seen = 0
    for disk in source.tensors:
        short = tensor_name(name, disk)
        if short is None or short not in tensors:
            continue
        tensor, dense = tensors[short], source.read(disk).float()
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if name == "gpt2" and dense.ndim == 2 and short.startswith("blk"):  # Conv1D
            dense = dense.t()
        if name == "llama" and (match := qk.match(short)):
            heads = config["num_attention_heads"] if match[1] == "q" else config["num_key_value_heads"]
            dense = dense.reshape(heads, 2, dense.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(dense.shape)
        assert torch.equal(found.reshape(dense.shape), dense), short
        seen += 1
    assert seen == len(tensors)


def test_a_size_holds_in_the_targets_files(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = str(cached("qwen2", torch.bfloat16))
    for target, size in (("compressed-tensors", "11bit"), ("gguf", "7bit")):
        report = fitted(model, tmp_path / target, size=size, target=target)
        assert report["size"]["after"] <= report["budget"]["bytes"]
        assert report["target"]["name"] == target and "import slimwright" not in report["how_to_load"]
        assert str(tmp_path / target) in report["how_to_load"] and ".scratch" not in json.dumps(report.data)
        plan = Plan.load(tmp_path / target / "plan.yaml")
        assert plan.target == target
        assert (tmp_path / target / "report.html").exists() and not (tmp_path / f"{target}.partial").exists()
        again = fitted(model, tmp_path / target, size=size, target=target)
        assert again["hash"] == report["hash"] and "finished" in again["notes"][-1]


def test_a_budget_above_the_source_is_written_in_the_targets_container(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    report = fitted(str(cached("qwen2", torch.bfloat16)), tmp_path / "out", size="24bit", target="gguf")
    assert (tmp_path / "out" / "model.gguf").stat().st_size == report["size"]["after"] <= report["budget"]["bytes"]


def test_auto_takes_what_others_load_where_it_costs_little(tmp_path: Path) -> None:
    model = str(cached("qwen2", torch.bfloat16))
    plain = fitted(model, tmp_path / "grid", grid="int4:g32:sym", rules=("embed: keep",), target="auto")
    assert plain["target"]["name"] == "compressed-tensors"
    ours = fitted(model, tmp_path / "ours", grid="int3:g32", target="auto")
    assert "target" not in ours.data and "import slimwright" in ours["how_to_load"]
    assert str(tmp_path / "ours") in ours["how_to_load"] and ".scratch" not in json.dumps(ours.data)
    assert logits("qwen2", tmp_path / "ours").isfinite().all()
    small = fitted(model, tmp_path / "small", size="3.5bit", target="auto")
    assert "import slimwright" in small["how_to_load"]
    assert any("compressed-tensors fits the budget" in note for note in small["notes"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"grid": "int3:g32", "target": "compressed-tensors"}, "on int3:g32 .*legal there: int4:g32:sym"),
        ({"size": "11bit", "target": "compressed-tensors", "rules": ("q_proj: nf4", "k_proj: nf4", "v_proj: nf4")},
         "A rule puts .* not legal as compressed-tensors"),
        ({"size": "2bit", "target": "compressed-tensors"}, "the smallest possible is"),
        ({"grid": "int4:g32", "target": "onxx"}, "Unknown target 'onxx'"),
        ({"grid": "q4_0", "target": "gguf", "activations": "int8:token"}, "llama.cpp rounds inputs in its own way"),
        ({"memory": "1GB", "target": "gguf"}, "measured in slimwright's own runtime: give --size"),
        ({"keep": ("kl:0.5",), "target": "auto"}, "compares plans of one size"),
        ({"grid": "int4:g32", "target": "gguf", "cache": "cache/kivi,bits=4"}, "packed by slimwright only"),
    ],
)  # fmt: skip
def test_what_is_illegal_in_a_target_is_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        fitted(tiny("qwen2"), tmp_path / "out", **options)
    assert str(caught.value).count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_illegal_is_refused(tmp_path: Path) -> None:
    fitted(tiny("qwen2"), tmp_path / "packed", grid="int4:g32")
    for to, legal in (("compressed-tensors", "int4:g32:sym"), ("gguf", "q4_0")):
        with pytest.raises(InputError, match=f"cannot be written as {to}.*{legal}"):
            export(str(tmp_path / "packed"), to=to, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="Unknown target 'ggml'"):
        export(str(tmp_path / "packed"), to="ggml", out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="no packed weights"):
        export(tiny("qwen2"), to="compressed-tensors", out=str(tmp_path / "out"))
    assert Checkpoint.open(tmp_path / "packed").quantization is not None
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)
def test_an_encoder_is_written_as_onnx(tmp_path: Path) -> None:
    fitted(tiny("bert"), tmp_path / "packed", grid="int8:g32")
    report = export(str(tmp_path / "packed"), to="onnx", out=str(tmp_path / "onnx"))
    assert report["verified"]["logits_error"] <= 1e-4 and (tmp_path / "onnx" / "model.onnx").exists()


def test_what_is_no_encoder_is_not_written_as_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match="Qwen2ForCausalLM is no encoder of text"):
        export(tiny("qwen2"), to="onnx", out=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_job_with_a_target_continues_after_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the fit's build, after the fit was published, in the export, and before the export is published."""
    monkeypatch.setattr(parallel, "_pool", None)  # threads do not survive a fork
    model, out = tiny("llama"), tmp_path / "out"

    def job(where: Path) -> None:
        fitted(model, where, grid="int4:g32:sym", rules=("embed: keep", "lm_head: keep"), target="compressed-tensors")

    assert in_forked_child(lambda: job(tmp_path / "whole")) == 0
    for where in ("write:9", "publish:4", "write:5", "publish:2"):
        assert in_forked_child(lambda: job(out), SLIMWRIGHT_CRASH_AT=where) == faults.CRASH_STATUS, where
        assert not out.exists(), where
    assert in_forked_child(lambda: job(out)) == 0
    assert files(out) == files(tmp_path / "whole")
    data = json.loads((out / "report.json").read_text())
    assert data["target"]["weights_compared"] == 14 and not any("finished" in note for note in data["notes"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
