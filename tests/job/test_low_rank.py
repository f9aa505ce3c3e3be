"""Fits into low-rank forms: by grid, rule, plan and search; proven, resumed, exported, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimwright.calibrate.site_statistics import Apart
from slimwright.checkpoint import CheckpointWriter
from slimwright.errors import InputError, SlimwrightError
from slimwright.job.export import export
from slimwright.job.fit import FitReport
from slimwright.job.low_rank import low_rank_losses, noise_held
from slimwright.methods import SiteStatistics, method
from slimwright.plan import Assignment, Plan
from slimwright.runtime.modules import PackedModule
from tests.job.conftest import files, fitted, tiny
from tests.runtime.packing import edit_config

FEW = {"calibration_tokens": 512, "calibration_length": 16}
SUM = "int3:g16+lowrank:r4:int8:row"
IDS = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def calibrated(in_this_process: None, tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    """Corrected attention, factored MLPs, solved with data; never write to it."""
    out = tmp_path_factory.mktemp("low_rank") / "out"
    rules = ["mlp: lowrank:r12"]
    return fitted(tiny("llama"), out, grid=SUM, rules=rules, method="quantize/gptq", **FEW)


def test_the_ledger_says_what_was_done(calibrated: FitReport) -> None:
    assert calibrated["verified"]["ok"] and calibrated["verified"]["logits_error"] <= 1e-4
    lines = {line["site"]: line for line in calibrated["ledger"]}
    q, up = (lines[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert (q["grid"], q["method"], q["state"]) == (SUM, "factorize/corrected", "calibrated")
    assert (up["grid"], up["method"], up["state"]) == ("lowrank:r12", "factorize/svd_llm", "calibrated")
    for line in (q, up):
        assert line["checksum"] and line["tokens"] and 0 < line["error_after"] < line["error_before"]
    stored = load_file(calibrated.out / "model.safetensors")
    for line in lines.values():
        own = [tensor.nbytes for name, tensor in stored.items() if name.startswith(line["site"])]
        assert line["bytes"] == sum(own) and line["bits"] == pytest.approx(8 * sum(own) / line["parameters"])
    embedding = lines["model.embed_tokens.weight"]
    assert embedding["state"] == "kept" and "rows are looked up" in embedding["reason"]
    kernels = {line["grid"] for line in calibrated["kernels"]}
    assert {SUM, "lowrank:r12"} <= kernels


def test_it_loads_saves_again_and_is_exported(calibrated: FitReport, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(calibrated.out, dtype=torch.float32)
    up = model.model.layers[0].mlp.up_proj
    assert isinstance(up, PackedModule) and str(up.packed["weight"].grid) == "lowrank:r12"
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (calibrated.out, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    settings = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert settings["format_version"] == 2 and SUM in settings["grids"]
    export(str(calibrated.out), out=str(tmp_path / "dense"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    with torch.no_grad():
        got, wanted = model(IDS).logits, dense(IDS).logits  # the export is rounded to bfloat16
    assert float((got - wanted).norm() / wanted.norm()) < 0.02


def test_a_newer_format_than_is_known_is_refused(calibrated: FitReport, tmp_path: Path) -> None:
    shutil.copytree(calibrated.out, tmp_path / "new")
    edit_config(tmp_path / "new", lambda config: config["quantization_config"].update(format_version=3))
    with pytest.raises(InputError, match="format version 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "new")


def test_what_has_only_grids_is_still_written_as_version_1(result: FitReport) -> None:
    assert json.loads((result.out / "config.json").read_text())["quantization_config"]["format_version"] == 1


@pytest.mark.parametrize(
    ("name", "data", "rules"),
    [
        ("gpt2", None, ["c_fc: lowrank:r8:int8:row", "c_proj: int4:g32+lowrank:r4"]),
        ("gpt_oss", None, [f"{place}: int4:g16+lowrank:r4" for place in ("gate_up_proj", "down_proj")]),
        ("gpt_oss", "none", ["down_proj: lowrank:r8"]),
        ("mixtral", "none", ["experts: lowrank:r8"]),
    ],
)
def test_other_layouts(name: str, data: str | None, rules: list[str], tmp_path: Path) -> None:
    """Conv1D, experts fused into one tensor, experts one by one."""
    few = FEW | {"method": "quantize/gptq"} if data is None else {"data": "none"}
    report = fitted(tiny(name), tmp_path / "out", grid="int8:row", rules=rules, **few)
    assert report["verified"]["ok"] and report["verified"]["logits_error"] <= 1e-4
    solved = [line for line in report["ledger"] if line["grid"] and "lowrank" in line["grid"]]
    assert solved and all(line["error_after"] < 1 for line in solved)
    model = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
    held = {str(spec.grid) for m in model.modules() if isinstance(m, PackedModule) for spec in m.packed.values()}
    assert {rule.partition(": ")[2] for rule in rules} <= held


def test_a_plan_gives_the_same_bytes(calibrated: FitReport, tmp_path: Path) -> None:
    again = fitted(tiny("llama"), tmp_path / "out", plan=str(calibrated.out / "plan.yaml"), method=None, **FEW)
    assert files(again.out) == files(calibrated.out)


def test_an_interrupted_job_ends_with_the_same_bytes(
    calibrated: FitReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"grid": SUM, "rules": ["mlp: lowrank:r12"], "method": "quantize/gptq", **FEW}
    original, written = CheckpointWriter.write, 0

    def stop(self: CheckpointWriter, name: str, tensor: torch.Tensor, offset_bytes: int = 0) -> None:
        nonlocal written
        written += 1
        if written == 40:
            raise KeyboardInterrupt
        original(self, name, tensor, offset_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            fitted(tiny("llama"), tmp_path / "out", **options)
    resumed = fitted(tiny("llama"), tmp_path / "out", **options)
    assert files(resumed.out) == files(calibrated.out)


@pytest.mark.parametrize(
    ("data", "suffix"), [(None, ""), (None, "_right"), ("none", "_left"), ("none", "_right_scale")]
)
def test_a_damaged_factor_is_found(
    data: str | None, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CheckpointWriter.write

    def flip(self: CheckpointWriter, name: str, tensor: torch.Tensor, offset_bytes: int = 0) -> None:
        if name.endswith("layers.1.self_attn.o_proj.weight" + suffix):
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[0] ^= 1
        original(self, name, tensor, offset_bytes)

    monkeypatch.setattr(CheckpointWriter, "write", flip)
    few = FEW | {"method": "quantize/gptq"} if data is None else {"data": "none"}
    with pytest.raises(SlimwrightError, match=r"o_proj.weight' in the files differs from"):
        fitted(tiny("llama"), tmp_path / "out", grid="int8:row", rules=[f"o_proj: {SUM}"], **few)


# -- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, "none"])
def test_the_search_factors_what_is_of_low_rank(data: str | None, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    out, columns = tensors[name].shape
    generator = torch.Generator().manual_seed(0)
    product = torch.randn(out, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    tensors[name] = (product * tensors[name].float().std() / product.std()).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    few = FEW | {"method": "quantize/gptq"} if data is None else {"data": "none"}
    report = fitted(str(source), tmp_path / "out", size="4bit", rules=["embed_tokens: int4:row"], **few)
    line = next(line for line in report["ledger"] if line["site"] == name)
    assert line["grid"].startswith("lowrank:r"), line["grid"]
    assert line["error_after"] < 0.02


def test_losses_of_corrections_are_those_of_solving() -> None:
    """Noise with the profile of the Gram's factor stands for what error feedback leaves."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    x = torch.randn(2000, 128, generator=generator) @ (
        torch.randn(128, 128, generator=generator) * torch.logspace(0, -1, 128)
    )
    stats, gptq = SiteStatistics.from_inputs(x), method("quantize/gptq", grid="int2:g64")
    assert stats.gram is not None

    def lost(value: torch.Tensor) -> float:
        return float((((weight - value) @ stats.gram) * (weight - value)).sum())

    forms = [f"int2:g64+lowrank:r{rank}:int4:g64" for rank in (4, 12)] + ["lowrank:r24:int4:g64"]
    choices = [Assignment(grid="int2:g64", method="quantize/gptq")]
    choices += [Assignment(grid=form, method="factorize/corrected") for form in forms[:2]]
    choices += [Assignment(grid=forms[2], method="factorize/svd_llm")]
    base = lost(gptq.solve(weight, stats).dense())
    found = low_rank_losses(choices, [base, 0.0, 0.0, 0.0], gptq, (96, 128), lambda: weight, stats, torch.ones(96))
    for place, choice in enumerate(choices[1:], 1):
        assert found[place] == pytest.approx(lost(choice.solver().solve(weight, stats).dense()), rel=0.15), choice.grid


