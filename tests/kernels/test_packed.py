"""Products with packed weights against exact arithmetic (float64 on the grid's values), for every instruction set that
this machine runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from slimwright.errors import SlimwrightError
from slimwright.kernels import packed
from slimwright.kernels.packed import Layout, Library, Matrix, instruction_sets
from slimwright.methods import SiteStatistics, method
from slimwright.weights import Int, grid_kinds, parse_grid
from slimwright.weights.matrix import kernel_layout, kernel_matrix

pytestmark = pytest.mark.skipif(packed.library() is None, reason="no compiled kernels here")

INTS = [
    f"int{bits}:{group}{kind}"
    for bits in range(2, 9)
    for group, kind in (("g128", ""), ("row", ":sym"), ("g48", ":real"), ("g32", ""), ("g20", ""))
]
OTHERS = [spec for kind in grid_kinds().values() if kind is not Int for spec in kind.examples or (kind.key,)]
OTHERS = [spec for spec in OTHERS if kernel_layout(parse_grid(spec), 256, 256) is not None]
SHAPES = [(5, 64), (33, 256), (7, 200), (3, 37), (18, 1024), (2, 1)]
BATCHES = (1, 2, 3, 33)


@functools.cache
def loaded(name: str) -> Library:
    return Library(name)


@functools.cache
def value(spec: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """Parts and dense values of a matrix with ordinary, zero and one-sided rows."""
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * 0.05
    w[1] = 0
    w[-1] = w[-1].abs() + 0.3
    solved: Any = method("quantize/rtn", grid=spec).solve(w, SiteStatistics.none())
    return solved.save(), solved.dense()


def cases(specs: list[str]) -> Iterator[tuple[str, int, int]]:
    for spec in specs:
        for rows, columns in SHAPES:
            if parse_grid(spec).illegal(rows, columns) is None:
                yield spec, rows, columns


def inputs(batch: int, columns: int) -> Tensor:
    """Ordinary inputs, one row with an outlier, one of zeros, one of tiny numbers."""
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
    x[-1, columns // 3] = 3000.0
    if batch > 2:
        x[1], x[2] = 0, x[2] * 1e-36
    return x


def bound(matrix: Matrix, x: Tensor, dense: Tensor, digits: int) -> Tensor:
    """What packed_rows.cpp promises, (batch, rows)."""
    layout, x, dense = matrix.layout, x.double(), dense.double()
    magnitude = x.abs() @ dense.abs().T
    if digits in (packed.BFLOATS, packed.BFLOAT_PANELS):
        terms = layout.columns / 16 if digits == packed.BFLOATS else min(layout.columns, 512) + layout.columns / 512
        return (terms + 2**16) * 2.0**-24 * magnitude  # half a step of the weight's rounding, 2**-8
    if digits == packed.PANELS:
        return (min(layout.columns, 256) + layout.columns / 256) * 2.0**-24 * magnitude
    if digits == 0:
        return (layout.columns / 8 + 24) * 2.0**-24 * magnitude
    segment = 64 if layout.group < layout.columns and layout.group % 64 else min(layout.group, 512)
    segments = -(-layout.columns // segment)

    def largest(values: Tensor, length: int) -> Tensor:
        """Of each block, where the values were."""
        padded = torch.nn.functional.pad(values.abs(), (0, -layout.columns % length)).unflatten(1, (-1, length))
        return padded.amax(2, keepdim=True).expand_as(padded).flatten(1)[:, : layout.columns]

    resolution = {1: 2.0**-7, 2: 2.0**-15, 3: 2.0**-23}[digits]
    rounding = resolution * largest(x, segment) @ dense.abs().T
    # scale * (code + zero point) is at most four times the group's largest weight
    adding = (segments + 24) * 2.0**-24 * 4 * x.abs() @ largest(dense, layout.group).T
    return rounding + adding


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("specs", [INTS[:18], INTS[18:], OTHERS], ids=["int2-5", "int5-8", "others"])
def test_values_are_the_grid_s_bit_for_bit(name: str, specs: list[str]) -> None:
    for spec, rows, columns in cases(specs):
        parts, dense = value(spec, rows, columns)
        matrix = kernel_matrix(parse_grid(spec), parts, (rows, columns), loaded(name))
        assert matrix is not None
        assert torch.equal(matrix.decode(), dense), (spec, rows, columns)
        assert torch.equal(matrix.decode(1, 2), dense[1:2])
        assert torch.equal(matrix.decode(dtype=torch.bfloat16), dense.bfloat16()), (spec, rows, columns)
        index = torch.tensor([rows - 1, 0, rows - 1])
        assert torch.equal(matrix.gather(index), dense[index])


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("specs", [INTS[:18], INTS[18:], OTHERS], ids=["int2-5", "int5-8", "others"])
def test_products_keep_their_bound(name: str, dtype: torch.dtype, specs: list[str]) -> None:
    for spec, rows, columns in cases(specs):
        parts, dense = value(spec, rows, columns)
        matrix = kernel_matrix(parse_grid(spec), parts, (rows, columns), loaded(name))
        assert matrix is not None
        for batch in BATCHES:
            x = inputs(batch, columns).to(dtype)
            exact = x.double() @ dense.double().T
            automatic = (3 if dtype == torch.float32 else 2) if matrix.layout.integer else 0
            ways = {automatic, 0, 1} if matrix.layout.integer else {0}
            ways |= {packed.PANELS}
            if dtype == torch.bfloat16 and matrix.library.bfloats:
                ways |= {packed.BFLOATS, packed.BFLOAT_PANELS}
            for digits in ways:
                got = matrix.linear(x, digits=None if digits == automatic else digits)
                error = (got.double() - exact).abs()
                most = bound(matrix, x, dense, digits) + 1e-37
                if dtype == torch.bfloat16:
                    most = most + 2.0**-8 * (exact.abs() + most)
                assert bool((error <= most).all()), (spec, rows, columns, batch, digits, float((error / most).max()))


def test_float32_inputs_lose_nothing_beside_a_float32_product() -> None:
    """Inputs of 24 bits and integer sums: no more error than the library's own product."""
    parts, dense = value("int4:g128", 33, 1024)
    matrix = kernel_matrix(parse_grid("int4:g128"), parts, (33, 1024))
    assert matrix is not None
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ dense.double().T
    ours, theirs = (float((got.double() - exact).square().mean().sqrt()) for got in (matrix.linear(x), x @ dense.T))
    assert ours < 3 * theirs


