"""HQQ: the card's figures, its degenerate cases, and a plain-Python iteration."""

import pytest
import torch

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method

NONE = SiteStatistics.none()


def student(rows: int, columns: int) -> torch.Tensor:
    """Student's t with four degrees of freedom: normal / sqrt(chi² / 4)."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(5, rows, columns, generator=generator)
    return normals[0] / normals[1:].square().mean(0).sqrt()


def solve(w: torch.Tensor, grid: str, **knobs: object) -> torch.Tensor:
    return method("quantize/hqq", grid=grid, **knobs).solve(w, NONE).dense()


@pytest.mark.parametrize(("bits", "before", "after"), [(2, 0.671, 0.633), (3, 0.287, 0.273), (4, 0.1335, 0.1269)])
def test_the_card_s_table(bits: int, before: float, after: float) -> None:
    w = student(512, 1024)
    error = {iters: float((solve(w, f"int{bits}:g64:real", iters=iters) - w).abs().mean()) for iters in (0, 20)}
    assert error[0] == pytest.approx(before, rel=0.02)
    assert error[20] == pytest.approx(after, rel=0.02)
    assert error[20] / error[0] == pytest.approx(after / before, rel=0.01)


def test_at_two_bits_an_integer_zero_has_the_lower_squared_error() -> None:
    w = student(256, 1024)
    squared = float((solve(w, "int2:g64:real") - w).square().mean())
    plain = float((method("quantize/rtn", grid="int2:g64", clip="none").solve(w, NONE).dense() - w).square().mean())
    assert plain < 0.95 * squared


def test_without_iterations_it_is_min_max() -> None:
    w = student(16, 256)  # every group lies on both sides of 0
    plain = method("quantize/rtn", grid="int4:g64:real", clip="none").solve(w, NONE).dense()
    assert torch.equal(solve(w, "int4:g64:real", iters=0), plain)


def test_one_group_by_hand() -> None:
    """Every zero point of the iteration, in float64; the returned one has the least mean |error|."""
    w = student(1, 32)
    grid = method("quantize/hqq", grid="int3:row:real").grid
    value = method("quantize/hqq", grid="int3:row:real").solve(w, NONE)
    scale = float(value.params["scale"])
    xs, top, p, beta = w[0].double().tolist(), 2**grid.bits - 1, 0.7, 10.0
    assert scale == pytest.approx((max(xs) - min(xs)) / top, rel=1e-3)
    zero, best = -min(xs) / scale, (float("inf"), 0.0)
    for _ in range(21):
        codes = [min(max(round(x / scale + zero), 0), top) for x in xs]
        errors = [x - (code - zero) * scale for x, code in zip(xs, codes, strict=True)]
        best = min(best, (sum(map(abs, errors)) / len(xs), zero))
        shrunk = [max(abs(e) - abs(e) ** (p - 1) / beta, 0) * (1 if e > 0 else -1) if e else 0.0 for e in errors]
        zero = sum(code - (x - e) / scale for code, x, e in zip(codes, xs, shrunk, strict=True)) / len(xs)
        beta *= 1.01
    assert float(value.params["zero"]) == pytest.approx(best[1], rel=2e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integer_zero_points_stay_integers(bits: int) -> None:
    value = method("quantize/hqq", grid=f"int{bits}:g32").solve(student(8, 96), NONE)
    zero = value.params["zero"]
    assert torch.equal(zero, zero.round())
    assert (zero >= 0).all() and (zero < 2**bits).all()


@pytest.mark.parametrize("spec", ["int4:g32:real", "int4:g32"])
def test_groups_far_from_zero_and_constant_ones(spec: str) -> None:
    w = torch.cat(
        [torch.full((1, 32), 0.75), torch.zeros(1, 32), 1000 + student(1, 32), torch.full((1, 32), -2000.0)], 1
    )
    values = solve(w, spec)
    assert torch.allclose(values[:, :32], w[:, :32], rtol=2**-9)
    assert (values[:, 32:64] == 0).all()
    assert (values - w).abs().max() <= 1000 / 15


def test_tiny_weights_are_rounded_as_well_as_large_ones() -> None:
    w = student(32, 256)
    relative = [float((solve(w * size, "int4:g64:real") - w * size).abs().mean() / size) for size in (1.0, 2.0**-10)]
    assert relative[1] == pytest.approx(relative[0], rel=0.05)


@pytest.mark.parametrize("spec", ["int4:g64:sym", "nf4", "q4_k", "bf16"])
def test_grids_without_a_zero_point_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="zero points"):
        method("quantize/hqq", grid=spec)
