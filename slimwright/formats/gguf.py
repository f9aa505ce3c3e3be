"""GGUF as a target: what llama.cpp loads. Names and layout of the container follow ggml-org/ggml's docs/gguf.md and the
architectures of llama.cpp; the ``gguf`` package writes the container.

Matrices are on Q4_0, Q8_0, Q4_K or Q6_K, whose payload here is ggml's own blocks byte for byte, or plain 16 or 32 bits.
Vectors and position embeddings become float32, as llama.cpp wants them. Q4_K and Q6_K need rows of a multiple of 256
inputs; where there are not, their substitutes are Q4_0 and Q8_0, which need a multiple of 32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.checkpoint import TensorEntry
from slimwright.errors import InputError
from slimwright.formats.target import TargetProfile, Weight
from slimwright.weights import Q4_0, Q4_K, Q6_K, Q8_0, Grid
from slimwright.weights.activations import Activations

ALIGNMENT = 32
_BLOCKS: tuple[Grid, ...] = (Q4_0(), Q4_K(), Q6_K(), Q8_0())
_SUBSTITUTES: Mapping[Grid, Grid] = {Q4_K(): Q4_0(), Q6_K(): Q8_0()}

_LLAMA: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2: Mapping[str, str] = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NAMES: Mapping[str, Mapping[str, str]] = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}
"""Names of modules by ``model_type``, which is llama.cpp's name of the architecture too."""

_LAYER = re.compile(r"(?:model\.layers|(?:transformer\.)?h)\.(\d+)\.(.+)\.(weight|bias)")
_OUTSIDE = re.compile(r"(?:transformer\.)?(.+)\.(weight|bias)")
_MASKS = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias|.*rotary_emb\.inv_freq")


def tensor_name(family: str, name: str) -> str | None:
    """llama.cpp's name of a tensor by its disk name; None for what it makes itself (masks, frequencies).

    Raises:
        InputError: it has no place for the tensor.
    """
    if _MASKS.fullmatch(name):
        return None
    table = NAMES[family]
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in table:
        return f"blk.{layer[1]}.{table[layer[2]]}.{layer[3]}"
    outside = _OUTSIDE.fullmatch(name)
    if outside and outside[1] in table:
        return f"{table[outside[1]]}.{outside[2]}"
    raise InputError(f"llama.cpp's {family} has no place for the tensor '{name}': it cannot be written as gguf.")


class GGUF(TargetProfile):
    """See the module.

    Args:
        family: the model's ``model_type``, one of :data:`NAMES`.
        names: of all tensors of the model that are written, by disk name.
        head_bytes: of the container's header and metadata, without the tensors' own entries.
    """

    name: ClassVar[str] = "gguf"

    def __init__(self, family: str, names: Mapping[str, str], head_bytes: int = 0) -> None:
        self.family = family
        self.names = names
        self.head_bytes = head_bytes

    def grids(self, site: Weight, rounding: Activations | None = None) -> tuple[Grid, ...]:
        dense = site.kind not in ("linear", "conv1d", "embedding") or len(site.shape) != 2
        if dense or rounding is not None or self.is_wide(site.name):
            return ()
        return tuple(grid for grid in _BLOCKS if grid.illegal(site.rows, site.columns) is None)

    def substitute(self, site: Weight, grid: Grid) -> Grid | None:
        other = _SUBSTITUTES.get(grid)
        return other if other in self.grids(site) else None

    def is_wide(self, name: str, dimensions: int = 2) -> bool:
        """Whether a tensor is stored in float32 whatever it was."""
        return dimensions < 2 or self.names.get(name, "").startswith("position_embd")

    def entries(self, site: Weight, grid: Grid, rounding: Activations | None = None) -> list[TensorEntry]:
        return [TensorEntry(self.names[site.name], torch.uint8, (site.rows, grid.nbytes(1, site.columns)))]

    def kept(self, entry: TensorEntry) -> TensorEntry | None:
        if entry.name not in self.names:
            return None
        wide = self.is_wide(entry.name, len(entry.shape)) or entry.dtype not in (torch.float16, torch.bfloat16)
        return TensorEntry(self.names[entry.name], torch.float32 if wide else entry.dtype, entry.shape)

    def cost(self, entries: Iterable[TensorEntry], budget: int) -> int:
        """Data up to the next multiple of 32, and the entry: name, dimensions, type, offset."""
        return sum(
            -(-entry.nbytes // ALIGNMENT) * ALIGNMENT + 8 + len(entry.name.encode()) + 4 + 8 * len(entry.shape) + 12
            for entry in entries
        )

    def overhead(self, budget: int, max_shard_bytes: int) -> int:
        return self.head_bytes + ALIGNMENT


def permuted_rows(name: str, rows: int, config: Mapping[str, Any]) -> Tensor | None:
    """Which row of a matrix or vector of Llama's q and k comes where, (rows,) int64; None for all other tensors.

    llama.cpp rotates neighbours where transformers rotates halves: the rows of each head, (2, half), become (half, 2).
    """
    if config.get("model_type") != "llama":
        return None
    heads = config["num_attention_heads"]
    if ".self_attn.k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".self_attn.q_proj." not in name:
        return None
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """What Llama 3.1 divides the rotary frequencies by, (head_dim / 2,) float32; None for plain rotary embeddings.

    Raises:
        InputError: a scaling that is not written.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind != "llama3":
        raise InputError(f"The rotary embedding is scaled by '{kind}', which is not written as gguf: only llama3 is.")
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    length = 2 * torch.pi * base ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = (float(rope["original_max_position_embeddings"]) / length - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).float()


def metadata(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Key → (type, value) of what llama.cpp must know of the model.

    Raises:
        InputError: a family that is not written.
    """
    family = config.get("model_type")
    if family not in NAMES:
        raise InputError(f"A {family} model is not written as gguf; {', '.join(NAMES)} are.")
    if config.get("use_sliding_window"):
        raise InputError("Sliding windows of attention are not written as gguf.")
    gpt2 = family == "gpt2"
    heads = config["n_head" if gpt2 else "num_attention_heads"]
    width = config["n_embd" if gpt2 else "hidden_size"]
    inner = (config.get("n_inner") or 4 * width) if gpt2 else config["intermediate_size"]
    found: dict[str, tuple[str, Any]] = {
        "context_length": ("uint32", config["n_positions" if gpt2 else "max_position_embeddings"]),
        "embedding_length": ("uint32", width),
        "block_count": ("uint32", config["n_layer" if gpt2 else "num_hidden_layers"]),
        "feed_forward_length": ("uint32", inner),
        "attention.head_count": ("uint32", heads),
    }
    if gpt2:
        found["attention.layer_norm_epsilon"] = ("float32", config.get("layer_norm_epsilon", 1e-5))
    else:
        size = config.get("head_dim") or width // heads
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        found |= {
            "attention.head_count_kv": ("uint32", config.get("num_key_value_heads") or heads),
            "attention.layer_norm_rms_epsilon": ("float32", config.get("rms_norm_eps", 1e-6)),
            "attention.key_length": ("uint32", size),
            "attention.value_length": ("uint32", size),
            "rope.dimension_count": ("uint32", size),
            "rope.freq_base": ("float32", float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)),
        }
    found = {f"{family}.{key}": value for key, value in found.items()}
    found[f"{family}.vocab_size"] = ("uint32", config["vocab_size"])
    return found


