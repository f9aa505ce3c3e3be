"""Fold groups: named by hand for some families, and proven on all of them by folding random scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimwright.model.inputs import dummy_inputs
from slimwright.model.structure import FoldGroup, Structure
from tests.families import FAMILIES, make

StructureOf = Callable[[str], Structure]

# Per block: a norm before attention, one before the MLP, v → o, up → down.
COUNTS = {
    "llama": {"norm": 4, "v_o": 2, "up_down": 2},
    "qwen2": {"norm": 4, "v_o": 2, "up_down": 2},
    "gemma3": {"norm": 4, "v_o": 2, "up_down": 2},
    "phi3": {"norm": 4},  # v and up are parts of fused matrices
    "olmo2": {"v_o": 2, "up_down": 2},  # its norms come after the sublayers
    "cohere": {"norm": 2, "v_o": 2, "up_down": 2},  # one norm for both sublayers
    "mixtral": {"norm": 2, "v_o": 2},  # the MLP's norm feeds the router too
    "gpt_oss": {"norm": 2},  # sinks in the attention
    "gpt2": {"norm": 4},  # up passes through an activation
    "bert": {"norm": 1},  # norms are residuals too, but the last one before the head's dense
    "mamba": {"norm": 2},
    # Encoder and decoder; the cross-attention's norm feeds q only. No final norm: its output is scaled.
    "t5": {"norm": 10, "v_o": 6},
    "jetmoe": {},  # not observed
}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts(name: str, structure_of: StructureOf) -> None:
    assert Counter(fold.kind for fold in structure_of(name).folds) == Counter(COUNTS[name])


def test_groups_of_llama(structure_of: StructureOf) -> None:
    folds = {fold.producer: fold for fold in structure_of("llama").folds}
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    norm = folds["model.layers.0.input_layernorm.weight"]
    assert (norm.kind, norm.offset) == ("norm", 0)
    assert set(norm.consumers) == {attention + f"{part}_proj.weight" for part in "qkv"}
    assert set(folds["model.layers.0.post_attention_layernorm.weight"].consumers) == {
        mlp + "gate_proj.weight",
        mlp + "up_proj.weight",
    }
    value = folds[attention + "v_proj.weight"]
    assert value == FoldGroup("v_o", attention + "v_proj.weight", (attention + "o_proj.weight",), 2, 0.0, 16)
    assert folds[mlp + "up_proj.weight"].consumers == (mlp + "down_proj.weight",)


def test_gemma_norms_add_one_to_their_weight(structure_of: StructureOf) -> None:
    assert {fold.offset for fold in structure_of("gemma3").folds if fold.kind == "norm"} == {1.0}


@pytest.mark.parametrize(
    ("name", "count", "offsets"),
    [
        ("llama", 5, {0.0}),  # two a block and the last
        ("qwen3", 9, {0.0}),  # those of q and k too
        ("gemma3", 13, {1.0}),  # four a block, q and k, the last
        ("cohere", 0, set()),  # subtracts the mean, though it has no bias
        ("bert", 0, set()),
        ("t5", 12, {0.0}),
    ],
)
def test_rms_norms(name: str, count: int, offsets: set[float], structure_of: StructureOf) -> None:
    norms = structure_of(name).rms_norms
    assert len(norms) == count
    assert set(norms.values()) == offsets


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_folding_random_scales_changes_nothing(name: str, structure_of: StructureOf) -> None:
    structure = structure_of(name)
    model = make(name)
    inputs = dummy_inputs(model)
    before = _outputs(model, inputs)
    generator = torch.Generator().manual_seed(0)
    for fold in structure.folds:
        _fold(model, structure, fold, generator)
    after = _outputs(model, inputs)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.allclose(value, after[key], rtol=1e-3, atol=1e-4 * float(value.abs().max())), key


def _outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in model(**inputs).items() if isinstance(value, Tensor)}


def _fold(model: PreTrainedModel, structure: Structure, fold: FoldGroup, generator: torch.Generator) -> None:
    path = structure.to_module[fold.producer].rpartition(".")[0]
    producer = model.get_submodule(path)
    site = structure.sites.get(fold.producer)
    transposed = site is not None and site.transposed
    channels = producer.weight.shape[-1 if transposed else 0]
    scale = 0.5 + torch.rand(channels, generator=generator)
    if fold.kind == "norm":
        producer.weight.add_(fold.offset).mul_(scale).sub_(fold.offset)
    else:
        producer.weight.mul_(scale if transposed else scale[:, None])
    if getattr(producer, "bias", None) is not None:
        producer.bias.mul_(scale)
    read = torch.arange(channels)
    if fold.repeat > 1:  # column h · head_dim + d of o reads channel (h // repeat) · head_dim + d of v
        heads = torch.arange(channels // fold.head_dim).repeat_interleave(fold.repeat)
        read = (heads[:, None] * fold.head_dim + torch.arange(fold.head_dim)).flatten()
    for name in fold.consumers:
        consumer = structure.sites[name]
        weight = model.get_submodule(consumer.module).weight
        weight.div_(scale[read][:, None] if consumer.transposed else scale[read])
