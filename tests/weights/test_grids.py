"""What every grid must do, over all examples of all registered kinds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slimwright.errors import InputError
from slimwright.weights import (
    Dense,
    Int,
    Quantized,
    disk_shapes,
    grid_kinds,
    load_value,
    parse_grid,
    quantize,
    unpack_rows,
)

SPECS = [spec for kind in grid_kinds().values() for spec in kind.examples or (kind.key,)] + [
    *(f"int{bits}:g40" for bits in range(2, 9)),
    "int5:g24:sym",
    "int2:row:real",
]
PACKED = [spec for spec in SPECS if not parse_grid(spec).plain]
SHAPES = [(16, 256), (5, 512), (7, 100), (1, 1), (3, 33)]


def weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def legal(spec: str, shape: tuple[int, int]) -> bool:
    return parse_grid(spec).illegal(*shape) is None


CASES = [(spec, shape) for spec in SPECS for shape in SHAPES if legal(spec, shape)]


@pytest.mark.parametrize("spec", SPECS)
def test_spec_round_trip(spec: str) -> None:
    assert parse_grid(spec).spec == spec
    assert parse_grid(f" {spec.upper()} ") == parse_grid(spec)


@pytest.mark.parametrize(("spec", "shape"), CASES)
def test_save_load_and_bytes(spec: str, shape: tuple[int, int], tmp_path) -> None:
    grid, w = parse_grid(spec), weight(*shape)
    value = quantize(grid, w, grid.fit(w))
    tensors = value.save()
    save_file({suffix or "weight": tensor for suffix, tensor in tensors.items()}, tmp_path / "w.safetensors")
    read = {"" if name == "weight" else name: tensor for name, tensor in load_file(tmp_path / "w.safetensors").items()}
    assert value.nbytes == sum(tensor.nbytes for tensor in read.values()) == grid.nbytes(*shape)
    assert value.bits_per_weight == pytest.approx(grid.bits_per_weight(*shape))
    expected = {suffix: (part.dtype, part.shape) for suffix, part in disk_shapes(grid, shape).items()}
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in read.items()} == expected
    again = load_value(read, value.spec())
    assert torch.equal(again.dense(), value.dense())
    assert torch.isfinite(value.dense()).all()
    for suffix, tensor in again.save().items():
        assert torch.equal(tensor, tensors[suffix])


@pytest.mark.parametrize("spec", PACKED)
def test_the_payload_has_one_dimension_more(spec: str) -> None:
    shapes = disk_shapes(parse_grid(spec), (4, 8, 256))
    assert shapes[""].dtype == torch.uint8
    assert shapes[""].shape[:2] == (4, 8)
    assert len(shapes[""].shape) == 4


@pytest.mark.parametrize("spec", PACKED)
def test_stacked_experts(spec: str) -> None:
    grid, w = parse_grid(spec), weight(4 * 8, 256)
    value = Quantized(grid, grid.encode(w, params := grid.fit(w)), params, (4, 8, 256))
    again = load_value(value.save(), value.spec())
    assert again.shape == (4, 8, 256)
    assert torch.equal(again.dense().reshape(32, 256), grid.round(w, params))
    x = torch.randn(4, 3, 256, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([x[expert] @ again.dense()[expert].T for expert in range(4)])
    torch.testing.assert_close(again.matmul(x), expected)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("columns", [256, 768])
def test_tiles_give_the_bytes_of_the_whole(spec: str, columns: int) -> None:
    grid, rows = parse_grid(spec), 150
    w = weight(rows, columns)
    whole = grid.pack(grid.encode(w, params := grid.fit(w, survey=grid.survey(w))), params)
    multiple = grid.row_multiple(columns)
    for tiles in (1, 2):
        cuts = [slice(at, min(at + tiles * multiple, rows)) for at in range(0, rows, tiles * multiple)]
        state = None
        for cut in cuts:
            state = grid.survey(w[cut], state)
        pieces = []
        for cut in cuts:
            params = grid.fit(w[cut], survey=state)
            packed = grid.pack(grid.encode(w[cut], params), params)
            for suffix, tensor in packed.items():
                assert torch.equal(tensor, whole[suffix][grid.part_slice(suffix, cut, columns)]), (suffix, cut)
            pieces.append(grid.decode(*grid.unpack(packed, columns)))
            read = unpack_rows(grid, whole, (rows, columns), cut)
            assert torch.equal(grid.decode(*read), pieces[-1])
        assert torch.equal(torch.cat(pieces), grid.decode(*grid.unpack(whole, columns)))


@pytest.mark.parametrize(("spec", "shape"), CASES)
def test_rounding_is_idempotent(spec: str, shape: tuple[int, int]) -> None:
    grid, w = parse_grid(spec), weight(*shape)
    params = grid.fit(w)
    _, params = grid.unpack(grid.pack(grid.encode(w, params), params), shape[1])  # as they are stored
    once = grid.round(w, params)
    assert torch.equal(grid.round(once, params), once)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in ("q4_0", "q8_0", "nf4")])
def test_no_other_code_is_nearer(spec: str) -> None:
    """Brute force over all codes; the three formats left out choose codes with an unrounded scale, as their oracles."""
    grid, w = parse_grid(spec), weight(4, 256)
    params = grid.fit(w)
    error = (grid.round(w, params) - w).abs()
    if grid.plain:
        assert torch.equal(grid.round(w, params), w.to(grid.dtype).float())
        return
    every = torch.stack([grid.decode(torch.full(w.shape, code, dtype=torch.uint8), params) for code in _codes(spec)])
    nearest = (every - w).abs().amin(0)
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-7)


def _codes(spec: str) -> list[int]:
    grid = parse_grid(spec)
    if spec.startswith("fp8"):
        return [code for code in range(256) if code & 127 != 127]  # S1111111 is NaN
    if isinstance(grid, Int):
        return list(range(2**grid.bits))
    return list(range(64 if spec == "q6_k" else 16))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [1e30, 3.4e38, 1e-30, 1e-45, 1e-7])
def test_extreme_magnitudes_stay_finite(spec: str, size: float) -> None:
    grid = parse_grid(spec)
    w = (weight(4, 256).clamp(-1, 1) * size).float()
    w[0, 0] = size
    params = grid.fit(w, survey=grid.survey(w))
    value = quantize(grid, w, params)
    assert torch.isfinite(value.dense()).all()
    read = load_value(value.save(), value.spec())
    assert torch.isfinite(read.dense()).all()
    assert all(torch.isfinite(tensor.float()).all() for tensor in value.save().values() if tensor.is_floating_point())
    if size == 1e-7 and spec.startswith("int"):
        assert (read.dense() - w).abs().max() <= 2**-24  # float16's smallest scale bounds the error


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_stay_zeros(spec: str) -> None:
    grid, w = parse_grid(spec), weight(6, 512)
    w[2] = 0
    w[4, :256] = 0
    w[5] = -0.0
    value = quantize(grid, w, grid.fit(w))
    if not spec.endswith("real"):  # a real zero point does not hold 0 in a group of other values
        assert (load_value(value.save(), value.spec()).dense()[w == 0] == 0).all()
    zero = torch.zeros(3, 256)
    assert (grid.round(zero, grid.fit(zero)) == 0).all()


@pytest.mark.parametrize("spec", [spec for spec in PACKED if spec != "bf16"])
@pytest.mark.parametrize("power", [-3, 5])
def test_scaling_by_a_power_of_two_scales_the_result(spec: str, power: int) -> None:
    grid, w = parse_grid(spec), 8 * torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    scaled = w * 2.0**power
    once, twice = grid.round(w, grid.fit(w)), grid.round(scaled, grid.fit(scaled))
    assert torch.equal(once * 2.0**power, twice)


@pytest.mark.parametrize("spec", ["q4_k", "q6_k", "q4_0"])
def test_blocks_must_divide_the_columns(spec: str) -> None:
    grid = parse_grid(spec)
    assert "multiple of" in str(grid.illegal(4, 100))
    assert grid.illegal(4, 512) is None


@pytest.mark.parametrize(
    "spec",
    ["", "int", "int1:g8", "int9", "int4:g7", "int4:g99999", "int4:sym:real", "int4:row:g32", "int4:sym:sym", "int4:x",
     "int4:", "nf4:double", "fp8:row", "mxfp4:g32", "q5_k", "int٤", "int" + "9" * 5000, 4, None],
)  # fmt: skip
def test_bad_specs_are_refused(spec: object) -> None:
    with pytest.raises(InputError):
        parse_grid(spec)  # type: ignore[arg-type]


@given(st.text(max_size=20) | st.from_regex(r"(int|nf4|fp8|q4_k|bf16)[0-9:a-z]{0,12}", fullmatch=True))
def test_a_spec_is_read_or_refused(text: str) -> None:
    try:
        grid = parse_grid(text)
    except InputError as error:
        assert "\n" not in str(error).replace(text, "")
    else:
        assert parse_grid(grid.spec) == grid


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(InputError, match="did you mean 'mxfp4'"):
        parse_grid("mxpf4")


def test_a_damaged_value_is_refused() -> None:
    grid, w = Int(4, group=32), weight(4, 64)
    value = quantize(grid, w, grid.fit(w))
    tensors = value.save()
    with pytest.raises(InputError, match="missing"):
        load_value({name: tensor for name, tensor in tensors.items() if name != "_scale"}, value.spec())
    with pytest.raises(InputError, match="belongs there"):
        load_value({**tensors, "_scale": tensors["_scale"].float()}, value.spec())
    with pytest.raises(InputError, match="belongs there"):
        load_value({**tensors, "": tensors[""][:, :-1]}, value.spec())
    with pytest.raises(InputError, match="newer version"):
        load_value(tensors, {"form": "ternary"})


@pytest.mark.parametrize("spec", ["bf16", "fp16"])
def test_a_cast_is_a_dense_value(spec: str) -> None:
    grid, w = parse_grid(spec), weight(4, 6)
    value = quantize(grid, w, grid.fit(w))
    assert isinstance(value, Dense)
    assert torch.equal(value.save()[""], w.to(grid.dtype))
    assert disk_shapes(grid, (2, 2, 6))[""].shape == (2, 2, 6)
    assert quantize(grid, w, {}, (2, 2, 6)).shape == (2, 2, 6)