def test_factors_are_judged_on_what_they_were_not_made_of() -> None:
    """Of few inputs, the spectrum under their Gram promises more than factors keep on others."""
    generator = torch.Generator().manual_seed(0)
    weight, mixing = torch.randn(96, 128, generator=generator), torch.randn(128, 128, generator=generator)
    seen, apart, other = (
        torch.randn(tokens, 128, generator=generator) * torch.logspace(0, -1, 128) @ mixing
        for tokens in (120, 60, 3000)
    )
    together = SiteStatistics.from_inputs(torch.cat([seen, apart]))
    stats = replace(together, apart=Apart(apart, 60 / 180))
    choice = Assignment(grid="lowrank:r48:int4:g64", method="factorize/svd_llm")

    def predicted(directions: torch.Tensor | None) -> float:
        gptq = method("quantize/gptq", grid="int2:g64")
        found = low_rank_losses([choice], [0.0], gptq, (96, 128), lambda: weight, stats, torch.ones(96), directions)
        return found[0]

    value = choice.solver().solve(weight, SiteStatistics.from_inputs(seen)).dense()
    lost = float(((weight - value) @ other.t()).square().sum()) / len(other)
    lost *= float(together.gram.diagonal().sum()) / (float(other.square().sum()) / len(other))
    assert predicted(apart) == pytest.approx(lost, rel=0.2) and predicted(None) < 0.7 * lost


