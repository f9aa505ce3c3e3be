"""The reverse walk against gradients of an ordinary forward and backward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimwright.calibrate import sensitivity
from slimwright.calibrate.sensitivity import ReverseWalk, Sensitivity, moved_by_batch, row_energy
from slimwright.calibrate.walk import Batch
from slimwright.checkpoint import Checkpoint
from slimwright.job.open import model_of
from slimwright.job.source import PlainSource
from slimwright.job.walked import WalkSource
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.runtime.streamed import load_streamed
from tests.families import FAMILIES, cached


def reversed_walk(name: str, batches: int = 1, text_only: bool = False, path: Path | None = None, **options: object):
    source = Checkpoint.open(str(path or cached(name, torch.float32)))
    structure = discover(source)
    cls, config = model_of(source)
    sources = {name: WalkSource(PlainSource(source, site)) for name, site in structure.sites.items()}
    model = load_streamed(cls, source.model_path, config, sources)
    inputs = [Batch(dummy_inputs(model, batch=2, length=12, seed=seed)) for seed in range(batches)]
    inputs = [replace(batch, documents=("first", "second")) for batch in inputs]
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
    """The first batch alone is the first of several; there it is the squares of the weight's gradients."""
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
        assert one.batches is not None and several.batches is not None and one.of_weights is not None
        energy = float(seen[0].double().square().sum())
        assert float(one.batches[0, 0]) == pytest.approx(float(one.of_weights.double().sum()) * energy, rel=1e-5)
        assert several.batches.shape == (3, 2) and several.batches[0].tolist() == pytest.approx(one.batches[0].tolist())
        assert several.batches[:, 1].tolist() == [tokens] * 3
    name = next(site.name for site in structure.sites.values() if site.role == "embed")
    looked_up = next(s for s in alone[name] if s.inputs is not None)
    assert looked_up.batches is not None and looked_up.of_weights is not None
    found_there = float(looked_up.of_weights.double().sum()) * tokens
    assert float(looked_up.batches[0, 0]) == pytest.approx(found_there, rel=1e-5)


def weight_gradients(cls, source, batch: Batch, modules: list[str]) -> dict[str, list[Tensor]]:
    """The gradient of each module's weight over each sequence of a batch, by an ordinary backward for each."""
    model = cls.from_pretrained(source.model_path, dtype=torch.float32).eval().requires_grad_(False)
    found: dict[str, list[Tensor]] = {module: [] for module in modules}
    logits = model(**batch.inputs)["logits"].detach()
    chance = torch.softmax(logits.reshape(-1, logits.shape[-1]), -1)
    labels = torch.multinomial(chance, 1, generator=torch.Generator().manual_seed(0)).view(logits.shape[:2])
    weights = {module: model.get_submodule(module).weight.requires_grad_() for module in modules}
    for row in range(len(labels)):
        own = model(**{name: value[row : row + 1] for name, value in batch.inputs.items()})["logits"][0]
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(own, labels[row], reduction="sum"), list(weights.values())
        )
        for module, gradient in zip(weights, gradients, strict=True):
            found[module].append(gradient.double())
    return found


