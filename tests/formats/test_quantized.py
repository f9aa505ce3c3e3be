"""Checkpoints quantized by others: tiny files packed here, number by number, by loops that know only the layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.formats.quantized import foreign_weights
from slimwright.job.open import ForeignCheckpoint, open_source

NAME = "model.layers.0.mlp.up_proj"


def directory(path: Path, tensors: Mapping[str, Tensor], quantization: Any, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization, "dtype": "float32", **config}))
    return path


def opened(path: Path, tensors: Mapping[str, Tensor], quantization: Any, **config: Any) -> ForeignCheckpoint:
    return ForeignCheckpoint(Checkpoint.open(directory(path, tensors, quantization, **config)))


def check(found: ForeignCheckpoint, expected: Tensor, name: str = f"{NAME}.weight") -> None:
    """Values whole, by uneven ranges of rows, and through ``read``."""
    assert set(found.tensors) == {name}
    assert found.tensors[name].shape == tuple(expected.shape)
    assert "quantization_config" not in found.config
    assert torch.equal(found.read(name), expected)
    matrix = expected.transpose(-1, -2).flatten(0, 1) if expected.ndim == 3 else expected
    rows = matrix.shape[0]
    for first, last in ((0, 1), (1, rows), (rows // 2, rows // 2 + 3), (rows - 1, rows)):
        assert torch.equal(found.weight_rows(name, slice(first, last)), matrix[first:last])


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def stream(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other in a long little-endian number, cut into words of 32 bits."""
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    return [signed(number >> (32 * word) & 0xFFFFFFFF) for word in range(math.ceil(len(codes) * bits / 32))]


def random(seed: int, *shape: int, top: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed))


def scales_of(seed: int, *shape: int) -> Tensor:
    """Powers of two and their sums: products with codes are exact."""
    return (random(seed, *shape, top=7) + 1).float() / 64


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", None])
def test_gptq(bits: int, layout: str | None, tmp_path: Path) -> None:
    out, columns, groups = 32, 64, 2
    codes, zeros = random(1, out, columns, top=2**bits), random(2, groups, out, top=2**bits)
    index = torch.randperm(columns, generator=torch.Generator().manual_seed(3)) % groups
    scales = scales_of(4, groups, out).half()
    offset = 0 if layout == "gptq_v2" else 1
    tensors = {
        f"{NAME}.qweight": torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32).t(),
        f"{NAME}.qzeros": torch.tensor(
            [stream([(zero - offset) % 2**bits for zero in row], bits) for row in zeros.tolist()], dtype=torch.int32
        ),
        f"{NAME}.scales": scales,
        f"{NAME}.g_idx": index.int(),
    }
    settings = {"quant_method": "gptq", "bits": 5, "group_size": 32, "desc_act": True}  # bits: as the tensors say
    settings |= {} if layout is None else {"checkpoint_format": layout}
    expected = torch.empty(out, columns)
    for row in range(out):
        for column in range(columns):
            group = int(index[column])
            expected[row, column] = float(scales[group, row]) * int(codes[row, column] - zeros[group, row])
    check(opened(tmp_path / "m", tensors, settings), expected)
    del tensors[f"{NAME}.g_idx"]
    settings["bits"] = bits
    plain = (codes.unflatten(1, (groups, -1)) - zeros.t()[:, :, None]) * scales.t()[:, :, None].float()
    check(opened(tmp_path / "n", tensors, settings), plain.flatten(1))


