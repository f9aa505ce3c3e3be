"""What ``inspect`` prints."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from slimwright.checkpoint import Checkpoint
from slimwright.model.discover import discover
from slimwright.model.render import structure_json, structure_tree
from slimwright.model.structure import Structure
from tests.families import FAMILIES

StructureOf = Callable[[str], Structure]


def _text(structure: Structure) -> str:
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(structure_tree(structure))
    return out.getvalue()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_json_holds_every_tensor_and_survives_json(name: str, structure_of: StructureOf) -> None:
    structure = structure_of(name)
    shown = json.loads(json.dumps(structure_json(structure)))
    assert [tensor["name"] for tensor in shown["tensors"]] == list(structure.bytes)
    assert shown["bytes"] == sum(tensor["bytes"] for tensor in shown["tensors"])
    assert {tensor["name"] for tensor in shown["tensors"] if "kept" in tensor} == set(structure.kept)
    assert sum(map(len, shown["choice_groups"].values())) == len(structure.sites)
    assert shown["ties"] == structure.ties and shown["parameters"] == structure.parameters


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tree_fits_a_screen_and_names_the_groups(name: str, structure_of: StructureOf) -> None:
    structure = structure_of(name)
    text = _text(structure)
    assert len(text.splitlines()) < 60
    for stack in structure.stacks:
        assert stack.module in text
    for owner in structure.ties.values():
        assert owner in text
    for group, sites in structure.choice_groups().items():
        assert group.rpartition(".")[2] in text
        assert all(site.role in text for site in sites)


def test_tree_of_llama(structure_of: StructureOf) -> None:
    """2 · (2·64² + 2·32·64 + 3·128·64 + 2·64) + 2·320·64 + 64 = 115,008 float32 parameters."""
    text = _text(structure_of("llama"))
    assert "LlamaForCausalLM (llama): 115.01k parameters, 460.0 kB" in text
    assert "blocks 0-1: 2 × LlamaDecoderLayer, 148.0 kB each" in text
    assert "self_attn.q_proj+k_proj+v_proj [q+k+v] 2 of 32×64, 64×64, 32.8 kB" in text
    assert "kept: 2 norm, 512 B" in text


def test_blocks_that_repeat_are_shown_once(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=24,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    text = _text(discover(Checkpoint.open(tmp_path)))
    assert "blocks 0-23: 24 × Qwen2DecoderLayer" in text
    assert len(text.splitlines()) < 25


def test_blocks_that_differ_are_shown_apart(structure_of: StructureOf) -> None:
    text = _text(structure_of("jamba"))
    assert "block 0: JambaMambaDecoderLayer" in text and "block 1: JambaAttentionDecoderLayer" in text
    assert "AlbertLayer, 133.9 kB, run 3 times" in _text(structure_of("albert"))


def test_what_was_guessed_is_said(structure_of: StructureOf) -> None:
    assert "note: Uses and groups are guessed" in _text(structure_of("jetmoe"))