@pytest.mark.parametrize("tokens", [3, 200])
def test_lengths_of_gradients_rows_by_tokens_or_by_themselves(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "GRADIENT_ELEMENTS", 100)
    generator = torch.Generator().manual_seed(0)
    gradient, x = torch.randn(tokens, 24, generator=generator), torch.randn(tokens, 40, generator=generator)
    torch.testing.assert_close(row_energy(gradient, x).float(), (gradient.t() @ x).square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("apart", [(), ("second",)])
def test_errors_of_weights_cost_by_the_weights_gradient_over_each_sequence(
    apart: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its squares; directions are samples of its rows, of what is apart."""
    monkeypatch.setattr(sensitivity, "DIRECTIONS", 20_000)
    source, structure, cls, inputs, walk = reversed_walk("llama", apart=apart)
    found = walk.run()
    sites = [site for site in structure.sites.values() if site.role in ("q", "v", "gate", "down") and site.block]
    embed = next(site for site in structure.sites.values() if site.role == "embed")
    expected = weight_gradients(cls, source, inputs[0], [site.module for site in [*sites, embed]])
    for site in sites:
        own, gradients = found[site.name][0], expected[site.module]
        assert own.of_weights is not None and own.batches is not None and own.directions is not None
        squares = sum(gradient.square().sum(1) for gradient in gradients)
        torch.testing.assert_close(
            own.of_weights.double() / own.of_weights.sum(), squares / squares.sum(), rtol=1e-3, atol=1e-7
        )
        assert float(own.batches[0, 0]) == pytest.approx(float(squares.sum()), rel=1e-4)
        chosen = gradients[1:] if apart else gradients
        wanted = sum(gradient.t() @ gradient for gradient in chosen)
        sampled = own.directions.double().t() @ own.directions.double() / 20_000
        assert float((sampled - wanted).norm()) < 0.1 * float(wanted.norm())
    looked_up = next(own for own in found[embed.name] if own.inputs is not None)
    assert looked_up.of_weights is not None
    assert not structure.ties
    squares = sum(gradient.square().sum(0) for gradient in expected[embed.module])
    tokens = inputs[0].inputs["input_ids"].numel()
    torch.testing.assert_close(looked_up.of_weights.double() * tokens, squares, rtol=1e-3, atol=1e-9)


def test_what_taking_an_output_away_costs() -> None:
    """The square of its product with its gradient, bias included; of those asked for alone."""
    structure = discover(Checkpoint.open(str(cached("gpt2", torch.float32))))
    sites = [site for site in structure.sites.values() if site.role in ("o", "down")]
    source, _, cls, inputs, walk = reversed_walk("gpt2", removable={site.name for site in sites})
    found = walk.run()
    model = cls.from_pretrained(source.model_path, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        out.retain_grad()
        seen[name] = out

    for site in sites:
        module = model.get_submodule(site.module)
        module.register_forward_hook(lambda m, args, out, name=site.name: keep(name, out))
    logits = model(**inputs[0].inputs)["logits"].flatten(0, 1)
    chance = torch.softmax(logits.detach(), -1)
    labels = torch.multinomial(chance, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert len(sites) >= 4
    for site in sites:
        out, gradient = seen[site.name], seen[site.name].grad
        assert gradient is not None and found[site.name][0].removed is not None
        expected = (out.detach() * gradient).sum(-1).square().mean()
        assert float(found[site.name][0].removed) == pytest.approx(float(expected), rel=1e-3)
    others = [own for name, members in found.items() for own in members if name not in {site.name for site in sites}]
    assert others and all(own.removed is None for own in others)


def test_padding_counts_nowhere() -> None:
    walks = [reversed_walk("llama")[-1] for _ in range(2)]
    ids = walks[0].batches[0].inputs["input_ids"]
    padded = torch.cat([ids, ids[:, :4]], 1)
    counted = torch.arange(padded.shape[1]).expand_as(padded) < ids.shape[1]
    walks[0].batches = [Batch({"input_ids": ids}, documents=("first", "second"))]
    walks[1].batches = [Batch({"input_ids": padded}, {tuple(padded.shape): counted}, ("first", "second"))]
    one, two = (walk.run() for walk in walks)
    for name, matrices in one.items():
        for own, other in zip(matrices, two[name], strict=True):
            for part in ("of_weights", "directions"):
                if (value := getattr(own, part)) is not None:
                    torch.testing.assert_close(
                        getattr(other, part), value, rtol=1e-3, atol=1e-4 * float(value.abs().max())
                    )


def test_tokens_of_experts_count_for_themselves() -> None:
    """What routing picked is no sequence, and has no directions."""
    _, structure, _, _, walk = reversed_walk("qwen3_moe")
    found = walk.run()
    experts = [own for name, site in structure.sites.items() if site.kind == "experts" for own in found[name]]
    others = [found[name][0] for name, site in structure.sites.items() if site.role in ("q", "o")]
    reached = [own for own in experts if own.share]
    assert reached and all(own.directions is None and own.of_weights is not None for own in reached)
    assert others and all(own.directions is not None for own in others)


def divergence_of(model: nn.Module, module: nn.Module, change: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """What a module is fed (tokens, in), and the summed KL of the model's output when its weight is changed."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, args, out: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        before = torch.log_softmax(model(**batch.inputs)["logits"], -1)
        hook.remove()
        module.weight += change
        after = torch.log_softmax(model(**batch.inputs)["logits"], -1)
        module.weight -= change
    return seen[0], float((before.exp() * (before - after)).sum())


def test_what_all_tokens_have_in_common_counts(tmp_path: Path) -> None:
    """Where every token's input has a large common part, errors of what attention reads cost more than independent
    tokens would: the divergence of a random change says so."""
    cls, _ = model_of(Checkpoint.open(str(cached("gpt2", torch.float32))))
    model = cls.from_pretrained(cached("gpt2", torch.float32), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("ln_1.bias"):
                value += 2 * torch.randn(value.shape, generator=generator)
    model.save_pretrained(tmp_path)
    _, structure, _, inputs, walk = reversed_walk("gpt2", batches=48, path=tmp_path)
    found = walk.run()
    for site in [site for site in structure.sites.values() if site.module.endswith("attn.c_attn")]:
        module, (own, *_) = model.get_submodule(site.module), found[site.name]
        change = torch.randn(site.rows, site.columns, generator=generator) * 0.003
        independent = coherent = divergence = 0.0
        assert own.of_weights is not None
        for batch in inputs:
            seen, found_kl = divergence_of(model, module, change.t(), batch)
            moved = (seen @ change.T).square()
            independent += float((moved @ own.outputs).sum()) / 2
            coherent += float((moved @ own.of_weights).sum()) / 2
            divergence += found_kl
        assert 0.75 < divergence / coherent < 1.33 and divergence / independent > 1.33, site.name


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
            seen, found_kl = divergence_of(model, module, change, batch)
            moved = seen @ change.T
            predicted += float((moved.square() @ found[key][0].outputs).sum()) / 2
            divergence += found_kl
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
