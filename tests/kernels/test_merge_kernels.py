"""Compiled loops of merging against the methods' own torch code, byte by byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimwright import kernels
from slimwright.kernels import merge as kernel
from slimwright.methods import method, selection
from slimwright.methods.blending import blended
from slimwright.methods.merging import BLOCK, MergeMethod, MergeSite, State, StoredTile, Tile, add_sums

pytestmark = pytest.mark.skipif(kernels.library("merge") is None, reason="no compiled kernels here")

LENGTH = BLOCK + 16_384 + 517
KINDS = (torch.float32, torch.bfloat16, torch.float16)
METHODS = [
    ("linear", {"weight": (0.6, 0.4, -0.3)}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {"weight": (0.6, -0.4, 1.0), "lambda_": 0.7, "normalize": True}),
    ("passthrough", {}),
    ("passthrough", {"scale": 0.3}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": (0.7, 0.3)}),
    ("multislerp", {}),
    ("karcher", {}),
    ("model_stock", {}),
    ("ties", {"granularity": "tensor", "density": 0.5}),
    ("ties", {"granularity": "tensor", "density": (0.9, 0.3, 1.0), "weight": (1.0, -0.5, 0.25), "majority": "plus"}),
    ("ties", {"granularity": "tensor", "agg": "sum", "sign_method": "count", "lambda_": 0.6}),
    ("ties", {"granularity": "tensor", "agg": "max", "density": 0.0}),
    ("ties", {"granularity": "tensor", "density": (0.2, 0.0, 0.6), "rescale": "l1", "weight": (0.6, 0.4, 1.0)}),
    ("dare", {"density": 0.3}),
    ("dare", {"density": (0.3, 1.0, 0.7), "rescale": "l1", "consensus": "ties", "weight": (0.6, 0.4, 0.3)}),
    ("dare", {"rescale": "none", "consensus": "ties", "normalize": True, "lambda_": 1.5}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    ("breadcrumbs", {"consensus": "ties", "normalize": True, "gamma": 1.0, "density": 0.0}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1, "rescale": "l1", "weight": (0.6, 0.4, 1.0)}),
    ("breadcrumbs", {"consensus": "ties", "density": 1.0, "lambda_": 1.0}),
]


def vectors(kind: torch.dtype, levels: int | None, count: int) -> list[Tensor]:
    """A base and models near it: signed zeros, subnormal numbers, equal values; with levels many equal magnitudes."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(LENGTH, generator=generator)
    base[::7] = 0.0
    base[1::7] = -0.0
    given = [base]
    for _ in range(count):
        noise = torch.randn(LENGTH, generator=generator) * 0.1
        if levels is not None:
            noise = (noise * levels).round() / levels
        noise[::5] = 0
        model = base + noise
        model[2::11] = -0.0
        model[3::13] = 1e-39 if kind != torch.float16 else 3e-7
        given.append(model)
    return [tensor.to(kind) for tensor in given]


def tiles(stored: list[Tensor], with_base: bool, step: int) -> list[tuple[StoredTile, Tile]]:
    """The same tiles as they are stored, and in float32."""
    site, found = MergeSite("layers.3.weight", (LENGTH,), 3, 8), []
    for start in range(0, LENGTH, step):
        parts = [tensor[start : start + step] for tensor in stored]
        base, models = (parts[0], parts[1:]) if with_base else (None, parts[1:])

        def refuse(place: int) -> None:
            raise AssertionError(place)

        floats = tuple(tensor.float().clone() for tensor in models)
        found.append(
            (
                StoredTile(site, start, tuple(models), base, 11, refuse),
                Tile(site, start, floats, None if base is None else base.float(), 11),
            )
        )
    return found


def settled(merger: MergeMethod, given: list[Tile]) -> State:
    """The state after all surveys of these tiles."""
    site = given[0].site
    state = merger.begin(len(given[0].tensors), {site.name: site})
    for _ in range(merger.rounds):
        if state.get("done"):
            break
        sums: dict[str, object] = {}
        for tile in given:
            sums = add_sums(sums, merger.survey(tile, state))
        state = merger.settle({site.name: sums}, state)
    return state


