"""Target profiles, and what is written for them, against the formats' definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from slimwright.checkpoint import TensorEntry
from slimwright.errors import InputError
from slimwright.formats.compressed_tensors import CompressedTensors, quantization_config
from slimwright.formats.gguf import _SPLITS, GGUF, metadata, permuted_rows, rope_factors, tensor_name, vocabulary
from slimwright.weights import parse_grid
from slimwright.weights.activations import Activations


@dataclass(frozen=True)
class Weight:
    """A linear layer."""

    name: str = "model.layers.0.mlp.up_proj.weight"
    role: str = "up"
    kind: str = "linear"
    shape: tuple[int, ...] = (64, 256)
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]


GGUF_NAMES = {"model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight", "model.norm.weight": "output_norm.weight"}


@pytest.mark.parametrize(
    ("spec", "weight", "rounding", "legal"),
    [
        ("int4:g32:sym", Weight(), None, True),
        ("int8:row:sym", Weight(), None, True),
        ("fp8", Weight(), None, True),
        ("bf16", Weight(), None, True),
        ("keep", Weight(role="head"), None, True),
        ("int4:g32:sym", Weight(role="head"), None, False),
        ("int4:g32:sym", Weight(kind="embedding", role="embed"), None, False),
        ("int4:g32:sym", Weight(transposed=True), None, False),
        ("int4:g32:sym", Weight(shape=(64, 100)), None, False),
        ("int4:g128", Weight(), None, False),
        ("int3:g32:sym", Weight(), None, False),
        ("nf4", Weight(), None, False),
        ("int8:row:sym", Weight(), "int8:token", True),
        ("int8:g32:sym", Weight(), "int8:token", False),
        ("int4:g32:sym", Weight(), "int8:token", False),
        ("fp8:tensor", Weight(), "fp8:tensor=0.5", True),
        ("fp8:tensor", Weight(), None, False),
        ("int8:row:sym", Weight(), "fp8:token", False),
    ],
)
def test_what_compressed_tensors_takes(spec: str, weight: Weight, rounding: str | None, legal: bool) -> None:
    profile, given = CompressedTensors(), Activations.parse(rounding) if rounding else None
    assert (profile.illegal(weight, spec, given) is None) is legal
    if not legal:
        with pytest.raises(InputError, match=f"'{weight.name}' on {spec}.*legal there.*keep"):
            profile.check({weight.name: spec}, [weight], {weight.name: given} if given else {})


def test_what_gguf_takes() -> None:
    profile, wide, odd = GGUF("llama", GGUF_NAMES), Weight(), Weight(shape=(64, 96))
    assert {grid.spec for grid in profile.grids(wide)} == {"q4_0", "q4_k", "q6_k", "q8_0"}
    assert {grid.spec for grid in profile.grids(odd)} == {"q4_0", "q8_0"}
    assert str(profile.substitute(odd, parse_grid("q4_k"))) == "q4_0"
    assert str(profile.substitute(odd, parse_grid("q6_k"))) == "q8_0"
    assert profile.substitute(odd, parse_grid("int4:g32")) is None
    assert profile.grids(Weight(shape=(64, 40))) == ()
    norm = profile.kept(TensorEntry("model.norm.weight", torch.bfloat16, (256,)))
    assert norm == TensorEntry("output_norm.weight", torch.float32, (256,))
    entries = profile.entries(wide, parse_grid("q4_k"))
    assert [entry.nbytes for entry in entries] == [64 * 144]
    # name's length 8 and its 19 letters, dimensions 4 + 2 × 8, type 4, offset 8
    assert profile.cost(entries, 10**6) == 64 * 144 + 8 + 19 + 4 + 16 + 12


def test_a_refusal_names_sites_and_what_is_legal() -> None:
    sites = [Weight(name=f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)]
    with pytest.raises(InputError) as caught:
        CompressedTensors().check({site.name: "int3:g64" for site in sites}, sites, {})
    text = str(caught.value)
    assert "'model.layers.0.mlp.up_proj.weight' and 2 more on int3:g64" in text
    assert "int4:g32:sym" in text and text.count("\n") == 0


@pytest.mark.parametrize("spec", ["int4:g32:sym", "int8:g64:sym"])
def test_packed_words_are_a_stream_of_codes(spec: str) -> None:
    grid, weight = parse_grid(spec), Weight(shape=(6, 64))
    dense = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    params = grid.fit(dense)
    codes = grid.encode(dense, params)
    tensors = CompressedTensors().tensors(weight, grid, codes, params)
    entries = CompressedTensors().entries(weight, grid)
    assert {e.name: (e.dtype, e.shape) for e in entries} == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    packed, bits = tensors["model.layers.0.mlp.up_proj.weight_packed"], 4 if spec.startswith("int4") else 8
    for row in range(6):
        number = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(packed[row]))
        signed = [(number >> (bits * i) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(64)]
        scales = tensors["model.layers.0.mlp.up_proj.weight_scale"][row].float()
        scale = scales.repeat_interleave(64 // len(scales))
        assert torch.equal(torch.tensor(signed) * scale, grid.decode(codes, params)[row])


def test_schemes_are_grouped_and_the_rest_is_ignored() -> None:
    int4, int8 = parse_grid("int4:g32:sym"), parse_grid("int8:row:sym")
    token = Activations.parse("int8:token")
    one = quantization_config({"a": (int4, None), "b": (int4, None)}, ["lm_head"], "0.15.0")
    assert one["format"] == "pack-quantized" and one["config_groups"]["group_0"]["targets"] == ["Linear"]
    two = quantization_config({"a": (int4, None), "b": (int8, token), "c": (int8, token)}, ["lm_head"], "0.15.0")
    assert two["format"] == "mixed-precision" and two["ignore"] == ["lm_head"]
    groups = list(two["config_groups"].values())
    assert [group["targets"] for group in groups] == [["a"], ["b", "c"]]
    assert groups[0]["weights"]["strategy"] == "group" and groups[0]["weights"]["group_size"] == 32
    assert groups[1]["input_activations"]["dynamic"] is True and groups[1]["weights"]["strategy"] == "channel"


def test_llamas_rows_are_turned_as_rotary_pairs() -> None:
    """Rotating neighbours of permuted rows gives what rotating halves gives, permuted alike: by pairs of angles."""
    heads, size = 3, 8
    order = permuted_rows("model.layers.0.self_attn.q_proj.weight", heads * size, {
        "model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": 1,
    })  # fmt: skip
    assert order is not None
    for place, row in enumerate(order.tolist()):
        head, inside = divmod(place, size)
        pair, second = divmod(inside, 2)  # neighbours 2p and 2p + 1 turn by angle p
        assert row == head * size + pair + second * size // 2  # as the halves' p and p + size / 2 do
    keys = permuted_rows("model.layers.0.self_attn.k_proj.bias", size, {
        "model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": 1,
    })  # fmt: skip
    assert keys is not None and keys.tolist() == order[:size].tolist()
    assert (
        permuted_rows("model.layers.0.self_attn.v_proj.weight", 24, {"model_type": "llama", "num_attention_heads": 3})
        is None
    )
    assert permuted_rows("model.layers.0.self_attn.q_proj.weight", 24, {"model_type": "qwen2"}) is None


def test_rotary_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    found = rope_factors(config.to_dict())
    assert found is not None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(plain / found, scaled, rtol=1e-5)
    assert found.min() == 1 and math.isclose(float(found.max()), 8.0, rel_tol=1e-6)
    assert rope_factors({"rope_parameters": {"rope_type": "default"}}) is None
    with pytest.raises(InputError, match="'yarn'"):
        rope_factors({"rope_parameters": {"rope_type": "yarn"}})


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("llama", "model.layers.12.self_attn.q_proj.weight", "blk.12.attn_q.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
        ("qwen3", "model.layers.3.self_attn.q_norm.weight", "blk.3.attn_q_norm.weight"),
        ("llama", "model.embed_tokens.weight", "token_embd.weight"),
        ("llama", "lm_head.weight", "output.weight"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias", "blk.2.attn_qkv.bias"),
        ("gpt2", "h.2.mlp.c_proj.weight", "blk.2.ffn_down.weight"),
        ("gpt2", "wpe.weight", "position_embd.weight"),
        ("gpt2", "h.2.attn.bias", None),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_names_of_llama_cpp(family: str, name: str, expected: str | None) -> None:
    assert tensor_name(family, name) == expected


def test_what_gguf_cannot_carry_is_refused() -> None:
    with pytest.raises(InputError, match="no place for the tensor"):
        tensor_name("llama", "model.layers.0.extra.weight")
    with pytest.raises(InputError, match="A mamba model is not written as gguf; llama, qwen2, qwen3, gpt2 are"):
        metadata({"model_type": "mamba"})


def byte_level(split: str | None = None, **model: Any) -> dict[str, Any]:
    """tokenizer.json of three tokens and an end."""
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": split is None}
    first = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], **model},
        "pre_tokenizer": last if split is None else {"type": "Sequence", "pretokenizers": [first, last]},
        "added_tokens": [{"id": 3, "content": "<end>", "special": True}],
    }


QWEN2, LLAMA3 = _SPLITS


def test_vocabularies_of_gguf() -> None:
    found = vocabulary(byte_level(), 5)
    assert found["tokenizer.ggml.tokens"][1] == ["a", "b", "ab", "<end>", "[PAD4]"]
    assert found["tokenizer.ggml.token_type"][1] == [1, 1, 1, 3, 5]
    assert found["tokenizer.ggml.merges"][1] == ["a b"] and found["tokenizer.ggml.pre"][1] == "gpt-2"
    with pytest.raises(InputError, match="token 3, but the model's vocabulary ends at 2"):
        vocabulary(byte_level(), 3)
    assert vocabulary(byte_level(QWEN2), 5)["tokenizer.ggml.pre"][1] == "qwen2"
    llama = byte_level(LLAMA3, ignore_merges=True)
    assert vocabulary(llama, 5)["tokenizer.ggml.pre"][1] == "llama-bpe"
    for place, words in (((True, False), ["SpecialToken", "Sequence"]), ((False, True), ["Sequence", "SpecialToken"])):
        llama["post_processor"] = {"type": "TemplateProcessing", "single": [{word: {}} for word in words]}
        found = vocabulary(llama, 5)
        assert tuple(found[f"tokenizer.ggml.add_{end}_token"][1] for end in ("bos", "eos")) == place


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": []}, "pre_tokenizer": {"type": "Metaspace"}}, "its model is Unigram"),
        (byte_level(byte_fallback=True), "its model is BPE with byte fallback"),  # Llama 2's, once SentencePiece
        (byte_level(LLAMA3), "ignore_merges is False"),
        (byte_level(ignore_merges=True), "ignore_merges is True"),
        (byte_level(r"\s+"), "it splits text in another way"),
        (byte_level() | {"normalizer": {"type": "NFKC"}}, "it normalizes text by NFKC"),
        (byte_level(end_of_word_suffix="</w>"), "it has end_of_word_suffix"),
        (byte_level() | {"added_tokens": [{"id": 3, "content": "<m>", "lstrip": True}]}, "its token <m> has lstrip"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_carry_is_refused(tokenizer: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"cannot be written as gguf \({words}") as caught:
        vocabulary(tokenizer, 5)
    assert str(caught.value).count("\n") == 0