def test_flat_noise_is_held_in_proportion_and_a_spike_at_once() -> None:
    flat = noise_held((300, 300), torch.ones(300))
    assert flat[0] == 0 and flat[-1] == pytest.approx(1.0) and 0.1 < flat[len(flat) // 10] < 0.4
    spike = torch.ones(300) * 1e-3
    spike[7] = 1.0
    assert noise_held((300, 300), spike)[1] > 0.99


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "lowrank"}, "no low-rank form"),
        ({"grid": "int4", "rules": ["embed_tokens: lowrank:r4"]}, "embedding, whose rows are looked up"),
        ({"grid": "int4", "rules": ["mlp: lowrank:r4000"]}, "a rank of 4000 is more than its"),
        ({"grid": "int4", "rules": ["mlp: lowrank:r0"]}, "rank of at least 1"),
        ({"size": "4bit", "method": "factorize/svd"}, "--size has nothing to choose for it"),
        ({"grid": "lowrank:r4", "method": "factorize/svd_llm", "data": "none"}, "needs data"),
        ({"grid": "lowrank:r4", "method": "factorize/svd,rank=0"}, "must lie in"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fitted(tiny("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_plan_whose_method_does_not_fit_its_form_is_refused(tmp_path: Path, calibrated: FitReport) -> None:
    plan = Plan.load(calibrated.out / "plan.yaml")
    group = next(name for name, own in plan.assignments.items() if own.grid == SUM)
    plan.assignments[group] = Assignment(grid=SUM, method="quantize/gptq")
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    with pytest.raises(InputError, match="quantize/gptq does not give int3:g16"):
        fitted(tiny("llama"), tmp_path / "out", plan=str(tmp_path / "plan.yaml"), method=None)
