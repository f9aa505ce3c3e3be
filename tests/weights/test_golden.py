"""The formats against independent oracles: the gguf package, torch's float8, plain-Python nearest points, the cards."""

import math

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from slimwright.weights import FP8, MXFP4, NF4, Int, parse_grid
from slimwright.weights.nf4 import _DYNAMIC, LEVELS

GGUF = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("q4_0", "q8_0", "q4_k", "q6_k")}


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# -- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_bytes_equal_the_package(name: str, dtype: torch.dtype) -> None:
    grid, w = parse_grid(name), gaussian(64, 512).to(dtype).float()  # bfloat16 has ties of magnitude
    w[0, :32] = 0
    w[1, :32] = -0.75
    params = grid.fit(w)
    ours = grid.pack(grid.encode(w, params), params)[""].squeeze(-1).numpy()
    assert np.array_equal(ours, quants.quantize(w.numpy(), GGUF[name]))


@pytest.mark.parametrize("name", sorted(GGUF))
def test_gguf_values_equal_the_package(name: str) -> None:
    grid = parse_grid(name)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (40, 3, grid.block_bytes), dtype=np.uint8)
    for at in {"q4_0": [0], "q8_0": [0], "q4_k": [0, 2], "q6_k": [208]}[name]:  # any float16 that is finite
        blocks[..., at : at + 2] = rng.normal(size=(40, 3)).astype(np.float16)[..., None].view(np.uint8)
    data = blocks.reshape(40, -1)
    codes, params = grid.unpack({"": torch.from_numpy(data).unsqueeze(-1)}, 3 * grid.block)
    assert np.array_equal(grid.decode(codes, params).numpy(), quants.dequantize(data, GGUF[name]))
    repacked = grid.pack(codes, params)[""].squeeze(-1).numpy()
    assert np.array_equal(repacked, data)


def test_q4_0_holds_a_constant_negative_block() -> None:
    w = torch.full((1, 32), -0.5)
    grid = parse_grid("q4_0")
    assert torch.equal(grid.round(w, grid.fit(w)), w)


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k"])
def test_importance_lowers_the_weighted_error(name: str) -> None:
    grid, w = parse_grid(name), gaussian(64, 512)
    importance = torch.exp(2 * gaussian(1, 512, seed=1)[0])
    plain, aware = grid.round(w, grid.fit(w)), grid.round(w, grid.fit(w, importance))
    loss = lambda values: ((values - w).square() * importance).sum()  # noqa: E731
    assert loss(aware) < 0.95 * loss(plain)


# -- FP8 ---------------------------------------------------------------------------------------------------------------


def test_fp8_is_torch_s_cast() -> None:
    w = gaussian(32, 96)
    grid = FP8()
    params = grid.fit(w)
    scale = (w.abs().amax(1, keepdim=True) / 448).float()
    cast = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(grid.encode(w, params), cast.view(torch.uint8))
    assert torch.equal(grid.round(w, params), cast.float() * scale)
    assert torch.equal(params["scale"], scale)


def test_fp8_values_already_on_the_grid_come_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    w = every[torch.isfinite(every)].view(1, -1) * 2.0**-3
    for grid in (FP8(), FP8(per_tensor=True)):
        assert torch.equal(grid.round(w, grid.fit(w)), w)


# -- NF4 ---------------------------------------------------------------------------------------------------------------


def test_nf4_codes_are_the_nearest_levels() -> None:
    w = gaussian(4, 192)
    grid = NF4(double=False)
    params = grid.fit(w)
    codes = grid.encode(w, params)
    for row in range(4):
        for block in range(3):
            values = w[row, block * 64 : block * 64 + 64]
            absmax = values.abs().max()
            assert params["absmax"][row, block] == absmax
            for value, code in zip(values.tolist(), codes[row, block * 64 : block * 64 + 64].tolist(), strict=True):
                distances = [abs(value / float(absmax) - level) for level in LEVELS]
                assert distances[code] <= min(distances) + 1e-7


