"""The compiled kernels against the torch code that stands where there is no compiler."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import slimwright
from slimwright import kernels
from slimwright.errors import InputError
from slimwright.kernels import compiling, gram, packed, solve
from slimwright.weights import Int
from slimwright.weights.packing import pack_codes, unpack_codes
from slimwright.weights.ranges import shrink_ranges

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels here")

GRIDS = [
    Int(bits, group, symmetric=symmetric, zero=zero)  # type: ignore[arg-type]
    for bits in (2, 3, 4, 5, 6, 7, 8)
    for group in (8, 40, 64, 128, None)
    for symmetric, zero in ((False, "integer"), (True, "integer"), (False, "real"))
]


@contextlib.contextmanager
def torch_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "available", lambda *tensors: False)
        yield


def weights(columns: int) -> torch.Tensor:
    """Ordinary rows and hard ones: zeros, one value, far from zero, tiny, huge."""
    w = torch.randn(24, columns, generator=torch.Generator().manual_seed(columns)) * 0.05
    w[3] = 0
    w[4] = 0.7
    w[5] = w[5].abs() + 3
    w[6] *= 1e-7
    w[7] *= 1e6
    w[8, ::3] = 0
    w[9] = -w[9].abs()
    return w


@pytest.mark.parametrize("columns", [1, 7, 64, 100, 257])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_and_values_equal_bit_for_bit(grid: Int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(columns)
    params = grid.fit(w)
    codes, values = grid.encode(w, params), grid.decode(grid.encode(w, params), params)
    with torch_only(monkeypatch):
        reference = grid.fit(w)
        assert params.keys() == reference.keys()
        assert all(torch.equal(params[name], reference[name]) for name in params)
        assert torch.equal(codes, grid.encode(w, params))
        assert torch.equal(values, grid.decode(codes, params))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 127, 200])
def test_packing_gives_equal_bytes_and_comes_back(bits: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    with torch_only(monkeypatch):
        assert torch.equal(packed, pack_codes(codes, bits))
        assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("grid", GRIDS[::4], ids=str)
def test_range_search_finds_what_torch_finds(
    grid: Int, norm: float, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same factor but for near ties, which the order of sums and division decide."""
    w = weights(200)
    importance = torch.rand(200, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    low, high = shrink_ranges(grid, w, norm=norm, importance=importance)
    with torch_only(monkeypatch):
        expected_low, expected_high = shrink_ranges(grid, w, norm=norm, importance=importance)
    weight = torch.ones(200) if importance is None else importance

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        params = grid.from_range(low, high)
        return (weight * (grid.round(w, params) - w).abs() ** norm).sum(1)

    torch.testing.assert_close(error(low, high), error(expected_low, expected_high), rtol=2e-2, atol=1e-30)
    same = ((low == expected_low) & (high == expected_high)).float().mean()
    assert same > 0.9


def test_errors_are_summed_in_double() -> None:
    a, b = torch.randn(1001), torch.randn(1001)
    error, norm = solve.squared_error(a, b)
    assert error == pytest.approx(float((b - a).double().square().sum()), rel=1e-12)
    assert norm == pytest.approx(float(a.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("spec", ["int3:g64", "int4:row:sym", "nf4", "fp8", "mxfp4", "q4_0", "q8_0", "q4_k", "q6_k"])
def test_feedback_is_as_good_as_torch_s(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding near a tie decides all that follows, so codes differ here and there; the error does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    w = torch.randn(96, 256, generator=generator)
    stats = slimwright.SiteStatistics.from_inputs(x)
    assert stats.gram is not None

    def loss() -> float:
        delta = slimwright.method("quantize/gptq", grid=spec).solve(w, stats).dense() - w
        return float(((delta @ stats.gram) * delta).sum())

    found = loss()
    with torch_only(monkeypatch):
        assert found == pytest.approx(loss(), rel=0.02)


def test_a_tensor_that_a_kernel_cannot_take_is_refused() -> None:
    with pytest.raises(TypeError, match="contiguous"):
        kernels.pointer(torch.zeros(4, 4).t())
    with pytest.raises(TypeError, match="float32"):
        kernels.pointer(torch.zeros(4, dtype=torch.float64))
    assert not kernels.available(torch.zeros(4, 4).t())


def test_without_a_compiler_torch_does_the_work(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels._load.cache_clear()
    try:
        assert kernels.library() is None and "no-such-compiler" in kernels.why_not()
        value = slimwright.method("quantize/rtn", grid="int4:g64").solve(
            torch.randn(4, 64), slimwright.SiteStatistics.none()
        )
        assert value.dense().shape == (4, 64)
        with pytest.raises(InputError):
            slimwright.method("quantize/rtn", grid="int9")
    finally:
        kernels._load.cache_clear()


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (3, 5), (7, 16), (100, 17), (513, 47), (1025, 100), (40, 257)])
def test_grams_of_bfloat16_inputs(tokens: int, columns: int) -> None:
    """Against double; on any number of threads the same bits; what lies beside the matrix is not touched. So are the
    moments, whose largest magnitude is exact."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    room = torch.full((columns + 2, columns), 7.0)
    total = room[1:-1].zero_()
    if not gram.gram_available(x, total):
        pytest.skip("this CPU has no bfloat16 products")
    before = torch.get_num_threads()
    found, moments = [], torch.zeros(3, 3, columns)
    for own, threads in zip(moments, (1, 2, 3), strict=True):
        torch.set_num_threads(threads)
        total.zero_()
        gram.add_gram(total, x, own)
        gram.add_gram(total, x, own)
        found.append(total.tril())
    torch.set_num_threads(before)
    exact = 2 * (x.double().T @ x.double()).tril()
    assert float((found[0].double() - exact).abs().max()) <= 3e-6 * float(exact.abs().max())
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (room[0] == 7).all() and (room[-1] == 7).all()
    most, magnitudes, values = moments[0]
    assert torch.equal(most, x.float().abs().amax(0)) and torch.equal(moments[0], moments[1])
    assert torch.equal(moments[0], moments[2])
    size = 2 * x.double().abs().sum(0)
    torch.testing.assert_close(magnitudes.double(), size, rtol=1e-6, atol=0)
    assert ((values - 2 * x.double().sum(0)).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_moments_keep_what_is_not_finite(value: float) -> None:
    x = torch.ones(9, 17, dtype=torch.bfloat16)
    total, moments = torch.zeros(17, 17), torch.zeros(3, 17)
    if not gram.gram_available(x, total):
        pytest.skip("this CPU has no bfloat16 products")
    x[8, 16] = value
    gram.add_gram(total, x, moments)
    gram.add_gram(total, torch.ones_like(x), moments)
    assert torch.isfinite(moments[0]).tolist() == [True] * 16 + [False]


def test_a_wheel_has_every_library_that_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setup.py compiles is what is asked for here, by the same names; what the package has needs no compiler."""
    recipes = {recipe.name: recipe for recipe in compiling.all_recipes(os.uname().machine)}
    asked = [compiling.single(name) for name in ("solve", "gram", "merge", "attend")]
    asked += [compiling.packed(name) for name in packed.instruction_sets()]
    assert all(recipes[recipe.name] == recipe for recipe in asked)
    sources = {path.stem for path in Path(kernels.__file__).parent.glob("*.cpp")}
    assert sources == {recipe.name for recipe in asked if "-" not in recipe.name} | {
        Path(name).stem for name in compiling.PACKED_SOURCES if name.endswith(".cpp")
    }
    monkeypatch.setattr(kernels, "SHIPPED", tmp_path)
    monkeypatch.setenv("SLIMWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match="no C\\+\\+ compiler"):
        kernels.shared_library(asked[0])
    (tmp_path / asked[0].file).touch()
    assert kernels.shared_library(asked[0]) == tmp_path / asked[0].file
