"""Every family is fit to 40 %, proven, and generates the same with and without its cache."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.fit import FitReport
from slimwright.model.inputs import dummy_inputs
from tests.families import FAMILIES
from tests.job.conftest import fitted, tiny

MOSTLY_KEPT = {"jetmoe", "llama4"}
"""Families whose experts this version leaves as they are, so that 40 % cannot be met."""

FRESH = ("llama", "bert")
"""Families that are verified in a fresh process here; `python -m benchmarks.families` does so with every one."""


def check(name: str, report: FitReport) -> None:
    """What must hold of a result of any family."""
    data, out = report.data, report.out
    assert out is not None
    assert data["verified"]["ok"] and data["verified"]["logits_error"] <= 1e-4
    size, budget = data["size"]["after"], data["budget"]["bytes"]
    assert size == sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    assert 0.99 * budget <= size <= budget
    source = Checkpoint.open(tiny(name))
    assert [line["site"] for line in data["ledger"]] == list(source.tensors)
    assert all(line["reason"] for line in data["ledger"])
    assert all((line["state"] == "kept") == (line["grid"] is None) for line in data["ledger"])
    if FAMILIES[name].generates:
        model = FAMILIES[name].model_class.from_pretrained(out, dtype=torch.float32)
        inputs = {key: value for key, value in dummy_inputs(model).items() if key != "decoder_input_ids"}
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        uncached = model.generate(**inputs, **settings, use_cache=False)
        if name != "home_made":  # has no cache
            assert torch.equal(model.generate(**inputs, **settings, use_cache=True), uncached)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - MOSTLY_KEPT - set(FRESH)))
def test_family(name: str, tmp_path: Path) -> None:
    check(name, fitted(tiny(name), tmp_path / "out", size="40%"))


@pytest.mark.parametrize("name", FRESH)
def test_family_in_a_fresh_process(name: str, tmp_path: Path, fresh_process: None) -> None:
    report = fitted(tiny(name), tmp_path / "out", size="40%")
    assert "fresh process" in report["verified"]["how"]
    check(name, report)


def test_home_made_says_that_it_was_verified_in_this_process(tmp_path: Path, fresh_process: None) -> None:
    """Its class is registered in this process only: a fresh one could not load it."""
    report = fitted(tiny("home_made"), tmp_path / "out", size="40%")
    assert "this process" in report["verified"]["how"] and "fresh" not in report["verified"]["how"]


@pytest.mark.parametrize("name", sorted(MOSTLY_KEPT))
def test_family_that_cannot_be_fit_to_40_percent(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the smallest possible is [0-9]+ bytes") as refused:
        fitted(tiny(name), tmp_path / "out", size="40%")
    smallest = int(re.search(r"smallest possible is ([0-9]+) bytes", str(refused.value))[1])  # type: ignore[index]
    check(name, fitted(tiny(name), tmp_path / "out2", size=f"{smallest + 2000}B"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - MOSTLY_KEPT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_family_in_another_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from tests.families import cached

    report = fitted(str(cached(name, dtype)), tmp_path / "out", size="40%")
    assert report["verified"]["ok"]
    assert 0.99 <= report["size"]["after"] / report["budget"]["bytes"] <= 1