def test_nf4_midpoints_take_the_lower_code() -> None:
    levels = torch.tensor(LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    w = torch.zeros(1, 64)
    w[0, :15], w[0, 15:30], w[0, 30] = midpoints, above, 1.0
    grid = NF4(double=False)
    codes = grid.encode(w, grid.fit(w))[0]
    assert codes[:15].tolist() == list(range(15))
    assert codes[15:30].tolist() == list(range(1, 16))


def test_nf4_codes_equal_a_search_over_all_midpoints() -> None:
    levels = torch.tensor(LEVELS)
    w = gaussian(256, 1024)
    grid = NF4(double=False)
    params = grid.fit(w)
    unit = (w.unflatten(1, (-1, 64)) * (1 / params["absmax"]).unsqueeze(2)).clamp(-1, 1).flatten(1)
    assert torch.equal(grid.encode(w, params), torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8))


def test_nf4_values_on_the_levels_are_exact() -> None:
    w = torch.tensor(LEVELS).repeat(4).view(1, 64) * 0.37
    grid = NF4(double=False)
    assert torch.equal(grid.round(w, grid.fit(w)), w)


def test_the_dynamic_code() -> None:
    levels = _DYNAMIC.tolist()
    assert len(set(levels)) == 256
    assert levels == sorted(levels)
    assert levels[-1] == 1.0
    assert 0.0 in levels
    assert -1.0 not in levels
    # The top decade has 64 intervals of 0.9 / 64 each; the lowest one interval, whose middle is 0.55e-6.
    assert levels[-2] == pytest.approx(1 - 0.9 / 128, rel=1e-6)
    assert levels[0] == -levels[-2]
    assert min(level for level in levels if level > 0) == pytest.approx(0.55e-6, rel=1e-6)


def test_double_quantization_by_hand() -> None:
    """Plain Python over the definition."""
    w = gaussian(100, 192)  # 300 blocks: one whole superblock and one of 44
    grid = NF4()
    params = grid.fit(w)
    packed = grid.pack(grid.encode(w, params), params)
    absmax = w.view(-1, 64).abs().amax(1)
    mean = float(absmax.mean())
    assert packed["_absmax_mean"].item() == pytest.approx(mean, rel=1e-6)
    assert packed["_absmax_scale"].shape == (2,)
    levels = _DYNAMIC.tolist()
    stored = packed["_absmax"].flatten().tolist()
    for first, last in ((0, 256), (256, 300)):
        offsets = [float(value) - mean for value in absmax[first:last]]
        scale = max(map(abs, offsets))
        assert packed["_absmax_scale"][first // 256].item() == pytest.approx(scale, rel=1e-5)
        for offset, code in zip(offsets, stored[first:last], strict=True):
            assert abs(offset / scale - levels[code]) <= min(abs(offset / scale - level) for level in levels) + 1e-5
    decoded = grid.decode(*grid.unpack(packed, 192))
    single = NF4(double=False)
    assert torch.equal(grid.encode(w, params), single.encode(w, single.fit(w)))  # chosen with the exact absmax
    assert (decoded - single.round(w, single.fit(w))).abs().max() < 0.03 * absmax.max()


def test_nf4_costs_what_the_paper_says() -> None:
    assert NF4().bits_per_weight(4096, 4096) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)
    assert NF4(double=False).bits_per_weight(4096, 4096) == 4.5


# -- MXFP4 -------------------------------------------------------------------------------------------------------------

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def test_mxfp4_by_hand() -> None:
    """Ties go to the even code, values above 6 saturate, the sign is bit 3."""
    w = torch.tensor([[4.0, 7.9, -7.9, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, -0.75, -2.6, 0.0, 6.0]])
    grid = MXFP4()
    params = grid.fit(w)
    assert params["scale"].tolist() == [[127]]  # floor(log2 7.9) - 2 = 0
    assert grid.encode(w, params).tolist() == [[6, 7, 15, 0, 1, 2, 2, 4, 4, 6, 6, 7, 10, 13, 0, 7]]


