"""Packed modules on their own: numbers, gradients, memory, copies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method
from slimwright.runtime import modules
from slimwright.runtime.modules import (
    PackedConv1D,
    PackedEmbedding,
    PackedLinear,
    PackedSpec,
    decode_rows,
    experts_class,
    packed_class,
    packed_linear,
    tile_slices,
)
from slimwright.weights import Quantized, disk_shapes, grid_kinds, parse_grid

SPECS = sorted({spec for kind in grid_kinds().values() for spec in (kind.examples or (kind.key,))} - {"int", "float"})


def fill(module: Any, spec: str, seed: int = 0, name: str = "weight", transposed: bool = False) -> Tensor:
    """Give a packed module random weights on a grid; returns them dense as (..., out, in)."""
    grid, packed = parse_grid(spec), module.packed[name]
    rows, columns = modules.matrix_shape(packed.shape)
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    value: Any = method("quantize/rtn", grid=grid).solve(w, SiteStatistics.none())
    parts = value.save() if grid.plain else Quantized(grid, value.codes, value.params, packed.shape).save()
    for suffix, part in parts.items():
        holder = module._buffers if suffix or grid.plain else module._parameters
        if grid.plain:
            part = part.reshape(packed.shape).transpose(-1, -2) if transposed else part.reshape(packed.shape)
        holder[name + suffix] = part if holder is module._buffers else nn.Parameter(part, requires_grad=False)
    return value.dense().reshape(packed.shape)


def packed(own: nn.Module, base: Any, spec: str, shape: tuple[int, int], transposed: bool = False) -> Any:
    own.__class__ = packed_class(base, type(own))
    own.compute_dtype = torch.float32
    own.pack_parameter("weight", PackedSpec(parse_grid(spec), shape, transposed))
    return own


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "TILE_BYTES", 4 * 256 * 24)


@pytest.mark.parametrize("spec", SPECS)
def test_linear_forward_and_gradients(spec: str, small_tiles: None) -> None:
    module = packed(nn.Linear(256, 72), PackedLinear, spec, (72, 256))
    assert isinstance(module, nn.Linear) and type(module).__name__ == "PackedLinear"
    weight = fill(module, spec)
    x = torch.randn(3, 5, 256, requires_grad=True)
    y = module(x)
    wanted = F.linear(x.detach().requires_grad_(), weight, module.bias)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)
    gradient = torch.randn_like(y)
    module.bias.grad = None
    y.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.bias.grad, gradient.sum((0, 1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.dense_parameter("weight", torch.float32), weight)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [40, 300])
def test_embedding_reads_single_rows(spec: str, rows: int, small_tiles: None) -> None:
    grid = parse_grid(spec)
    if grid.illegal(rows, 256):
        pytest.skip("illegal")
    module = packed(nn.Embedding(rows, 256, padding_idx=0), PackedEmbedding, spec, (rows, 256))
    weight = fill(module, spec)
    ids = torch.randint(0, rows, (4, 33))
    ids[0, :3] = torch.tensor([0, rows - 1, rows - 1])
    assert torch.equal(module(ids), F.embedding(ids, weight))
    assert module(ids[:0]).shape == (0, 33, 256)


def test_nf4_superblocks_cross_rows(small_tiles: None) -> None:
    """Columns that make a superblock span many rows, and a row count that leaves the last one short."""
    for columns, rows in ((64, 300), (192, 130), (896, 77)):
        grid = parse_grid("nf4")
        assert grid.row_multiple(columns) > 1
        module = packed(nn.Embedding(rows, columns), PackedEmbedding, "nf4", (rows, columns))
        weight = fill(module, "nf4")
        ids = torch.arange(rows).flip(0)
        assert torch.equal(module(ids), weight[ids])
        covered = [index for tile in tile_slices(grid, (rows, columns)) for index in range(tile.start, tile.stop)]
        assert covered == list(range(rows))
        parts = module.parts("weight")
        assert torch.equal(decode_rows(grid, parts, (rows, columns), slice(5, 9)), weight[5:9])
        assert torch.equal(module.project(torch.eye(columns)), weight.T)


def test_tiles_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the dense matrix's size is made in forward or backward, and none is kept between them."""
    monkeypatch.setattr(modules, "TILE_BYTES", 4 * 512 * 64)
    module = packed(nn.Linear(512, 2048, bias=False), PackedLinear, "int4:g128", (2048, 512))
    fill(module, "int4:g128")
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, Tensor) and tensor._base is None and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return out

    saved: list[Tensor] = []
    x = torch.randn(2, 512, requires_grad=True)
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
        y.sum().backward()
    assert largest <= 64 * 512
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in module.parts("weight").values()}


