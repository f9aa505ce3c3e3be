"""Every family's structure against the hand-written table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from slimwright.checkpoint import Checkpoint
from slimwright.model.discover import discover
from slimwright.model.structure import ROLES, Structure
from tests.families import FAMILIES, cached, make
from tests.model.expected import EXPECTED, ROUTER

StructureOf = Callable[[str], Structure]
every_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def _roles(text: str) -> list[str]:
    """``gate up x4`` → four gates and four ups, in the order of ROLES."""
    words = text.split()
    times = int(words.pop()[1:]) if words[-1].startswith("x") else 1
    return sorted(words * times, key=ROLES.index)


def test_the_table_covers_every_family() -> None:
    assert EXPECTED.keys() == FAMILIES.keys()
    assert len(FAMILIES) >= 40


@every_family
def test_choice_groups_and_roles(name: str, structure_of: StructureOf) -> None:
    structure, expected = structure_of(name), EXPECTED[name]
    wanted = {group: _roles(roles) for group, roles in expected.outside.items()}
    for prefix, groups in expected.blocks.items():
        wanted |= {prefix + group: _roles(roles) for group, roles in groups.items()}
    found = {
        group: sorted((site.role for site in sites), key=ROLES.index)
        for group, sites in structure.choice_groups().items()
    }
    assert found == wanted


@every_family
def test_gram_groups(name: str, structure_of: StructureOf) -> None:
    """Choice groups are fed one tensor; some are fed the same one. An expert's inputs are its own."""
    structure, expected = structure_of(name), EXPECTED[name]
    wanted: set[frozenset[str]] = set()
    merged = {group: together for together in expected.same_input for group in together}
    choices = structure.choice_groups()
    for group, sites in choices.items():
        if sites[0].expert is None:
            members = merged.get(group, frozenset({group}))
            wanted.add(frozenset(site.name for member in members for site in choices[member]))
        else:
            for expert in range(4):
                wanted.add(frozenset(site.name for site in sites if f"experts.{expert}." in site.name))
    found = {frozenset(site.name for site in sites) for sites in structure.gram_groups().values()}
    assert found == wanted


@every_family
def test_stacks(name: str, structure_of: StructureOf) -> None:
    structure, expected = structure_of(name), EXPECTED[name]
    assert [stack.module for stack in structure.stacks] == list(expected.stacks)
    for stack, (count, class_names, runs) in zip(structure.stacks, expected.stacks.values(), strict=True):
        names = class_names.split()
        names = names * count if len(names) == 1 else names
        assert [(block.class_name, block.index, block.runs) for block in stack.blocks] == [
            (class_name, index, runs) for index, class_name in enumerate(names)
        ]
    in_blocks = Counter(site.block is not None for site in structure.sites.values())
    assert in_blocks[True] == sum(len(_roles(r)) for groups in expected.blocks.values() for r in groups.values())


@every_family
def test_kept_tensors_and_reasons(name: str, structure_of: StructureOf) -> None:
    structure, expected = structure_of(name), EXPECTED[name]
    counts = Counter(structure.kept.values())
    assert counts["norm"] == expected.norms
    assert counts["bias"] == expected.biases
    others = {tensor: reason for tensor, reason in structure.kept.items() if reason not in ("norm", "bias")}
    assert others == expected.kept
    assert all(structure.roles[tensor] == "norm" for tensor, reason in structure.kept.items() if reason == "norm")
    assert all(structure.roles[tensor] == "router" for tensor, reason in expected.kept.items() if reason == ROUTER)


@every_family
def test_ties(name: str, structure_of: StructureOf) -> None:
    assert structure_of(name).ties == EXPECTED[name].ties


@every_family
def test_every_tensor_is_a_site_or_kept_exactly_once(name: str, structure_of: StructureOf) -> None:
    structure = structure_of(name)
    assert not structure.sites.keys() & structure.kept.keys()
    assert structure.sites.keys() | structure.kept.keys() == structure.bytes.keys() == structure.roles.keys()
    weights = sum(file.stat().st_size for file in cached(name).glob("*.safetensors"))
    assert 0 < weights - sum(structure.bytes.values()) < 64 * 1024  # headers
    assert set(structure.roles.values()) <= set(ROLES)


@every_family
def test_unique_parameters(name: str, structure_of: StructureOf) -> None:
    """``parameters()`` yields a tied parameter once."""
    assert structure_of(name).parameters == sum(parameter.numel() for parameter in make(name).parameters())


