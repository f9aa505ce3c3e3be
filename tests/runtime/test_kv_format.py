"""KIVI's rounding against its formula written out in plain Python, and what the card promises."""

import pytest
import torch

from slimwright.errors import InputError
from slimwright.runtime.kv_format import KvFormat


def rounded(values: list[float], bits: int) -> list[float]:
    """The group quantizer with float16 ends."""
    half = lambda x: float(torch.tensor(x).half())  # noqa: E731
    low = half(min(values))
    scale = half((max(values) - low) / (2**bits - 1))
    if scale == 0:
        return [low] * len(values)
    return [low + scale * min(max(round((v - low) / scale), 0), 2**bits - 1) for v in values]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_formula(bits: int) -> None:
    format = KvFormat(bits, 32, 64)
    keys, values = torch.randn(64, 5) * 3 + 1, torch.randn(3, 80)
    got = format.round_keys(keys)
    for start in (0, 32):
        for channel in range(5):
            expected = rounded(keys[start : start + 32, channel].tolist(), bits)
            torch.testing.assert_close(got[start : start + 32, channel], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    got = format.round_values(values)
    for token in range(3):
        for start, end in ((0, 32), (32, 64), (64, 80)):  # the last group is short
            expected = rounded(values[token, start:end].tolist(), bits)
            torch.testing.assert_close(got[token, start:end], torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_half_a_step(bits: int) -> None:
    keys = torch.randn(2, 128, 24) * 10
    format = KvFormat(bits, 64, 128)
    _, scale, low = format.pack_keys(keys)
    bound = scale.float().repeat_interleave(64, 1) / 2 + 2e-3 * low.float().abs().repeat_interleave(64, 1) * (bits == 8)
    top = low.float() + scale.float() * (2**bits - 1)  # rounding the ends to float16 may cut the largest
    slack = (keys.unflatten(1, (2, 64)).amax(2) - top).clamp(min=0).repeat_interleave(64, 1)
    assert ((format.round_keys(keys) - keys).abs() <= torch.maximum(bound, slack) + 0.008).all()


def test_layout_of_a_tile() -> None:
    """Byte i of a tile holds the codes i, i + n, ... from its low bits up: files and kernels rely on it."""
    codes = torch.arange(32) % 16
    values = torch.cat([codes.float(), torch.tensor([])])[None]
    packed, scale, low = KvFormat(4, 32, 32).pack_values(values)
    assert float(scale) == 1 and float(low) == 0
    assert packed.flatten().tolist() == [int(codes[i]) | int(codes[i + 16]) << 4 for i in range(16)]


def test_planted_outlier_channel() -> None:
    """The card's check: at 2 bits, ranges per channel are at least 4 times better on keys with an outlier channel."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(256, 64, generator=g)
    keys[:, 7] += 60
    format = KvFormat(2, 32, 128)
    per_channel = (format.round_keys(keys) - keys).square().mean()
    per_token = (format.round_values(keys) - keys).square().mean()
    assert per_token >= 4 * per_channel
    values = torch.randn(256, 64, generator=g)
    per_channel = (format.round_keys(values) - values).square().mean()
    per_token = (format.round_values(values) - values).square().mean()
    assert per_token <= 1.1 * per_channel


def test_constant_groups_and_extremes_are_kept() -> None:
    format = KvFormat(2, 32, 32)
    constant = torch.full((32, 4), 3.25)
    assert torch.equal(format.round_keys(constant), constant) and torch.equal(format.round_values(constant), constant)
    huge = torch.tensor([[1e6, -1e6, *[0.0] * 30]])
    assert torch.isfinite(format.round_values(huge)).all()


def test_specs() -> None:
    for format in (KvFormat(), KvFormat(2, 64, 256)):
        assert KvFormat.parse(format.spec) == format
    for wrong in ("kv4", "kv3:g32:w128", "kv4:g33:w66", "kv4:g32:w100", "kv4:g128:w64", "kv4:g32:w0"):
        with pytest.raises(InputError):
            KvFormat.parse(wrong)
