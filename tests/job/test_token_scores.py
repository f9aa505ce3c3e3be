"""Tokens that count by what they are to a block: the attention seen is the attention paid, jobs weigh by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from slimwright.errors import InputError
from slimwright.job.token_scores import AttentionReceived, attention_received
from tests.families import make
from tests.job.conftest import files, fitted, tiny

FEW: dict[str, Any] = {"calibration_tokens": 512, "calibration_length": 16, "data": None, "grid": "int4:g32"}


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_attention_that_is_seen_is_what_the_model_pays(name: str, padded: bool) -> None:
    model = make(name)
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), AttentionReceived(mask.bool()) as seen:
        model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        paid = model(**inputs, output_attentions=True).attentions
    expected = sum((a * mask[:, None, :, None]).sum((1, 2)) for a in paid)
    assert seen.total is not None
    torch.testing.assert_close(seen.total[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_causal_attention_without_a_mask() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(1)).unbind(0)
    with AttentionReceived(None) as seen:
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
    logits = query @ key.transpose(-1, -2) / 2
    expected = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1).sum((1, 2))
    assert seen.total is not None
    torch.testing.assert_close(seen.total, expected)
    assert float(attention_received(query, key, value).sum()) == pytest.approx(10)


@pytest.mark.parametrize(
    "strategy", ["attncon", "first", "first_last", "token_freq", "act_norm", "act_diff", "token_sim"]
)
def test_every_strategy_in_a_job(strategy: str, tmp_path: Path) -> None:
    report = fitted(tiny("llama"), tmp_path / "out", method=f"quantize/rsq,strategy={strategy}", **FEW)
    assert report["verified"]["ok"] and report["verified"]["edits_error"] < 1e-5
    calibrated = [line for line in report["ledger"] if line["state"] == "calibrated" and line["block"]]
    assert calibrated and all(line["method"].startswith("quantize/rsq") for line in calibrated)
    uniform = fitted(tiny("llama"), tmp_path / "uniform", method="quantize/rsq,r_min=1.0", **FEW)
    assert uniform["verified"]["ok"] and files(tmp_path / "out") != files(tmp_path / "uniform")


def test_equal_weights_are_rotation_and_gptq(tmp_path: Path) -> None:
    """Card rsq: r_min = r_max is the same solver on the same Gram."""
    fitted(tiny("llama"), tmp_path / "rsq", method="quantize/rsq,r_min=1.0", **FEW)
    same = "quantize/gptq,act_order=false,clip=mse,damp=0.01"
    fitted(tiny("llama"), tmp_path / "gptq", method=same, folds=["fold/rotation"], **FEW)
    assert files(tmp_path / "rsq") == files(tmp_path / "gptq")


def test_experts_cannot_be_weighed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be weighed"):
        fitted(tiny("mixtral"), tmp_path / "out", method="quantize/rsq", folds=["none"], **FEW)


def test_attention_that_is_not_seen(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be seen"):
        fitted(tiny("bloom"), tmp_path / "out", method="quantize/rsq", folds=["none"], **FEW)
