"""Random inputs: every family takes them, on any device, and they mean nothing special."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from slimwright.errors import InputError
from slimwright.model.inputs import dummy_inputs
from slimwright.model.skeleton import skeleton
from tests.families import FAMILIES, make

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))
SPECIAL = {0, 1, 2, 300}


@every_family
@torch.no_grad()
def test_a_forward_takes_them(name: str) -> None:
    model = make(name)
    output = model(**dummy_inputs(model, batch=2, length=8))
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor)]
    assert tensors and all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())
    assert tensors[0].std() > 0.1  # weights large enough that a mixed-up tensor shows


@every_family
def test_same_for_the_same_seed_and_from_the_config_alone(name: str) -> None:
    model = make(name)
    first = dummy_inputs(model, batch=2, length=8, seed=3)
    assert all(len(tensor) == 2 for tensor in first.values())
    model.config.architectures = [type(model).__name__]
    sources = [model] if name == "home_made" else [model, model.config]
    for source in sources:
        again = dummy_inputs(source, batch=2, length=8, seed=3)
        assert first.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    other = dummy_inputs(model, batch=2, length=8, seed=4)
    assert any(not torch.equal(tensor, other[key]) for key, tensor in first.items())


@every_family
def test_no_special_tokens(name: str) -> None:
    """0 to 2 are padding, begin and end; 300 is the image token, which stands where the image is and nowhere else."""
    inputs = dummy_inputs(make(name), batch=4, length=64)
    for key in inputs.keys() & {"input_ids", "decoder_input_ids"}:
        images = 16 if name in ("llava", "paligemma") else 0
        ids = inputs[key]
        assert (ids[:, :images] == 300).all()
        used = set(ids[:, images:].flatten().tolist())
        assert not used & ({300} if images else set()) and len(used) > 50
        assert not used & (SPECIAL - {300} - _ordinary(name))


def _ordinary(name: str) -> set[int]:
    """Low ids that the family's config does not declare special."""
    config = FAMILIES[name].config()
    text = config.get_text_config()
    declared = {getattr(c, f"{kind}_token_id", None) for c in (config, text) for kind in ("pad", "bos", "eos")}
    return SPECIAL - {token for token in declared if isinstance(token, int)}


@pytest.mark.parametrize("name", ["llama", "whisper", "llava", "clip", "t5"])
def test_on_meta_they_have_shapes_only(name: str) -> None:
    model = make(name)
    inputs = dummy_inputs(model)
    on_meta = dummy_inputs(skeleton({**model.config.to_dict(), "architectures": [type(model).__name__]}), device="meta")
    assert {k: v.shape for k, v in inputs.items()} == {k: v.shape for k, v in on_meta.items()}
    assert all(tensor.is_meta for tensor in on_meta.values())


def test_kinds() -> None:
    shapes = {
        name: {key: tuple(value.shape) for key, value in dummy_inputs(make(name), batch=3, length=5).items()}
        for name in ("llama", "vit", "clip", "whisper", "t5", "llava")
    }
    assert shapes == {
        "llama": {"input_ids": (3, 5)},
        "vit": {"pixel_values": (3, 3, 32, 32)},
        "clip": {"input_ids": (3, 5), "pixel_values": (3, 3, 32, 32)},
        "whisper": {"input_features": (3, 16, 64), "decoder_input_ids": (3, 5)},
        "t5": {"input_ids": (3, 5), "decoder_input_ids": (3, 5)},
        "llava": {"input_ids": (3, 16 + 5), "pixel_values": (3, 3, 32, 32)},
    }


def test_text_is_cut_to_the_longest_the_model_takes() -> None:
    assert dummy_inputs(make("roberta"), batch=1, length=10_000)["input_ids"].shape == (1, 126)


def test_floating_inputs_follow_the_model() -> None:
    assert dummy_inputs(make("vit", torch.bfloat16))["pixel_values"].dtype == torch.bfloat16


def test_what_cannot_be_made_is_named() -> None:
    with pytest.raises(InputError, match="no such class"):
        dummy_inputs(LlamaConfig(architectures=["NoSuchModel"]))
    config = LlamaConfig(vocab_size=3, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(InputError, match="all 3 tokens"):
        dummy_inputs(config)
