"""Models that are unlike the families of tests.families in one thing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AriaTextConfig, AriaTextForCausalLM, OlmoConfig, OlmoForCausalLM

from tests.job.conftest import fitted


def test_the_parts_of_a_renamed_weight_are_renamed_with_it(tmp_path: Path) -> None:
    """Aria stores fused experts as ``experts.fc1.weight``, which the model has as ``experts.gate_up_proj``."""
    config = AriaTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1, initializer_range=0.1,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AriaTextForCausalLM(config).save_pretrained(tmp_path / "model")
    report = fitted(str(tmp_path / "model"), tmp_path / "out", size="40%")
    assert report.data["verified"]["ok"] and report.data["verified"]["logits_error"] <= 1e-4

    model = AriaTextForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    names = [set(safe_open(tmp_path / d / "model.safetensors", "pt").keys()) for d in ("out", "again")]
    assert names[0] == names[1] and "model.layers.0.mlp.experts.fc1.weight_scale" in names[0]
    tokens = torch.arange(3, 19)[None]
    again = AriaTextForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_model_without_a_parameter_that_is_not_packed(tmp_path: Path) -> None:
    """OLMo's norms have no scales: nothing is left that transformers could ask for the model's device and dtype."""
    config = OlmoConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    OlmoForCausalLM(config).save_pretrained(tmp_path / "model")
    report = fitted(str(tmp_path / "model"), tmp_path / "out", size="40%")
    assert report.data["verified"]["ok"] and report.data["verified"]["logits_error"] <= 1e-4

    model = OlmoForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert model.device.type == model.model.device.type == "cpu" and model.dtype == torch.bfloat16
    tokens = torch.arange(3, 19)[None]
    assert model.generate(tokens, max_new_tokens=3, min_new_tokens=3).shape == (1, 19)
    model.load_state_dict(OlmoForCausalLM.from_pretrained(tmp_path / "out").state_dict())
    model.save_pretrained(tmp_path / "again")
    names = [set(safe_open(tmp_path / d / "model.safetensors", "pt").keys()) for d in ("out", "again")]
    assert names[0] == names[1]
    assert set(model.dequantize().state_dict()) == set(OlmoForCausalLM(config).state_dict())
