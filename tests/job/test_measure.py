"""``measure``: every kind of model on data, in this process; one run in processes of its own, as users have it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import log_softmax

import slimwright
from slimwright.errors import InputError, SlimwrightError
from slimwright.evaluate import LanguageQuality, score_rankings
from slimwright.job import measuring
from slimwright.job.measure import read_result, run_process
from slimwright.report.measure import measure_tables, render_measurement
from tests.evaluate.samples import (
    beir,
    bert,
    byte_tokenizer,
    causal,
    lines,
    perturbed,
    sentences,
    word_tokenizer,
    write,
)
from tests.families import cached, make
from tests.report.test_report import Page

TEXTS = ["héllo wörld", "x = 1\n" * 9, "def f(a):\n    return a\n", "🙂" * 9, "import os\n"]


def run_here(spec: measuring.Spec) -> dict[str, Any]:
    """Stands for ``run_process``: the same work, in this process."""
    with torch.random.fork_rng(devices=[]):
        found = measuring.run(measuring.Spec.from_json(json.loads(json.dumps(spec.to_json()))))
    return {**json.loads(json.dumps(found)), "tensors": f"{spec.result}.safetensors"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimwright.job.measure.run_process", run_here)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return f"own={lines(tmp_path / 'own.jsonl', [{'text': text} for text in TEXTS])}"


def measured(*models: Path, **options: Any) -> dict[str, Any]:
    report = slimwright.measure(*map(str, models), **{"repeats": 0, "quiet": True, **options})
    json.dumps(report.data, allow_nan=False)
    return report.data


def quality(found: dict[str, Any], name: str, data: str = "own") -> dict[str, Any]:
    (model,) = [model for model in found["models"] if model["name"] == name]
    return model["quality"][data]


def difference(found: dict[str, Any], model: str, against: str, metric: str, data: str = "own") -> dict[str, Any]:
    (one,) = [
        one for one in found["differences"]
        if (one["model"], one["against"], one["metric"], one["data"]) == (model, against, metric, data)
    ]  # fmt: skip
    return one


def test_causal_models(tmp_path: Path, text: str) -> None:
    paths = [causal(tmp_path / "r"), causal(tmp_path / "near", 0.01), causal(tmp_path / "far", 0.1)]
    found = measured(*paths[1:], reference=str(paths[0]), data=[text])
    assert found["kind"] == "causal" and found["reference"] == "r"
    assert [model["name"] for model in found["models"]] == ["r", "near", "far"]
    assert set(quality(found, "r")) == {"perplexity", "bits_per_byte"}
    assert set(quality(found, "near")) == {"kl", "top1_agreement", "perplexity", "bits_per_byte"}
    assert 0 < quality(found, "near")["kl"]["value"] < quality(found, "far")["kl"]["value"]
    expected = LanguageQuality()
    r, near = make("llama"), perturbed(make("llama"), 0.01)
    tokenizer = byte_tokenizer()
    for name, one in enumerate(TEXTS):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(one, add_special_tokens=False)]])
        ones = torch.ones(ids.shape[1] - 1, dtype=torch.long)
        with torch.no_grad():
            expected.add(name, r(ids).logits[0, :-1], near(ids).logits[0, :-1], None, ids[0, 1:], ones)
    whole = expected.result()  # a byte is a token
    for metric in ("kl", "top1_agreement"):
        assert quality(found, "near")[metric]["value"] == pytest.approx(whole[metric]["value"], rel=1e-3)
    for metric in ("perplexity", "bits_per_byte"):
        assert quality(found, "r")[metric]["value"] == pytest.approx(whole[metric]["before"]["value"], rel=1e-5)
        assert quality(found, "near")[metric]["value"] == pytest.approx(whole[metric]["after"]["value"], rel=1e-5)
        paired = difference(found, "near", "r", metric)
        assert paired["value"] == pytest.approx(whole[metric]["difference"]["value"], rel=1e-3, abs=1e-6)
        assert paired["low"] <= paired["value"] <= paired["high"]
    assert difference(found, "far", "near", "kl")["low"] > 0, "candidates are compared in pairs too"
    assert found["data"][0]["documents"] == len(TEXTS)


def test_a_copy_is_no_different(tmp_path: Path, text: str) -> None:
    found = measured(causal(tmp_path / "a"), causal(tmp_path / "b"), data=[text])
    assert found["reference"] == "a", "the first model, where no reference is named"
    again = measured(tmp_path / "a", data=[text], reference=f"{tmp_path}/./b/../a/")
    assert [model["name"] for model in again["models"]] == ["a"], "one directory is one model, however it is written"
    assert quality(found, "b")["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert quality(found, "b")["top1_agreement"]["value"] == 1.0
    assert all(one["value"] == one["low"] == one["high"] == 0 for one in found["differences"])


def test_what_is_not_tokenized_alike_is_not_compared(tmp_path: Path, text: str) -> None:
    a, other = causal(tmp_path / "a"), causal(tmp_path / "other", reverse=True)
    found = measured(a, other, data=[text])
    assert set(quality(found, "other")) == {"bits_per_byte"}
    assert {one["metric"] for one in found["differences"]} == {"bits_per_byte"}
    (note,) = found["notes"]
    assert note.startswith("other: reads 'own' as other tokens") and "bits per byte are comparable" in note
    assert note in render_measurement(found).replace("&#39;", "'")


def test_masked_models(tmp_path: Path) -> None:
    paths = [
        write(perturbed(make("bert"), noise), word_tokenizer(), tmp_path / name)
        for name, noise in (("a", 0), ("b", 0.05))
    ]
    data = lines(tmp_path / "words.jsonl", [{"text": text} for text in sentences(6)])
    found = measured(*paths, data={"own": str(data)})
    assert found["kind"] == "masked" and set(quality(found, "b")) == {"kl", "top1_agreement"}
    assert quality(found, "b")["kl"]["low"] > 0


def test_encoders(tmp_path: Path) -> None:
    for name, noise, hidden in (("r", 0, 32), ("near", 0.02, 32), ("wide", 0, 64)):
        write(bert(noise=noise, hidden=hidden), word_tokenizer(), tmp_path / name)
    task = beir(tmp_path / "task")
    texts = lines(tmp_path / "plain.jsonl", [{"text": text} for text in sentences(8)])
    found = measured(
        tmp_path / "near",
        tmp_path / "wide",
        reference=str(tmp_path / "r"),
        data={"own": str(task), "plain": str(texts)},
    )
    near = quality(found, "near")
    ranking = {"ndcg_at_10", "recall_at_100", "mrr", "map"}
    mixed = {"mixed_ndcg_at_10", "mixed_recall_at_100"}
    assert set(near) == ranking | mixed | {"cosine_mean", "cosine_min"}
    assert set(quality(found, "near", "plain")) == {"cosine_mean", "cosine_min"}
    assert set(quality(found, "wide")) == ranking
    assert any(note.startswith("wide: gives vectors of 64 features, the reference of 32") for note in found["notes"])
    vectors = {}
    for name, model in (("r", bert()), ("near", bert(noise=0.02))):
        tokenizer = word_tokenizer()
        for kind, file in (("queries", "queries.jsonl"), ("corpus", "corpus.jsonl")):
            rows = [json.loads(line) for line in (task / file).read_text().splitlines()]
            with torch.no_grad():
                hidden = [model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0] for row in rows]
            made = torch.stack([part.mean(0) for part in hidden])
            vectors[name, kind] = (made / made.norm(dim=1, keepdim=True)).double()
    judged = {f"q{i}": {f"d{i}": 1} for i in range(12)}
    for metric, queries, corpus in (("ndcg_at_10", "near", "near"), ("mixed_ndcg_at_10", "near", "r")):
        scores = vectors[queries, "queries"] @ vectors[corpus, "corpus"].T
        run = {f"q{i}": {f"d{j}": float(scores[i, j]) for j in range(30)} for i in range(12)}
        expected = score_rankings(run, judged).columns["ndcg_at_10"].mean()
        assert near[metric]["value"] == pytest.approx(expected, abs=1e-6)
    cosines = (vectors["r", "corpus"] * vectors["near", "corpus"]).sum(1)
    assert near["cosine_mean"]["value"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert near["cosine_min"]["value"] == pytest.approx(cosines.min().item(), abs=1e-5)
    assert quality(found, "r")["mixed_ndcg_at_10"] == quality(found, "r")["ndcg_at_10"]


def test_classifiers_of_text(tmp_path: Path) -> None:
    for name, noise in (("a", 0.0), ("b", 0.05)):
        write(bert(labels=3, noise=noise), word_tokenizer(), tmp_path / name)
    texts = sentences(12)
    labels: list[Any] = [i % 3 for i in range(11)] + ["LABEL_2"]
    data = lines(tmp_path / "data.jsonl", [{"text": t, "label": label} for t, label in zip(texts, labels)])
    found = measured(tmp_path / "a", tmp_path / "b", data={"own": str(data)})
    logits = {}
    for name, model in (("a", bert(labels=3)), ("b", bert(labels=3, noise=0.05))):
        with torch.no_grad():
            logits[name] = np.stack(
                [model(**word_tokenizer()(t, return_tensors="pt")).logits[0].double().numpy() for t in texts]
            )
    right = {name: rows.argmax(1) == np.array([*labels[:11], 2]) for name, rows in logits.items()}
    for name in "ab":
        assert quality(found, name)["accuracy"]["value"] == pytest.approx(right[name].mean())
    p, q = (log_softmax(logits[name], axis=1) for name in "ab")
    assert quality(found, "b")["kl"]["value"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
    assert difference(found, "b", "a", "accuracy")["value"] == pytest.approx(right["b"].mean() - right["a"].mean())
    bare = lines(tmp_path / "bare.jsonl", [{"text": text} for text in texts])
    found = measured(tmp_path / "a", tmp_path / "b", data={"own": str(bare)})
    assert set(quality(found, "b")) == {"kl", "top1_agreement"} and "no labels" in found["notes"][0]


def test_classifiers_of_images(tmp_path: Path) -> None:
    a = cached("vit")
    b = write(perturbed(make("vit"), 0.05), None, tmp_path / "b")
    pixels = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = make("vit")(pixels).logits.argmax(1)
    save_file({"pixel_values": pixels, "labels": labels}, tmp_path / "images.safetensors")
    found = measured(a, b, data={"own": str(tmp_path / "images.safetensors")})
    assert found["kind"] == "vision"
    assert quality(found, found["reference"])["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    with torch.no_grad():
        same = (perturbed(make("vit"), 0.05)(pixels).logits.argmax(1) == labels).double().mean().item()
    assert (
        quality(found, "b")["accuracy"]["value"]
        == quality(found, "b")["top1_agreement"]["value"]
        == pytest.approx(same)
    )


def test_a_folder_of_images_is_what_the_processor_makes_of_it(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow, which reads images, is not installed")
    from PIL import Image

    from tests.media import SIDE, model_with_processor, write_image

    a = model_with_processor("vit", tmp_path / "a")
    b = write(perturbed(make("vit", torch.bfloat16), 0.05), None, tmp_path / "b")
    names = [write_image(tmp_path / f"{i}.png", i, (SIDE, SIDE)).name for i in range(12)]
    data = lines(tmp_path / "rows.jsonl", [{"image": name, "label": i % 10} for i, name in enumerate(names)])
    found = measured(a, b, data={"own": str(data)})
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(tmp_path / name))).permute(2, 0, 1) for name in names])
    save_file(
        {"pixel_values": (pixels / 255 - 0.5) / 0.5, "labels": torch.arange(12) % 10}, tmp_path / "pixels.safetensors"
    )
    by_hand = measured(a, b, data={"own": str(tmp_path / "pixels.safetensors")})
    for model in ("a", "b"):
        ours, theirs = quality(found, model), quality(by_hand, model)
        assert set(ours) == set(theirs) >= {"accuracy"}
        assert all(ours[name]["value"] == pytest.approx(theirs[name]["value"], rel=1e-4) for name in ours)
    assert found["data"][0]["documents"] == 12


def test_in_processes_of_their_own(tmp_path: Path, text: str) -> None:
    """Through the command line: speed, load time, memory, the page and the one object on stdout."""
    a, out = causal(tmp_path / "a"), tmp_path / "out"
    ran = subprocess.run(
        [
            sys.executable, "-m", "slimwright", "measure", str(a), "--data", text, "--repeats", "1", "--out",
            str(out), "--json",
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = ran.stdout.splitlines()
    found = json.loads(line)
    assert found == json.loads((out / "measure.json").read_text())
    here = measured(a, data=[text])
    for metric, leaf in quality(here, "a").items():
        assert quality(found, "a")[metric] == pytest.approx(leaf, rel=1e-4)
    for model in found["models"]:
        speed = model["speed"]
        assert {"load_seconds", "prefill_tokens_per_second", "peak_memory_bytes"} <= set(speed)
        assert all(leaf["low"] == leaf["value"] == leaf["high"] > 0 for leaf in speed.values() if leaf["value"])
        weights = 4 * model["parameters"]
        assert speed["peak_memory_bytes"]["value"] > weights
    page = Page((out / "measure.html").read_text())
    assert "script" not in page.tags and any("Bits per byte" in text for text in page.text("td"))
    assert not [value for _, name, value in page.attributes if name in ("src", "href")]


def test_speeds_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimwright.evaluate.speed.PATIENCE", 0.0)
    words = lines(tmp_path / "words.jsonl", [{"text": text} for text in sentences(4)])
    save_file(
        {"pixel_values": torch.zeros(3, 3, 32, 32), "labels": torch.zeros(3, dtype=torch.long)},
        tmp_path / "images.safetensors",
    )
    kinds = {
        "masked": (write(make("bert"), word_tokenizer(), tmp_path / "masked"), words),
        "encoder": (write(bert(), word_tokenizer(), tmp_path / "encoder"), words),
        "classifier": (write(bert(labels=2), word_tokenizer(), tmp_path / "classifier"), words),
        "vision": (cached("vit"), tmp_path / "images.safetensors"),
    }
    for kind, (model, data) in kinds.items():
        found = measured(model, data={"own": str(data)}, repeats=2)
        assert found["kind"] == kind
        unit = "images" if kind == "vision" else "texts"
        leaf = found["models"][0]["speed"][f"{unit}_per_second"]
        assert 0 < leaf["low"] <= leaf["value"] <= leaf["high"]
        for table in measure_tables(found):
            assert table.row_count > 3


def test_tables_and_page_hold_what_was_found(tmp_path: Path, text: str) -> None:
    from rich.console import Console

    hostile = tmp_path / "[red]<b>x"
    found = measured(causal(tmp_path / "a"), causal(hostile, 0.01), data=[text], out=str(tmp_path / "out"))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in measure_tables(found):
        console.print(table)
    printed = console.export_text()
    assert "[red]<b>x" in printed and "a (reference)" in printed and "Difference from a (paired)" in printed
    value = quality(found, "[red]<b>x")["bits_per_byte"]["value"]
    html = (tmp_path / "out" / "measure.html").read_text()
    assert f"{value:.4g}" in printed and f"{value:.4g}" in html
    assert "<b>x" not in html and "&lt;b&gt;x" in html
    Page(html)
    assert math.isclose(json.loads((tmp_path / "out" / "measure.json").read_text())["models"][1]["bytes"],
                        sum(f.stat().st_size for f in hostile.glob("*.safetensors")))  # fmt: skip


def test_bad_input(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = causal(tmp_path / "a")
    encoder = write(bert(), word_tokenizer(), tmp_path / "encoder")
    bare = write(make("llama"), None, tmp_path / "bare")
    two, three = (write(bert(labels=n), word_tokenizer(), tmp_path / f"c{n}") for n in (2, 3))
    own = text.partition("=")[2]
    words = lines(tmp_path / "words.jsonl", [{"text": text, "label": i} for i, text in enumerate(sentences(4))])
    part = lines(tmp_path / "part.jsonl", [{"text": "the cat", "label": 1}, {"text": "a dog"}])
    one = lines(tmp_path / "one.jsonl", [{"text": "the cat", "label": 1}])
    save_file({"pixel_values": torch.zeros(2, 3, 32, 32)}, tmp_path / "images.safetensors")
    save_file(
        {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([0, 10])}, tmp_path / "labels.safetensors"
    )
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    monkeypatch.setattr("slimwright.evaluate.harness.find_spec", lambda name: None)
    vit = cached("vit")
    cases: list[tuple[tuple[Path, ...], dict[str, Any], str]] = [
        ((), {}, "Name at least one model"),
        ((a,), {"sise": 3}, "no option 'sise'"),
        ((tmp_path / "absent",), {}, "absent' does not exist|absent does not exist"),
        ((a,), {"reference": str(tmp_path / "absent")}, "absent"),
        ((a, encoder), {}, "encoder' is an encoder but .* is a causal language model"),
        ((two, three), {}, "other classes"),
        ((cached("clip"),), {}, "CLIPModel is not measured"),
        ((write(bert(labels=1), word_tokenizer(), tmp_path / "c1"),), {}, "c1' has one output"),
        ((bare,), {}, "tokenizer of '.*bare' does not load"),
        ((a,), {"dtype": "int8"}, "--dtype 'int8'"),
        ((a,), {"repeats": -1}, "--repeats -1"),
        ((a,), {"text": "much"}, "--text 'much'"),
        ((a,), {"task_limit": 1}, "--task-limit 1"),
        ((a,), {"data": ["x=/absent/file"]}, "/absent/file does not exist"),
        ((a,), {"data": ["x="]}, "names no source"),
        ((a,), {"data": [f"x={own}", f"x={own}"]}, "Two sources are named 'x'"),
        ((a,), {"tasks": ["arc_easy"]}, r"pip install lm-eval"),
        ((encoder,), {"tasks": ["arc_easy"]}, "--tasks needs causal language models"),
        ((a,), {"out": str(tmp_path / "a")}, "exists and is not empty"),
        ((a,), {"out": str(tmp_path / "own.jsonl" / "out")}, "own.jsonl is no directory"),
        ((encoder,), {"data": [str(one)]}, "at least two"),
        ((two,), {"data": [str(words)]}, "label '[23]' of words.jsonl:[34] .* is no class of the model"),
        ((two,), {"data": [str(part)]}, "Only 1 of the 2 samples"),
        ((vit,), {"data": ["stdlib"]}, "Classifiers of images need --data"),
        ((vit,), {"data": [str(tmp_path / "images.safetensors")]}, "must hold `pixel_values`"),
        ((vit,), {"data": [str(tmp_path / "labels.safetensors")]}, "no indices of the model's 10 classes"),
        ((vit,), {"data": [str(tmp_path / "broken.safetensors")]}, "cannot be read as safetensors"),
        ((vit,), {"data": [str(words)]}, "holds an image, which a classifier of images reads: give a folder of images"),
    ]
    for models, options, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            measured(*models, **{"data": [text] if models and models[0] in (a, bare) else (), **options})
        assert "\n" not in str(caught.value)


def test_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho MemoryError >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(SlimwrightError, match=r"process that measured 'some/model' failed \(exit 3\): MemoryError$"):
        run_process(measuring.Spec("quality", "some/model", str(tmp_path / "result")))


def test_what_a_process_says_reaches_the_user(tmp_path: Path) -> None:
    bare, data = write(make("llama"), None, tmp_path / "bare"), (measuring.Data("own", (("one", "x"),)),)
    spec = measuring.Spec("quality", str(bare), str(tmp_path / "result"), data=data)
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_json()))
    assert measuring.main(["", str(tmp_path / "spec.json")]) == 0
    with pytest.raises(InputError, match=r"^'.*bare': The tokenizer of '.*bare' does not load"):
        read_result(spec)