def test_awq(tmp_path: Path) -> None:
    out, columns, groups = 24, 64, 2
    codes, zeros = random(1, columns, out, top=16), random(2, groups, out, top=16)
    scales = scales_of(3, groups, out).half()

    def packed(rows: Tensor) -> Tensor:
        found = []
        for row in rows.tolist():
            words = [row[start : start + 8] for start in range(0, out, 8)]
            found.append([
                signed(sum(word[place] << (4 * nibble) for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7))))
                for word in words
            ])  # fmt: skip
        return torch.tensor(found, dtype=torch.int32)

    tensors = {f"{NAME}.qweight": packed(codes), f"{NAME}.qzeros": packed(zeros), f"{NAME}.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    expected = torch.empty(out, columns)
    for row in range(out):
        for column in range(columns):
            group = column // 32
            expected[row, column] = float(scales[group, row]) * int(codes[column, row] - zeros[group, row])
    check(opened(tmp_path / "m", tensors, settings), expected)
    with pytest.raises(InputError, match="'gemv'"):
        foreign_weights(Checkpoint.open(directory(tmp_path / "n", tensors, {**settings, "version": "gemv"})))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_compressed_tensors_packed(bits: int, symmetric: bool, ordered: bool, tmp_path: Path) -> None:
    out, columns, groups = 40, 72, 3
    codes, zeros = random(1, out, columns, top=2**bits), random(2, out, groups, top=2**bits)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = scales_of(3, out, groups).bfloat16()
    index = torch.arange(columns) // 24
    tensors = {
        f"{NAME}.weight_packed": torch.tensor([stream(row, bits) for row in codes.tolist()], dtype=torch.int32),
        f"{NAME}.weight_scale": scales,
        f"{NAME}.weight_shape": torch.tensor([out, columns]),
        f"{NAME}.input_scale": torch.ones(1),
    }
    if not symmetric:
        packed = [stream(column, bits) for column in zeros.t().tolist()]
        tensors[f"{NAME}.weight_zero_point"] = torch.tensor(packed, dtype=torch.int32).t()
    if ordered:
        index = torch.randperm(columns, generator=torch.Generator().manual_seed(4)) % groups
        tensors[f"{NAME}.weight_g_idx"] = index.int()
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    expected = (codes - zeros[:, index]) * scales.float()[:, index]
    check(opened(tmp_path / "m", tensors, settings), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("int-quantized", torch.int8), ("float-quantized", torch.float8_e4m3fn)])