def test_dtypes_and_autocast() -> None:
    module = packed(nn.Linear(64, 32), PackedLinear, "int4:g32", (32, 64))
    weight = fill(module, "int4:g32")
    module.to(torch.bfloat16)
    x = torch.randn(4, 64).bfloat16()
    exact = F.linear(x.double(), weight.double(), module.bias.double())
    assert module(x).dtype == torch.bfloat16
    size = F.linear(x.double().abs(), weight.double().abs(), module.bias.double().abs())
    assert bool(((module(x).double() - exact).abs() <= 2**-8 * (exact.abs() + size)).all())
    assert module.weight.dtype == torch.bfloat16 and module._parameters["weight"].dtype == torch.uint8
    module.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.float()).dtype == torch.bfloat16
        y = module(x.float().requires_grad_())
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.weight_scale.dtype == torch.float16


def test_weight_is_never_a_plain_tensor() -> None:
    module = packed(nn.Linear(64, 32), PackedLinear, "int4:g32", (32, 64))
    fill(module, "int4:g32")
    assert module.weight.shape == (32, 32, 1) and isinstance(module.weight, nn.Parameter)
    for use in (
        module.weight.data.clone,
        lambda: module.weight.data.add_(torch.ones(32, 64)),
        lambda: module.weight + 1,
        lambda: module.weight.T,
        lambda: F.linear(torch.randn(2, 64), module.weight),
        lambda: module.weight[0],
        module.weight.norm,
        lambda: module.weight.add_(1),
        lambda: setattr(module.weight, "data", torch.zeros(1)),
    ):
        with pytest.raises(InputError, match="packed"):
            use()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    own: list[tuple[Any, Any, Any]] = [
        (nn.Linear(64, 32), PackedLinear, (32, 64)),
        (nn.Embedding(50, 64), PackedEmbedding, (50, 64)),
        (Gemma3TextScaledWordEmbedding(50, 64, 0, embed_scale=3.0), PackedEmbedding, (50, 64)),
    ]
    for module, base, shape in own:
        module = packed(module, base, "int4:g32", shape)
        fill(module, "int4:g32")
        if how == "deepcopy":
            other = copy.deepcopy(module)
        else:
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        x = torch.randn(3, 64) if base is PackedLinear else torch.arange(7)
        assert type(other) is type(module) and torch.equal(other(x), module(x))
        assert other.payload("weight").data_ptr() != module.payload("weight").data_ptr()


