"""The models of the zoo: shape, objective and schedule of each.

Widths are multiples of 256 (the longest block of GGUF's k-quants). Weights are stored as the published models of each
family store theirs: float32, and bfloat16 for Llama and Qwen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from slimwright.zoo import bundled_path
from slimwright.zoo.objectives import Digits, MaskedTokens, NextToken, Objective, SpanCorruption
from slimwright.zoo.tokens import VOCABULARY
from slimwright.zoo.training import Schedule

WINDOW = 512
ENCODER_WINDOW = 32
SPAN_WINDOW = 256
BUNDLED_WINDOW = 1024
END = 0  # the bundled tokenizer's end of text

# Four kinds of text, by top-level package of the standard library; single modules belong to none.
TOPICS = {
    "interface": frozenset({"idlelib", "tkinter", "turtledemo", "curses"}),
    "network": frozenset({"asyncio", "concurrent", "email", "http", "multiprocessing", "urllib", "wsgiref", "xmlrpc"}),
    "build": frozenset({"ctypes", "distutils", "ensurepip", "importlib", "lib2to3", "unittest", "venv"}),
    "formats": frozenset({"dbm", "encodings", "help", "html", "json", "re", "sqlite3", "tomllib", "xml", "zoneinfo"}),
}


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        description: what it is, in one line.
        model: makes it, untrained or as the model that a fine-tune starts from, in float32.
        objective: reads the data and says what is learned.
        schedule: steps and rates.
        dtype: of the weights that are written.
        fine_tune: whether it starts from the bundled LM; its figure is then reported before and after.
    """

    description: str
    model: Callable[[], PreTrainedModel]
    objective: Callable[[], Objective]
    schedule: Schedule
    dtype: torch.dtype
    fine_tune: bool = False


def _padded_with_end(model: PreTrainedModel) -> PreTrainedModel:
    """Generation fills up with the end of text. In the config an id would freeze that row of the embedding."""
    assert model.generation_config is not None
    model.generation_config.pad_token_id = END
    return model


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=WINDOW,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
    )
    return _padded_with_end(GPT2LMHeadModel(config))


def _qwen2() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
    )
    return _padded_with_end(Qwen2ForCausalLM(config))


def _qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        router_aux_loss_coef=0.01,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=END,
        eos_token_id=END,
    )
    return _padded_with_end(Qwen3MoeForCausalLM(config))


def _bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=MaskedTokens.vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=ENCODER_WINDOW,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=MaskedTokens.PAD,
    )
    return BertForMaskedLM(config)


def _vit() -> PreTrainedModel:
    config = ViTConfig(
        image_size=Digits.SIDE,
        patch_size=2,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    return ViTForImageClassification(config)


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=SpanCorruption.PAD,
        eos_token_id=SpanCorruption.END,
    )
    config.decoder_start_token_id = SpanCorruption.PAD
    return T5ForConditionalGeneration(config)


def _bundled() -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32)


def _fine_tune(topic: str) -> Recipe:
    return Recipe(
        f"the bundled LM, fine-tuned on the packages {', '.join(sorted(TOPICS[topic]))}",
        _bundled,
        partial(NextToken, BUNDLED_WINDOW, TOPICS[topic]),
        Schedule(60, 5e-4, 10, 0.8),
        torch.bfloat16,
        fine_tune=True,
    )


_next_token = partial(NextToken, WINDOW)

RECIPES = {
    "gpt2": Recipe(
        "GPT-2: learned positions, fused q/k/v, Conv1D, biases, tied",
        _gpt2, _next_token, Schedule(220, 3e-3, 30), torch.float32,
    ),
    "qwen2": Recipe(
        "Qwen2: grouped queries, biases on q/k/v, tied",
        _qwen2, _next_token, Schedule(120, 3e-3, 30), torch.bfloat16,
    ),
    "qwen3-moe": Recipe(
        "Qwen3-MoE: 8 experts of which 2 run, first block dense, tied",
        _qwen3_moe, _next_token, Schedule(150, 3e-3, 30), torch.bfloat16,
    ),
    "bert": Recipe(
        "BERT: a masked language model, norms after the sublayers",
        _bert, partial(MaskedTokens, ENCODER_WINDOW), Schedule(1300, 2e-3, 20, muon_factor=4.0), torch.float32,
    ),
    "vit": Recipe(
        "ViT: a classifier of handwritten digits of 8 x 8 pixels",
        _vit, Digits, Schedule(250, 1e-3, 40), torch.float32,
    ),
    "t5": Recipe(
        "T5: encoder and decoder, relative positions, no biases, tied",
        _t5, partial(SpanCorruption, SPAN_WINDOW), Schedule(220, 3e-3, 30), torch.float32,
    ),
    **{f"bundled-{topic}": _fine_tune(topic) for topic in TOPICS},
}  # fmt: skip
