"""The walk is a plain forward, on every family, and it sees every site's inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimwright.calibrate.statistics import Collector, InputSums
from slimwright.calibrate.walk import Batch, Walk, walk_units
from slimwright.checkpoint import Checkpoint
from slimwright.job.open import model_of
from slimwright.job.source import plain_sources
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.runtime.streamed import load_streamed
from tests.families import FAMILIES, cached


def opened(name: str):
    source = Checkpoint.open(str(cached(name, torch.float32)))
    structure = discover(source)
    cls, config = model_of(source)
    sources = plain_sources(source, structure)
    return source, structure, load_streamed(cls, source.model_path, config, sources), sources


def outputs(result) -> dict[str, Tensor]:
    return {k: v for k, v in result.items() if isinstance(v, Tensor) and v.is_floating_point()}


def plain(model: nn.Module, inputs: dict[str, Tensor]):
    with torch.no_grad():
        return outputs(model(**inputs))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_walk_equals_a_plain_forward(name: str) -> None:
    _, structure, model, _ = opened(name)
    batches = [Batch(dummy_inputs(model, batch=2, length=12, seed=seed)) for seed in range(3)]
    expected = [plain(model, batch.inputs) for batch in batches]
    found: dict[int, dict[str, Tensor]] = {}
    seen: list[str] = []
    walk = Walk(model, structure, batches, finish=lambda index, output: found.update({index: outputs(output)}))
    for step in walk:
        assert step.indices == [0, 1, 2]
        for index in step.indices:
            first = step.output(index)
            step.output(index)  # running a unit twice changes nothing
            step.advance(index, first)
        seen.append(step.unit.module)
    for index, reference in enumerate(expected):
        for key, value in reference.items():
            if key in found[index]:
                assert torch.equal(found[index][key], value), key
        assert found[index].keys() <= reference.keys()
        assert found[index]
    blocks = [block.module for stack in structure.stacks for block in stack.blocks for _ in range(block.runs)]
    assert [module for module in seen if module in set(blocks)] == blocks
    assert "forward" not in model.get_submodule(blocks[0]).__dict__


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_site_s_inputs_are_seen(name: str) -> None:
    """The watch sees what forward hooks see on the model that transformers loads."""
    source, structure, model, sources = opened(name)
    inputs = dummy_inputs(model, batch=2, length=12, seed=0)
    seen: dict[str, list[tuple[int, Tensor]]] = {}
    for key, weights in sources.items():
        weights.watch = lambda x, expert, key=key: seen.setdefault(key, []).append((expert, x.clone()))
    for _ in Walk(model, structure, [Batch(inputs)]):
        pass
    for weights in sources.values():
        weights.watch = None
    unseen = [
        site.name for site in structure.sites.values()
        if site.name not in seen and site.kind not in ("embedding", "experts")
    ]  # fmt: skip
    # A model may have a weight that this forward does not use; then no forward hook fires on it either.
    cls, _ = model_of(source)
    loaded = cls.from_pretrained(source.model_path, dtype=torch.float32).eval()
    hooked: dict[str, list[Tensor]] = {}
    for path, module in loaded.named_modules():
        module.register_forward_hook(
            lambda module, args, output, path=path: (
                hooked.setdefault(path, []).append(args[0].clone()) if args and isinstance(args[0], Tensor) else None
            )
        )
    plain(loaded, inputs)
    for missing in unseen:
        assert structure.sites[missing].module not in hooked, missing
    for key, calls in seen.items():
        site = structure.sites[key]
        if site.kind in ("linear", "conv1d") and site.module in hooked:
            for (_, x), reference in zip(calls, hooked[site.module], strict=True):
                assert torch.allclose(x, reference, atol=1e-5), key
    experts = [site for site in structure.sites.values() if site.kind == "experts"]
    if experts:
        assert any(site.name in seen for site in experts)
        for site in experts:
            for expert, x in seen.get(site.name, []):
                assert x.shape[-1] == site.columns and x.shape[0] > 0
                assert expert < (site.shape[0] if len(site.shape) == 3 else 1)


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_a_forward_is_left_when_every_site_was_fed(name: str) -> None:
    """Statistics are those of whole forwards; behind the last site nothing runs, unless there are experts."""
    _, structure, model, sources = opened(name)
    batches = [Batch(dummy_inputs(model, batch=2, length=12, seed=seed)) for seed in range(3)]
    ended: list[bool] = []
    for step in Walk(model, structure, batches):
        sites = [site for site in step.unit.sites if step.unit.block]
        if not sites:
            continue
        found: list[Collector] = []
        for whole in (True, False):
            found.append(Collector(sources, sites))
            for index in step.indices:
                with found[-1].watching(step.batch(index), whole=whole):
                    step.show(index)
                    ended += [] if whole or index == 0 else [True]
        for site in sites:
            for one, other in zip(*(collector.statistics(site) for collector in found), strict=True):
                assert one.tokens == other.tokens
                assert one.gram is None or torch.equal(one.gram, other.gram)  # type: ignore[arg-type]
    assert bool(ended) == (name == "mixtral")


def test_masks_leave_padding_out() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    batch = Batch({}, {(2, 3): mask})
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert torch.equal(batch.counted(x), x[mask])
    assert torch.equal(batch.counted(x.reshape(6, 2)), x[mask])
    assert batch.counted(torch.zeros(2, 5, 2)).shape == (10, 2)


def test_a_sample_that_is_wholly_masked_counts_nowhere() -> None:
    """Neither in Grams and magnitudes nor as the sample that is named, and the outputs of others stay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, generator=generator)
    x[1] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    batch = Batch({}, {(3, 4): mask}, ("first", "masked", "last"))
    with_it, without = InputSums(8), InputSums(8)
    with_it.add(batch.counted(x))
    without.add(torch.cat([x[0], x[2]]))
    found, expected = with_it.statistics(), without.statistics()
    assert with_it.finite and found.tokens == expected.tokens == 8
    assert found.gram is not None and expected.gram is not None and torch.equal(found.gram, expected.gram)
    x[2, 1] = torch.inf
    assert batch.named(x) == "the sample 'last'"
    nothing = InputSums(8)
    nothing.add(Batch({}, {(1, 4): mask[1:2]}).counted(x[1:2]))
    assert nothing.statistics().tokens == 0


