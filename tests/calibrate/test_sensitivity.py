"""The reverse walk against gradients of an ordinary forward and backward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimwright.calibrate import sensitivity
from slimwright.calibrate.sensitivity import ReverseWalk, Sensitivity, moved_by_batch
from slimwright.calibrate.walk import Batch
from slimwright.checkpoint import Checkpoint
from slimwright.job.open import model_of
from slimwright.job.source import PlainSource
from slimwright.job.walked import WalkSource
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.runtime.streamed import load_streamed
from tests.families import FAMILIES, cached


def reversed_walk(name: str, batches: int = 1, text_only: bool = False, **options: object):
    source = Checkpoint.open(str(cached(name, torch.float32)))
    structure = discover(source)
    cls, config = model_of(source)
    sources = {name: WalkSource(PlainSource(source, site)) for name, site in structure.sites.items()}
    model = load_streamed(cls, source.model_path, config, sources)
    inputs = [Batch(dummy_inputs(model, batch=2, length=12, seed=seed)) for seed in range(batches)]
    if text_only:
        inputs = [replace(batch, outputs=batch.inputs["input_ids"] != IMAGE_TOKEN) for batch in inputs]

    def hold(unit) -> None:
        for site in unit.sites:
            sources[site.name].hold(torch.float32)

    def release(unit) -> None:
        for site in unit.sites:
            sources[site.name].release()

    walk = ReverseWalk(model, structure, sources, inputs, hold, release, **options)  # type: ignore[arg-type]
    return source, structure, cls, inputs, walk


def plain_gradients(cls, source, inputs: list[Batch]) -> dict[str, Tensor]:
    """Mean squared gradient at every module's output, with the walk's labels."""
    model = cls.from_pretrained(source.model_path, dtype=torch.float32).eval().requires_grad_(False)
    squares: dict[str, list[Tensor]] = {}

    def watch(path: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(
                    lambda gradient: squares.setdefault(path, []).append(
                        gradient.detach().double().reshape(-1, gradient.shape[-1]).square()
                    )
                )

        return hook

    def begin(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.requires_grad_(True)

    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(begin)
        module.register_forward_hook(watch(path))
    generator = torch.Generator().manual_seed(0)
    for batch in inputs:
        output = model(**{n: t.requires_grad_() if t.is_floating_point() else t for n, t in batch.inputs.items()})
        logits = output.get("logits")
        if logits is not None and logits.ndim >= 2 and logits.shape[-1] > 1:
            rows = logits[batch.outputs] if batch.outputs is not None else logits.reshape(-1, logits.shape[-1])
            labels = torch.multinomial(torch.softmax(rows.detach(), -1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(rows, labels, reduction="sum").backward()
        else:
            towers = [output[name] for name in ("image_embeds", "text_embeds") if name in output]
            first = (v for v in output.values() if isinstance(v, Tensor) and v.requires_grad and v.ndim >= 2)
            loss = torch.zeros(())
            for found in towers or [next(first)]:
                vectors = nn.functional.normalize(found.reshape(-1, found.shape[-1]), dim=-1)
                loss = loss + (vectors * torch.randn(vectors.shape, generator=generator)).sum()
            loss.backward()
    return {path: torch.cat(found).mean(0) for path, found in squares.items()}


TEXT = sorted(
    name for name in FAMILIES if name not in ("vit", "clip", "whisper", "llava", "deit", "swin", "siglip", "paligemma")
)


IMAGE_TOKEN = 300


@pytest.mark.parametrize("name", ["vit", "clip", "llava", "whisper"])
def test_models_of_images_and_sounds_likewise(name: str) -> None:
    """CLIP's both towers; of LLaVA only the text's positions are predicted, not the image's."""
    source, structure, cls, inputs, walk = reversed_walk(name, text_only=name == "llava")
    found = walk.run()
    assert walk.tokens == {"vit": 2, "clip": 2, "llava": 24, "whisper": 24}[name]
    expected = plain_gradients(cls, source, inputs)
    compared = set()
    for key, (first, *more) in found.items():
        site = structure.sites[key]
        if more or site.kind != "linear" or site.module not in expected:
            continue
        torch.testing.assert_close(first.outputs.double(), expected[site.module], rtol=2e-3, atol=1e-9)
        compared.add(site.block)
    blocks = {block.module for stack in structure.stacks for block in stack.blocks}
    assert len(blocks - compared) <= (1 if name == "llava" else 0), "the last block of LLaVA's vision is not used"


@pytest.mark.parametrize("name", TEXT)
def test_sensitivities_are_the_gradients_of_a_plain_backward(name: str) -> None:
    source, structure, cls, inputs, walk = reversed_walk(name)
    found = walk.run()
    expected = plain_gradients(cls, source, inputs)
    compared = 0
    for key, sensitivities in found.items():
        site = structure.sites[key]
        products = [s for s in sensitivities if s.inputs is None]
        if site.kind not in ("linear", "conv1d") or site.module not in expected or len(products) != 1:
            continue
        reference = expected[site.module].float()
        if reference.shape != products[0].outputs.shape:
            continue
        scale = float(reference.abs().max())
        assert torch.allclose(products[0].outputs, reference, rtol=1e-3, atol=1e-5 * scale), key
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(TEXT)))
def test_other_inputs_have_sensitivities_too(name: str) -> None:
    _, structure, _, _, walk = reversed_walk(name)
    found = walk.run()
    linears = [site for site in structure.sites.values() if site.kind == "linear" and site.block is not None]
    reached = [site for site in linears if site.name in found and float(found[site.name][0].outputs.sum()) > 0]
    assert len(reached) >= len(linears) // 2


