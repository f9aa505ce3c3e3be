"""RTN's range search against a plain search, and the card's figures."""

import pytest
import torch

from slimwright.methods import SiteStatistics, method
from slimwright.weights import Int

NONE = SiteStatistics.none()


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def rounded(w: torch.Tensor, grid: str, **knobs: object) -> torch.Tensor:
    return method("quantize/rtn", grid=grid, **knobs).solve(w, NONE).dense()


def relative(values: torch.Tensor, w: torch.Tensor) -> float:
    return float((values - w).square().sum() / w.square().sum())


@pytest.mark.parametrize(("bits", "plain", "clipped"), [(2, 0.341, 0.146), (3, 0.0641, 0.0396), (4, 0.0139, 0.0111)])
@pytest.mark.parametrize("search", ["coarse", "exhaustive"])
def test_the_card_s_table(bits: int, plain: float, clipped: float, search: str) -> None:
    w, grid = gaussian(256, 512), f"int{bits}:row"
    assert relative(rounded(w, grid, clip="none"), w) == pytest.approx(plain, rel=0.03)
    assert relative(rounded(w, grid, search=search), w) == pytest.approx(clipped, rel=0.03)


def plain_search(values: list[float], grid: Int, steps: int, maxshrink: float, norm: float) -> tuple[float, float]:
    """(best error, best factor) of one group, in float64, straight from the card."""
    low, high, top = min(values + [0.0]), max(values + [0.0]), 2**grid.bits - 1
    best = (float("inf"), 1.0)
    for index in range(round(maxshrink * steps)):
        factor = 1 - index / steps
        if grid.symmetric:
            scale, zero = max(-low, high) * factor / (2 ** (grid.bits - 1) - 1), float(2 ** (grid.bits - 1))
        else:
            scale = (high - low) * factor / top
        scale = float(torch.tensor(scale).half())
        if not grid.symmetric:
            zero = -low * factor / scale
            zero = float(torch.tensor(zero).half()) if grid.zero == "real" else float(min(max(round(zero), 0), top))
        error = sum(abs(scale * (min(max(round(x / scale + zero), 0), top) - zero) - x) ** norm for x in values)
        if error < best[0]:
            best = (error, factor)
    return best


@pytest.mark.parametrize("spec", ["int3:g24", "int4:g24:sym", "int4:g24:real", "int2:g24"])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_exhaustive_search_is_the_card_s(spec: str, norm: float) -> None:
    """Error of each group, the short last one included, as the plain search finds it."""
    w = gaussian(3, 58)
    grid = method("quantize/rtn", grid=spec).grid
    values = rounded(w, spec, search="exhaustive", norm=norm)
    for row in range(3):
        for first, last in ((0, 24), (24, 48), (48, 58)):
            expected, _ = plain_search(w[row, first:last].tolist(), grid, 100, 0.8, norm)
            error = float((values[row, first:last] - w[row, first:last]).double().abs().pow(norm).sum())
            assert error == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "spec", ["int2:g128", "int3:g64", "int4:g128", "int4:row", "int4:g32:sym", "int8:g128", "int4:g64:real"]
)
@pytest.mark.parametrize("tails", ["gaussian", "heavy"])
def test_the_coarse_search_loses_little(spec: str, tails: str) -> None:
    w = gaussian(48, 1024)
    if tails == "heavy":
        w = w / gaussian(48, 1024, seed=1).abs().clamp_(min=0.2)
    coarse, exhaustive = (relative(rounded(w, spec, search=search), w) for search in ("coarse", "exhaustive"))
    assert coarse <= exhaustive * 1.005


def test_padding_does_not_count() -> None:
    """The last value of a row pads a short group; were it counted, an outlier there would keep its range wide."""
    w = gaussian(16, 40)
    w[:, -1] = 6.0
    apart = rounded(w[:, 32:].contiguous(), "int2:row", search="exhaustive")
    assert torch.equal(rounded(w, "int2:g32", search="exhaustive")[:, 32:], apart)


def test_constant_groups_and_zeros() -> None:
    w = torch.tensor([[0.0] * 32 + [3.0] * 32 + [-0.5] * 32])
    for spec in ("int4:g32", "int4:g32:sym", "int4:g32:real"):
        assert torch.allclose(rounded(w, spec), w, rtol=2**-10)
        assert (rounded(w, spec)[0, :32] == 0).all()


def test_group_of_the_whole_row_is_per_row() -> None:
    w = gaussian(8, 96)
    assert torch.equal(rounded(w, "int4:g96"), rounded(w, "int4:row"))
    assert torch.equal(rounded(w, "int4:g1000"), rounded(w, "int4:row"))


def test_no_shrinking_is_min_max() -> None:
    w = gaussian(8, 96)
    assert torch.equal(rounded(w, "int4:g32", maxshrink=0.0), rounded(w, "int4:g32", clip="none"))


def test_percentile_ignores_outliers() -> None:
    w = gaussian(8, 1000)
    w[:, 3] = 100
    ordinary = torch.arange(1000) != 3
    clipped = rounded(w, "int4:row", clip="percentile", percentile=0.995)
    unclipped = rounded(w, "int4:row", clip="none")
    assert relative(clipped[:, ordinary], w[:, ordinary]) < 0.03
    assert relative(unclipped[:, ordinary], w[:, ordinary]) > 0.5
    assert torch.equal(rounded(w, "int4:row", clip="percentile", percentile=1.0), rounded(w, "int4:row", clip="none"))


@pytest.mark.parametrize("spec", ["q4_k", "nf4", "fp8", "mxfp4", "q8_0", "bf16"])
def test_other_formats_keep_their_own_rule(spec: str) -> None:
    w = gaussian(8, 256)
    assert torch.equal(rounded(w, spec, clip="mse"), rounded(w, spec, clip="none"))


@pytest.mark.parametrize("spec", ["int4:g128", "int4:row", "int3:g100:real"])
@pytest.mark.parametrize("name", ["quantize/rtn", "quantize/hqq"])
def test_tiles_give_the_codes_of_the_whole(spec: str, name: str) -> None:
    w = gaussian(40, 1100, seed=3)
    solver = method(name, grid=spec)
    whole = solver.solve(w, NONE)
    for step in (1, 7):
        tiles = [solver.solve(w[at : at + step], NONE) for at in range(0, 40, step)]
        assert torch.equal(torch.cat([tile.codes for tile in tiles]), whole.codes)
        for key in whole.params:
            assert torch.equal(torch.cat([tile.params[key] for tile in tiles]), whole.params[key])
