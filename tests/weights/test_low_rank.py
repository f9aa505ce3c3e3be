"""Low-rank forms and values: how they are written, what lies on disk, what they multiply to."""

from __future__ import annotations

import pytest
import torch

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method
from slimwright.weights import (
    Compressed,
    Dense,
    Float,
    Int,
    LowRank,
    LowRankForm,
    Sum,
    decode_rows,
    load_value,
    parse_form,
    parse_grid,
)

OUT, IN, RANK = 40, 96, 6
SPECS = ("lowrank:r6", "lowrank:r6:fp16", "lowrank:r6:int8:g32", "lowrank:r6:nf4", "int3:g32+lowrank:r6",
         "nf4+lowrank:r6:int4:row", "q4_0+lowrank:r6:int8:row:sym")  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(grid: str, w: torch.Tensor) -> Compressed:
    return method("quantize/rtn", grid=grid).solve(w, SiteStatistics.none())


def value(spec: str) -> Compressed:
    """Random factors, and a random base, on the grids of a form."""
    form = parse_form(spec)
    assert isinstance(form, LowRankForm)
    factors = LowRank(on(form.factors.spec, random(OUT, RANK)), on(form.factors.spec, random(RANK, IN, seed=1)))
    return factors if form.base is None else Sum(on(form.base.spec, random(OUT, IN, seed=2)), factors)


def test_a_form_in_writing() -> None:
    form = LowRankForm(16, Int(8, group=64), Int(3, group=64))
    assert form.spec == str(form) == "int3:g64+lowrank:r16:int8:g64" and parse_form(form.spec) == form
    assert parse_form(" LOWRANK:R64 ") == LowRankForm(64, Float("bf16")) and LowRankForm(64).spec == "lowrank:r64"
    assert parse_form("int4:g128") == parse_grid("int4:g128")
    for spec in SPECS:
        assert parse_form(spec).spec == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lowrank", "no low-rank form: write lowrank:rR"),
        ("lowrank:64", "no low-rank form"),
        ("lowrank:r0", "rank of at least 1, not 0"),
        ("lowrank:r4:int9", "Unknown grid|must be 2 to 8|bits"),
        ("int4+", "no low-rank form"),
        ("+lowrank:r4", "no low-rank form"),
        ("int4+int8", "no low-rank form"),
        ("bf16+lowrank:r4", "takes no low-rank correction"),
        ("lowrank:r4+lowrank:r4", "Unknown grid"),
    ],
)
def test_forms_that_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_form(spec)


def test_shapes_that_a_form_cannot_hold() -> None:
    assert parse_form("lowrank:r40").misfit((OUT, IN)) is None
    assert "more than its 40 rows" in str(parse_form("lowrank:r41").misfit((OUT, IN)))
    assert "multiple of 256" in str(parse_form("q4_k+lowrank:r4").misfit((OUT, IN)))
    assert "q4_0" in str(parse_form("lowrank:r6:q4_0").misfit((OUT, IN)))
    assert "span experts" in str(parse_form("nf4+lowrank:r4").misfit((3, OUT, IN)))
    assert parse_form("int4:g32+lowrank:r4").misfit((3, OUT, IN)) is None


def test_what_lies_on_disk() -> None:
    """Worked out by hand from docs/formats.md."""
    parts = {s: (str(p.dtype)[6:], p.shape) for s, p in parse_form("lowrank:r6").parts_of((OUT, IN)).items()}
    assert parts == {"": ("bfloat16", (40, 6, 1)), "_right": ("bfloat16", (6, 96))}
    parts = {
        s: (str(p.dtype)[6:], p.shape)
        for s, p in parse_form("int3:g32+lowrank:r6:int8:g64").parts_of((2, 40, 96)).items()
    }
    assert parts == {
        "": ("uint8", (2, 40, 36, 1)), "_scale": ("float16", (80, 3)), "_zero": ("uint8", (80, 2)),
        "_left": ("uint8", (2, 40, 8, 1)), "_left_scale": ("float16", (80, 1)), "_left_zero": ("uint8", (80, 1)),
        "_right": ("uint8", (2, 6, 96, 1)), "_right_scale": ("float16", (12, 2)), "_right_zero": ("uint8", (12, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_a_value_is_saved_and_read(spec: str) -> None:
    form, made = parse_form(spec), value(spec)
    tensors = made.save()
    wanted = form.parts_of((OUT, IN))
    assert tensors.keys() == wanted.keys()
    assert all(tensors[s].shape == p.shape and tensors[s].dtype == p.dtype for s, p in wanted.items())
    assert made.nbytes == form.nbytes_of((OUT, IN)) == sum(tensor.nbytes for tensor in tensors.values())
    read = load_value(tensors, made.spec())
    assert type(read) is type(made) and torch.equal(read.dense(), made.dense())
    for rows in (slice(0, OUT), slice(7, 31)):
        torch.testing.assert_close(decode_rows(form, tensors, (OUT, IN), rows), made.dense()[rows])


@pytest.mark.parametrize("spec", SPECS)
def test_the_product_does_not_go_through_the_dense_weight(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = value(spec), random(5, IN, seed=3)
    wanted = x @ made.dense().T
    for cls in (LowRank, Sum):
        monkeypatch.setattr(cls, "dense", lambda self: pytest.fail("the dense weight was made"))
    torch.testing.assert_close(made.matmul(x), wanted, rtol=1e-4, atol=1e-4)
    assert made.matmul(x.bfloat16()).dtype == torch.bfloat16


def test_experts_have_factors_of_their_own() -> None:
    left, right = random(3, 8, 2), random(3, 2, 10, seed=1)
    made = LowRank(Dense(left), Dense(right))
    assert made.shape == (3, 8, 10)
    torch.testing.assert_close(made.dense(), torch.einsum("eor,eri->eoi", left, right))
    x = random(3, 4, 10, seed=2)
    torch.testing.assert_close(made.matmul(x), torch.einsum("eti,eoi->eto", x, made.dense()))
    bf16 = LowRank(Dense(left.bfloat16()), Dense(right.bfloat16()))
    for rows in (slice(0, 24), slice(5, 19), slice(9, 10)):
        found = decode_rows(parse_form("lowrank:r2"), bf16.save(), (3, 8, 10), rows)
        torch.testing.assert_close(found, bf16.dense().reshape(24, 10)[rows])


def test_values_that_cannot_be() -> None:
    with pytest.raises(InputError, match="cannot be multiplied"):
        LowRank(Dense(random(4, 3)), Dense(random(2, 5)))
    with pytest.raises(InputError, match="does not fit"):
        Sum(Dense(random(4, 6)), LowRank(Dense(random(4, 3)), Dense(random(3, 5))))
