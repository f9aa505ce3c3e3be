"""Results as plain weights, and results as the source of other jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimwright.job.export import export
from slimwright.job.fit import FitReport
from tests.families import FAMILIES, cached
from tests.job.conftest import files, fitted, tiny

WITHOUT_SLIMWRIGHT = """
import sys, torch, transformers
cls, directory, ids = getattr(transformers, sys.argv[1]), sys.argv[2], torch.tensor(eval(sys.argv[3]))
model = cls.from_pretrained(directory, dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[4])
assert "slimwright" not in sys.modules
"""

IDS = torch.arange(3, 27).reshape(2, 12)


def logits(name: str, directory: Path | str) -> torch.Tensor:
    model = FAMILIES[name].model_class.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "gpt2", "phi3", "gpt_neox"])
def test_an_exported_model_is_the_packed_one(name: str, tmp_path: Path) -> None:
    """Per-expert and fused transposed experts, Conv1D, fused projections; names, shapes and dtypes of the source."""
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    model = str(cached(name, torch.float32))  # so that the exported weights are the packed ones, not rounded again
    fitted(model, packed, grid="int4:g32")
    report = export(str(packed), out=str(dense))
    assert report.out == dense.resolve() and "import slimwright" not in report["how_to_load"]
    exported, source = load_file(dense / "model.safetensors"), load_file(Path(model) / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in exported.items()} == {n: (t.shape, t.dtype) for n, t in source.items()}
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
    assert config == json.loads((Path(model) / "config.json").read_text())
    before, after = logits(name, packed), logits(name, dense)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert not torch.allclose(after, logits(name, model), rtol=1e-3)


def test_an_exported_float32_model_has_equal_logits_without_slimwright(tmp_path: Path) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    fitted(str(cached("llama", torch.float32)), packed, grid="int4:g32")
    export(str(packed), out=str(dense))
    subprocess.run(
        [sys.executable, "-c", WITHOUT_SLIMWRIGHT, "LlamaForCausalLM", dense, str(IDS.tolist()), tmp_path / "l"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    there, here = torch.load(tmp_path / "l"), logits("llama", packed)
    assert (there - here).abs().max() <= 1e-5 * here.abs().max()


def test_export_run_again_is_finished(result: FitReport, tmp_path: Path) -> None:
    first = export(str(result.out), out=str(tmp_path / "dense"))
    again = export(str(result.out), out=str(tmp_path / "dense"))
    assert first["hash"] == again["hash"]


def test_a_result_is_the_source_of_another_job(result: FitReport, tmp_path: Path) -> None:
    smaller = fitted(str(result.out), tmp_path / "smaller", size="25%")
    assert smaller["verified"]["ok"]
    assert 0.99 * smaller["budget"]["bytes"] <= smaller["size"]["after"] < result["size"]["after"]
    assert smaller["model"]["parameters"] == result["model"]["parameters"]
    assert smaller["quality"]["kl"]["value"] > 0
    dense = export(str(result.out), out=str(tmp_path / "dense"))
    via = fitted(str(dense.out), tmp_path / "via", size="25%")
    # The packed result is decoded to what its export holds, so both jobs plan the same.
    assert [line["grid"] for line in via["ledger"]] == [line["grid"] for line in smaller["ledger"]]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt2"])
def test_a_result_with_other_orientations_is_a_source_too(name: str, tmp_path: Path) -> None:
    fitted(tiny(name), tmp_path / "first", grid="int8:g32")
    second = fitted(str(tmp_path / "first"), tmp_path / "second", grid="int3:g32")
    assert second["verified"]["ok"]
    assert files(tmp_path / "first") != files(tmp_path / "second")
