"""Folding on real models changes nothing, and statistics after a fold are those of the inputs after it."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method
from slimwright.methods.folding import (
    apply_fold,
    bias_of,
    folded_loss,
    folded_statistics,
    input_channels,
    storable_scale,
    tied,
)
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.model.structure import Structure
from tests.families import cached, make

SOLVER = method("quantize/rtn", grid="int4:g64", clip="none")
FOLDABLE = ["bert", "cohere", "gemma2", "gemma3", "gpt2", "llama", "llama_tied", "mamba", "mixtral", "phi3", "qwen2",
            "qwen3", "stablelm", "t5", "vit", "whisper"]  # fmt: skip


@cache
def structure_of(name: str) -> Structure:
    return discover(Checkpoint.open(cached(name)))


@cache
def tensors_of(name: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(cached(name))
    return {tensor: checkpoint.read(tensor) for tensor in structure_of(name).roles}


def random_scale(structure: Structure, fold, generator: torch.Generator) -> Tensor:
    columns = structure.sites[fold.consumers[0]].columns
    return tied(torch.exp(torch.randn(columns, generator=generator)), input_channels(structure, fold))


def outputs(name: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the family's model returns, with some of its tensors replaced by disk name."""
    model, structure = make(name), structure_of(name)
    state = model.state_dict()
    for disk, tensor in (tensors or {}).items():
        target = state[structure.to_module[disk]]
        target.copy_(tensor)
    with torch.no_grad():
        found = model(**dummy_inputs(model))
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_every_group_changes_no_output(name: str) -> None:
    structure, tensors = structure_of(name), dict(tensors_of(name))
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, Tensor] = {}
    for fold in structure.folds:
        found = apply_fold({**tensors, **changed}, structure, fold, random_scale(structure, fold, generator))
        assert found[fold.producer].shape == tensors[fold.producer].shape
        changed |= found
    assert changed
    before, after = outputs(name), outputs(name, changed)
    for key, value in before.items():
        assert float((after[key] - value).norm() / value.norm()) < 1e-4, key


def test_the_families_hold_what_makes_folding_hard() -> None:
    """Grouped queries, biases of norms and of v, transposed weights, Gemma's offset, all three kinds."""
    kinds, hard = Counter(), Counter()
    for name in FOLDABLE:
        structure = structure_of(name)
        for fold in structure.folds:
            kinds[fold.kind] += 1
            hard["grouped"] += fold.repeat > 1
            hard["offset"] += fold.offset != 0
            hard["transposed"] += structure.sites[fold.consumers[0]].transposed
            hard["bias of " + fold.kind] += bias_of(structure, fold.producer) is not None
    assert set(kinds) == {"norm", "v_o", "up_down"}
    assert all(hard[what] for what in ("grouped", "offset", "transposed", "bias of norm", "bias of v_o"))


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_fold_left_half_done_shows(name: str) -> None:
    """The test above can fail: without the producer's share the outputs differ."""
    structure = structure_of(name)
    fold = structure.folds[0]
    scale = random_scale(structure, fold, torch.Generator().manual_seed(0))
    changed = apply_fold(tensors_of(name), structure, fold, scale)
    del changed[fold.producer]
    before, after = outputs(name), outputs(name, changed)
    assert max(float((after[key] - value).norm() / value.norm()) for key, value in before.items()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_in_16_bits_can_be_folded_exactly(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gain = (torch.randn(500, generator=generator) + 2).to(dtype)
    gain[:2] = -offset  # a dead channel
    scale = torch.exp(2 * torch.randn(500, generator=generator))
    found = storable_scale(gain, offset, scale)
    stored = ((gain.double() + offset) / found.double() - offset).to(dtype)
    old, new = gain.double() + offset, (stored.double() + offset) * found.double()
    torch.testing.assert_close(new, old, rtol=1e-6, atol=0)  # what the channel is multiplied by, all in all
    assert (found[:2] == 1).all() and (found > 0).all()
    near = (found / scale)[2:][(old / scale).abs()[2:] > 0.05]
    assert near.min() > 0.9 and near.max() < 1.1
    half_done = (old / scale.double() - offset).to(dtype).double() + offset
    assert float((half_done * scale - old).abs().max()) > 1e-4 * float(old.abs().max())


def test_bad_scales_are_refused() -> None:
    structure, tensors = structure_of("llama"), tensors_of("llama")
    norm = next(fold for fold in structure.folds if fold.kind == "norm")
    value = next(fold for fold in structure.folds if fold.kind == "v_o")
    columns = structure.sites[norm.consumers[0]].columns
    for bad, words in ((torch.ones(3), "factors, not 3"), (torch.zeros(columns), "positive"),
                       (torch.full((columns,), float("nan")), "positive")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            apply_fold(tensors, structure, norm, bad)
    with pytest.raises(InputError, match="shared channel"):
        apply_fold(tensors, structure, value, torch.arange(1.0, structure.sites[value.consumers[0]].columns + 1))


def test_statistics_after_a_fold_are_those_of_the_inputs_after_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(300, 32, generator=generator) + 0.5, torch.exp(torch.randn(32, generator=generator))
    found, expected = folded_statistics(SiteStatistics.from_inputs(x), scale), SiteStatistics.from_inputs(x / scale)
    for name in ("gram", "absmax", "absmean", "mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert found.tokens == expected.tokens


def test_the_loss_after_a_fold_is_the_output_s_squared_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(300, 64, generator=generator), torch.exp(torch.randn(64, generator=generator))
    weights = [torch.randn(rows, 64, generator=generator) for rows in (5, 9)]
    error = 0.0
    for weight in weights:
        rounded = SOLVER.solve(weight * scale, SiteStatistics.none()).dense()
        error += float((x / scale @ rounded.T - x @ weight.T).square().sum(1).mean())
    assert folded_loss(weights, SiteStatistics.from_inputs(x), SOLVER, scale) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("fold_name", ["fold/awq", "fold/smoothquant", "fold/smoothquant_plus"])
@pytest.mark.parametrize("name", ["qwen2", "bert", "gpt2"])
def test_the_methods_scales_change_no_output(name: str, fold_name: str) -> None:
    structure, tensors = structure_of(name), dict(tensors_of(name))
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, Tensor] = {}
    for fold in structure.folds:
        sites = [structure.sites[consumer] for consumer in fold.consumers]
        x = torch.randn(300, sites[0].columns, generator=generator)
        x[:, 3] *= 30
        weights = [(tensors | changed)[site.name] for site in sites]
        weights = [weight.t() if site.transposed else weight for weight, site in zip(weights, sites, strict=True)]
        stats = SiteStatistics.from_inputs(x)
        scale = method(fold_name).scales(weights, stats, SOLVER, input_channels(structure, fold))
        changed |= apply_fold(tensors | changed, structure, fold, scale)
    before, after = outputs(name), outputs(name, changed)
    for key, value in before.items():
        assert float((after[key] - value).norm() / value.norm()) < 1e-4, key