def test_batches_have_what_errors_of_equal_size_cost_on_them() -> None:
    """The first batch alone is the first of several; there it is the squares of gradients times those of inputs."""
    source, structure, cls, inputs, walk = reversed_walk("llama", batches=3)
    found, alone = walk.run(), reversed_walk("llama")[-1].run()
    model = cls.from_pretrained(source.model_path, dtype=torch.float32).eval()
    tokens = inputs[0].inputs["input_ids"].numel()
    for key in [key for key, site in structure.sites.items() if site.role in ("down", "q", "gate")][:6]:
        seen: list[Tensor] = []
        module = model.get_submodule(structure.sites[key].module)
        hook = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**inputs[0].inputs)
        hook.remove()
        (one,), (several,) = alone[key], found[key]
        assert one.batches is not None and several.batches is not None and one.weighted is not None
        energy = float(seen[0].double().square().sum())
        assert float(one.batches[0, 0]) == pytest.approx(float(one.weighted.double().sum()) * energy, rel=1e-5)
        assert several.batches.shape == (3, 2) and several.batches[0].tolist() == pytest.approx(one.batches[0].tolist())
        assert several.batches[:, 1].tolist() == [tokens] * 3
    name = next(site.name for site in structure.sites.values() if site.role == "embed")
    looked_up = next(s for s in alone[name] if s.inputs is not None)
    assert looked_up.batches is not None
    assert float(looked_up.batches[0, 0]) == pytest.approx(float(looked_up.outputs.double().sum()) * tokens, rel=1e-5)


def test_batches_of_several_matrices_are_added() -> None:
    first, second = (
        Sensitivity(torch.ones(1), batches=torch.tensor(values, dtype=torch.float64))
        for values in ([[10.0, 10.0], [30.0, 10.0]], [[30.0, 10.0], [50.0, 10.0]])
    )
    assert moved_by_batch([first]) == [-0.25, 0.25]
    assert moved_by_batch([first, second, Sensitivity(torch.ones(1))]) == pytest.approx([-1 / 6, 1 / 6])
    assert moved_by_batch([Sensitivity(torch.ones(1))]) == []
    uneven = Sensitivity(torch.ones(1), batches=torch.tensor([[90.0, 90.0], [10.0, 10.0]], dtype=torch.float64))
    assert moved_by_batch([uneven]) == pytest.approx([0, 0])  # a small batch of the same cost a token moves nothing


def test_half_the_squared_change_is_the_kl_divergence() -> None:
    """The second-order KL of a small random change of one weight, against the divergence itself."""
    source, structure, cls, inputs, walk = reversed_walk("llama", batches=24)
    found = walk.run()
    model = cls.from_pretrained(source.model_path, dtype=torch.float32).eval()
    ratios = []
    for key in [k for k, s in structure.sites.items() if s.role in ("down", "o", "q", "gate")][:6]:
        site = structure.sites[key]
        module = model.get_submodule(site.module)
        change = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.01
        predicted = divergence = tokens = 0.0
        for batch in inputs:
            seen: list[Tensor] = []
            hook = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                before = torch.log_softmax(model(**batch.inputs)["logits"], -1)
                hook.remove()
                module.weight += change
                after = torch.log_softmax(model(**batch.inputs)["logits"], -1)
                module.weight -= change
            moved = seen[0].reshape(-1, change.shape[1]) @ change.T
            predicted += float((moved.square() @ found[key][0].outputs).sum()) / 2
            divergence += float((before.exp() * (before - after)).sum())
            tokens += moved.shape[0]
        ratios.append(predicted / divergence)
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios


def test_embeddings_know_how_often_their_rows_are_looked_up() -> None:
    _, structure, _, inputs, walk = reversed_walk("llama")
    found = walk.run()
    name = next(site.name for site in structure.sites.values() if site.role == "embed")
    looked_up = next(s for s in found[name] if s.inputs is not None)
    counts = torch.bincount(inputs[0].inputs["input_ids"].flatten(), minlength=structure.sites[name].rows)
    assert looked_up.inputs is not None
    assert torch.equal(looked_up.inputs.argsort(stable=True), (counts + 1).float().argsort(stable=True))
    assert float(looked_up.inputs.sum()) == pytest.approx(1)
    assert float(looked_up.outputs.min()) > 0


def test_embeddings_may_be_scaled_in_place() -> None:
    """As CTRL does, where every output of the walk's own would be a leaf of the graph."""

    def scaled(factor: float, in_place: bool) -> dict:
        _, structure, _, _, walk = reversed_walk("llama")
        embed = walk.model.get_submodule(next(s.module for s in structure.sites.values() if s.role == "embed"))
        embed.register_forward_hook(lambda m, x, out: out.mul_(factor) if in_place else out * factor)
        return walk.run()

    found, expected = scaled(8.0, True), scaled(8.0, False)
    assert found.keys() == expected.keys()
    for name, matrices in found.items():
        for one, two in zip(matrices, expected[name], strict=True):
            assert torch.equal(one.outputs, two.outputs)


def test_spilled_states_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SPILLED_BYTES", 1)
    found = []
    for cap in (None, 5000, 0):
        walk = reversed_walk("llama", 3, cap=cap, scratch=tmp_path)[-1]
        found.append(walk.run())
        assert (walk.spilled_bytes > 0) == (cap is not None)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, matrices in found[0].items():
            for one, two in zip(matrices, other[name], strict=True):
                assert torch.equal(one.outputs, two.outputs) and one.share == two.share
    assert not list(tmp_path.iterdir())
