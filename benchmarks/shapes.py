"""Checkpoints of a given shape with random bf16 weights, written shard by shard in little memory."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from slimwright.checkpoint import Checkpoint, CheckpointWriter, TensorEntry, plan_layout, write_json_atomic
from slimwright.model.skeleton import skeleton

LLAMA_8B_24 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 150_000,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
"""An 8B Llama's shape cut to 24 blocks with a vocabulary of 150,000: 13 GB in bf16."""

GPT_OSS_13GB = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 8, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 150_000,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"] * 4, "max_position_embeddings": 4096, "dtype": "bfloat16",
}  # fmt: skip
"""Fused experts, (32, 2880, 5760) and (32, 2880, 2880) a layer: 13 GB in bf16 with eight blocks."""

QWEN2_05B = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    "max_position_embeddings": 32768, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
"""Qwen2-0.5B's shape: 988 MB in bf16."""

LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32_000,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
"""TinyLlama's shape: 2.2 GB in bf16."""


def make(config: dict[str, object], directory: Path, shard_bytes: int = 2_000_000_000) -> Path:
    """Write a checkpoint with random weights (scaled by 1/sqrt(inputs); norms near 1) unless it is there already."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    model = skeleton(config)
    entries = [
        TensorEntry(name, torch.bfloat16, tuple(value.shape))
        for name, value in model.state_dict().items()
        if name not in (getattr(model, "all_tied_weights_keys", None) or {})
    ]
    generator = torch.Generator().manual_seed(0)
    layout = plan_layout(entries, max_shard_bytes=shard_bytes)
    with CheckpointWriter(directory, layout) as writer:
        for entry in entries:
            _fill(writer, entry, generator)
    write_json_atomic(directory / "config.json", dict(config))
    return directory


def _fill(writer: CheckpointWriter, entry: TensorEntry, generator: torch.Generator) -> None:
    total, offset, step = math.prod(entry.shape), 0, 1 << 22
    scale = 1.0 / math.sqrt(entry.shape[-1]) if len(entry.shape) > 1 else 0.05
    while offset < total:
        count = min(step, total - offset)
        values = torch.randn(count, generator=generator).mul_(scale)
        if len(entry.shape) == 1 and "norm" in entry.name:
            values.add_(1.0)
        writer.write(entry.name, values.bfloat16(), offset * 2)
        offset += count


def describe(directory: Path) -> str:
    """One line about a checkpoint."""
    opened = Checkpoint.open(directory)
    family = opened.config["model_type"]
    return f"{directory}: {opened.total_bytes / 1e9:.2f} GB, {len(opened.tensors)} tensors, {family}"