@every_family
def test_observed(name: str, structure_of: StructureOf) -> None:
    structure = structure_of(name)
    assert structure.observed == EXPECTED[name].observed
    assert bool(structure.note) != structure.observed


def test_kinds_and_transposition(structure_of: StructureOf) -> None:
    conv1d = structure_of("gpt2").sites["transformer.h.0.mlp.c_fc.weight"]
    assert (conv1d.kind, conv1d.transposed, conv1d.shape, conv1d.weight_shape) == ("conv1d", True, (64, 256), (256, 64))
    fused = structure_of("gpt_oss").sites["model.layers.0.mlp.experts.gate_up_proj"]
    assert (fused.kind, fused.transposed, fused.weight_shape) == ("experts", True, (4, 256, 64))
    assert (fused.module, fused.parameter, fused.expert) == ("model.layers.0.mlp.experts", "gate_up_proj", None)
    one = structure_of("mixtral").sites["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    assert (one.kind, one.transposed, one.weight_shape) == ("experts", False, (128, 64))
    assert (one.module, one.parameter, one.expert) == ("model.layers.1.mlp.experts", "gate_up_proj", (3, 1, 2))
    assert one.block == "model.layers.1"
    table = structure_of("opt").sites["model.decoder.embed_positions.weight"]
    assert (table.kind, table.role, table.block) == ("embedding", "embed", None)
    # A subclass of nn.Linear that multiplies by hand, but computes what a linear does.
    by_hand = structure_of("falcon").sites["transformer.h.0.self_attention.dense.weight"]
    assert by_hand.kind == "linear"


def test_weights_whose_dtype_the_model_reads(structure_of: StructureOf) -> None:
    """T5 casts the input of ``wo`` to its weight's dtype; Gemma scales its embedding in the weight's dtype."""
    t5 = structure_of("t5").sites.values()
    assert {site.name for site in t5 if site.dtype_read} == {site.name for site in t5 if site.role == "down"}
    gemma = structure_of("gemma3").sites.values()
    assert {site.name for site in gemma if site.dtype_read} == {"model.embed_tokens.weight"}
    assert not any(site.dtype_read for site in structure_of("llama").sites.values())


class OddConfig(PretrainedConfig):
    model_type = "odd_for_tests"


class OddLayer(nn.Module):
    """Not marked as a layer; three linears used in three ways, one not at all, and PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(64, 64)
        self.read_elsewhere = nn.Linear(64, 64)
        self.both = nn.Linear(64, 64)
        self.never = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(self.called(x)) + x @ self.both.weight
        x = nn.functional.linear(x, self.read_elsewhere.weight) + x @ self.table
        return x + self.attention(x, x, x)[0]


class OddModel(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_values"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.enter = nn.Linear(4000, 64)
        self.layers = nn.ModuleList([OddLayer() for _ in range(3)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, input_values: Tensor) -> BaseModelOutput:
        x = self.enter(input_values)[:, None]
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)


def test_what_a_forward_shows_decides(tmp_path: Path) -> None:
    """A class says little: a linear whose weight others read cannot be packed, and what is never called is unknown."""
    AutoConfig.register("odd_for_tests", OddConfig, exist_ok=True)
    AutoModel.register(OddConfig, OddModel, exist_ok=True)
    OddModel(OddConfig()).save_pretrained(tmp_path)
    structure = discover(Checkpoint.open(tmp_path))
    assert set(structure.sites) == {"enter.weight", *(f"layers.{i}.called.weight" for i in range(3))}
    assert {name: reason for name, reason in structure.kept.items() if "layers.1." in name and "bias" not in name} == {
        "layers.1.read_elsewhere.weight": "functional use: read by OddLayer",
        "layers.1.both.weight": "functional use: read by OddLayer",
        "layers.1.never.weight": "not used in the observed forward",
        "layers.1.table": "functional use: read by OddLayer",
        "layers.1.attention.in_proj_weight": "functional use: read by MultiheadAttention",
        "layers.1.attention.out_proj.weight": "functional use: read by MultiheadAttention",
    }
    assert [(stack.module, len(stack.blocks)) for stack in structure.stacks] == [("layers", 3)]
    assert structure.observed
    assert structure.note.startswith("3 weights (0.0 MB, 'layers.0.never.weight' first) took no part")
