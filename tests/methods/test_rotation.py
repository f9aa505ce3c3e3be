"""Rotation: orthogonal matrices, models that stay what they are, families that are refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.methods.orthogonal import hadamard, orthogonal
from slimwright.methods.rotation import rotate
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.model.structure import Structure
from tests.families import FAMILIES, cached, make
from tests.methods.setups import setup

ROTATED = {"llama", "llama_tied", "mistral", "qwen2", "qwen3", "smollm3", "granite", "phi3"}
REFUSED = {
    "gemma2": "not just in front of linears",  # norms after the sublayers
    "gemma3": "not just in front of linears",
    "olmo2": "not just in front of linears",
    "cohere": "not an RMS norm",
    "stablelm": "not an RMS norm",
    "gpt2": "embeddings",
    "bert": "embeddings",
    "mixtral": "not just in front of linears",  # the router reads it
    "t5": "one observed stack",
    "mamba": "not known",
}


@cache
def structure_of(name: str) -> Structure:
    return discover(Checkpoint.open(cached(name)))


def tensors_of(name: str) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(cached(name))
    return {tensor: checkpoint.read(tensor) for tensor in structure_of(name).roles}


def logits(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Of the family's model with these tensors, in double precision but for its norms, which compute in float32."""
    model, structure = make(name).double(), structure_of(name)
    state = model.state_dict()
    for disk, tensor in tensors.items():
        if disk in structure.to_module:
            state[structure.to_module[disk]].copy_(tensor)
        else:  # a head that has become its own
            model.get_output_embeddings().weight = torch.nn.Parameter(tensor.double())
    with torch.no_grad():
        return model(**dummy_inputs(model)).logits


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 48, 60, 64, 108, 140, 256, 384, 768, 896, 1536, 2880])
def test_hadamard_matrices(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None and matrix.dtype == torch.float64
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 14, 100, 257])
@pytest.mark.parametrize("mode", ["hadamard", "random"])
def test_orthogonal_matrices_of_any_size(size: int, mode: str) -> None:
    matrix = orthogonal(size, mode=mode, seed=3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, orthogonal(size, mode=mode, seed=3))
    assert not torch.equal(matrix, orthogonal(size, mode=mode, seed=4))


@pytest.mark.parametrize("name", sorted(ROTATED))
@pytest.mark.parametrize(("mode", "values"), [("hadamard", True), ("random", False)])
def test_the_model_stays_what_it_is(name: str, mode: str, values: bool) -> None:
    structure, tensors = structure_of(name), tensors_of(name)
    turned = rotate(tensors, structure, mode=mode, values=values)
    before, after = logits(name, tensors), logits(name, turned)
    assert float((after - before).norm() / before.norm()) < 1e-5
    changed = {disk for disk in tensors if not torch.equal(turned[disk].double(), tensors[disk].double())}
    assert set(structure.sites) <= changed
    # Embedding and head were tied, and the tiny models' norms are random.
    assert (turned.keys() - tensors.keys() == {"lm_head.weight"}) == bool(structure.ties)


def test_values_are_turned_where_the_head_size_is_known() -> None:
    structure, tensors = structure_of("qwen2"), tensors_of("qwen2")
    names = [name for name in tensors if "v_proj" in name]
    with_values, without = (rotate(tensors, structure, values=values) for values in (True, False))
    assert any("bias" in name for name in names)
    assert all(not torch.equal(with_values[name], without[name]) for name in names)


@pytest.mark.parametrize("name", ["llama_tied", "granite"])
def test_a_uniform_gain_leaves_embedding_and_head_tied(name: str) -> None:
    structure, tensors = structure_of(name), tensors_of(name)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.7)
    turned = rotate(tensors, structure)
    assert turned.keys() == tensors.keys()
    before, after = logits(name, tensors), logits(name, turned)
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_turn_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"cannot be rotated: .*{REFUSED[name]}"):
        rotate(tensors_of(name), structure_of(name))


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - ROTATED - REFUSED.keys()))
def test_every_other_family_is_exact_or_refused(name: str) -> None:
    tensors = tensors_of(name)
    try:
        turned = rotate(tensors, structure_of(name))
    except InputError as error:
        assert "cannot be rotated" in str(error)
        return
    before, after = logits(name, tensors), logits(name, turned)
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_outliers_spread() -> None:
    """Card: on S-out with symmetric 4-bit activations per token the relative output error falls from 0.271 to 0.096."""
    site = setup(outliers=True)
    exact = site.inputs.double() @ site.weight.double().T

    def error(turn: Tensor) -> float:
        x = site.inputs.double() @ turn
        scale = x.abs().amax(1, keepdim=True) / 7
        rounded = (x / scale).round().clamp(-8, 7) * scale
        return float((rounded @ (site.weight.double() @ turn).T - exact).norm() / exact.norm())

    assert error(torch.eye(256, dtype=torch.float64)) == pytest.approx(0.271, rel=0.15)
    assert error(orthogonal(256)) == pytest.approx(0.096, rel=0.15)
