"""Every family without some of its sublayers: plain ``from_pretrained`` gives a model that equals the one whose output
projections are zero, cached, uncached, padded and with a static cache; or the family refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimwright.model.dropped import is_dropped
from slimwright.model.inputs import dummy_inputs
from tests.families import FAMILIES, cached
from tests.runtime import dropping

NOTHING = {"jetmoe", "mamba"}
"""Families of which no sublayer can be dropped."""


@torch.no_grad()
def outputs(model: Any, **inputs: Any) -> dict[str, Tensor]:
    found = model(**inputs)
    return {name: t for name, t in found.items() if isinstance(t, Tensor) and t.is_floating_point()}


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got and got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.isfinite(got[name]).all()
        assert float((got[name] - tensor).abs().max()) <= 1e-5 * max(1.0, float(tensor.abs().max())), name


@torch.no_grad()
def continued(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the second half of ``ids``, computed on the cache of the first."""
    half = ids.shape[1] // 2
    first = {} if mask is None else {"attention_mask": mask[:, :half]}
    cache = model(ids[:, :half], use_cache=True, **first).past_key_values
    more = {} if mask is None else {"attention_mask": mask}
    return model(ids[:, half:], past_key_values=cache, use_cache=True, **more).logits


def check(name: str, directory: Path, dense: Path) -> Any:
    """Compare the two models in every way that the family has."""
    cls = FAMILIES[name].model_class
    model, info = cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    wanted = cls.from_pretrained(dense, dtype=torch.float32)
    inputs = dummy_inputs(wanted)
    close(outputs(model, **inputs), outputs(wanted, **inputs))
    if not FAMILIES[name].generates:
        return model
    ids = inputs.get("input_ids")
    if ids is not None and list(inputs) == ["input_ids"] and not getattr(model, "_is_stateful", False):
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        counted = mask.bool()
        got, expected = (m(ids, attention_mask=mask).logits for m in (model, wanted))
        close({"padded": got[counted]}, {"padded": expected[counted]})
        if name != "home_made":
            half = ids.shape[1] // 2
            close({"cached": continued(model, ids)}, {"cached": continued(wanted, ids)})
            close({"cached": continued(model, ids)}, {"cached": model(ids).logits[:, half:]})
            close({"padded": continued(model, ids, mask)}, {"padded": continued(wanted, ids, mask)})
    given = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    uncached = wanted.generate(**given, **length, use_cache=False)
    assert torch.equal(model.generate(**given, **length, use_cache=False), uncached)
    if name != "home_made":
        assert torch.equal(model.generate(**given, **length), uncached)
        try:
            static = wanted.generate(**given, **length, cache_implementation="static")
        except Exception:  # not every family has a static cache
            return model
        assert torch.equal(model.generate(**given, **length, cache_implementation="static"), static)
    return model


@pytest.mark.parametrize("name", list(FAMILIES))
def test_equals_the_model_with_zero_projections(name: str, tmp_path: Path) -> None:
    drops = dropping.some(dropping.found(name).drops.values())
    assert bool(drops) == (name not in NOTHING)
    if not drops:
        return
    directory, dense = dropping.write(cached(name, torch.float32), tmp_path, drops)
    model = check(name, directory, dense)
    held = [m for m in model.modules() if is_dropped(m)]
    assert len(held) >= len(drops) and sum(p.numel() for m in held for p in m.parameters()) <= len(drops)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(after[k].to(t.dtype), t) for k, t in before.items())