@pytest.mark.parametrize("levels", [None, 16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("name", "knobs"), METHODS, ids=str)
def test_the_loop_writes_the_methods_bytes(
    name: str, knobs: dict[str, object], kind: torch.dtype, levels: int | None
) -> None:
    merger = method(f"merge/{name}", **knobs)
    assert isinstance(merger, MergeMethod)
    count = merger.most if merger.most is not None and merger.most < 3 else 3
    stored = vectors(kind, levels, count)
    with_base = merger.base_model == "required"
    pairs = tiles(stored, with_base, BLOCK)
    fast, plain = settled(merger, [pair[0] for pair in pairs]), settled(merger, [pair[1] for pair in pairs])
    assert fast == plain
    blend = merger.blend(count, with_base, plain)
    assert blend is not None
    for dtype in (*KINDS,):
        for tile, floats in tiles(stored, with_base, BLOCK):
            found = blended(blend, tile, dtype)
            expected = merger.combine(floats, plain).to(dtype)
            assert found is not None and found.dtype == dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), (dtype, tile.start)


@pytest.mark.parametrize("density", [0.5, 0.37])
@pytest.mark.parametrize("numel", [LENGTH, 3 * BLOCK])
def test_thresholds_among_many_equal_magnitudes(density: float, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered, and what is counted bit by bit and block by block, find the same entries as torch does."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(numel, dtype=torch.bfloat16)
    model = (torch.randint(1, 4, (numel,), generator=generator) * 0.25).bfloat16()
    merger = method("merge/ties", density=density, granularity="tensor", majority="plus")
    assert isinstance(merger, MergeMethod)
    site, states = MergeSite("w", (numel,)), []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(selection, "GATHERED", limit)
        for stored in (True, False):
            parts = []
            for start in range(0, numel, BLOCK):
                a, b = model[start : start + BLOCK], base[start : start + BLOCK]
                plain = Tile(site, start, (a.float(),), b.float(), 0)
                parts.append(StoredTile(site, start, (a,), b, 0, print) if stored else plain)
            state = settled(merger, parts)
            made = [blended(merger.blend(1, True, state), part, torch.bfloat16) for part in parts]  # type: ignore[arg-type]
            if stored:
                states.append(torch.cat([part for part in made if part is not None]))
            else:
                states.append(torch.cat([merger.combine(part, state).bfloat16() for part in parts]))
    assert all(torch.equal(state, states[0]) for state in states)
    assert int((states[0] != 0).sum()) == int(density * numel)


def test_what_is_not_finite_is_left_to_torch() -> None:
    merger = method("merge/task_arithmetic")
    assert isinstance(merger, MergeMethod)
    good = torch.ones(5000, dtype=torch.bfloat16)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in range(3):
            stored = [good.clone() for _ in range(3)]
            stored[place][4097] = bad
            asked: list[int] = []
            tile = StoredTile(MergeSite("w", (5000,)), 0, tuple(stored[1:]), stored[0], 0, asked.append)
            assert blended(merger.blend(2, True, {}), tile, torch.float32) is None  # type: ignore[arg-type]
            assert kernel.count_bits(kernel.sources(stored[1:]), stored[0], 5000, [None, None]) is None
            assert kernel.run_sums(kernel.sources(stored[1:]), stored[0], 5000, False) is None
            assert (tile.base, tile.tensors) and asked == [(place - 1) % 3]
    large = torch.full((700,), 60_000.0)
    tile = StoredTile(MergeSite("w", (700,)), 0, (large,), large / 2, 0, asked.append)
    doubled = method("merge/task_arithmetic", lambda_=3.0)
    assert isinstance(doubled, MergeMethod)
    assert blended(doubled.blend(1, True, {}), tile, torch.float16) is None  # type: ignore[arg-type]
    assert blended(doubled.blend(1, True, {}), tile, torch.bfloat16) is not None  # type: ignore[arg-type]


def test_sums_are_exact_and_have_an_order() -> None:
    """Against float64, and the same whatever the length of the last run."""
    stored = vectors(torch.bfloat16, None, 2)
    sums = kernel.run_sums(kernel.sources(stored[1:]), stored[0], LENGTH, False)
    assert sums is not None and sums.shape == (-(-LENGTH // 16_384), 3)
    first, second = (tensor.double() - stored[0].double() for tensor in stored[1:])
    for column, expected in enumerate(((first * first), (first * second), (second * second))):
        assert abs(float(sums[:, column].double().sum() - expected.sum())) <= 1e-6 * float(expected.abs().sum())
