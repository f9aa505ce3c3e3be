"""A decoding step in one call: which models have one, that it gives transformers' tokens, and what it refuses."""

from __future__ import annotations

import copy
import ctypes
import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from slimwright.errors import InputError, SlimwrightError
from slimwright.kernels import packed
from slimwright.runtime import decode, fused
from slimwright.runtime.kv_cache import KvLayer, kv_cache
from slimwright.runtime.kv_format import KvFormat
from slimwright.runtime.modules import PackedLinear
from tests.runtime.packing import packed_family, prompts

pytestmark = pytest.mark.skipif(packed.library() is None, reason="no compiled kernels here")

SPECS = ("int4:g32", "int8:row", "int3:g64", "nf4", "q4_0", "int4:g20")
WHOLE = ("llama", "llama_tied", "granite", "smollm3", "qwen2", "qwen3")
"""Families built as most are; the others are refused for what stands beside them."""
OTHERWISE = {
    "gemma2": "built otherwise", "olmo2": "built otherwise", "cohere": "otherwise",
    "qwen3_moe": "built otherwise", "gpt2": "is not layers",
}  # fmt: skip


def loaded(name: str, dtype: torch.dtype = torch.float32, dense: bool = False) -> Any:
    family = packed_family(name, dtype, SPECS)
    directory = family.dense if dense else family.directory
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def steps(model: Any, rows: int = 2, count: int = 6, formats: Any = None, whole: bool = True) -> torch.Tensor:
    """Logits (count, rows, vocabulary) of tokens after a prompt of 40, by the fused step or by the modules."""
    ids = torch.randint(3, 300, (rows, 40 + count), generator=torch.Generator().manual_seed(2))
    cache = kv_cache(model.config, formats or {}, ours=True)
    with torch.no_grad():
        model(input_ids=ids[:, :40], past_key_values=cache, use_cache=True)
        assert not decode.supported(model)
        decoding = decode.Decoding(cache, None)
        if not whole:
            decoding.steps[rows] = None
        with decode.attention_by_cache(model):
            found = [
                decode.decode(model, decoding, ids[:, at : at + 1], torch.full((rows, 1), at)).float()
                for at in range(40, 40 + count)
            ]
    assert (decoding.steps[rows] is not None) == whole
    return torch.stack(found)


@pytest.mark.parametrize("name", WHOLE)
def test_greedy_tokens_are_those_of_the_dense_model(name: str) -> None:
    model, dense = loaded(name), loaded(name, dense=True)
    for rows in (3, 1):
        how = {**prompts(rows), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**how), dense.generate(**how))
        assert fused.why_not(model, rows) == ""


@pytest.mark.parametrize("name", OTHERWISE)
def test_models_that_are_built_or_compute_otherwise_run_their_modules(name: str) -> None:
    model = loaded(name)
    decode.supported(model)
    assert re.search(OTHERWISE[name], fused.why_not(model, 1)), fused.why_not(model, 1)
    how = {**prompts(), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**how), loaded(name, dense=True).generate(**how))


