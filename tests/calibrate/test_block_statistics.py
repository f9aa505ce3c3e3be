"""Cosines of blocks and records of routers against what hooks see on the model that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from slimwright.calibrate.block_statistics import BlockCosine, BlockSimilarity, RouterRecord, token_cosines
from slimwright.calibrate.walk import Batch, Walk
from slimwright.model.inputs import dummy_inputs
from tests.calibrate.test_walk import opened
from tests.families import make

LENGTH = 12


def observed(name: str, statistic, batches: list[Batch], change: Callable[[nn.Module], None] = lambda model: None):
    """What the statistic finds in a walk."""
    _, structure, model, _ = opened(name)
    change(model)
    for step in Walk(model, structure, batches):
        for index in step.indices if step.unit.block else ():
            with statistic.watching(step, index, model) as tell:
                output = step.output(index)
            tell(output)
            step.advance(index, output)
    return statistic.result()


def padded(name: str) -> list[Batch]:
    """Two batches, the second with padding on its right."""
    model = make(name)
    full, short = (dummy_inputs(model, batch=2, length=LENGTH, seed=seed) for seed in (0, 1))
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, LENGTH // 2 :] = False
    return [Batch(full), Batch({**short, "attention_mask": mask.long()}, {(2, LENGTH): mask})]


@contextmanager
def recording(model: nn.Module, paths: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """First input and first output of modules, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(path: str, module: nn.Module, args, kwargs, output) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen[path] = given.clone(), (output[0] if isinstance(output, tuple) else output).clone()

    handles = [model.get_submodule(p).register_forward_hook(partial(note, p), with_kwargs=True) for p in paths]
    yield seen
    for handle in handles:
        handle.remove()


Pairs = dict[str, tuple[Tensor, Tensor]]


def sequential(seen: Pairs, block: str, attention: str, mlp: str) -> Pairs:
    """Stream before and after, where both are added one after the other as these modules return them."""
    x, middle = seen[block][0], seen[block][0] + seen[attention][1]
    return {"": seen[block], "attention": (x, middle), "mlp": (middle, middle + seen[mlp][1])}


def side_by_side(seen: Pairs, block: str, attention: str, mlp: str) -> Pairs:
    """The same, where both read the block's input."""
    x = seen[block][0]
    return {"": seen[block], "attention": (x, x + seen[attention][1]), "mlp": (x, x + seen[mlp][1])}


def norm_after_sum(seen: Pairs, block: str, attention: str, mlp: str) -> Pairs:
    """BERT: ``attention`` and ``mlp`` are the dense layers, whose outputs are added before a norm."""
    x, middle = seen[block][0], seen[mlp.removesuffix(".output.dense") + ".intermediate"][0]
    return {"": seen[block], "attention": (x, x + seen[attention][1]), "mlp": (middle, middle + seen[mlp][1])}


@pytest.mark.parametrize(
    ("name", "block", "attention", "mlp", "arrangement"),
    [
        ("llama", "model.layers.1", "self_attn", "mlp", sequential),
        ("gemma2", "model.layers.1", "post_attention_layernorm", "post_feedforward_layernorm", sequential),
        ("deepseek_v3", "model.layers.1", "self_attn", "mlp", sequential),
        ("falcon", "transformer.h.1", "self_attention", "mlp", side_by_side),
        ("bert", "bert.encoder.layer.1", "attention.output.dense", "output.dense", norm_after_sum),
    ],
)
def test_cosines_of_blocks_and_sublayers(
    name: str, block: str, attention: str, mlp: str, arrangement: Callable[[Pairs, str, str, str], Pairs]
) -> None:
    batches = padded(name)
    model = make(name)
    paths = [block, f"{block}.{attention}", f"{block}.{mlp}"]
    paths += [f"{block}.intermediate"] if arrangement is norm_after_sum else []
    cosines: dict[str, list[Tensor]] = {}
    for batch in batches:
        with recording(model, paths) as seen, torch.no_grad():
            model(**batch.inputs)
        for part, (before, after) in arrangement(seen, block, *paths[1:3]).items():
            mask = batch.masks.get((2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool))
            cosines.setdefault(part, []).append(cosine_similarity(before[mask].double(), after[mask].double(), dim=-1))
    found: dict[str, BlockSimilarity] = observed(name, BlockCosine(), batches)
    expected = {part: float(torch.cat(values).mean()) for part, values in cosines.items()}
    assert found[block].tokens == LENGTH * 3 + LENGTH // 2
    assert found[block].block == pytest.approx(expected[""], abs=1e-5)
    own = found[block].sublayers
    assert len(own) == 2
    for sublayer, value in own.items():
        part = "attention" if sublayer.rpartition(".")[2] in ("self_attn", "attention", "self_attention") else "mlp"
        assert value == pytest.approx(expected[part], abs=1e-5), sublayer
    assert abs(expected["attention"] - expected["mlp"]) > 1e-3  # else a mix-up would not show


