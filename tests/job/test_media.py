"""Fits that calibrate on images and sounds: every stack, the report's quality by brute force, refusals before work."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("PIL", reason="Pillow, which reads images, is not installed")

from slimwright.calibrate.data import Document, documents, split
from slimwright.calibrate.feeding import Feed, fed, load_processor
from slimwright.errors import InputError
from slimwright.job.fit import FitReport
from tests.families import FAMILIES
from tests.job.conftest import fitted
from tests.media import RATE, model_with_processor, words, write_image, write_rows

LABELS = [f"LABEL_{index}" for index in range(10)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    for family in ("vit", "clip", "llava", "whisper"):
        model_with_processor(family, root / family)
        columns = {"label": lambda index: LABELS[index % 10] if index % 2 else index % 10} if family == "vit" else {}
        write_rows(root / f"{family}-data", family, 24, **columns)
    return {path.name: path for path in root.iterdir()}


def solved(places: dict[str, Path], family: str, out: Path, **options: Any) -> FitReport:
    how = {"data": str(places[f"{family}-data"] / "rows.jsonl"), "method": "quantize/gptq", "calibration_tokens": 2048}
    return fitted(str(places[family]), out, **{"grid": "int4:g32", **how, **options})


@pytest.fixture(scope="module")
def reports(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, FitReport]:
    out = tmp_path_factory.mktemp("fits")
    return {family: solved(places, family, out / family) for family in ("vit", "clip", "llava", "whisper")}


def kept_outputs(places: dict[str, Path], report: FitReport, family: str) -> list[tuple[Document, Any, Any]]:
    """Each kept document with the source's and the result's outputs, one at a time, both loaded by transformers."""
    cls = FAMILIES[family].model_class
    models = [cls.from_pretrained(place, dtype=torch.float32).eval() for place in (places[family], report.out)]
    feed = Feed(models[0], load_processor(places[family], fed(models[0])), 64)
    _, kept = split(documents(str(places[f"{family}-data"] / "rows.jsonl")))
    with torch.no_grad():
        return [(document, *(model(**feed.row(document).inputs) for model in models)) for document in kept]


def line_tokens(report: FitReport, part: str) -> set[int]:
    return {line["tokens"] for line in report["ledger"] if line["state"] == "calibrated" and part in line["site"]}


def test_every_stack_is_calibrated(places: dict[str, Path], reports: dict[str, FitReport]) -> None:
    kinds = {"vit": "images", "clip": "images and text", "llava": "images and text", "whisper": "sounds and text"}
    for family, report in reports.items():
        assert report["verified"]["ok"] and report["calibration"]["kind"] == kinds[family]
        assert not any("random" in note or "generic" in note for note in report["notes"])
        inside = [line for line in report["ledger"] if line["block"] is not None and line["state"] != "kept"]
        assert inside and all(line["state"] == "calibrated" for line in inside)
    solvers, _ = split(documents(str(places["whisper-data"] / "rows.jsonl")))
    seconds = [0.5 + 0.1 * (int(Path(str(d.audio)).stem) % 10) for d in solvers]
    heard = sum(math.ceil(math.ceil(int(s * RATE) / 160) / 2) for s in seconds)  # frames with sound, two a position
    assert line_tokens(reports["whisper"], "encoder.layers.0.self_attn.q_proj") == {heard}, "silence does not count"
    spoken = sum(1 + len(document.text.split()) for document in solvers)
    assert line_tokens(reports["whisper"], "decoder.layers.0.self_attn.q_proj") == {spoken}
    assert line_tokens(reports["whisper"], "encoder_attn.k_proj") == {heard}
    assert line_tokens(reports["clip"], "vision_model.encoder.layers.0.self_attn.q_proj") == {17 * len(solvers)}


def test_the_accuracy_of_a_classifier(places: dict[str, Path], reports: dict[str, FitReport]) -> None:
    found = kept_outputs(places, reports["vit"], "vit")
    right: dict[str, list[bool]] = {"before": [], "after": []}
    divergences, agreements = [], []
    for document, before, after in found:
        label = LABELS.index(document.label) if isinstance(document.label, str) else document.label
        right["before"].append(int(before.logits.argmax()) == label)
        right["after"].append(int(after.logits.argmax()) == label)
        x, y = (output.logits[0].double().log_softmax(-1) for output in (before, after))
        divergences.append(float((x.exp() * (x - y)).sum()))
        agreements.append(int(x.argmax()) == int(y.argmax()))
    quality = reports["vit"]["quality"]
    for when, outcomes in right.items():
        assert quality["accuracy"][when]["value"] == sum(outcomes) / len(outcomes)
    assert quality["kl"]["value"] == pytest.approx(sum(divergences) / len(found), rel=1e-3)
    assert quality["top1_agreement"]["value"] == sum(agreements) / len(found)
    leaves = [quality["kl"], quality["top1_agreement"], *quality["accuracy"].values()]
    assert all(
        set(leaf) == {"value", "low", "high"} and leaf["low"] <= leaf["value"] <= leaf["high"] for leaf in leaves
    )
    assert reports["vit"]["measured_on"]["documents"] == len(found)


def test_the_cosines_of_two_towers(places: dict[str, Path], reports: dict[str, FitReport]) -> None:
    found = kept_outputs(places, reports["clip"], "clip")
    for tower in ("image", "text"):
        cosines = [
            float(torch.cosine_similarity(before[f"{tower}_embeds"].double(), after[f"{tower}_embeds"].double()))
            for _, before, after in found
        ]
        quality = reports["clip"]["quality"]
        assert quality[f"{tower}_cosine_mean"]["value"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
        assert quality[f"{tower}_cosine_min"]["value"] == pytest.approx(min(cosines), abs=1e-6)


def test_only_the_texts_positions_are_compared(places: dict[str, Path], reports: dict[str, FitReport]) -> None:
    found = kept_outputs(places, reports["llava"], "llava")
    divergences: list[Tensor] = []
    for document, before, after in found:
        x, y = (output.logits[0].double().log_softmax(-1) for output in (before, after))
        here = torch.ones(len(x), dtype=torch.bool)
        here[1:17] = False  # the image's
        assert int(here.sum()) == 2 + len(document.text.split())
        divergences.append((x.exp() * (x - y)).sum(-1)[here])
    assert reports["llava"]["measured_on"]["tokens"] == sum(map(len, divergences))
    expected = float(torch.cat(divergences).mean())
    assert reports["llava"]["quality"]["kl"]["value"] == pytest.approx(expected, rel=1e-3)


def test_a_budget_is_searched_for_on_images(places: dict[str, Path], tmp_path: Path) -> None:
    report = solved(places, "llava", tmp_path / "out", grid=None, size="40%")
    assert report["verified"]["ok"] and report["size"]["after"] <= report["budget"]["bytes"]
    states = {
        line["state"] for line in report["ledger"] if line["block"] is not None and line["role"] in ("q", "k", "v")
    }
    assert "calibrated" in states and "data-free" not in states


def test_labels_may_be_missing(places: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        write_image(folder / f"{index}.png", index)
    (folder / "READ.ME").write_text("about these images")
    report = solved(places, "vit", tmp_path / "out", data=str(folder))
    assert set(report["quality"]) == {"kl", "top1_agreement"}
    assert any("1 of the 13 documents of" in note for note in report["notes"])


# -- refusals, before work -----------------------------------------------------------------------------------------


def refused(places: dict[str, Path], family: str, out: Path, sentence: str, **options: Any) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        solved(places, family, out, **options)
    assert len(str(error.value).splitlines()) == 1 and error.value.exit_code == 2
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()


def rows(folder: Path, found: list[dict[str, Any]]) -> str:
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, found)))
    return str(folder / "own.jsonl")


def test_what_a_model_does_not_read(places: dict[str, Path], tmp_path: Path) -> None:
    text = rows(tmp_path, [{"text": words(index, 9)} for index in range(9)])
    out = tmp_path / "out"
    refused(places, "vit", out, "holds an image, which ViTForImageClassification reads: give a folder", data=text)
    refused(places, "whisper", out, "holds sound and text, which Whisper.* reads: give rows with 'audio'", data=text)
    refused(places, "llava", out, "holds an image and text", data=str(places["vit-data"] / "rows.jsonl"))
    refused(places, "vit", out, "holds an image", data="generic")
    refused(places, "clip", out, "No document of the data .* holds an image and text", eval_data=text)


def test_labels_that_are_no_classes(places: dict[str, Path], tmp_path: Path) -> None:
    for index in range(6):
        write_image(tmp_path / f"{index}.png", index)
    out = tmp_path / "out"
    named = rows(tmp_path, [{"image": f"{i}.png", "label": "zebra"} for i in range(6)])
    refused(places, "vit", out, r"The label 'zebra' of own\.jsonl:\d .* is no class of the model", data=named)
    some = rows(tmp_path, [{"image": f"{i}.png", **({"label": 1} if i else {})} for i in range(6)])
    refused(places, "vit", out, r"Only 5 of the 6 samples .* have a label", eval_data=some)
    large = rows(tmp_path, [{"image": f"{i}.png", "label": 10} for i in range(6)])
    refused(places, "vit", out, "The label '10'", data=large)


def test_damaged_files_that_only_evaluation_would_read(places: dict[str, Path], tmp_path: Path) -> None:
    for index in range(6):
        write_image(tmp_path / f"{index}.png", index)
    data = rows(tmp_path, [{"image": f"{i}.png"} for i in range(6)])
    for index in range(6):  # whole at the beginning, as a download that broke off is
        path = tmp_path / f"{index}.png"
        path.write_bytes(path.read_bytes()[:500])
    refused(places, "vit", tmp_path / "out", r"The image .*\.png cannot be read", data=data)
    refused(places, "vit", tmp_path / "out", r"The image .*\.png cannot be read", eval_data=data)


def test_one_image_for_evaluation(places: dict[str, Path], tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / f"{index}.png", index)
    data = rows(tmp_path, [{"image": f"{i}.png"} for i in range(3)])
    refused(places, "vit", tmp_path / "out", "leaves one sample for evaluation, and an interval needs two", data=data)


def test_without_its_processor(places: dict[str, Path], tmp_path: Path) -> None:
    from tests.job.conftest import tiny

    data = str(places["vit-data"] / "rows.jsonl")
    with pytest.raises(InputError, match=r"The processor of .* does not load .*preprocessor_config\.json"):
        fitted(tiny("vit"), tmp_path / "out", grid="int4:g32", data=data, method=None)
    report = fitted(tiny("vit"), tmp_path / "out", grid="int4:g32", method="quantize/gptq", calibration_tokens=64)
    assert report["calibration"]["kind"] == "random inputs"