@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.parametrize("spec", ["int4:g128", "int3:g48:real", "int8:row:sym", "nf4", "q4_0", "q6_k"])
def test_the_same_bytes_with_any_number_of_threads(name: str, spec: str) -> None:
    rows, columns, before = 333, 256, torch.get_num_threads()
    library = loaded(name)
    parts, dense = value(spec, rows, columns)
    matrix = kernel_matrix(parse_grid(spec), parts, (rows, columns), library)
    assert matrix is not None
    x, bias = torch.randn(33, columns), torch.randn(rows)
    try:
        for function in {packed._torch_threads(), None}:
            library.share_threads(function)
            for batch in (1, 5, 33):
                torch.set_num_threads(1)
                alone = matrix.linear(x[:batch], bias)
                for threads in (2, 3, 4):
                    torch.set_num_threads(threads)
                    for _ in range(5):
                        assert torch.equal(matrix.linear(x[:batch], bias), alone)
                    assert torch.equal(matrix.decode(), dense)
    finally:
        torch.set_num_threads(before)
        library.share_threads(packed._torch_threads())


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    parts, _ = value("int4:g128", 33, 256)
    matrix = kernel_matrix(parse_grid("int4:g128"), parts, (33, 256))
    assert matrix is not None
    x = torch.randn(5, 256)
    clean = matrix.linear(x)
    assert all(torch.equal(matrix.linear(x[i : i + 1])[0], clean[i]) for i in range(5))
    x[1, 7], x[3, 200] = float("inf"), float("nan")
    found = matrix.linear(x)
    assert not bool(torch.isfinite(found[1]).any()) and not bool(torch.isfinite(found[3]).any())
    assert torch.equal(found[[0, 2, 4]], clean[[0, 2, 4]])