def test_own_classes_of_embeddings_and_linears() -> None:
    scaled = packed(Gemma3TextScaledWordEmbedding(50, 64, 0, embed_scale=7.9), PackedEmbedding, "int8:row", (50, 64))
    weight = fill(scaled, "int8:row")
    ids = torch.arange(20)
    torch.testing.assert_close(scaled(ids), weight[ids] * 7.9)
    assert isinstance(scaled, Gemma3TextScaledWordEmbedding)

    offset = packed(OPTLearnedPositionalEmbedding(30, 64), PackedEmbedding, "int8:row", (32, 64))
    weight = fill(offset, "int8:row")
    assert torch.equal(offset(torch.ones(1, 5)), weight[2:7][None])

    conv = Conv1D(48, 64)
    conv.in_features, conv.out_features = 64, 48
    conv = packed(conv, PackedConv1D, "int4:g32", (48, 64), transposed=True)
    weight = fill(conv, "int4:g32")
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(conv(x), F.linear(x, weight, conv.bias))
    assert conv.dense_parameter("weight", torch.float32).shape == (64, 48)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = packed(Doubled(64, 48), PackedLinear, "int4:g32", (48, 64))
    weight = fill(doubled, "int4:g32")
    torch.testing.assert_close(doubled(x), 2 * F.linear(x, weight, doubled.bias))

    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = x @ self.weight.T
            return out if self.bias is None else out + self.bias

    functional = packed(Functional(64, 48), PackedLinear, "int4:g32", (48, 64))
    weight = fill(functional, "int4:g32")
    torch.testing.assert_close(functional(x), F.linear(x, weight, functional.bias))


@pytest.mark.parametrize("spec", ["int4:g32", "nf4", "bf16", "int3:g64:sym"])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_are_decoded_one_by_one(spec: str, transposed: bool) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = (4, 64, 40) if transposed else (4, 40, 64)
            self.up = nn.Parameter(torch.empty(shape))

        def forward(self, x: Tensor, expert: Tensor) -> Tensor:
            return x @ self.up[expert] if transposed else F.linear(x, self.up[expert])

    module: Any = Experts()
    module.__class__ = experts_class(Experts, ("up",))
    module.compute_dtype = torch.float32
    module.pack_parameter("up", PackedSpec(parse_grid(spec), (4, 40, 64), transposed))
    weight = fill(module, spec, name="up", transposed=transposed)
    for expert in range(4):
        x = torch.randn(5, 64, requires_grad=True)
        y = module(x, torch.tensor(expert))
        torch.testing.assert_close(y, F.linear(x, weight[expert]))
        y.sum().backward()
        torch.testing.assert_close(x.grad, weight[expert].sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)
        seen = module.up[torch.tensor(expert)]
        dense = weight[expert].T if transposed else weight[expert]
        assert torch.equal(seen.dense(), dense) and seen.shape == dense.shape
        torch.testing.assert_close(torch.einsum("ij,jk->ik", torch.eye(dense.shape[0]), seen), dense)
    assert copy.deepcopy(module).up[0].dense().equal(module.up[0].dense())


def test_experts_run_eagerly_whatever_the_config_says() -> None:
    """Whole-tensor kernels would need all experts dense: the packed class runs its own loop, others are left alone."""
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=4, num_hidden_layers=1)
    config._experts_implementation = "grouped_mm"
    module: Any = MixtralExperts(config)
    module.__class__ = experts_class(MixtralExperts, ("down_proj", "gate_up_proj"))
    module.compute_dtype = torch.float32
    weights = {}
    for name, shape in (("gate_up_proj", (4, 64, 64)), ("down_proj", (4, 64, 32))):
        module.pack_parameter(name, PackedSpec(parse_grid("int8:row"), shape))
        weights[name] = fill(module, "int8:row", name=name)
    plain = MixtralExperts(config)
    plain.load_state_dict(weights)
    x, experts, scores = torch.randn(10, 64), torch.randint(0, 4, (10, 2)), torch.rand(10, 2)
    expected = plain(x, experts, scores)
    torch.testing.assert_close(module(x, experts, scores), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert plain.config._experts_implementation == "grouped_mm"


def test_packed_linear_of_a_range_of_rows() -> None:
    grid = parse_grid("nf4")
    w = torch.randn(64, 192)
    value = method("quantize/rtn", grid=grid).solve(w, SiteStatistics.none())
    parts = {
        suffix: tensor.reshape(disk_shapes(grid, (64, 192))[suffix].shape) for suffix, tensor in value.save().items()
    }
    x = torch.randn(2, 192)
    got = packed_linear(x, parts, PackedSpec(grid, (64, 192)), rows=slice(3, 30))
    torch.testing.assert_close(got, F.linear(x, value.dense()[3:30]))