def test_low_rank_factors_are_multiplied_one_after_the_other() -> None:
    """Packed and plain factors, alone and beside a weight; the operators give the same bits."""
    forms = ("int4:g32+lowrank:r3", "lowrank:r16:int8:row", "int3:g32+lowrank:r4:int4:row", "lowrank:r8", "int8:row")
    family, called = packed_family("llama", torch.float32, forms), []
    model = AutoModelForCausalLM.from_pretrained(family.directory, dtype=torch.float32).eval()
    dense = AutoModelForCausalLM.from_pretrained(family.dense, dtype=torch.float32).eval()
    for rows in (3, 1):
        how = {**prompts(rows), "max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(**how), dense.generate(**how))
    assert fused.why_not(model, 1) == "a weight has low-rank factors"

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    modules = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert {2, 3} <= {len(m.factors("weight") or ()) for m in modules}
    x = torch.randn(1, modules[0].in_features)
    with torch.no_grad():
        direct = modules[0](x)
        with Watch():
            assert torch.equal(modules[0](x), direct)
    assert "slimwright.packed_linear.default" in called  # who watches sees the operators


@pytest.mark.parametrize(
    ("where", "field", "says"),
    [("layers.1", "residual_multiplier", "computes otherwise"), ("", "embedding_multiplier", "embeddings are changed")],
)
def test_what_is_computed_is_compared(where: str, field: str, says: str) -> None:
    """Granite's modules are those of Llama; its multipliers, which a file may set, are in its forward alone."""
    models = [loaded("granite"), loaded("granite", dense=True)]
    for model in models:
        setattr(model.model.get_submodule(where), field, 0.7)
    how = {**prompts(), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(models[0].generate(**how), models[1].generate(**how))
    assert says in fused.why_not(models[0], 1)


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_modules(bits: int | None, dtype: torch.dtype) -> None:
    """Over a packed cache too, across the moment in which it packs; windows of 32 are full after 40 tokens."""
    model = loaded("qwen3", dtype)
    formats = None if bits is None else {i: KvFormat(bits, 32, 32) for i in range(model.config.num_hidden_layers)}
    expected = steps(model, count=30, formats=formats, whole=False)
    got = steps(model, count=30, formats=formats)
    # a key that lies between two codes may go to the other one, where rounding is coarse
    bound = {None: 1e-4, 8: 0.01, 4: 0.05, 2: 0.2}[bits] + (0.08 if dtype == torch.bfloat16 else 0)
    assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_texts_of_any_lengths_go_together_in_any_parts() -> None:
    """Whole prompts, parts of prompts and next tokens in one call, across the moments in which a cache grows: each
    part's last logits are those of the model's own forward over its text."""
    model = loaded("qwen3")
    assert not decode.supported(model)
    texts = torch.randint(3, 300, (4, 300), generator=torch.Generator().manual_seed(3))
    whole = fused.Fused(model, fused.asked(model))
    caches = [kv_cache(model.config, {}, ours=True).layers for _ in texts]
    fed = [0] * len(texts)
    with torch.no_grad():
        expected = model(input_ids=texts).logits
        for counts in ((1, 200, 7, 0), (1, 1, 30, 1), (5, 60, 1, 2), (1, 1, 1, 1), (2, 30, 0, 250)):
            rows = [row for row, count in enumerate(counts) if count]
            parts = [torch.arange(fed[row], fed[row] + counts[row]) for row in rows]
            tokens = torch.cat([texts[row, part] for row, part in zip(rows, parts)])[:, None]
            given, own = [counts[row] for row in rows], [caches[row] for row in rows]
            got = whole(tokens, torch.cat(parts)[:, None], own, counts=given)
            fed = [before + count for before, count in zip(fed, counts)]
            for index, row in enumerate(rows):
                right = expected[row, fed[row] - 1]
                assert (got[index] - right).abs().max() <= 1e-4 * right.abs().max()


def test_rows_with_packed_caches_of_their_own_give_what_each_gives_alone() -> None:
    """Each packs at its own places; more than one token at once is refused, as by a ring that would lose some."""
    model = loaded("qwen3")
    assert not decode.supported(model)
    formats = {i: KvFormat(4, 32, 32) for i in range(model.config.num_hidden_layers)}
    lengths, whole = (1, 33, 60), fused.Fused(model, fused.asked(model))

    def filled() -> list[Any]:
        caches = [kv_cache(model.config, formats, ours=True) for _ in lengths]
        for cache, length in zip(caches, lengths):
            model(input_ids=torch.arange(5, 5 + length)[None], past_key_values=cache, use_cache=True)
        return [cache.layers for cache in caches]

    with torch.no_grad():
        together, alone = filled(), filled()
        for step in range(6):
            tokens = torch.tensor([[5], [7], [9]]) + step
            places = torch.tensor([[length + step] for length in lengths])
            got = whole(tokens, places, together, counts=[1, 1, 1])
            for row, cache in enumerate(alone):
                expected = whole(tokens[row : row + 1], places[row : row + 1], [cache])[0]
                # a key between two codes may go to the other one
                assert (got[row] - expected).abs().max() <= 0.05 * expected.abs().max()
        with pytest.raises(SlimwrightError, match="cache"):
            whole(torch.tensor([[5], [6]]), torch.tensor([[66], [67]]), together[2:], counts=[2])
    ring = KvLayer(sliding=8)
    assert ring.takes(8) and not ring.takes(9) and not KvLayer(KvFormat(4, 32, 32)).takes(2)


def test_bits_do_not_depend_on_threads() -> None:
    model, before = loaded("qwen2"), torch.get_num_threads()
    library = packed.library()
    assert library is not None
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for function in (packed.torch_threads(), None):
                library.share_threads(function)
                found.append(steps(model))
    finally:
        torch.set_num_threads(before)
        library.share_threads(packed._torch_threads())
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_hook_is_called() -> None:
    """Whoever watches a module sees it run."""
    model, seen = loaded("llama"), []
    decode.supported(model)
    assert fused.why_not(model, 1) == ""
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    assert fused.why_not(model, 1) == "a module is hooked"
    model.generate(**prompts(1), max_new_tokens=4, do_sample=False)
    assert len(seen) >= 4


def test_a_model_that_was_changed_is_not_believed() -> None:
    model = loaded("llama")
    decode.supported(model)
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    assert "changed" in fused.why_not(model, 1)


def test_out_of_memory_and_a_full_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = loaded("llama"), {**prompts(), "max_new_tokens": 6, "do_sample": False}
    expected, own = model.generate(**how), fused.Fused.__call__

    def failing(self: Any, *args: Any) -> Any:
        raise MemoryError("a decoding step")

    monkeypatch.setattr(fused.Fused, "__call__", failing)
    with pytest.raises(InputError, match="not enough memory to generate for this batch of 3 rows"):
        model.generate(**how)
    monkeypatch.setattr(fused.Fused, "__call__", own)
    assert torch.equal(model.generate(**how), expected)
    cache = kv_cache(model.config, {}, capacity=12, ours=True)
    with torch.no_grad():
        model(input_ids=prompts(1)["input_ids"], past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="holds 12 tokens, but 13 are needed"):
            decode.decoded(model, cache, torch.tensor([[5]]), torch.tensor([[12]]))


def test_descriptions_that_contradict_themselves_are_refused_by_the_kernels() -> None:
    """Every field damaged in turn: an error's number comes back, and nothing is written."""
    model = loaded("qwen2")
    steps(model, rows=1)
    cache = kv_cache(model.config, {}, capacity=20, ours=True)
    with torch.no_grad():
        model(input_ids=torch.arange(5, 15)[None], past_key_values=cache, use_cache=True)
    layers = [layer for layer in cache.layers if isinstance(layer, KvLayer)]
    whole = fused.Fused(model, fused.asked(model))
    whole(torch.tensor([[5]]), torch.tensor([[10]]), [layers])
    step = whole._step(1)
    structure = step.structure
    hidden, cosine = torch.ones(1, model.config.hidden_size), torch.ones(1, 16)
    structure.hidden, structure.cosine, structure.sine = (t.data_ptr() for t in (hidden, cosine, cosine))

    def refused(target: Any, field: str, wrong: Any) -> None:
        kept = getattr(target, field)
        setattr(target, field, wrong)
        assert step.run(ctypes.addressof(structure)) != 0, (field, wrong)
        setattr(target, field, kept)

    for field, values in {
        "batch": (0, -1, 2, 1 << 40), "width": (0, 8, 1 << 40), "layers": (-1,), "rotary": (-2, 3, 1 << 20),
        "caches": (0, 2, 1 << 40), "outputs": (0, 2), "positions": (0, 3), "type": (1, 2, 7), "threads": (0, 1 << 20),
        "layer": (None,), "cosine": (None,), "hidden": (None,), "final_gain": (None,), "logits": (None,),
        "parts": (None,),
    }.items():  # fmt: skip
        for value in values:
            refused(structure, field, value)
    layer, native = step.layers[0], layers[0].native
    for field in ("input_gain", "middle_gain", "kv"):
        refused(layer, field, None)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        refused(getattr(layer, name), "weight", None)
        for digits in (-1, 5, 1 << 33):
            refused(getattr(layer, name), "digits", digits)
    refused(layer.down, "weight", layer.o.weight)
    refused(layer.q, "weight", layer.k.weight)
    for field, value in {
        "batch": 2, "heads": 3, "kv_heads": 0, "key_dim": 1 << 30, "value_dim": 0, "dtype": 1, "window": 0,
        "length": 20, "key_window": None,
    }.items():  # fmt: skip
        refused(native, field, value)
    refused(native, "length", -3)
    assert torch.equal(hidden, torch.ones_like(hidden))