def test_mxfp4_is_the_nearest_point() -> None:
    w = gaussian(8, 96)
    grid = MXFP4()
    params = grid.fit(w)
    values = grid.round(w, params)
    for row in range(8):
        for block in range(3):
            cut = w[row, block * 32 : block * 32 + 32].tolist()
            power = 2.0 ** (math.floor(math.log2(max(map(abs, cut)))) - 2)
            for value, got in zip(cut, values[row, block * 32 : block * 32 + 32].tolist(), strict=True):
                assert abs(got - value) == pytest.approx(min(abs(abs(value) - power * size) for size in E2M1), abs=1e-7)


def test_mxfp4_values_on_the_grid_come_back() -> None:
    w = torch.tensor([[sign * size for size in E2M1 for sign in (1.0, -1.0)] * 2]) * 2.0**-9
    grid = MXFP4()
    assert torch.equal(grid.round(w, grid.fit(w)), w)


# -- Int ---------------------------------------------------------------------------------------------------------------


def test_int_by_hand() -> None:
    grid = Int(4, group=8)
    w = torch.tensor([[-1.0, 2.75, 0.0, 0.125, 0.25, 0.375, -0.125, 1.0]])
    params = grid.fit(w)
    assert params["scale"].tolist() == [[0.25]]  # (2.75 + 1) / 15
    assert params["zero"].tolist() == [[4.0]]
    assert grid.encode(w, params).tolist() == [[0, 15, 4, 4, 5, 6, 4, 8]]  # 0.5 -> 0, 1.5 -> 2, -0.5 -> 0
    symmetric = Int(4, group=8, symmetric=True)
    params = symmetric.fit(torch.tensor([[-1.75, 1.0, 0, 0, 0, 0, 0, 0.25]]))
    assert params["scale"].tolist() == [[0.25]]  # 1.75 / 7
    assert symmetric.encode(torch.tensor([[-3.0, 9, 0.5, 0, 0, 0, 0, 0]]), params).tolist() == [[0, 15, 10] + [8] * 5]


def test_int_zero_points_are_packed_two_to_a_byte() -> None:
    grid = Int(4, group=8)
    params = {"scale": torch.ones(1, 3), "zero": torch.tensor([[1.0, 2.0, 15.0]])}
    assert grid.pack(torch.zeros(1, 24, dtype=torch.uint8), params)["_zero"].tolist() == [[0x21, 0x0F]]


def test_short_last_group() -> None:
    grid, w = Int(3, group=32), gaussian(5, 75)
    params = grid.fit(w)
    values = grid.round(w, params)
    for first, last in ((0, 32), (32, 64), (64, 75)):
        part = w[:, first:last].contiguous()
        assert torch.equal(values[:, first:last], Int(3).round(part, Int(3).fit(part)))


def test_the_largest_weight_is_not_clipped_by_tiny_scales() -> None:
    """A subnormal float16 scale is rounded up: else the range would lose up to a third."""
    w = torch.tensor([[0.0, 1.4, 0.7, 0, 0, 0, 0, 0]]) * 2.0**-24 * 15
    grid = Int(4, group=8)
    params = grid.fit(w)
    assert (params["scale"] * 15 >= w.max()).all()
    assert (grid.round(w, params) - w).abs().max() <= params["scale"].max() / 2


# -- the cards' table of signal to noise -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "decibels"),
    [
        ("mxfp4", 18.8),
        ("nf4", 20.7),
        ("q4_0", 21.3),
        ("int4:g32", 21.9),
        ("q4_k", 23.0),
        ("int4:g64", 20.8),
        ("int4:g128", 19.95),
    ],
)
def test_signal_to_noise_on_gaussian_weights(spec: str, decibels: float) -> None:
    grid, w = parse_grid(spec), gaussian(512, 1024)
    noise = (grid.round(w, grid.fit(w)) - w).square().sum()
    assert 10 * math.log10(w.square().sum() / noise) == pytest.approx(decibels, abs=0.15)