@pytest.mark.parametrize("shape", [(24, 1), (24,), (1,), (24, 4), (2, 3)])
def test_compressed_tensors_plain(kind: str, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = (random(1, 24, 64, top=200) - 100).to(dtype)
    scales = scales_of(2, *shape)
    args = {"num_bits": 8, "strategy": "block" if shape == (2, 3) else "channel", "block_structure": [16, 24]}
    settings = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": {"weights": args}}}
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": scales, f"{NAME}.input_scale": torch.ones(1)}
    expected = codes.float()
    for row in range(24):
        for column in range(64):
            place = {
                (24, 1): (row, 0), (24,): (row,), (1,): (0,), (24, 4): (row, column // 16),
                (2, 3): (row // 16, column // 24),
            }[shape]  # fmt: skip
            expected[row, column] *= scales[place]
    check(opened(tmp_path / "m", tensors, settings), expected)


@pytest.mark.parametrize("experts", [(), (3,)])
def test_float8_blocks(experts: tuple[int, ...], tmp_path: Path) -> None:
    shape, scales = (*experts, 40, 72), scales_of(2, *experts, 3, 3)
    codes = (random(1, *shape, top=200) - 100).to(torch.float8_e4m3fn)
    tensors = {"a.up.weight": codes, "a.up.weight_scale_inv": scales, "a.up.input_scale": torch.ones(1)}
    found = opened(tmp_path / "m", tensors, {"quant_method": "fp8", "weight_block_size": [16, 32]})
    expected = codes.float()
    for row in range(40):
        for column in range(72):
            expected[..., row, column] *= scales[..., row // 16, column // 32]
    assert set(found.tensors) == {"a.up.weight"}
    assert torch.equal(found.read("a.up.weight"), expected)
    assert torch.equal(found.weight_rows("a.up.weight", slice(13, 40)), expected.reshape(-1, 72)[13:40])


def test_mxfp4(tmp_path: Path) -> None:
    experts, out, blocks = 2, 6, 3
    codes, exponents = random(1, experts, out, 32 * blocks, top=16), random(2, experts, out, blocks, top=20) + 118
    values = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    expected = torch.empty(experts, out, 32 * blocks)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in expected.shape)).tolist():
        code, exponent = int(codes[tuple(place)]), int(exponents[place[0], place[1], place[2] // 32])
        expected[tuple(place)] = (-1.0 if code & 8 else 1.0) * values[code & 7] * 2.0 ** (exponent - 127)
    pairs = codes.unflatten(2, (blocks, 16, 2))
    tensors = {
        "e.gate_up_proj_blocks": (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8),
        "e.gate_up_proj_scales": exponents.to(torch.uint8),
    }
    found = opened(tmp_path / "m", tensors, {"quant_method": "mxfp4"})
    check(found, expected.transpose(1, 2), "e.gate_up_proj")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("columns", [64, 37])
def test_bitsandbytes_4_bit(double: bool, columns: int, tmp_path: Path) -> None:
    out, block, outer = 21, 16, 8
    count = out * columns
    blocks = -(-count // block)
    codes, table = random(1, count, top=16), torch.linspace(-1, 1, 16)
    data = [*codes.tolist(), 0]
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": [out, columns]}
    if double:
        inner, levels, scale = random(2, blocks, top=256), torch.linspace(-1, 1, 256), scales_of(3, -(-blocks // outer))
        absmax = torch.tensor([float(levels[int(inner[b])] * scale[b // outer] + 0.75) for b in range(blocks)])
        state |= {"nested_blocksize": outer, "nested_offset": 0.75, "nested_dtype": "float32"}
        extra = {"absmax": inner.to(torch.uint8), "nested_absmax": scale, "nested_quant_map": levels}
    else:
        absmax = scales_of(2, blocks)
        extra = {"absmax": absmax}
    tensors = {
        f"{NAME}.weight": torch.tensor([[data[i] << 4 | data[i + 1]] for i in range(0, count, 2)], dtype=torch.uint8),
        f"{NAME}.weight.quant_map": table,
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode())).to(torch.uint8),
        **{f"{NAME}.weight.{name}": tensor for name, tensor in extra.items()},
    }
    expected = torch.tensor([float(table[int(codes[i])] * absmax[i // block]) for i in range(count)])
    check(
        opened(tmp_path / "m", tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}), expected.view(out, -1)
    )


def test_bitsandbytes_8_bit(tmp_path: Path) -> None:
    codes, largest = (random(1, 24, 64, top=255) - 127).to(torch.int8), scales_of(2, 24) * 127
    tensors = {
        f"{NAME}.weight": codes,
        f"{NAME}.SCB": largest,
        f"{NAME}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    check(opened(tmp_path / "m", tensors, {"load_in_8bit": True}), codes * (largest / 127)[:, None])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quantization_config": {"quant_method": "aqlm", "bits": 2}}, "'aqlm'"),
        ({"text_config": {"quantization_config": {"quant_method": "quip"}}}, "'quip'"),
        ({"quantization_config": {"bits": 4}}, "does not name"),
        ({"quantization_config": []}, "not an object"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}}, "'marlin'"),
        ({"quantization_config": {"quant_method": "gptq"}, "model_type": "gpt2"}, "stored transposed"),
        ({"compression_config": {"quant_method": "compressed-tensors", "format": "marlin-24"}}, "'marlin-24'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "none of its tensors is"),
    ],
)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = directory(tmp_path / "m", {"a": torch.ones(1)}, None)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=named) as caught:
        open_source(str(path))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("weight_packed", torch.zeros(40, 6, dtype=torch.int32)),
        ("weight_packed", torch.zeros(40, 9, dtype=torch.float32)),
        ("weight_scale", torch.ones(40, 5)),
        ("weight_scale", None),
        ("weight_shape", torch.tensor([40, -1])),
        ("weight_g_idx", torch.full((72,), 3, dtype=torch.int32)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, other: Tensor | None, tmp_path: Path) -> None:
    tensors = {
        f"{NAME}.weight_packed": torch.zeros(40, 9, dtype=torch.int32),
        f"{NAME}.weight_scale": torch.ones(40, 3),
        f"{NAME}.weight_shape": torch.tensor([40, 72]),
    }
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert foreign_weights(Checkpoint.open(directory(tmp_path / "m", tensors, settings)))
    tensors.pop(f"{NAME}.{name}", None)
    if other is not None:
        tensors[f"{NAME}.{name}"] = other
    with pytest.raises(InputError, match=rf"{name}|cannot hold \(40, -1\)"):
        foreign_weights(Checkpoint.open(directory(tmp_path / "m", tensors, settings)))
