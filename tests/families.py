"""Tiny random checkpoints of many transformers families, for tests.

``FAMILIES`` maps a name to a :class:`Family`; :func:`build` writes one as a checkpoint directory, :func:`cached` once
per process. About two blocks each, hidden size 64, a vocabulary of 320, all weights random enough that any two
swapped tensors change the logits: no norm is all ones, no bias all zeros.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    GradientCheckpointingLayer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

VOCABULARY = 320
HIDDEN = 64
WEIGHT_STD = 0.1


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: key of :data:`FAMILIES`.
        architecture: the transformers class of the checkpoint; the name of a class in ``transformers``, or a class.
        config: makes a fresh tiny config.
        generates: whether ``generate`` makes sense.
    """

    name: str
    architecture: str | type[PreTrainedModel]
    config: Callable[[], PretrainedConfig]
    generates: bool = True

    @property
    def model_class(self) -> type[PreTrainedModel]:
        if isinstance(self.architecture, str):
            return getattr(transformers, self.architecture)
        return self.architecture


FAMILIES: dict[str, Family] = {}


def _family(name: str, architecture: str, config_class: str, *, generates: bool = True, **values: Any) -> None:
    """Register a family whose config is ``config_class(**values)``."""

    def config() -> PretrainedConfig:
        return getattr(transformers, config_class)(**values)

    FAMILIES[name] = Family(name, architecture, config, generates)


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": WEIGHT_STD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": WEIGHT_STD,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": WEIGHT_STD,
}


def _decoder(name: str, architecture: str, config_class: str, **values: Any) -> None:
    _family(name, architecture, config_class, **{**_DECODER, **values})