def test_what_adds_nothing_has_a_cosine_of_exactly_one() -> None:
    """A layer whose output projections are zero changes nothing (cards: shortgpt, llm-drop)."""

    def silence(model: nn.Module) -> None:
        for path in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"):
            source = model.get_submodule(path).source
            source.held = torch.zeros(source.site.rows, source.site.columns)

    found = observed("llama", BlockCosine(), padded("llama"), silence)
    assert found["model.layers.0"].block == 1.0
    assert set(found["model.layers.0"].sublayers.values()) == {1.0}
    assert found["model.layers.1"].sublayers["model.layers.1.mlp"] == 1.0
    assert found["model.layers.1"].sublayers["model.layers.1.self_attn"] < 1.0
    assert found["model.layers.1"].block == found["model.layers.1"].sublayers["model.layers.1.self_attn"]


def test_cosines_of_zeros() -> None:
    zeros, x = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, -3.0]])
    given = torch.cat([zeros, zeros, x, x, x]), torch.cat([zeros, x, zeros, x, -x])
    assert token_cosines(*given).tolist() == [1.0, 0.0, 0.0, 1.0, -1.0]


def test_cross_attention_is_a_sublayer_of_its_own() -> None:
    found = observed("t5", BlockCosine(), [Batch(dummy_inputs(make("t5"), batch=2, length=LENGTH))])
    assert list(found["decoder.block.0"].sublayers) == [f"decoder.block.0.layer.{index}" for index in range(3)]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_router_s_record(name: str) -> None:
    """Experts are the largest of the softmax, their weights divided by their sum, over tokens that are not padding."""
    batches = padded(name)
    model = make(name)
    config = model.config
    k = config.num_experts_per_tok
    found = observed(name, RouterRecord(), batches)
    assert found.keys() == {f"model.layers.{n}.mlp.experts" for n in ([1] if name == "qwen3_moe" else [0, 1])}
    for layer, own in enumerate(found.values()):
        experts = own.counts.numel()
        counts, mass = torch.zeros(experts), torch.zeros(experts, dtype=torch.float64)
        together = torch.zeros(experts, experts)
        tokens = 0
        for batch in batches:
            with torch.no_grad():
                logits = model(**batch.inputs, output_router_logits=True).router_logits[layer].reshape(-1, experts)
            mask = batch.masks.get((2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)).reshape(-1)
            for row in logits[mask]:
                weights, chosen = row.softmax(-1).topk(k)
                if name == "mixtral" or config.norm_topk_prob:
                    weights = weights / weights.sum()
                for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
                    counts[expert] += 1
                    mass[expert] += weight
                    for other in chosen.tolist():
                        together[expert, other] += 1
                tokens += 1
        assert own.tokens == tokens == LENGTH * 3 + LENGTH // 2
        assert own.counts.tolist() == counts.tolist()
        assert own.coactivation.tolist() == together.tolist()
        torch.testing.assert_close(own.mass, mass, rtol=1e-4, atol=1e-5)
