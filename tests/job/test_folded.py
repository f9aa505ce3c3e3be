"""Jobs that fold or rotate first: the function stays, the proof says so, what cannot be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimwright.errors import InputError, SlimwrightError
from slimwright.job import edits
from slimwright.job.fold_walk import FoldWalk
from slimwright.plan import Plan
from tests.families import FAMILIES
from tests.job.conftest import files, fitted, tiny

FEW: dict[str, Any] = {"calibration_tokens": 512, "calibration_length": 16, "data": None}


QUICK = {
    "llama", "qwen2", "gemma3", "gpt2", "opt", "gpt_neox", "falcon", "olmo2", "cohere", "mixtral", "bert", "t5",
    "whisper", "modernbert", "mamba",
}  # fmt: skip
"""Families of different build; the others run in `make bench`."""

NO_FOLDS = {"jetmoe"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(set(FAMILIES) - NO_FOLDS)]
)
def test_every_family_with_fold_groups_keeps_its_function(name: str, tmp_path: Path) -> None:
    report = fitted(tiny(name), tmp_path / "out", grid="int4:g32", folds=["fold/awq,n_grid=4"], **FEW)
    assert report["verified"]["ok"] and report["verified"]["logits_error"] <= 1e-4
    assert report["verified"]["edits_error"] < 1e-2
    folded = [line for line in report["ledger"] if "fold/awq" in (line["method"] or "") or "fold/awq" in line["reason"]]
    assert folded
    assert all(line["tokens"] > 0 for line in folded if line["method"] == "fold/awq,n_grid=4")
    plan = Plan.load(tmp_path / "out" / "plan.yaml")
    assert [edit.method for edit in plan.edits] == ["fold/awq,n_grid=4"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "phi3"])
def test_rotated_models_are_what_they_were(name: str, tmp_path: Path) -> None:
    report = fitted(tiny(name), tmp_path / "out", grid="int8:g32", folds=["fold/rotation"])
    assert report["verified"]["ok"]
    assert report["verified"]["edits_error"] < (1e-2 if name == "qwen2" else 1e-5)  # its biases are rounded to bfloat16
    assert report["quality"]["kl"]["value"] < 5e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    head = [line for line in report["ledger"] if line["role"] == "head"]
    if name in ("llama_tied", "qwen2"):  # tiny models have uneven gains, so that the head gets a tensor of its own
        assert config["tie_word_embeddings"] is False
        assert [line["bytes_before"] for line in head] == [0] and head[0]["bytes"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(8)[None]
    before = AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, before(input_ids=ids).logits, atol=0.1, rtol=0.1)


def test_a_rotation_counts_the_untied_head_in_the_budget(tmp_path: Path) -> None:
    report = fitted(tiny("llama_tied"), tmp_path / "out", size="60%", folds=["fold/rotation"], data="none")
    assert 0.99 * report["budget"]["bytes"] <= report["size"]["after"] <= report["budget"]["bytes"]
    assert report["verified"]["ok"]


def test_a_rotation_before_a_fold(tmp_path: Path) -> None:
    options = {"grid": "int4:g32", "folds": ["fold/rotation", "fold/smoothquant_plus,steps=4"], **FEW}
    report = fitted(tiny("llama"), tmp_path / "out", method="quantize/gptq", **{**options})
    assert report["verified"]["ok"] and report["verified"]["edits_error"] < 1e-2
    with pytest.raises(InputError, match="comes before other folds"):
        fitted(tiny("llama"), tmp_path / "b", **{**options, "folds": ["fold/awq", "fold/rotation"]})


def test_folds_help_where_there_are_outliers(outliers: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"grid": "int4:g64", "calibration_tokens": 2048, "calibration_length": 128, "data": None}
    plain = fitted(outliers, tmp_path / "plain", **{**options, "data": "none"})["quality"]["kl"]["value"]
    for fold in ("fold/awq", "fold/smoothquant_plus"):
        report = fitted(outliers, tmp_path / fold.replace("/", "-"), folds=[fold], **options)
        assert report["verified"]["ok"]
        assert report["quality"]["kl"]["value"] < 0.8 * plain


def test_awq_folds_first_and_does_not_clip_q_and_k(tmp_path: Path) -> None:
    report = fitted(tiny("llama"), tmp_path / "out", grid="int4:g32", method="quantize/awq", **FEW)
    assert report["verified"]["ok"]
    plan = Plan.load(tmp_path / "out" / "plan.yaml")
    assert [edit.method for edit in plan.edits] == ["fold/awq"]
    methods = {line["role"]: line["method"] for line in report["ledger"] if line["state"] == "calibrated"}
    assert methods["q"] == methods["k"] == "quantize/awq,max_shrink=0.0"
    assert methods["v"] == methods["down"] == "quantize/awq"
    without = fitted(tiny("llama"), tmp_path / "b", grid="int4:g32", method="quantize/awq", folds=["none"], **FEW)
    assert "edits_error" not in without["verified"] and files(tmp_path / "b") != files(tmp_path / "out")


def test_the_written_plan_does_the_same_again(tmp_path: Path) -> None:
    options = {"calibration_tokens": 512, "calibration_length": 16}
    fitted(tiny("qwen2"), tmp_path / "a", grid="int4:g32", folds=["fold/rotation", "fold/awq"], **FEW)
    again = fitted(tiny("qwen2"), tmp_path / "b", plan=str(tmp_path / "a" / "plan.yaml"), method=None, **options)
    assert again["verified"]["ok"] and files(tmp_path / "a") == files(tmp_path / "b")


def test_a_crash_after_a_fold_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"grid": "int4:g32", "folds": ["fold/awq,n_grid=4", "fold/smoothquant"], **FEW}
    fitted(tiny("llama"), tmp_path / "whole", **options)
    original, runs = FoldWalk.run, 0

    def fail_second(self: FoldWalk) -> Any:
        nonlocal runs
        runs += 1
        if runs == 2:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(FoldWalk, "run", fail_second)
        with pytest.raises(KeyboardInterrupt):
            fitted(tiny("llama"), tmp_path / "out", **options)
        assert runs == 2
        fitted(tiny("llama"), tmp_path / "out", **options)
        assert runs == 3  # the first fold's scales were kept
    assert files(tmp_path / "whole") == files(tmp_path / "out")


def test_an_edit_that_changes_the_function_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = edits.FoldedCheckpoint.edited_vector

    def wrong(self: edits.FoldedCheckpoint, name: str) -> torch.Tensor:
        return original(self, name) * (1.5 if "layers.1" in name else 1.0)

    monkeypatch.setattr(edits.FoldedCheckpoint, "edited_vector", wrong)
    with pytest.raises(SlimwrightError, match="edits before rounding changed"):
        fitted(tiny("llama"), tmp_path / "out", grid="int8:g32", folds=["fold/smoothquant"], **FEW)


@pytest.mark.parametrize("folds", [["fold/rotation"], ["fold/awq"]])
def test_a_budget_above_the_source_copies_it_without_edits(folds: list[str], tmp_path: Path) -> None:
    options = {"folds": folds, "activations": "int8:tensor", **FEW}
    report = fitted(tiny("llama_tied"), tmp_path / "out", size="100MB", **options)
    assert report["verified"]["ok"] and "edits_error" not in report["verified"]
    assert any("copied as it is" in note for note in report["notes"])
    assert {line["state"] for line in report["ledger"]} == {"kept"}


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("llama", {"folds": ["fold/awk"]}, "did you mean 'fold/awq'"),
        ("llama", {"folds": ["quantize/rtn"]}, "does not change a model before"),
        ("llama", {"folds": ["fold/awq"], "data": "none"}, "Scales are found on data"),
        ("bert", {"folds": ["fold/rotation"]}, "cannot be rotated"),
        ("mixtral", {"folds": ["fold/rotation"]}, "cannot be rotated"),
        ("jetmoe", {"folds": ["fold/awq"]}, "nothing to fold"),
    ],
)
def test_bad_folds(model: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        fitted(tiny(model), tmp_path / "out", grid="int4:g32", **{**FEW, **options})
    assert not (tmp_path / "out").exists()