_decoder("llama", "LlamaForCausalLM", "LlamaConfig")
_decoder("llama_tied", "LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, hidden_size=256, head_dim=64)
_decoder("mistral", "MistralForCausalLM", "MistralConfig", sliding_window=8)
_decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True)
_decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", tie_word_embeddings=True, head_dim=32)
_decoder("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", tie_word_embeddings=True)
_decoder("granite", "GraniteForCausalLM", "GraniteConfig", tie_word_embeddings=True)
_decoder(
    "gemma2",
    "Gemma2ForCausalLM",
    "Gemma2Config",
    tie_word_embeddings=True,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=8,
)
_decoder(
    "gemma3",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    tie_word_embeddings=True,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
)
_decoder("phi3", "Phi3ForCausalLM", "Phi3Config")
_decoder("stablelm", "StableLmForCausalLM", "StableLmConfig", use_qkv_bias=True, partial_rotary_factor=0.5)
_decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config")
_decoder("cohere", "CohereForCausalLM", "CohereConfig", tie_word_embeddings=True, logit_scale=0.5)
_decoder("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2)
_decoder(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    mlp_only_layers=[0],
    norm_topk_prob=True,
    head_dim=16,
)
_decoder("olmoe", "OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2)
_decoder(
    "gpt_oss",
    "GptOssForCausalLM",
    "GptOssConfig",
    num_local_experts=4,
    num_experts_per_tok=2,
    head_dim=16,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
)
_decoder(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    num_key_value_heads=4,
    moe_intermediate_size=64,
    n_routed_experts=4,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)
_decoder(
    "jamba",
    "JambaForCausalLM",
    "JambaConfig",
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=16,
    mamba_dt_rank=16,
    use_mamba_kernels=False,
)
_decoder(
    "qwen3_next",
    "Qwen3NextForCausalLM",
    "Qwen3NextConfig",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
_decoder(
    "nemotron_h",
    "NemotronHForCausalLM",
    "NemotronHConfig",
    layers_block_type=["mamba", "attention", "moe"],
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
    n_group=1,
    topk_group=1,
    use_mamba_kernels=False,
)
_decoder(
    "jetmoe",
    "JetMoeForCausalLM",
    "JetMoeConfig",
    kv_channels=16,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)
_decoder(
    "llama4",
    "Llama4ForCausalLM",
    "Llama4TextConfig",
    intermediate_size_mlp=128,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=1,
    moe_layers=[1],
    attention_chunk_size=32,
)
_family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=VOCABULARY,
    n_embd=HIDDEN,
    n_layer=2,
    n_head=4,
    n_positions=128,
    initializer_range=WEIGHT_STD,
    bos_token_id=1,
    eos_token_id=2,
)
_family(
    "codegen",
    "CodeGenForCausalLM",
    "CodeGenConfig",
    vocab_size=VOCABULARY,
    n_embd=HIDDEN,
    n_layer=2,
    n_head=4,
    n_positions=128,
    n_ctx=128,
    rotary_dim=8,
    initializer_range=WEIGHT_STD,
    bos_token_id=1,
    eos_token_id=2,
)
_family(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    word_embed_proj_dim=32,
    ffn_dim=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    init_std=WEIGHT_STD,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER, bos_token_id=1, eos_token_id=2)
_family(
    "bloom",
    "BloomForCausalLM",
    "BloomConfig",
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    n_layer=2,
    n_head=4,
    initializer_range=WEIGHT_STD,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_family(
    "falcon",
    "FalconForCausalLM",
    "FalconConfig",
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=4,
    multi_query=True,
    parallel_attn=True,
    bias=False,
    alibi=False,
    initializer_range=WEIGHT_STD,
    bos_token_id=1,
    eos_token_id=2,
)
_family(
    "mpt",
    "MptForCausalLM",
    "MptConfig",
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    n_layers=2,
    n_heads=4,
    expansion_ratio=2,
    max_seq_len=128,
    initializer_range=WEIGHT_STD,
)
_family(
    "mamba",
    "MambaForCausalLM",
    "MambaConfig",
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    state_size=16,
    num_hidden_layers=2,
    time_step_rank=16,
    initializer_range=WEIGHT_STD,
    use_mambapy=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_family("bert", "BertForMaskedLM", "BertConfig", generates=False, **_ENCODER)
_family("roberta", "RobertaForMaskedLM", "RobertaConfig", generates=False, **{**_ENCODER, "pad_token_id": 1})
_family("electra", "ElectraForMaskedLM", "ElectraConfig", generates=False, **_ENCODER, embedding_size=32)
_family(
    "modernbert",
    "ModernBertForMaskedLM",
    "ModernBertConfig",
    generates=False,
    **_ENCODER,
    local_attention=16,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)
_family(
    "distilbert",
    "DistilBertForMaskedLM",
    "DistilBertConfig",
    generates=False,
    vocab_size=VOCABULARY,
    dim=HIDDEN,
    hidden_dim=128,
    n_layers=2,
    n_heads=4,
    max_position_embeddings=128,
    initializer_range=WEIGHT_STD,
    pad_token_id=0,
)
_family(
    "albert",
    "AlbertForMaskedLM",
    "AlbertConfig",
    generates=False,
    **{**_ENCODER, "num_hidden_layers": 3},
    embedding_size=32,
)
_family("nomic_bert", "NomicBertForMaskedLM", "NomicBertConfig", generates=False, **_ENCODER)
_family("vit", "ViTForImageClassification", "ViTConfig", generates=False, **_VISION, num_labels=10)
_family("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", generates=False, **_VISION, num_labels=10)
_family(
    "swin",
    "SwinForImageClassification",
    "SwinConfig",
    generates=False,
    image_size=32,
    patch_size=4,
    embed_dim=32,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    initializer_range=WEIGHT_STD,
    num_labels=10,
)
_family(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="relu",
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
    tie_word_embeddings=True,
)
_family(
    "flan_t5",
    "T5ForConditionalGeneration",
    "T5Config",
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    d_kv=16,
    d_ff=128,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
    tie_word_embeddings=False,
)
_family(
    "bart",
    "BartForConditionalGeneration",
    "BartConfig",
    vocab_size=VOCABULARY,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    max_position_embeddings=128,
    init_std=WEIGHT_STD,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
_family(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    vocab_size=VOCABULARY,
    num_mel_bins=16,
    d_model=HIDDEN,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    max_source_positions=32,
    max_target_positions=64,
    init_std=WEIGHT_STD,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)


def _clip() -> PretrainedConfig:
    text = {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 32}
    return transformers.CLIPConfig(text_config=text, vision_config={**_VISION, "projection_dim": 32}, projection_dim=32)


def _llava() -> PretrainedConfig:
    return transformers.LlavaConfig(
        text_config={**_DECODER, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_id=300,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _paligemma() -> PretrainedConfig:
    return transformers.PaliGemmaConfig(
        text_config={**_DECODER, "model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
        vision_config={
            **_VISION,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "projection_dim": HIDDEN,
        },
        image_token_id=300,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
    )


FAMILIES["clip"] = Family("clip", "CLIPModel", _clip, generates=False)
FAMILIES["llava"] = Family("llava", "LlavaForConditionalGeneration", _llava)
FAMILIES["paligemma"] = Family("paligemma", "PaliGemmaForConditionalGeneration", _paligemma)


class HomeMadeConfig(PretrainedConfig):
    """A family that transformers does not know: the caller registers it in the process."""

    model_type = "home_made"

    def __init__(
        self, vocab_size: int = VOCABULARY, width: int = HIDDEN, depth: int = 2, heads: int = 4, **values: Any
    ) -> None:
        self.vocab_size, self.width, self.depth, self.heads = vocab_size, width, depth, heads
        super().__init__(**values)


class HomeMadeLayer(GradientCheckpointingLayer):
    """Pre-norm attention with one fused projection, then a squared-ReLU MLP; names of its own."""

    def __init__(self, config: HomeMadeConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.first_norm = nn.LayerNorm(config.width)
        self.mix_in = nn.Linear(config.width, 3 * config.width, bias=False)
        self.mix_out = nn.Linear(config.width, config.width)
        self.second_norm = nn.LayerNorm(config.width)
        self.widen = nn.Linear(config.width, 2 * config.width)
        self.narrow = nn.Linear(2 * config.width, config.width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, width = hidden_states.shape
        mixed = self.mix_in(self.first_norm(hidden_states)).view(batch, length, 3, self.heads, -1)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden_states = hidden_states + self.mix_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden_states + self.narrow(self.widen(self.second_norm(hidden_states)).relu().square())


class HomeMadeForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM with no cache and learned positions."""

    config_class = HomeMadeConfig
    base_model_prefix = "trunk"
    _no_split_modules = ["HomeMadeLayer"]
    _tied_weights_keys = {"unembed.weight": "words.weight"}

    def __init__(self, config: HomeMadeConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(128, config.width)
        self.stages = nn.ModuleList([HomeMadeLayer(config) for _ in range(config.depth)])
        self.last_norm = nn.LayerNorm(config.width)
        self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        hidden_states = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return CausalLMOutput(logits=self.unembed(self.last_norm(hidden_states)))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}


AutoConfig.register("home_made", HomeMadeConfig, exist_ok=True)
AutoModelForCausalLM.register(HomeMadeConfig, HomeMadeForCausalLM, exist_ok=True)
FAMILIES["home_made"] = Family(
    "home_made",
    HomeMadeForCausalLM,
    lambda: HomeMadeConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True, use_cache=False),
)


@torch.no_grad()
def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model of a family, on the CPU in evaluation mode; the same for the same arguments."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.model_class(family.config()).eval()
        buffers = [b for n, b in model.named_buffers() if n in model.state_dict() and b.is_floating_point()]
        for tensor in [*model.parameters(), *buffers]:
            if tensor.ndim < 2:
                tensor += 0.2 * torch.randn_like(tensor)
            elif tensor.std() == 0:
                tensor.normal_(std=WEIGHT_STD)
            elif tensor.std() < WEIGHT_STD:
                tensor *= WEIGHT_STD / tensor.std()
    return model.to(dtype)


def build(name: str, directory: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write the family's checkpoint into ``directory`` with ``save_pretrained`` and return it."""
    make(name, dtype, seed).save_pretrained(directory)
    return Path(directory)


@cache
def _scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="slimwright-families-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def cached(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """:func:`build` once per process, in a directory of its own: never write to it."""
    return build(name, _scratch() / f"{name}-{str(dtype).removeprefix('torch.')}-{seed}", dtype, seed)
