"""Recipes: order, references, going on, what is refused before anything is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import slimwright
from slimwright.errors import InputError
from slimwright.recipe import read_recipe, run
from slimwright.zoo import bundled_path
from tests.families import cached

PLAIN = {"method": "quantize/rtn,clip=none", "data": "none"}


def model(seed: int = 0) -> str:
    return str(cached("llama", torch.bfloat16, seed))


def recipe() -> dict[str, Any]:
    """Written backwards, so that the order must be found."""
    merge = {"method": "merge/linear", "models": [model(0), model(1)]}
    return {
        "recipe": 1,
        "steps": {
            "dense": {"export": "small"},
            "small": {"fit": "merged", "grid": "int4:g32", **PLAIN},
            "merged": {"merge": merge},
        },
    }


def test_steps_come_after_those_they_need() -> None:
    assert [step.name for step in read_recipe(recipe())] == ["merged", "small", "dense"]
    independent = {"steps": {name: {"fit": "x", "size": "4bit"} for name in ("c", "a", "b")}}
    assert [step.name for step in read_recipe(independent)] == ["c", "a", "b"]


def test_only_what_names_a_model_is_a_step() -> None:
    """Steps that are called after their method, or after a word of a merge, are no inputs of that merge."""
    merge = {
        "method": "ties", "base": "union", "models": ["x+lora", {"model": "linear", "parameters": {"weight": 1}}],
        "parameters": {"agg": "sum"}, "tokenizer_source": "base", "dtype": "sum",
    }  # fmt: skip
    plain = {"merge": {"method": "linear", "models": ["x", "y"]}}
    steps = {name: plain for name in ("linear", "union", "base", "sum", "lora")}
    found = {step.name: step.needs for step in read_recipe({"steps": {"ties": {"merge": merge}, **steps}})}
    assert found["ties"] == ("linear", "union", "lora") and not any(found[name] for name in steps)


def test_a_merge_is_fitted_and_measured_against_itself(tmp_path: Path) -> None:
    """The three verbs in one recipe that was stopped after the merge; as a step it is the same bytes as by itself."""
    other = tmp_path / "other"
    shutil.copytree(bundled_path(), other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: value * 1.01 for name, value in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    merge = {"method": "linear", "models": [str(bundled_path()), str(other)]}
    text = tmp_path / "text.txt"
    text.write_text("def merge(models):\n    return sum(models) / len(models)\n" * 40)
    steps: dict[str, Any] = {
        "figures": {"measure": ["s"], "reference": "m", "data": {"own": str(text)}, "text": "2kB", "repeats": 0},
        "s": {"fit": "m", "grid": "int8:g32", **PLAIN},
        "m": {"merge": merge},
    }
    run({"steps": {"m": steps["m"]}}, tmp_path / "out", quiet=True)
    made = (tmp_path / "out" / "m" / "report.json").stat().st_mtime_ns
    found = run({"steps": steps}, tmp_path / "out", quiet=True)
    assert [step["step"] for step in found["steps"]] == ["m", "s", "figures"]
    assert found["steps"][0]["seconds"] > 0 and (tmp_path / "out" / "m" / "report.json").stat().st_mtime_ns == made
    alone = slimwright.merge(merge, tmp_path / "alone", quiet=True)
    files = [tmp_path / folder / "model.safetensors" for folder in ("out/m", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes() and alone["verified"]["ok"]
    small = found["steps"][2]["measured"]
    assert len(small) == 2 and "kl" in str(small)


def test_a_recipe_makes_every_result_once(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe()))
    forecast = slimwright.run(str(file), dry_run=True)
    assert [step["step"] for step in forecast["steps"]] == ["merged", "small", "dense"]
    assert forecast["steps"][1]["forecast"] == "after merged" and not (tmp_path / "out").exists()
    report = slimwright.run(str(file), tmp_path / "out", quiet=True)
    assert [step["step"] for step in report["steps"]] == ["merged", "small", "dense"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert {path.parent.name for path in times} == {"merged", "small", "dense"}
    assert slimwright.load(tmp_path / "out" / "small").num_parameters()
    again = slimwright.run(str(file), tmp_path / "out", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == times
    assert [step["bytes"] for step in again["steps"]] == [step["bytes"] for step in report["steps"]]
    page = (tmp_path / "out" / "recipe.html").read_text()
    assert "small/report.html" in page and "<script" not in page


def test_a_recipe_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimwright.job import export

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "export", fail)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), tmp_path / "out", quiet=True)
    before = (tmp_path / "out" / "small" / "report.json").stat().st_mtime_ns
    run(recipe(), tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "small" / "report.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "dense" / "config.json").exists()


def test_measuring_is_not_repeated_and_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimwright.job import measure

    calls: list[tuple[Any, ...]] = []

    def fake(*models: str, out: str, **options: Any) -> None:
        calls.append((models, options))
        Path(out).mkdir()
        (Path(out) / "measure.json").write_text('{"models": [{"name": "x", "quality": {}}]}')

    monkeypatch.setattr(measure, "measure", fake)
    steps: dict[str, Any] = {
        "small": {"fit": model(), "grid": "int4:g32", **PLAIN},
        "figures": {"measure": ["small"], "reference": model(), "repeats": 0},
    }
    for _ in range(2):
        run({"steps": steps}, tmp_path / "out", quiet=True)
    assert calls == [((str(tmp_path / "out" / "small"),), {"reference": model(), "repeats": 0, "quiet": True})]
    steps["figures"]["repeats"] = 1
    with pytest.raises(InputError, match="another measurement"):
        run({"steps": steps}, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ({}, "has no 'steps'"),
        ({"a": {"fot": "x"}}, "did you mean 'fit'"),
        ({"a": {"fit": "x", "merge": {}}}, "needs one of"),
        ({"a": {"fit": "x", "sise": "4bit"}}, "did you mean 'size'"),
        ({"a": {"fit": "x", "out": "here"}}, "which fit has not"),
        ({"a": {"fit": "b"}, "b": {"fit": "a"}}, "need each other"),
        ({"a": {"fit": "a"}}, "needs itself"),
        ({"merged": {"merge": {"models": ["x"]}}, "a": {"fit": "mergd"}}, "did you mean the step 'merged'"),
        ({"a/b": {"fit": "x"}}, "cannot be a step's name"),
        ({"a": {"fit": 3}}, "names no model"),
        ({"a": {"merge": 3}}, "neither a file nor a merge"),
        ({"a": {"merge": "no-such-file.yaml"}}, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    steps: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        run({"steps": steps}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    newer = b"recipe: 9\nsteps: {a: {fit: x}}"
    for name, content in (("a", b"\xff\xfe"), ("b", b"- x"), ("c", b"steps: {a"), ("d", newer)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            run(tmp_path / name, tmp_path / "out")
    with pytest.raises(InputError, match="--out"):
        run({"steps": {"a": {"fit": "x", "size": "4bit"}}})