def test_spilled_hidden_states_give_the_same(tmp_path: Path) -> None:
    _, structure, model, _ = opened("llama")
    batches = [Batch(dummy_inputs(model, batch=8, length=96, seed=seed)) for seed in range(4)]
    found: list[dict[int, Tensor]] = []
    for cap in (None, 0):
        logits: dict[int, Tensor] = {}
        walk = Walk(
            model, structure, batches, cap, tmp_path, lambda i, out, logits=logits: logits.update({i: out["logits"]})
        )
        for _ in walk:
            pass
        assert (walk.spilled_bytes > 0) == (cap == 0)
        found.append(logits)
    assert all(torch.equal(found[0][i], found[1][i]) for i in range(4))
    assert not list(tmp_path.iterdir())


def test_leaving_early_drops_the_forwards() -> None:
    _, structure, model, _ = opened("llama")
    batch = Batch(dummy_inputs(model, batch=2, length=8))
    for _step in Walk(model, structure, [batch]):
        break
    expected = plain(model, batch.inputs)
    assert torch.isfinite(expected["logits"]).all()


def test_units_cover_every_site_but_embeddings() -> None:
    for name in ("llama", "t5", "bert", "whisper", "gpt2"):
        _, structure, _, _ = opened(name)
        covered = {site.name for unit in walk_units(structure).values() for site in unit.sites}
        assert {site.name for site in structure.sites.values() if site.kind != "embedding"} <= covered