def test_ranges_of_rows_and_shapes() -> None:
    parts, dense = value("int8:g48:real", 33, 256)
    matrix = kernel_matrix(parse_grid("int8:g48:real"), parts, (33, 256))
    assert matrix is not None
    x, bias = torch.randn(2, 3, 256), torch.randn(10)
    torch.testing.assert_close(matrix.linear(x, bias, 3, 13), x @ dense[3:13].T + bias)
    turned = torch.randn(256, 4).T
    torch.testing.assert_close(matrix.linear(turned), turned @ dense.T)
    assert matrix.linear(torch.empty(0, 256)).shape == (0, 33)
    assert matrix.gather(torch.empty(0, dtype=torch.int64)).shape == (0, 256)


def test_own_threads_after_a_fork() -> None:
    """The child has none of the parent's threads and must not wait for them."""
    parts, _ = value("int4:g128", 333, 256)
    library, before = loaded(instruction_sets()[0]), torch.get_num_threads()
    matrix = kernel_matrix(parse_grid("int4:g128"), parts, (333, 256), library)
    assert matrix is not None
    try:
        library.share_threads(None)
        torch.set_num_threads(2)
        x = torch.randn(1, 256)
        wanted = matrix.linear(x)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(matrix.linear(x), wanted) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(matrix.linear(x), wanted)
    finally:
        torch.set_num_threads(before)
        library.share_threads(packed._torch_threads())


def test_what_does_not_fit_is_refused() -> None:
    parts, _ = value("int4:g128", 33, 256)
    payload, scale, zero = parts[""], parts["_scale"], parts["_zero"]
    layout = Layout("int", 33, 256, 128, 4, "nibbles")
    matrix = Matrix(layout, payload, scale, zero)
    with pytest.raises(SlimwrightError, match="payload"):
        Matrix(Layout("int", 34, 256, 128, 4, "nibbles"), payload, scale, zero)
    with pytest.raises(SlimwrightError, match="scales"):
        Matrix(layout, payload, scale[:32], zero)
    with pytest.raises(SlimwrightError, match="zero points"):
        Matrix(layout, payload, scale, None)
    with pytest.raises(SlimwrightError, match="number format"):
        Matrix(Layout("nf4", 33, 256, 128, 4), payload, scale)
    with pytest.raises(SlimwrightError, match="shape"):
        Matrix(Layout("int", 0, 256, 128, 4), payload, scale)
    with pytest.raises(SlimwrightError, match="contiguous"):
        Matrix(layout, payload, scale.T.contiguous().T, zero)
    with pytest.raises(SlimwrightError, match="outside"):
        matrix.gather(torch.tensor([33]))
    with pytest.raises(SlimwrightError, match="outside"):
        matrix.linear(torch.zeros(1, 256), start=30, stop=34)
    with pytest.raises(SlimwrightError, match="256 columns"):
        matrix.linear(torch.zeros(1, 128))
    with pytest.raises(SlimwrightError, match="float32 or bfloat16"):
        matrix.linear(torch.zeros(1, 256, dtype=torch.float64))
    with pytest.raises(SlimwrightError, match="bias"):
        matrix.linear(torch.zeros(1, 256), torch.zeros(32))
    with pytest.raises(SlimwrightError, match="argument"):
        matrix.linear(torch.zeros(1, 256), digits=packed.BFLOATS)
    with pytest.raises(SlimwrightError, match="number format"):
        float_parts, _ = value("nf4", 33, 256)
        nf4 = kernel_matrix(parse_grid("nf4"), float_parts, (33, 256))
        assert nf4 is not None
        nf4.linear(torch.zeros(1, 256), digits=3)


def test_every_grid_has_a_kernel_or_is_plain() -> None:
    for kind in grid_kinds().values():
        for spec in kind.examples or (kind.key,):
            grid = parse_grid(spec)
            assert grid.plain or kernel_layout(grid, 256, 256) is not None, spec


def test_groups_of_zeros_give_nothing_but_zeros() -> None:
    """A group of zeros has scale 1 on a symmetric grid: its codes and zero points must cancel exactly."""
    for name in instruction_sets():
        for spec in ("int8:row:sym", "int4:g32:sym", "q8_0", "mxfp4", "q6_k"):
            solved: Any = method("quantize/rtn", grid=spec).solve(torch.zeros(9, 256), SiteStatistics.none())
            matrix = kernel_matrix(parse_grid(spec), solved.save(), (9, 256), loaded(name))
            assert matrix is not None
            assert not bool(matrix.linear(1000 * torch.randn(3, 256)).any()), (name, spec)
