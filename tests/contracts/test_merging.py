"""Contract of every merge method: a new one is covered the day it is added."""

import json

import pytest
import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods import method, methods
from slimwright.methods.merging import BLOCK, MergeMethod, MergeSite, Tile, add_sums

METHODS = [name for name, cls in methods().items() if issubclass(cls, MergeMethod)]
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("merge/ties", {"granularity": "tensor", "density": 0.5, "majority": "plus"}),
    ("merge/dare", {"rescale": "l1", "consensus": "ties"}),
    ("merge/della", {"rescale": "l1"}),
    ("merge/ties", {"rescale": "l1"}),
    ("merge/breadcrumbs", {"rescale": "l1", "granularity": "model"}),
    ("merge/breadcrumbs", {"consensus": "ties", "granularity": "model"}),
    ("merge/nuslerp", {"flatten": False}),
    ("merge/model_stock", {"filter_wise": True}),
    ("merge/sce", {"select_topk": 0.2}),
    ("merge/ram", {"r": 0.5, "alpha": 5.0, "epsilon": 0.1}),
]


def made(name: str, knobs: dict[str, object]) -> MergeMethod:
    found = method(name, **knobs)
    assert isinstance(found, MergeMethod)
    return found


def inputs(
    merger: MergeMethod, shape: tuple[int, ...] = (24, 96), dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor | None]:
    """As many models as the method takes, up to three, and a base where it needs one."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    count = min(3, merger.most) if merger.most is not None else 3
    models = [(base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    if merger.base_model == "optional" and merger.most == 2 and merger.fewest == 1:
        models = models[:1]  # slerp: the base is one of its two
        return models, base.to(dtype)
    return models, base.to(dtype) if merger.base_model != "unused" else None


def test_every_method_is_here() -> None:
    assert {"merge/linear", "merge/slerp", "merge/task_arithmetic", "merge/ties", "merge/dare"} <= set(METHODS)


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge(name: str, knobs: dict[str, object], dtype: torch.dtype) -> None:
    merger = made(name, knobs)
    models, base = inputs(merger, dtype=dtype)
    before = [tensor.clone() for tensor in (*models, *([base] if base is not None else []))]
    merged = merger.merge(models, base, seed=3)
    assert merged.dtype == dtype and merged.shape == models[0].shape
    assert torch.isfinite(merged).all()
    assert torch.equal(merged, merger.merge(models, base, seed=3)), "same input, other bytes"
    after = [*models, *([base] if base is not None else [])]
    assert all(torch.equal(a, b) for a, b in zip(before, after)), "an input was changed"
    json.dumps(merger.prepare([{"x": m} for m in models], base=None if base is None else {"x": base}))


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
def test_equal_models_give_that_model(name: str, knobs: dict[str, object]) -> None:
    """Whatever merges models that are all equal to the base must give the base."""
    merger = made(name, knobs)
    models, base = inputs(merger)
    same = models[0]
    merged = merger.merge([same] * len(models), same if base is not None else None)
    assert torch.allclose(merged, same, atol=2e-6)


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
def test_tiles_give_the_same_as_the_whole(name: str, knobs: dict[str, object]) -> None:
    """Tiles of blocks, rows or the whole tensor, surveyed and merged one by one."""
    merger = made(name, knobs)
    shape = (3, BLOCK // 2) if merger.extent == "element" else (24, 96)
    models, base = inputs(merger, shape)
    whole = merger.merge(models, base, site="x", seed=1)
    numel = whole.numel()
    step = {"element": BLOCK, "row": 5 * shape[1], "tensor": numel}[merger.extent]
    site = MergeSite("x", shape)

    def tiles() -> list[Tile]:
        return [
            Tile(
                site, start,
                tuple(merger.shaped(m.flatten()[start : start + step].clone(), site) for m in models),
                None if base is None else merger.shaped(base.flatten()[start : start + step], site), 1,
            )
            for start in range(0, numel, step)
        ]  # fmt: skip

    state = merger.begin(len(models), {"x": site})
    for _ in range(merger.rounds):
        if state.get("done"):
            break
        sums: dict[str, object] = {}
        for tile in tiles():
            sums = add_sums(sums, merger.survey(tile, state))
        state = json.loads(json.dumps(merger.settle({"x": sums}, state)))
    merged = torch.cat([merger.combine(tile, state).flatten() for tile in tiles()]).reshape(shape)
    if merger.rounds and any(key in state for key in ("factors", "ratio", "weights", "first")):
        assert torch.allclose(merged, whole, rtol=1e-6, atol=1e-7)  # sums in another order
    else:
        assert torch.equal(merged, whole)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 8)])
def test_any_shape(name: str, shape: tuple[int, ...]) -> None:
    merger = made(name, {})
    models, base = inputs(merger, shape)
    assert merger.merge(models, base).shape == shape


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(name: str, bad: float) -> None:
    merger = made(name, {})
    models, base = inputs(merger)
    models[-1][3, 5] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        merger.merge(models, base)


@pytest.mark.parametrize("name", METHODS)
def test_wrong_inputs_are_refused(name: str) -> None:
    merger = made(name, {})
    models, base = inputs(merger)
    if base is not None or len(models) > 1:
        with pytest.raises(InputError, match="shapes"):
            merger.merge([*models[:-1], models[-1][:3]], base)
    with pytest.raises(InputError, match="floats"):
        merger.merge([*models[:-1], models[-1].to(torch.int32)], base)
    if merger.base_model == "required":
        with pytest.raises(InputError, match="base"):
            merger.merge(models)
    if merger.base_model == "unused":
        with pytest.raises(InputError, match="no base"):
            merger.merge(models, models[0])
    if merger.most is not None:
        with pytest.raises(InputError, match="takes"):
            merger.merge([models[0]] * 4, base)
    for knob in merger.per_model_knobs():
        with pytest.raises(InputError, match="values for"):
            made(name, {knob.rstrip("_"): (0.5,) * 7}).merge(models, base)