_SPLITS: Mapping[str, str] = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}
"""llama.cpp's names of the ways that text is split before merges, by the regular expression of tokenizer.json."""

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5


def vocabulary(tokenizer: Mapping[str, Any], size: int) -> dict[str, tuple[str, Any]]:
    """Key → (type, value) of a byte-level BPE tokenizer.

    Args:
        tokenizer: tokenizer.json.
        size: rows of the embedding; tokens beyond the tokenizer's are unused.

    Raises:
        InputError: the target cannot carry the tokenizer.
    """
    model = tokenizer.get("model") or {}
    split = _splitting(tokenizer)
    if reason := _unlike(tokenizer, split):
        raise InputError(
            f"The tokenizer cannot be written as gguf ({reason}): only byte-level BPE that splits text as GPT-2, Qwen2 "
            "or Llama 3 does is."
        )
    tokens = {index: token for token, index in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added.get("special") else _USER
    if max(tokens) >= size:
        raise InputError(f"The tokenizer has a token {max(tokens)}, but the model's vocabulary ends at {size - 1}.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", split),
        "tokenizer.ggml.tokens": ("array", [tokens.get(index, f"[PAD{index}]") for index in range(size)]),
        "tokenizer.ggml.token_type": ("array", [kinds.get(index, _UNUSED) for index in range(size)]),
        "tokenizer.ggml.merges": ("array", merges),
        "tokenizer.ggml.add_bos_token": ("bool", _adds(tokenizer, 0)),
        "tokenizer.ggml.add_eos_token": ("bool", _adds(tokenizer, -1)),
    }


def _unlike(tokenizer: Mapping[str, Any], split: str | None) -> str:
    """What of a tokenizer llama.cpp's byte-level BPE has not; empty where it has all."""
    model = tokenizer.get("model") or {}
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return f"its model is {model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
    if split is None:
        return "it splits text in another way"
    if normalizer not in (None, "NFC"):  # NFC is Qwen's, which llama.cpp leaves out
        return f"it normalizes text by {normalizer}"
    if bool(model.get("ignore_merges")) != (split == "llama-bpe"):
        return f"ignore_merges is {bool(model.get('ignore_merges'))}, which does not go with the splits of {split}"
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            return f"it has {key}"
    for added in tokenizer.get("added_tokens") or []:
        for key in ("lstrip", "rstrip", "single_word"):
            if added.get(key):
                return f"its token {added.get('content')} has {key}"
    return ""


def _splitting(tokenizer: Mapping[str, Any]) -> str | None:
    pre = tokenizer.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or [pre]
    kinds = [part.get("type") for part in parts]
    spaced = any(part.get("add_prefix_space") for part in parts)
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not spaced:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True) and not spaced:
        isolated = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
        return _SPLITS.get((parts[0].get("pattern") or {}).get("Regex", "")) if isolated else None
    return None


def _adds(tokenizer: Mapping[str, Any], place: int) -> bool:
    """Whether the tokenizer puts a special token at the beginning (0) or the end (-1) of a text."""
    post = tokenizer.get("post_processor") or {}
    for part in post.get("processors") or [post]:
        single = part.get("single")
        if isinstance(single, list) and len(single) > 1 and "SpecialToken" in single[place]:
            return True
    return False
