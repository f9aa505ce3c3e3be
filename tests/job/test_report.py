"""What a result holds: report.json, hash, ledger, events, side files, model card."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from slimwright.checkpoint import Checkpoint
from slimwright.errors import SlimwrightError
from slimwright.job import build as building
from slimwright.job import ledger
from slimwright.job.fit import FitReport
from slimwright.job.work import Work
from tests.job.conftest import files, fitted, tiny


@pytest.fixture(scope="module")
def report(result: FitReport) -> dict[str, Any]:
    assert result.out is not None
    data = json.loads((result.out / "report.json").read_text())
    assert data == result.data
    return data


def test_the_fields_that_others_rely_on(report: dict[str, Any]) -> None:
    assert report["format_version"] == 1
    assert report["model"].keys() >= {"path", "fingerprint", "family", "parameters"}
    assert report["budget"] == {"asked": "40%", "bytes": int(0.8 * report["model"]["parameters"])}
    assert report["size"].keys() >= {"before", "after", "bits_per_weight"}
    assert report["size"]["bits_per_weight"] == 8 * report["size"]["after"] / report["model"]["parameters"]
    assert report["quality"].keys() == {"kl", "top1_agreement"}
    assert report["job"].keys() >= {"seconds", "peak_memory_bytes", "evaluations", "predicted"}
    assert report["job"]["predicted"].keys() == {"seconds", "peak_memory_bytes", "bytes"}
    assert report["job"]["evaluations"] <= 3
    columns = {
        "site", "group", "state", "reason", "method", "grid", "bits", "bytes", "error_before", "error_after", "tokens",
    }  # fmt: skip
    assert all(line.keys() >= columns for line in report["ledger"])
    assert report["verified"].keys() >= {"how", "ok"} and report["verified"]["ok"] is True
    assert report["versions"].keys() >= {"slimwright", "torch", "transformers", "python"}
    assert "from_pretrained" in report["how_to_load"]


def test_every_quality_is_a_value_within_its_interval(report: dict[str, Any]) -> None:
    for quality in report["quality"].values():
        assert quality.keys() == {"value", "low", "high"}
        assert quality["low"] <= quality["value"] <= quality["high"]
    assert report["quality"]["kl"]["value"] > 0


def test_an_encoder_decoder_is_measured_as_a_language_model(tmp_path: Path) -> None:
    assert fitted(tiny("t5"), tmp_path / "t5", grid="int4:g32")["quality"].keys() == {"kl", "top1_agreement"}


def test_the_hash_is_over_the_weight_files_in_order(result: FitReport) -> None:
    assert result.out is not None
    digest = hashlib.sha256()
    for content in files(result.out).values():
        digest.update(content)
    assert result["hash"] == digest.hexdigest()


def test_the_ledger_and_the_headers_are_the_files(result: FitReport) -> None:
    assert result.out is not None
    headers = total = 0
    for content in files(result.out).values():
        headers += 8 + struct.unpack("<Q", content[:8])[0]
        total += len(content)
    assert sum(line["bytes"] for line in result["ledger"]) + headers == total == result["size"]["after"]
    source = Checkpoint.open(tiny())
    assert {line["site"]: line["bytes_before"] for line in result["ledger"]} == {
        name: info.nbytes for name, info in source.tensors.items()
    }


def test_errors_in_the_ledger_are_those_of_the_weights(result: FitReport) -> None:
    """Recomputed from the files alone, through the model that transformers loads."""
    import torch
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(result.out, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    packed.dequantize()
    after = dict(packed.named_parameters())
    originals, checked = dict(before.named_parameters()), 0
    for line in result["ledger"]:
        if line["state"] == "data-free":
            old, new = originals[line["site"]].detach(), after[line["site"]].detach().float()
            error = float((old - new).square().sum() / old.square().sum())
            assert line["error_after"] == pytest.approx(error, rel=1e-3), line["site"]
            assert line["error_after"] <= line["error_before"] * (1 + 1e-6)
            checked += 1
    assert checked >= 10


def test_events_tell_where_the_job_was(result: FitReport) -> None:
    assert result.out is not None
    events = [json.loads(line) for line in (result.out / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if "log" not in event]
    assert all(event.keys() >= {"time", "phase", "done", "total", "eta_seconds", "memory_bytes"} for event in steps)
    assert list(dict.fromkeys(event["phase"] for event in steps)) == ["score", "build", "verify", "publish"]
    assert all(event["eta_seconds"] >= 0 and event["memory_bytes"] > 0 for event in steps)
    assert all(event["done"] <= event["total"] for event in steps)
    assert steps[-1]["eta_seconds"] < 0.1 and steps[0]["eta_seconds"] > steps[-1]["eta_seconds"]


def test_the_directory_holds_the_model_and_nothing_of_the_job(result: FitReport) -> None:
    assert result.out is not None
    names = {path.name for path in result.out.iterdir()}
    assert names >= {"config.json", "plan.yaml", "report.json", "report.html", "README.md", "events.jsonl"}
    assert (result.out / "generation_config.json").read_bytes() == (
        Path(tiny()) / "generation_config.json"
    ).read_bytes()
    assert not any(name.startswith(".") for name in names)
    assert not result.out.with_name("out.partial").exists()
    card = (result.out / "README.md").read_text()
    assert result["hash"] in card and result["how_to_load"].splitlines()[-1] in card


def test_how_to_load_loads(result: FitReport) -> None:
    space: dict[str, Any] = {}
    exec(result["how_to_load"], space)  # the very lines that users are told
    assert type(space["model"]).__name__ == "Qwen2ForCausalLM"


def test_an_unaccounted_tensor_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = building.build
    monkeypatch.setattr("slimwright.job.work.build", lambda *given: honest(*given)[:-1])
    with pytest.raises(SlimwrightError, match="does not account for every tensor"):
        fitted(tiny(), tmp_path / "out", grid="int4:g32")
    assert not (tmp_path / "out").exists()


def test_a_ledger_that_counts_wrong_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ledger.check_complete
    monkeypatch.setattr("slimwright.job.state.check_complete", lambda lines, source, n: honest(lines, source, n + 1))
    with pytest.raises(SlimwrightError, match="were written"):
        fitted(tiny(), tmp_path / "out", grid="int4:g32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["payload", "kept"])
def test_a_flipped_bit_is_found_and_not_published(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing and verifying, one bit of the file changes."""
    honest = Work._verify

    def damaged(job: Work, state: Any) -> None:
        held = state.held
        path = held.partial / "model.safetensors"
        name = {"payload": "model.layers.1.mlp.up_proj.weight", "kept": "model.norm.weight"}[where]
        info = Checkpoint.open(held.partial).tensors[name]
        content = bytearray(path.read_bytes())
        content[info.start] ^= 1
        path.write_bytes(bytes(content))
        honest(job, state)

    monkeypatch.setattr(Work, "_verify", damaged)
    with pytest.raises(SlimwrightError, match="not what was planned and was not published"):
        fitted(tiny(), tmp_path / "out", grid="int4:g32")
    assert not (tmp_path / "out").exists()


def test_a_wrong_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are right, but what transformers makes of them is not: a packed module that multiplies wrongly."""
    from slimwright.runtime import modules

    honest = modules.PackedModule.multiply_rows
    monkeypatch.setattr(modules.PackedModule, "multiply_rows", lambda *given, **named: honest(*given, **named) * 1.001)
    with pytest.raises(SlimwrightError, match="differ from the reference"):
        fitted(tiny(), tmp_path / "out", grid="int4:g32")
    assert not (tmp_path / "out").exists()
