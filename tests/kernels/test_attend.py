"""The compiled cache and attention against torch code: codes bit for bit, attention within float32's rounding."""

import ctypes

import pytest
import torch

from slimwright.errors import InputError
from slimwright.kernels import attend as kernel
from slimwright.runtime.kv_cache import KvLayer
from slimwright.runtime.kv_format import KvFormat

pytestmark = pytest.mark.skipif(kernel.library() is None, reason="no compiler")

FORMATS = [None, KvFormat(2, 32, 32), KvFormat(4, 32, 64), KvFormat(8, 64, 128), KvFormat(4, 128, 128)]
SHAPES = [  # batch, heads of keys and values, query heads, key dim, value dim, prompt, further tokens
    (1, 2, 14, 64, 64, 250, 8),
    (3, 2, 4, 16, 24, 60, 6),
    (2, 4, 4, 80, 48, 126, 4),
    (2, 1, 5, 33, 33, 300, 2),
    (1, 1, 1, 300, 40, 70, 2),
]


class TorchLayer(KvLayer):
    """The same without kernels."""

    def _allocate_window(self, window: int) -> None:
        super()._allocate_window(window)
        self.native = None


def states(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * 2 + 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(shape: tuple[int, ...], format: KvFormat | None, dtype: torch.dtype) -> None:
    batch, heads, queries, dim, width, prompt, steps = shape
    g = torch.Generator().manual_seed(0)
    layers = [KvLayer(format), TorchLayer(format)]
    keys, values = states((batch, heads, prompt, dim), g, dtype), states((batch, heads, prompt, width), g, dtype)
    for layer in layers:
        layer.update(keys, values)
    start = torch.tensor([0, 2, 4][:batch])
    for step in range(steps):
        query = states((batch, queries, 1, dim), g, dtype)
        new = (states((batch, heads, 1, dim), g, dtype), states((batch, heads, 1, width), g, dtype))
        how = {
            "start": start,
            "softcap": 30.0 * (step % 2),
            "sinks": torch.randn(queries, generator=g) if step % 3 else None,
        }
        got, expected = (layer.attend(query, new, dim**-0.5, **how) for layer in layers)
        bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
        assert (got - expected).abs().max() <= bound * expected.abs().max(), step
    assert layers[0].native is not None
    for ours, reference in zip(layers[0].dense(), layers[1].dense()):
        assert torch.equal(ours, reference)
    for name in ("key_scale", "key_low", "value_scale", "value_low"):
        if format is not None:
            used = slice(0, layers[1].parts[name].shape[2] if name[0] == "k" else format.packed_values(prompt + steps))
            assert torch.equal(layers[0].parts[name][:, :, used], layers[1].parts[name][:, :, used])


def test_threads_change_no_bit() -> None:
    """Work is cut the same for any number of threads."""
    g, found = torch.Generator().manual_seed(1), []
    keys, values = states((1, 2, 5000, 64), g, torch.float32), states((1, 2, 5000, 64), g, torch.float32)
    query, new = states((1, 14, 1, 64), g, torch.float32), states((1, 2, 1, 64), g, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = KvLayer(KvFormat(4))
            layer.update(keys, values)
            found.append(layer.attend(query, (new, new), 0.125))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_sliding_ring_equals_attention_over_the_window() -> None:
    g = torch.Generator().manual_seed(2)
    layer, seen = KvLayer(None, sliding=24), []
    for _ in range(60):
        query, key, value = (states((2, heads, 1, 32), g, torch.float32) for heads in (4, 2, 2))
        if not seen:
            layer.lazy_initialization(key, value)
        seen.append((key, value))
        got = layer.attend(query, (key, value), 0.2)
        keys, values = (torch.cat(part[-24:], 2).repeat_interleave(2, 1) for part in zip(*seen))
        weights = (query @ keys.transpose(-1, -2) * 0.2).softmax(-1)
        torch.testing.assert_close(got, (weights @ values).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert layer.nbytes == 2 * 2 * 24 * 64 * 4


def test_sizes_that_contradict_each_other_are_refused_by_the_kernel() -> None:
    layer = KvLayer(KvFormat(4, 32, 32))
    layer.update(torch.randn(1, 1, 70, 32), torch.randn(1, 1, 70, 32))
    query = torch.randn(1, 1, 1, 32)
    for field, value in (("bits", 3), ("group", 48), ("key_capacity", 31), ("window", 0), ("length", -1), ("dtype", 7)):
        native = kernel.Kv.from_buffer_copy(layer.native)
        setattr(native, field, value)
        out = torch.empty(1, 1, 1, 32)
        code = kernel.library().slimwright_kv_attend(ctypes.addressof(native), query.data_ptr(), out.data_ptr())
        assert code != 0, field
    native = kernel.Kv.from_buffer_copy(layer.native)
    native.length = 1000  # more than the packed parts hold
    with pytest.raises(InputError, match="full"):
        kernel.attend(native, query)
    with pytest.raises(TypeError, match="does not fit"):
        kernel.attend(layer.native, torch.randn(1, 1, 1, 31))
