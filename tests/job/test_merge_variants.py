"""One store, many models: TALL-masks beside the merged model, from which every input is restored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slimwright
from slimwright.errors import InputError
from slimwright.job.merging.sources import ModelReference
from slimwright.job.merging.variants import names_of, packed
from slimwright.methods import method
from tests.checkpoint.samples import save_checkpoint
from tests.job.conftest import files

CONFIG = {"model_type": "test", "num_hidden_layers": 1, "vocab_size": 50}


def tensors(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """An odd number of elements, an integer, a scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (50, 7), "model.layers.0.up.weight": (33, 9), "model.scale": ()}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**found, "model.positions": torch.arange(5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", ["task_arithmetic;lambda=1", "ties;agg=sum", "della;epsilon=0.1"])
def test_every_input_is_restored_from_one_store(tmp_path: Path, dtype: torch.dtype, inner: str) -> None:
    """Each restored model is what ``task`` makes, and the masks are those of the definition."""
    base = tensors(0, dtype)
    models = {}
    for number, name in enumerate(("one", "two", "three")):
        other = tensors(number + 1, dtype)
        models[name] = {k: (base[k] + 0.1 * other[k] if base[k].is_floating_point() else base[k]) for k in base}
    for name, content in {"base": base, **models}.items():
        save_checkpoint(tmp_path / name, content, 1, CONFIG)
    config = {
        "method": "tall", "base": str(tmp_path / "base"), "models": [str(tmp_path / name) for name in models],
        "parameters": {"inner": inner},
    }  # fmt: skip
    report = slimwright.merge(config, tmp_path / "store", quiet=True)
    assert report["variants"]["names"] == list(models) and report["verified"]["ok"]
    whole = load_file(tmp_path / "store" / "model.safetensors")
    for number, name in enumerate(models):
        restore = {"method": "passthrough", "models": [f"{tmp_path / 'store'}+{name}"]}
        slimwright.merge(restore, tmp_path / f"restored-{name}", quiet=True)
        found = load_file(tmp_path / f"restored-{name}" / "model.safetensors")
        alone = {**config, "parameters": {"inner": inner, "task": number}}
        slimwright.merge(alone, tmp_path / f"alone-{name}", quiet=True)
        expected = load_file(tmp_path / f"alone-{name}" / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]) and tensor.dtype == expected[key].dtype, (name, key)
            assert ((tensor == whole[key]) | (tensor == base[key])).all()
    if inner.startswith("task"):
        key = "model.layers.0.up.weight"
        start, ends = base[key].float(), [model[key].float() for model in models.values()]
        total = sum(end - start for end in ends)
        assert isinstance(total, Tensor)
        for name, end in zip(models, ends):
            own = end - start
            mask = own.abs() > 0.4 * (total - own).abs()
            stored = load_file(tmp_path / "store" / "variants" / name / "mask.safetensors")[key]
            assert torch.equal(stored, packed(mask.reshape(-1)))
    size = sum(file.stat().st_size for file in (tmp_path / "store").glob("**/*.safetensors"))
    weights = sum(tensor.nbytes for tensor in base.values())
    bits = sum(-(-tensor.numel() // 8) for tensor in base.values() if tensor.is_floating_point())
    assert size < 2 * weights + 3 * bits + 6_000  # headers


def test_a_store_is_a_model_and_its_parts_are_checked(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "one", "two")):
        save_checkpoint(tmp_path / name, tensors(number, torch.float32), 1, CONFIG)
    models = [str(tmp_path / "one"), str(tmp_path / "two")]
    config = {"method": "tall", "base": str(tmp_path / "base"), "models": models}
    slimwright.merge(config, tmp_path / "store", quiet=True)
    slimwright.merge(config, tmp_path / "again", quiet=True)
    weights = {name: content for name, content in files(tmp_path / "store").items() if name.endswith("safetensors")}
    assert weights == {n: c for n, c in files(tmp_path / "again").items() if n.endswith("safetensors")}
    average = {"method": "linear", "models": [f"{tmp_path / 'store'}+one", str(tmp_path / "base")]}
    slimwright.merge(average, tmp_path / "average", quiet=True)
    wrong = {"method": "passthrough", "models": [f"{tmp_path / 'store'}+three"]}
    with pytest.raises(InputError, match="keeps no model 'three'; it has: one, two"):
        slimwright.merge(wrong, tmp_path / "x", quiet=True)
    some = {**config, "parameters": {"task": [{"filter": "up", "value": 0}]}}
    with pytest.raises(InputError, match="for some tensors only"):
        slimwright.merge(some, tmp_path / "x", quiet=True)
    about = tmp_path / "store" / "variants" / "one" / "variant.json"
    about.write_text(json.dumps({"format_version": 2, "kind": "tall-mask"}))
    with pytest.raises(InputError, match="later version"):
        slimwright.merge(average, tmp_path / "x", quiet=True)
    (tmp_path / "store" / "variants" / "two" / "mask.safetensors").unlink()
    with pytest.raises(InputError, match="missing"):
        slimwright.merge({"method": "passthrough", "models": [f"{tmp_path / 'store'}+two"]}, tmp_path / "x", quiet=True)


def test_names_of_models_are_short_and_differ() -> None:
    given = ["org/math-7b", "/data/math-7b/", "org/code@main", "x y", "base"]
    references = [*map(ModelReference, given), ModelReference("org/model", "org/lora")]
    assert names_of(references) == ["math-7b", "math-7b-2", "code", "x-y", "base-2", "lora"]


def test_a_task_of_its_own_needs_no_store(tmp_path: Path) -> None:
    base, end = torch.zeros(4), torch.tensor([1.0, 0.1, -2.0, 0.0])
    merged = method("merge/tall").merge([end, torch.tensor([0.0, 1.0, 0.0, 1.0])], base)
    assert merged.tolist() == pytest.approx([1.0, 1.1, -2.0, 1.0])
    first = method("merge/tall", task=0).merge([end, torch.tensor([0.0, 1.0, 0.0, 1.0])], base)
    assert first.tolist() == [1.0, 0.0, -2.0, 0.0]
