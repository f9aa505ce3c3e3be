"""Contract of every registered solver: a new one is covered the day it is added."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, WeightSolver, method, method_class, methods, parse_method
from slimwright.methods.factorizing import LowRankSolver
from slimwright.weights import Compressed, Grid, LowRankForm, load_value, parse_form, parse_grid

ALL_SOLVERS = [name for name, cls in methods().items() if issubclass(cls, WeightSolver)]
LOW_RANK = [name for name in ALL_SOLVERS if issubclass(method_class(name), LowRankSolver)]
SOLVERS = [name for name in ALL_SOLVERS if name not in LOW_RANK]
SPECS = ["int4:g128", "int3:g64:real", "int8:row:sym", "int2:g24", "nf4", "nf4:single", "fp8:tensor", "mxfp4", "q4_0",
         "q4_k", "q6_k", "bf16"]  # fmt: skip


def accepted(name: str, spec: str) -> bool:
    try:
        method(name, grid=spec)
    except InputError:
        return False
    return True


CASES = [(name, spec) for name in SOLVERS for spec in SPECS if accepted(name, spec)]


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(24, 256, generator=generator) * torch.rand(24, 1, generator=generator)).to(dtype)


def statistics() -> SiteStatistics:
    return SiteStatistics.from_inputs(torch.randn(600, 256, generator=torch.Generator().manual_seed(1)))


def test_there_are_solvers_and_each_takes_a_grid() -> None:
    assert {"quantize/rtn", "quantize/hqq"} <= set(SOLVERS)
    assert {"factorize/svd", "factorize/asvd", "factorize/svd_llm", "factorize/corrected"} <= set(LOW_RANK)
    assert {name for name, _ in CASES} == set(SOLVERS)


@pytest.mark.parametrize(("name", "spec"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_solve(name: str, spec: str, dtype: torch.dtype) -> None:
    solver, w, stats = method(name, grid=spec), weight(dtype), statistics()
    before = w.clone()
    value = solver.solve(w, stats)
    assert torch.equal(w, before), "the weight was changed"
    assert value.shape == tuple(w.shape)
    dense = value.dense()
    assert dense.dtype == torch.float32
    assert torch.isfinite(dense).all()
    assert float((dense - w.float()).square().sum() / w.float().square().sum()) < 0.5
    # Same input, same bytes.
    tensors = value.save()
    again = solver.solve(before, stats).save()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert_saved(value)
    # A 16-bit weight is solved as its float32 copy is.
    assert torch.equal(solver.solve(w.float(), stats).dense(), dense)


def assert_saved(value: Compressed) -> None:
    """Save, load, same value; honest bytes."""
    stored = load(save({key or "weight": tensor.contiguous() for key, tensor in value.save().items()}))
    read = {"" if key == "weight" else key: tensor for key, tensor in stored.items()}
    assert value.nbytes == sum(tensor.nbytes for tensor in read.values())
    loaded = load_value(read, value.spec())
    assert torch.equal(loaded.dense(), value.dense())
    assert loaded.nbytes == value.nbytes


def of_rank(name: str, rank: int = 12, **knobs: object) -> LowRankSolver:
    solver: LowRankSolver = method(name, rank=rank, **knobs)
    return solver


FACTORS = [
    (name, {knob: spec})
    for name in LOW_RANK
    for knob in ("factors" if "factors" in method_class(name).__dataclass_fields__ else "grid",)
    for spec in ("bf16", "int4:g32", "nf4", "q8_0")
]


@pytest.mark.parametrize(("name", "factors"), FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_solve_by_factors(name: str, factors: dict[str, str], dtype: torch.dtype) -> None:
    solver, stats = of_rank(name, 32 if "q8_0" in factors.values() else 12, **factors), statistics()
    w = torch.cat([weight(dtype), weight(dtype).flip(1)])
    before = w.clone()
    value = solver.solve(w, stats)
    assert torch.equal(w, before), "the weight was changed"
    assert isinstance(solver.form, LowRankForm) and parse_form(solver.form.spec) == solver.form
    assert method_class(name).knobs_for(solver.form) is not None
    parts = solver.form.parts_of(tuple(w.shape))
    tensors, again = value.save(), solver.solve(before, stats).save()
    assert tensors.keys() == again.keys() == parts.keys()
    assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert all((t.dtype, tuple(t.shape)) == (parts[key].dtype, parts[key].shape) for key, t in tensors.items())
    assert torch.isfinite(value.dense()).all()
    assert_saved(value)
    assert torch.equal(solver.solve(w.float(), stats).dense(), value.dense())


@pytest.mark.parametrize("name", LOW_RANK)
def test_factors_of_odd_weights(name: str) -> None:
    """Memory order, any magnitude, zeros, NaN, inputs that were never seen, and few tokens."""
    solver, w, stats = of_rank(name), weight(), statistics()
    torch.testing.assert_close(solver.solve(w.t().contiguous().t(), stats).dense(), solver.solve(w, stats).dense())
    for size in (1e-30, 1e-6, 1e4, 1e30):
        assert torch.isfinite(solver.solve(w * size, stats).dense()).all()
    assert (solver.solve(torch.zeros(30, 256), stats).dense() == 0).all()
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    x[:, ::3] = 0
    assert torch.isfinite(solver.solve(w, SiteStatistics.from_inputs(x)).dense()).all()
    w[23, 200] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf"):
        solver.solve(w, stats)


@pytest.mark.parametrize("name", SOLVERS)
def test_memory_order_does_not_matter(name: str) -> None:
    solver, w = method(name), weight()
    stats = statistics()
    assert torch.equal(solver.solve(w.t().contiguous().t(), stats).dense(), solver.solve(w, stats).dense())


@pytest.mark.parametrize(("name", "spec"), [case for case in CASES if method_class(case[0]).row_independent])
def test_row_independent_solvers_can_be_tiled(name: str, spec: str) -> None:
    solver, w = method(name, grid=spec), weight()
    w = torch.cat([w] * 6)
    stats = statistics()
    whole = solver.solve(w, stats)
    state = None
    step = solver.grid.row_multiple(256) * (1 if solver.grid.row_multiple(256) > 1 else 37)
    cuts = [slice(at, min(at + step, len(w))) for at in range(0, len(w), step)]
    for cut in cuts:
        state = solver.grid.survey(w[cut], state)
    tiles = [solver.solve(w[cut], dataclasses.replace(stats, survey=state)).dense() for cut in cuts]
    assert torch.equal(torch.cat(tiles), whole.dense())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(name: str, bad: float) -> None:
    w = weight()
    w[23, 200] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        method(name).solve(w, statistics())


@pytest.mark.parametrize("name", ALL_SOLVERS)
@pytest.mark.parametrize("shape", [(), (5,), (0, 256), (4, 0), (2, 3, 256)])
def test_bad_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        method(name).solve(torch.zeros(shape), statistics())


@pytest.mark.parametrize("name", ALL_SOLVERS)
def test_other_things_than_floats_are_refused(name: str) -> None:
    for thing in (torch.zeros(4, 256, dtype=torch.int8), [[1.0]], None):
        with pytest.raises(InputError, match="floats"):
            method(name).solve(thing, SiteStatistics.none())


@pytest.mark.parametrize("name", [name for name in SOLVERS if method_class(name).needs])
def test_statistics_that_lack_or_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="needs the statistic"):
        method(name).solve(weight(), SiteStatistics.none())
    with pytest.raises(InputError, match="of 128 inputs, the weight has 256"):
        method(name).solve(weight(), SiteStatistics.from_inputs(torch.ones(300, 128)))


@pytest.mark.parametrize("name", SOLVERS)
def test_inputs_that_were_never_seen_and_few_tokens_do_no_harm(name: str) -> None:
    """A third of the inputs always 0, and fewer tokens than inputs: a singular Gram."""
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    x[:, ::3] = 0
    w = weight()
    solved = method(name).solve(w, SiteStatistics.from_inputs(x)).dense()
    assert torch.isfinite(solved).all()
    unseen = (solved - w)[:, ::3].square().sum() / w[:, ::3].square().sum()
    assert unseen < 0.5, "weights of inputs that were never seen are lost"


def test_a_grid_that_cannot_hold_the_shape_is_refused() -> None:
    with pytest.raises(InputError, match="multiple of 256"):
        method("quantize/rtn", grid="q4_k").solve(torch.ones(4, 300), SiteStatistics.none())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4, 1e30])
def test_any_magnitude_stays_finite(name: str, size: float) -> None:
    assert torch.isfinite(method(name).solve(weight() * size, statistics()).dense()).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_zeros_stay_zeros(name: str) -> None:
    assert (method(name).solve(torch.zeros(3, 256), statistics()).dense() == 0).all()


# -- knobs -------------------------------------------------------------------------------------------------------------

JUNK = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.binary(max_size=4)
    | st.lists(st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
    | st.complex_numbers()
    | st.sampled_from(
        ["nan", "inf", "1e999", "9" * 5000, "1_0", "-0", "true", "None", "int4:g128", "mse", torch.zeros(2), object]
    )
)
KNOBS = [(name, field.name) for name, cls in methods().items() for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("name", "knob"), KNOBS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=JUNK)
def test_any_knob_value_is_taken_or_refused(name: str, knob: str, value: object) -> None:
    try:
        made = method(name, **{knob: value})
    except InputError as error:
        assert str(error)
        return
    default = method_class(name).__dataclass_fields__[knob].default
    kept = getattr(made, knob)
    if isinstance(kept, tuple):  # one value a model
        assert kept and all(type(item) is type(default) and math.isfinite(item) for item in kept)
        return
    assert isinstance(kept, Grid) if isinstance(default, Grid) else default is None or type(kept) is type(default)
    assert not isinstance(kept, float) or math.isfinite(kept)
    hash(made)


@pytest.mark.parametrize(("name", "knob"), KNOBS)
def test_knobs_out_of_range_are_refused_and_ranges_are_ends(name: str, knob: str) -> None:
    rule = method_class(name).__dataclass_fields__[knob].metadata
    for end, step in ((rule["low"], -1), (rule["high"], 1)):
        if end is not None:
            assert getattr(method(name, **{knob: end}), knob) == end
            with pytest.raises(InputError, match="must lie in"):
                method(name, **{knob: end + step})
    if rule["choices"]:
        with pytest.raises(InputError, match="takes one of"):
            last = rule["choices"][-1]
            method(name, **{knob: last + 1 if isinstance(last, int) else f"{last}x"})
    assert rule["help"], "a knob needs a line of help"


@pytest.mark.parametrize("name", sorted(methods()))
def test_the_spec_is_read_back(name: str) -> None:
    assert parse_method(method(name).spec) == method(name)
    cls = method_class(name)
    assert cls.paper and cls.__doc__ and cls.family
    changed = {}
    for field in dataclasses.fields(cls):
        rule = field.metadata
        if rule["choices"]:
            changed[field.name] = rule["choices"][-1]
        elif rule["high"] is not None:
            changed[field.name] = rule["high"]
    made = method(name, **changed)
    grids = {
        field.name: getattr(made, field.name) for field in dataclasses.fields(cls) if isinstance(field.default, Grid)
    }
    assert parse_method(made.spec, **grids) == made


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'quantize/rtn'"):
        method("quantize/rnt")
    with pytest.raises(InputError, match="did you mean 'grid'"):
        method("quantize/rtn", gird="int4:g128")
    with pytest.raises(InputError, match="did you mean 'mse'"):
        method("quantize/rtn", clip="mes")
    for spec in ("", "quantize/rtn,", "quantize/rtn,clip", "quantize/rtn,clip=mse,clip=none", "quantize/rtn,x=1"):
        with pytest.raises(InputError):
            parse_method(spec)


def test_a_grid_may_be_given_as_text() -> None:
    assert method("quantize/rtn", grid="int3:g64").grid == parse_grid("int3:g64")
    assert parse_method("quantize/rtn,grid=nf4,clip=none").grid == parse_grid("nf4")


def test_statistics_refuse_bad_inputs() -> None:
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    stats = SiteStatistics.from_inputs(x)
    assert stats.tokens == 10
    torch.testing.assert_close(stats.importance, x.square().mean(0))
    assert SiteStatistics.none().importance is None
    for bad in (torch.zeros(3), torch.zeros(0, 4), torch.full((2, 2), float("nan"))):
        with pytest.raises(InputError):
            SiteStatistics.from_inputs(bad)
