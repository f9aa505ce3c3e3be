"""The packed cache as transformers uses it: bytes, exactness of the newest tokens, kinds of layers, refusals."""

import copy

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from slimwright.errors import InputError
from slimwright.runtime.kv_cache import KvLayer, attention_layers, cache_nbytes, kv_cache, refusal
from slimwright.runtime.kv_format import KvFormat
from slimwright.runtime.kv_simulate import simulated
from tests.families import FAMILIES, make

SMALL = KvFormat(4, 32, 32)


def formats_of(model, format=SMALL):
    return {index: format for index, sliding in attention_layers(model.config).items() if not sliding}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_what_is_allocated(bits: int, dtype: torch.dtype) -> None:
    """At every length, however the tokens came."""
    format = KvFormat(bits, 32, 64)
    for chunks in ([1] * 130, [70, 1, 1, 60, 200, 1], [64], [65, 64]):
        layer, length = KvLayer(format), 0
        for count in chunks:
            layer.update(torch.randn(2, 3, count, 40).to(dtype), torch.randn(2, 3, count, 24).to(dtype))
            length += count
            assert layer.nbytes == format.nbytes(length, 2, 3, 40, 24, dtype.itemsize), (chunks, length)


def test_bits_per_element_at_length() -> None:
    """The card: 2 * 16 / group bits beside a code's own."""
    whole = 8192 * 2 * 128 * 2
    for bits in (2, 4, 8):
        bytes = KvFormat(bits, 32, 128).nbytes(8192, 1, 2, 64, 64, 2)
        assert abs(8 * bytes / (whole // 2) - (bits + 1)) < 0.35  # the window of 128 tokens is the rest


def test_short_texts_are_exact() -> None:
    """The card's degenerate case: no more tokens than the window holds."""
    keys, values = torch.randn(1, 2, 128, 32), torch.randn(1, 2, 128, 32)
    layer = KvLayer(KvFormat(2, 32, 128))
    for token in range(128):
        got = layer.update(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        assert torch.equal(got[0], keys[:, :, : token + 1]) and torch.equal(got[1], values[:, :, : token + 1])


@pytest.mark.parametrize("chunks", [[100, 1, 1, 1], [40, 30, 33], [1] * 103])
def test_what_is_packed_when(chunks: list[int]) -> None:
    """Whatever the chunks: keys before the newest token's block and values before the window are rounded, nothing else,
    and nothing is rounded twice."""
    format, total = KvFormat(2, 32, 32), sum(chunks)
    keys, values = torch.randn(2, 2, total, 32), torch.randn(2, 2, total, 32)
    layer, done = KvLayer(format), 0
    for count in chunks:
        layer.update(keys[:, :, done : done + count], values[:, :, done : done + count])
        done += count
    got_keys, got_values = layer.dense()
    old = (total - 1) // 32 * 32
    assert torch.equal(got_keys[:, :, :old], format.round_keys(keys[:, :, :old]))
    assert torch.equal(got_keys[:, :, old:], keys[:, :, old:])
    assert torch.equal(got_values[:, :, : total - 32], format.round_values(values[:, :, : total - 32]))
    assert torch.equal(got_values[:, :, total - 32 :], values[:, :, total - 32 :])


def test_rows_are_selected_and_repeated() -> None:
    layer = KvLayer(SMALL)
    layer.update(torch.randn(3, 2, 70, 32), torch.randn(3, 2, 70, 32))
    before, after = layer.dense(), copy.deepcopy(layer)
    after.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(after.dense()[0], before[0][[2, 0, 0]])
    after.batch_select_indices(torch.tensor([1]))
    after.batch_repeat_interleave(2)
    after.update(torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32))  # memory is described anew
    assert torch.equal(after.dense()[1][:, :, :38], before[1][[0, 0]][:, :, :38])
    after.reset()
    assert after.get_seq_length() == 0 and after.nbytes == 0


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_neox", "mixtral"])
def test_token_by_token_equals_one_forward(name: str) -> None:
    """Cached equals uncached within nothing but the cache's rounding: text that goes through the packed cache token by
    token has the logits of one forward in which every token sees what would be packed by then."""
    model = make(name)
    format = KvFormat(8, 32, 32)  # at 8 bits a rounding that falls the other way moves little
    formats, ids = formats_of(model, format), torch.randint(3, 300, (2, 75), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), simulated(model, formats) as seen:
        expected = model(input_ids=ids, use_cache=False).logits
        exact = seen.copy()
    assert set(formats) <= exact
    cache, got = kv_cache(model.config, formats), []
    with torch.no_grad():
        for token in range(ids.shape[1]):
            got.append(model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True).logits)
        plain = model(input_ids=ids, use_cache=False).logits
    got, scale = torch.cat(got, 1), expected.abs().max()
    assert (got - expected).abs().max() <= 2e-3 * scale
    assert (got - expected).abs().max() < 0.25 * (got - plain).abs().max() + 1e-5 * scale  # and rounding shows


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
def test_every_family_is_packed_or_refused_by_name(name: str) -> None:
    config = FAMILIES[name].config()
    layers = attention_layers(config)
    packed = [index for index, sliding in layers.items() if not sliding]
    none = {"mamba", "t5", "flan_t5", "bart", "whisper", "mistral", "llama4", "home_made"}
    second = {"jamba", "qwen3_next", "nemotron_h", "gemma2", "gemma3", "gpt_oss"}
    assert packed == ([] if name in none else [1] if name in second else [0, 1])
    if packed:
        made = kv_cache(config, dict.fromkeys(packed, SMALL))
        assert [index for index, layer in enumerate(made.layers) if isinstance(layer, KvLayer)] == packed
    other = next((index for index in range(2) if index not in packed), None)
    if other is not None:
        with pytest.raises(InputError, match=config.model_type):
            kv_cache(config, {other: SMALL})
        assert refusal(config, other).count(".") <= 3


def test_no_more_tokens_than_the_capacity() -> None:
    model = make("llama")
    cache = kv_cache(model.config, formats_of(model), capacity=40)
    ids = torch.randint(3, 300, (1, 40))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(InputError, match="holds 40 tokens, but 41 are needed"):
            model(input_ids=ids[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match="cannot forget"):
        cache.layers[0].crop(-1)


def test_bytes_of_a_whole_cache() -> None:
    """Sliding layers are transformers' own, bounded by their window."""
    model = make("gemma2")
    cache = kv_cache(model.config, formats_of(model))
    with torch.no_grad():
        model(input_ids=torch.randint(3, 300, (2, 100)), past_key_values=cache)
    assert cache_nbytes(cache) == SMALL.nbytes(100, 2, 2, 32, 32, 4) + 2 * 2 * 7 * 64 * 4
    plain = DynamicCache(config=AutoConfig.for_model("gpt2"))
    assert cache_nbytes(plain) == 0
