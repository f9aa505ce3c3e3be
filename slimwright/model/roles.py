"""What a weight is for, by its name: tables of the names that model code uses. Second to what is observed."""

from __future__ import annotations

import re

_BY_LEAF: dict[str, str] = {}
for _role, _names in {
    "q": "q_proj query q_lin q wq to_q query_proj q_a_proj q_b_proj linear_q",
    "k": "k_proj key k_lin k wk to_k key_proj linear_k",
    "v": "v_proj value v_lin v wv to_v value_proj linear_v",
    "kv": "kv_proj kv_a_proj_with_mqa kv_b_proj kv_a_proj",
    "qkv": "qkv_proj query_key_value Wqkv W_pack c_attn qkv att_proj in_proj_qkv",
    "o": "o_proj out_lin o linear_o",
    "gate": "gate gate_proj wi_0 gate_linear",
    "up": "up_proj fc1 c_fc fc_in dense_h_to_4h wi_1 wi lin1 up_linear linear1 ffn",
    "gate_up": "gate_up_proj Wi w12",
    "down": "down_proj fc2 fc_out dense_4h_to_h lin2 down_linear linear2 ffn_output",
    "router": "router shared_expert_gate",
    "head": "lm_head embed_out vocab_projector generator_lm_head classifier cls_classifier distillation_classifier "
    "classification_head score",
}.items():
    _BY_LEAF |= dict.fromkeys(_names.split(), _role)

_ATTENTION = re.compile(r"attn|attention|mha\b|(^|\.)att(\.|$)", re.IGNORECASE)
_NOT_ATTENTION = re.compile(r"mamba|ssm|linear_attn", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|dense", re.IGNORECASE)
_OUTPUT = {"out_proj", "Wo", "wo", "dense", "c_proj", "proj", "to_out"}
_MLP_NAMES = {"c_proj": "down", "wo": "down", "Wo": "down", "w1": "gate", "w2": "down", "w3": "up"}


def role_of(path: str) -> str:
    """Role of the weight of the module at ``path`` (module names), one of structure.ROLES; ``other`` if no table knows.

    Embeddings, the head and fused experts are known by what they are: their callers do not ask. A module called
    ``gate`` is a ``gate``; that it is a router is seen by the experts beside it.
    """
    *parents, leaf = path.split(".")
    parent = parents[-1] if parents else ""
    context = ".".join(parents[-2:])
    if leaf in _OUTPUT and _ATTENTION.search(context) and not _NOT_ATTENTION.search(context):
        return "o"
    if leaf in _BY_LEAF:
        return _BY_LEAF[leaf]
    if leaf == "dense" and parent in ("intermediate", "output"):
        return "up" if parent == "intermediate" else "down"
    if leaf in _MLP_NAMES and _MLP.search(context):
        return _MLP_NAMES[leaf]
    return "other"
