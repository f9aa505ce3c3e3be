"""What each family's structure must be: written by hand from the architecture, never recorded from output.

Choice groups are written without the prefix of their block; the roles are those of the group's weights in the order q,
k, v, ..., gate, up, ...; ``x4`` says that each of four experts has them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ROUTER = "router: decides which experts run"


@dataclass(frozen=True)
class Expected:
    """One family.

    Attributes:
        stacks: module path of each stack, in forward order → (number of blocks, their class, runs of each).
        blocks: prefix on disk of a block → choice group → roles.
        outside: choice groups outside the blocks → roles.
        norms: tensors kept as ``norm``: gains and biases of norms.
        biases: tensors kept as ``bias``.
        kept: every other kept tensor → reason.
        ties: tied name → disk name of its owner.
        same_input: choice groups (full names) that are fed one tensor together though runtimes do not fuse them.
        renamed: whether any disk name differs from its module name.
        observed: whether a forward without values works.
    """

    stacks: dict[str, tuple[int, str, int]]
    blocks: dict[str, dict[str, str]]
    outside: dict[str, str]
    norms: int
    biases: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    same_input: tuple[frozenset[str], ...] = ()
    renamed: bool = False
    observed: bool = True


ATTENTION = {"self_attn.q_proj+k_proj+v_proj": "q k v", "self_attn.o_proj": "o"}
OUT_ATTENTION = {"self_attn.q_proj+k_proj+v_proj": "q k v", "self_attn.out_proj": "o"}
CROSS_ATTENTION = {"encoder_attn.q_proj": "q", "encoder_attn.k_proj+v_proj": "k v", "encoder_attn.out_proj": "o"}
GATED = {"mlp.gate_proj+up_proj": "gate up", "mlp.down_proj": "down"}
LLAMA = {**ATTENTION, **GATED}
EXPERTS = {"mlp.experts.gate_proj+up_proj": "gate up x4", "mlp.experts.down_proj": "down x4"}
FC = {"fc1": "up", "fc2": "down"}
CLIP_LAYER = {**OUT_ATTENTION, "mlp.fc1": "up", "mlp.fc2": "down"}
BERT_LAYER = {
    "attention.self.query+key+value": "q k v",
    "attention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
}
VIT_LAYER = {**BERT_LAYER, "attention.attention.query+key+value": "q k v"}
del VIT_LAYER["attention.self.query+key+value"]
UNTIED = {"model.embed_tokens": "embed", "lm_head": "head"}
TIED = {"model.embed_tokens": "embed"}
HEAD_TIE = {"lm_head.weight": "model.embed_tokens.weight"}


def both(prefix: str, block: dict[str, str], count: int = 2) -> dict[str, dict[str, str]]:
    """The same block ``count`` times."""
    return {prefix.format(index): block for index in range(count)}


def decoder(class_name: str, count: int = 2) -> dict[str, tuple[int, str, int]]:
    return {"model.layers": (count, class_name, 1)}


LAYERS = "model.layers.{}."

EXPECTED: dict[str, Expected] = {
    "llama": Expected(decoder("LlamaDecoderLayer"), both(LAYERS, LLAMA), UNTIED, norms=5),
    "llama_tied": Expected(decoder("LlamaDecoderLayer"), both(LAYERS, LLAMA), TIED, norms=5, ties=HEAD_TIE),
    "mistral": Expected(decoder("MistralDecoderLayer"), both(LAYERS, LLAMA), UNTIED, norms=5),
    # q, k and v have biases.
    "qwen2": Expected(decoder("Qwen2DecoderLayer"), both(LAYERS, LLAMA), TIED, norms=5, biases=6, ties=HEAD_TIE),
    # Norms of q and k.
    "qwen3": Expected(decoder("Qwen3DecoderLayer"), both(LAYERS, LLAMA), TIED, norms=9, ties=HEAD_TIE),
    "smollm3": Expected(decoder("SmolLM3DecoderLayer"), both(LAYERS, LLAMA), TIED, norms=5, ties=HEAD_TIE),
    "granite": Expected(decoder("GraniteDecoderLayer"), both(LAYERS, LLAMA), TIED, norms=5, ties=HEAD_TIE),
    # Norms before and after both sublayers; Gemma 3 also of q and k.
    "gemma2": Expected(decoder("Gemma2DecoderLayer"), both(LAYERS, LLAMA), TIED, norms=9, ties=HEAD_TIE),
    "gemma3": Expected(decoder("Gemma3DecoderLayer"), both(LAYERS, LLAMA), TIED, norms=13, ties=HEAD_TIE),
    "phi3": Expected(
        decoder("Phi3DecoderLayer"),
        both(
            LAYERS,
            {
                "self_attn.qkv_proj": "qkv",
                "self_attn.o_proj": "o",
                "mlp.gate_up_proj": "gate_up",
                "mlp.down_proj": "down",
            },
        ),
        UNTIED,
        norms=5,
    ),
    # LayerNorms with bias, biases of q, k, v.
    "stablelm": Expected(decoder("StableLmDecoderLayer"), both(LAYERS, LLAMA), UNTIED, norms=10, biases=6),
    "olmo2": Expected(decoder("Olmo2DecoderLayer"), both(LAYERS, LLAMA), UNTIED, norms=9),
    # Attention and MLP side by side after one norm.
    "cohere": Expected(
        decoder("CohereDecoderLayer"),
        both(LAYERS, LLAMA),
        TIED,
        norms=3,
        ties=HEAD_TIE,
        same_input=tuple(
            frozenset({f"model.layers.{i}.self_attn.q_proj+k_proj+v_proj", f"model.layers.{i}.mlp.gate_proj+up_proj"})
            for i in range(2)
        ),
    ),
    "mixtral": Expected(
        decoder("MixtralDecoderLayer"),
        both(
            LAYERS,
            {
                **ATTENTION,
                "block_sparse_moe.experts.w1+w3": "gate up x4",
                "block_sparse_moe.experts.w2": "down x4",
            },
        ),
        UNTIED,
        norms=5,
        kept={f"model.layers.{i}.block_sparse_moe.gate.weight": ROUTER for i in range(2)},
        renamed=True,
    ),
    "qwen3_moe": Expected(
        decoder("Qwen3MoeDecoderLayer"),
        {"model.layers.0.": LLAMA, "model.layers.1.": {**ATTENTION, **EXPERTS}},
        UNTIED,
        norms=9,
        kept={"model.layers.1.mlp.gate.weight": ROUTER},
        renamed=True,
    ),
    "olmoe": Expected(
        decoder("OlmoeDecoderLayer"),
        both(LAYERS, {**ATTENTION, **EXPERTS}),
        UNTIED,
        norms=9,
        kept={f"model.layers.{i}.mlp.gate.weight": ROUTER for i in range(2)},
        renamed=True,
    ),
    # Experts are fused on disk too; biases everywhere: 4 in attention and 2 of the experts in each layer.
    "gpt_oss": Expected(
        decoder("GptOssDecoderLayer"),
        both(LAYERS, {**ATTENTION, "mlp.experts.gate_up_proj": "gate_up", "mlp.experts.down_proj": "down"}),
        UNTIED,
        norms=5,
        biases=12,
        kept={
            f"model.layers.{i}.{name}": reason
            for i in range(2)
            for name, reason in {
                "mlp.router.weight": ROUTER,
                "mlp.router.bias": ROUTER,
                "self_attn.sinks": "vector",
            }.items()
        },
    ),
    # The first layer is dense. The down projections of q and of k/v read one tensor and are fused.
    "deepseek_v3": Expected(
        decoder("DeepseekV3DecoderLayer"),
        {
            f"model.layers.{i}.": {
                "self_attn.q_a_proj+kv_a_proj_with_mqa": "q kv",
                "self_attn.q_b_proj": "q",
                "self_attn.kv_b_proj": "kv",
                "self_attn.o_proj": "o",
                **mlp,
            }
            for i, mlp in enumerate(
                [
                    GATED,
                    {
                        **EXPERTS,
                        "mlp.shared_experts.gate_proj+up_proj": "gate up",
                        "mlp.shared_experts.down_proj": "down",
                    },
                ]
            )
        },
        UNTIED,
        norms=9,
        kept={
            "model.layers.1.mlp.gate.weight": ROUTER,
            "model.layers.1.mlp.gate.e_score_correction_bias": ROUTER,
        },
        renamed=True,
    ),
    # One Mamba layer with a dense MLP, one attention layer with experts.
    "jamba": Expected(
        {"model.layers": (2, "JambaMambaDecoderLayer JambaAttentionDecoderLayer", 1)},
        {
            "model.layers.0.": {
                "mamba.in_proj": "other",
                "mamba.x_proj": "other",
                "mamba.out_proj": "other",
                "feed_forward.gate_proj+up_proj": "gate up",
                "feed_forward.down_proj": "down",
            },
            "model.layers.1.": {
                **ATTENTION,
                "feed_forward.experts.gate_proj+up_proj": "gate up x4",
                "feed_forward.experts.down_proj": "down x4",
            },
        },
        UNTIED,
        norms=8,
        biases=2,
        kept={
            "model.layers.0.mamba.A_log": "functional use: read by JambaMambaMixer",
            "model.layers.0.mamba.dt_proj.weight": "functional use: read by JambaMambaMixer",
            "model.layers.0.mamba.D": "vector",
            "model.layers.0.mamba.conv1d.weight": "convolution",
            "model.layers.1.feed_forward.router.weight": ROUTER,
        },
        renamed=True,
    ),
    "qwen3_next": Expected(
        decoder("Qwen3NextDecoderLayer"),
        {
            f"model.layers.{i}.": {
                **mixer,
                **EXPERTS,
                "mlp.shared_expert.gate_proj+up_proj": "gate up",
                "mlp.shared_expert.down_proj": "down",
            }
            for i, mixer in enumerate(
                [{"linear_attn.in_proj_qkvz": "other", "linear_attn.out_proj": "other"}, ATTENTION]
            )
        },
        UNTIED,
        norms=8,
        biases=1,
        kept={
            "model.layers.0.linear_attn.A_log": "vector",
            "model.layers.0.linear_attn.conv1d.weight": "convolution",
            "model.layers.0.linear_attn.in_proj_ba.weight": "small: 512 values",
            **{
                f"model.layers.{i}.mlp.{name}.weight": ROUTER
                for i in range(2)
                for name in ("gate", "shared_expert_gate")
            },
        },
        renamed=True,
    ),
    # A layer is one of Mamba 2, attention or experts; experts have no gate.
    "nemotron_h": Expected(
        decoder("NemotronHBlock", 3),
        {
            "backbone.layers.0.": {"mixer.in_proj": "other", "mixer.out_proj": "other"},
            "backbone.layers.1.": {"mixer.q_proj+k_proj+v_proj": "q k v", "mixer.o_proj": "o"},
            "backbone.layers.2.": {
                "mixer.experts.up_proj": "up x4",
                "mixer.experts.down_proj": "down x4",
                "mixer.shared_experts.up_proj": "up",
                "mixer.shared_experts.down_proj": "down",
            },
        },
        {"backbone.embeddings": "embed", "lm_head": "head"},
        norms=5,
        biases=2,
        kept={
            "backbone.layers.0.mixer.A_log": "vector",
            "backbone.layers.0.mixer.D": "vector",
            "backbone.layers.0.mixer.conv1d.weight": "convolution",
            "backbone.layers.2.mixer.gate.weight": ROUTER,
            "backbone.layers.2.mixer.gate.e_score_correction_bias": ROUTER,
        },
        renamed=True,
    ),
    # One dense layer, one with experts that multiply all at once, in a class of their own.
    "llama4": Expected(
        decoder("Llama4TextDecoderLayer"),
        {
            "model.layers.0.": {
                **ATTENTION,
                "feed_forward.gate_proj+up_proj": "gate up",
                "feed_forward.down_proj": "down",
            },
            "model.layers.1.": {
                **ATTENTION,
                "feed_forward.shared_expert.gate_proj+up_proj": "gate up",
                "feed_forward.shared_expert.down_proj": "down",
            },
        },
        UNTIED,
        norms=5,
        kept={
            "model.layers.1.feed_forward.router.weight": ROUTER,
            "model.layers.1.feed_forward.experts.gate_up_proj": "functional use: read by Llama4TextExperts",
            "model.layers.1.feed_forward.experts.down_proj": "functional use: read by Llama4TextExperts",
        },
    ),
    # Experts of a class of its own, whose routing needs values: not observed.
    "jetmoe": Expected(
        decoder("JetMoeDecoderLayer"),
        both(LAYERS, {"self_attention.kv_proj": "kv"}),
        UNTIED,
        norms=5,
        biases=4,
        kept={
            **{
                f"model.layers.{i}.{path}.weight": "functional use: JetMoeParallelExperts is no linear or embedding"
                for i in range(2)
                for path in (
                    "mlp.input_linear",
                    "mlp.output_linear",
                    "self_attention.experts.input_linear",
                    "self_attention.experts.output_linear",
                )
            },
            **{
                f"model.layers.{i}.{path}.router.layer.weight": ROUTER
                for i in range(2)
                for path in ("mlp", "self_attention.experts")
            },
        },
        observed=False,
    ),
    "gpt2": Expected(
        {"transformer.h": (2, "GPT2Block", 1)},
        both(
            "transformer.h.{}.",
            {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"},
        ),
        {"transformer.wte": "embed", "transformer.wpe": "embed"},
        norms=10,
        biases=8,
        ties={"lm_head.weight": "transformer.wte.weight"},
    ),
    # Attention and MLP side by side; the head has a bias.
    "codegen": Expected(
        {"transformer.h": (2, "CodeGenBlock", 1)},
        both(
            "transformer.h.{}.",
            {"attn.qkv_proj": "qkv", "attn.out_proj": "o", "mlp.fc_in": "up", "mlp.fc_out": "down"},
        ),
        {"transformer.wte": "embed", "lm_head": "head"},
        norms=6,
        biases=5,
        same_input=tuple(
            frozenset({f"transformer.h.{i}.attn.qkv_proj", f"transformer.h.{i}.mlp.fc_in"}) for i in range(2)
        ),
    ),
    # Embeddings are narrower than the blocks.
    "opt": Expected(
        {"model.decoder.layers": (2, "OPTDecoderLayer", 1)},
        both("model.decoder.layers.{}.", {**OUT_ATTENTION, **FC}),
        {
            "model.decoder.embed_tokens": "embed",
            "model.decoder.embed_positions": "embed",
            "model.decoder.project_in": "other",
            "model.decoder.project_out": "other",
        },
        norms=10,
        biases=12,
        ties={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    ),
    "gpt_neox": Expected(
        {"gpt_neox.layers": (2, "GPTNeoXLayer", 1)},
        both(
            "gpt_neox.layers.{}.",
            {
                "attention.query_key_value": "qkv",
                "attention.dense": "o",
                "mlp.dense_h_to_4h": "up",
                "mlp.dense_4h_to_h": "down",
            },
        ),
        {"gpt_neox.embed_in": "embed", "embed_out": "head"},
        norms=10,
        biases=8,
        renamed=True,
    ),
    # The embedding has a LayerNorm.
    "bloom": Expected(
        {"transformer.h": (2, "BloomBlock", 1)},
        both(
            "transformer.h.{}.",
            {
                "self_attention.query_key_value": "qkv",
                "self_attention.dense": "o",
                "mlp.dense_h_to_4h": "up",
                "mlp.dense_4h_to_h": "down",
            },
        ),
        {"transformer.word_embeddings": "embed"},
        norms=12,
        biases=8,
        ties={"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
    "falcon": Expected(
        {"transformer.h": (2, "FalconDecoderLayer", 1)},
        both(
            "transformer.h.{}.",
            {
                "self_attention.query_key_value": "qkv",
                "self_attention.dense": "o",
                "mlp.dense_h_to_4h": "up",
                "mlp.dense_4h_to_h": "down",
            },
        ),
        {"transformer.word_embeddings": "embed"},
        norms=6,
        ties={"lm_head.weight": "transformer.word_embeddings.weight"},
        same_input=tuple(
            frozenset({f"transformer.h.{i}.self_attention.query_key_value", f"transformer.h.{i}.mlp.dense_h_to_4h"})
            for i in range(2)
        ),
    ),
    # LayerNorms without bias.
    "mpt": Expected(
        {"transformer.blocks": (2, "MptBlock", 1)},
        both(
            "transformer.blocks.{}.",
            {"attn.Wqkv": "qkv", "attn.out_proj": "o", "ffn.up_proj": "up", "ffn.down_proj": "down"},
        ),
        {"transformer.wte": "embed"},
        norms=5,
        ties={"lm_head.weight": "transformer.wte.weight"},
    ),
    "mamba": Expected(
        {"backbone.layers": (2, "MambaBlock", 1)},
        both("backbone.layers.{}.", {"mixer.in_proj": "other", "mixer.x_proj": "other", "mixer.out_proj": "other"}),
        {"backbone.embeddings": "embed"},
        norms=3,
        biases=4,
        kept={
            f"backbone.layers.{i}.mixer.{name}": reason
            for i in range(2)
            for name, reason in {
                "A_log": "functional use: read by MambaMixer",
                "dt_proj.weight": "functional use: read by MambaMixer",
                "D": "vector",
                "conv1d.weight": "convolution",
            }.items()
        },
        ties={"lm_head.weight": "backbone.embeddings.weight"},
    ),
    "bert": Expected(
        {"bert.encoder.layer": (2, "BertLayer", 1)},
        both("bert.encoder.layer.{}.", BERT_LAYER),
        {
            "bert.embeddings.word_embeddings": "embed",
            "bert.embeddings.position_embeddings": "embed",
            "cls.predictions.transform.dense": "other",
        },
        norms=12,
        biases=14,
        kept={"bert.embeddings.token_type_embeddings.weight": "small: 128 values"},
        ties={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "roberta": Expected(
        {"roberta.encoder.layer": (2, "RobertaLayer", 1)},
        both("roberta.encoder.layer.{}.", BERT_LAYER),
        {
            "roberta.embeddings.word_embeddings": "embed",
            "roberta.embeddings.position_embeddings": "embed",
            "lm_head.dense": "other",
        },
        norms=12,
        biases=14,
        kept={"roberta.embeddings.token_type_embeddings.weight": "small: 128 values"},
        ties={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
    ),
    # Embeddings of 32 are projected to 64 and back.
    "electra": Expected(
        {"electra.encoder.layer": (2, "ElectraLayer", 1)},
        both("electra.encoder.layer.{}.", BERT_LAYER),
        {
            "electra.embeddings.word_embeddings": "embed",
            "electra.embeddings.position_embeddings": "embed",
            "electra.embeddings_project": "other",
            "generator_predictions.dense": "other",
        },
        norms=12,
        biases=15,
        kept={"electra.embeddings.token_type_embeddings.weight": "small: 64 values"},
        ties={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    ),
    # The first layer has no attention norm. Wi makes gate and up at once.
    "modernbert": Expected(
        decoder("ModernBertEncoderLayer"),
        both(LAYERS, {"attn.Wqkv": "qkv", "attn.Wo": "o", "mlp.Wi": "gate_up", "mlp.Wo": "down"}),
        {"model.embeddings.tok_embeddings": "embed", "head.dense": "other"},
        norms=6,
        biases=1,
        ties={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    ),
    "distilbert": Expected(
        {"distilbert.transformer.layer": (2, "TransformerBlock", 1)},
        both(
            "distilbert.transformer.layer.{}.",
            {
                "attention.q_lin+k_lin+v_lin": "q k v",
                "attention.out_lin": "o",
                "ffn.lin1": "up",
                "ffn.lin2": "down",
            },
        ),
        {
            "distilbert.embeddings.word_embeddings": "embed",
            "distilbert.embeddings.position_embeddings": "embed",
            "vocab_transform": "other",
        },
        norms=12,
        biases=14,
        ties={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    ),
    # Three layers are one block, run three times.
    "albert": Expected(
        {"albert.encoder.albert_layer_groups.0.albert_layers": (1, "AlbertLayer", 3)},
        {
            "albert.encoder.albert_layer_groups.0.albert_layers.0.": {
                "attention.query+key+value": "q k v",
                "attention.dense": "o",
                "ffn": "up",
                "ffn_output": "down",
            }
        },
        {
            "albert.embeddings.word_embeddings": "embed",
            "albert.embeddings.position_embeddings": "embed",
            "albert.encoder.embedding_hidden_mapping_in": "other",
            "predictions.dense": "other",
        },
        norms=8,
        biases=9,
        kept={"albert.embeddings.token_type_embeddings.weight": "small: 64 values"},
        ties={
            "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
            "predictions.decoder.bias": "predictions.bias",
        },
    ),
    # Post-norm. On disk q, k and v are one matrix, which transformers cuts into three modules.
    "nomic_bert": Expected(
        {"nomic_bert.layers": (2, "NomicBertLayer", 1)},
        both(
            "nomic_bert.encoder.layers.{}.",
            {"attn.out_proj": "o", "mlp.fc12+fc11": "gate up", "mlp.fc2": "down"},
        ),
        {"nomic_bert.embeddings.word_embeddings": "embed", "cls.predictions.transform.dense": "other"},
        norms=12,
        biases=2,
        kept={
            "nomic_bert.embeddings.token_type_embeddings.weight": "small: 128 values",
            **{
                f"nomic_bert.encoder.layers.{i}.attn.Wqkv.weight": "converted by transformers on load" for i in range(2)
            },
        },
        ties={
            "cls.predictions.decoder.weight": "nomic_bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        renamed=True,
    ),
    "vit": Expected(
        {"vit.layers": (2, "ViTLayer", 1)},
        both("vit.encoder.layer.{}.", VIT_LAYER),
        {},
        norms=10,
        biases=14,
        kept={
            "classifier.weight": "small: 640 values",
            "vit.embeddings.cls_token": "small: 64 values",
            "vit.embeddings.position_embeddings": "functional use: read by ViTEmbeddings",
            "vit.embeddings.patch_embeddings.projection.weight": "convolution",
        },
        renamed=True,
    ),
    "deit": Expected(
        {"deit.layers": (2, "DeiTLayer", 1)},
        both("deit.encoder.layer.{}.", VIT_LAYER),
        {},
        norms=10,
        biases=15,
        kept={
            "cls_classifier.weight": "small: 640 values",
            "distillation_classifier.weight": "small: 640 values",
            "deit.embeddings.cls_token": "small: 64 values",
            "deit.embeddings.distillation_token": "small: 64 values",
            "deit.embeddings.position_embeddings": "functional use: read by DeiTEmbeddings",
            "deit.embeddings.patch_embeddings.projection.weight": "convolution",
        },
        renamed=True,
    ),
    # Two stages of two layers, 32 and 64 wide; a patch merging between them.
    "swin": Expected(
        {f"swin.encoder.layers.{stage}.blocks": (2, "SwinLayer", 1) for stage in range(2)},
        {f"swin.encoder.layers.{stage}.blocks.{i}.": BERT_LAYER for stage in range(2) for i in range(2)},
        {"swin.encoder.layers.0.downsample.reduction": "other"},
        norms=22,
        biases=26,
        kept={
            "classifier.weight": "small: 640 values",
            "swin.embeddings.patch_embeddings.projection.weight": "convolution",
            **{
                f"swin.encoder.layers.{stage}.blocks.{i}.attention.self.relative_position_bias_table": (
                    f"small: {49 * heads} values"
                )
                for stage, heads in enumerate((2, 4))
                for i in range(2)
            },
        },
        renamed=True,
    ),
    "bart": Expected(
        {"model.encoder.layers": (2, "BartEncoderLayer", 1), "model.decoder.layers": (2, "BartDecoderLayer", 1)},
        {
            **both("model.encoder.layers.{}.", {**OUT_ATTENTION, **FC}),
            **both("model.decoder.layers.{}.", {**OUT_ATTENTION, **CROSS_ATTENTION, **FC}),
        },
        {
            "model.shared": "embed",
            "model.encoder.embed_positions": "embed",
            "model.decoder.embed_positions": "embed",
        },
        norms=24,
        biases=32,
        kept={"final_logits_bias": "buffer"},
        ties={
            "lm_head.weight": "model.shared.weight",
            "model.encoder.embed_tokens.weight": "model.shared.weight",
            "model.decoder.embed_tokens.weight": "model.shared.weight",
        },
        same_input=(frozenset(f"model.decoder.layers.{i}.encoder_attn.k_proj+v_proj" for i in range(2)),),
    ),
    # k has no bias. The decoder's positions are a slice of the weight, the encoder's are looked up.
    "whisper": Expected(
        {
            "model.encoder.layers": (2, "WhisperEncoderLayer", 1),
            "model.decoder.layers": (2, "WhisperDecoderLayer", 1),
        },
        {
            **both("model.encoder.layers.{}.", {**OUT_ATTENTION, **FC}),
            **both("model.decoder.layers.{}.", {**OUT_ATTENTION, **CROSS_ATTENTION, **FC}),
        },
        {"model.decoder.embed_tokens": "embed", "model.encoder.embed_positions": "embed"},
        norms=24,
        biases=28,
        kept={
            "model.encoder.conv1.weight": "convolution",
            "model.encoder.conv2.weight": "convolution",
            "model.decoder.embed_positions.weight": "functional use: read by WhisperPositionalEmbedding",
        },
        ties={"proj_out.weight": "model.decoder.embed_tokens.weight"},
        same_input=(frozenset(f"model.decoder.layers.{i}.encoder_attn.k_proj+v_proj" for i in range(2)),),
    ),
    "clip": Expected(
        {
            "vision_model.encoder.layers": (2, "CLIPEncoderLayer", 1),
            "text_model.encoder.layers": (2, "CLIPEncoderLayer", 1),
        },
        {
            **both("text_model.encoder.layers.{}.", CLIP_LAYER),
            **both("vision_model.encoder.layers.{}.", CLIP_LAYER),
        },
        {
            "text_model.embeddings.token_embedding": "embed",
            "text_model.embeddings.position_embedding": "embed",
            "vision_model.embeddings.position_embedding": "embed",
            "text_projection": "other",
            "visual_projection": "other",
        },
        norms=22,
        biases=24,
        kept={
            "logit_scale": "vector",
            "vision_model.embeddings.class_embedding": "vector",
            "vision_model.embeddings.patch_embedding.weight": "convolution",
        },
    ),
    "llava": Expected(
        {
            "model.vision_tower.encoder.layers": (2, "CLIPEncoderLayer", 1),
            "model.language_model.layers": (2, "LlamaDecoderLayer", 1),
        },
        {
            **both("language_model.model.layers.{}.", LLAMA),
            **both("vision_tower.encoder.layers.{}.", CLIP_LAYER),
        },
        {
            "language_model.lm_head": "head",
            "language_model.model.embed_tokens": "embed",
            "vision_tower.embeddings.position_embedding": "embed",
            "multi_modal_projector.linear_1": "other",
            "multi_modal_projector.linear_2": "other",
        },
        norms=17,
        biases=14,
        kept={
            "vision_tower.embeddings.class_embedding": "vector",
            "vision_tower.embeddings.patch_embedding.weight": "convolution",
        },
        renamed=True,
    ),
    "paligemma": Expected(
        {
            "model.vision_tower.encoder.layers": (2, "SiglipEncoderLayer", 1),
            "model.language_model.layers": (2, "GemmaDecoderLayer", 1),
        },
        {
            **both("language_model.model.layers.{}.", LLAMA),
            **both("vision_tower.encoder.layers.{}.", CLIP_LAYER),
        },
        {
            "language_model.model.embed_tokens": "embed",
            "vision_tower.embeddings.position_embedding": "embed",
            "multi_modal_projector.linear": "other",
        },
        norms=15,
        biases=14,
        kept={"vision_tower.embeddings.patch_embedding.weight": "convolution"},
        ties={"lm_head.weight": "language_model.model.embed_tokens.weight"},
        renamed=True,
    ),
    # Names that no table knows: only the embeddings are recognised, by what they are.
    "home_made": Expected(
        {"stages": (2, "HomeMadeLayer", 1)},
        both("stages.{}.", {"mix_in": "other", "mix_out": "other", "widen": "other", "narrow": "other"}),
        {"words": "embed", "places": "embed"},
        norms=10,
        biases=6,
        ties={"unembed.weight": "words.weight"},
    ),
}


def _t5(mlp: dict[str, str], tail: str) -> Expected:
    attention = {"SelfAttention.q+k+v": "q k v", "SelfAttention.o": "o"}
    cross = {"EncDecAttention.q": "q", "EncDecAttention.k+v": "k v", "EncDecAttention.o": "o"}

    def at(layer: int, groups: dict[str, str]) -> dict[str, str]:
        return {f"layer.{layer}.{group}": roles for group, roles in groups.items()}

    return Expected(
        {"encoder.block": (2, "T5Block", 1), "decoder.block": (2, "T5Block", 1)},
        {
            **both("encoder.block.{}.", {**at(0, attention), **at(1, mlp)}),
            **both("decoder.block.{}.", {**at(0, attention), **at(1, cross), **at(2, mlp)}),
        },
        {"shared": "embed"},
        norms=12,
        kept={
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "small: 128 values"
            for part in ("encoder", "decoder")
        },
        ties={name: "shared.weight" for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", tail)},
        # All cross-attentions read the encoder's output.
        same_input=(frozenset(f"decoder.block.{i}.layer.1.EncDecAttention.k+v" for i in range(2)),),
    )


EXPECTED["t5"] = _t5({"DenseReluDense.wi": "up", "DenseReluDense.wo": "down"}, "lm_head.weight")
EXPECTED["flan_t5"] = _t5({"DenseReluDense.wi_0+wi_1": "gate up", "DenseReluDense.wo": "down"}, "lm_head.weight")
