"""Which way a product goes, and the operators that compiled models call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimwright.errors import SlimwrightError
from slimwright.job.doctor import examine
from slimwright.kernels import packed
from slimwright.methods import SiteStatistics, method
from slimwright.runtime import compute
from slimwright.runtime.modules import PackedEmbedding, PackedLinear, PackedSpec, packed_class
from slimwright.weights import parse_grid
from slimwright.weights.matrix import kernel_matrix

pytestmark = pytest.mark.skipif(packed.library() is None, reason="no compiled kernels here")


def filled(own: nn.Module, base: Any, spec: str) -> tuple[Any, Tensor]:
    """A packed module and its dense weight."""
    weight: Any = own.weight
    own.__class__ = packed_class(base, type(own))
    module: Any = own
    module.compute_dtype = torch.float32
    module.pack_parameter("weight", PackedSpec(parse_grid(spec), tuple(weight.shape)))
    value: Any = method("quantize/rtn", grid=spec).solve(weight.detach().float(), SiteStatistics.none())
    for suffix, part in value.save().items():
        if suffix:
            module._buffers["weight" + suffix] = part
        else:
            module._parameters["weight"] = nn.Parameter(part, requires_grad=False)
    return module, value.dense()


@pytest.mark.parametrize("spec", ["int4:g128", "int4:g32:sym", "int5:g40", "nf4", "q8_0", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_gives_the_same_product(spec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches on both sides of every threshold, and a matrix of several tiles where the processor has a unit for
    matrices of bfloat16."""
    monkeypatch.setattr(compute, "TILE_ELEMENTS", 128 * 40)
    module, dense = filled(nn.Linear(128, 97).to(dtype), PackedLinear, spec)
    matrix = module.kernel("weight")
    taken = set()
    narrow = dtype == torch.bfloat16 and matrix.library.bfloats
    for batch, unit in (
        (1, False),
        (2, False),
        (3, False),
        (4, False),
        (17, False),
        (97, False),
        (1700, False),
        (97, True),
    ):
        monkeypatch.setattr(packed, "has_matrix_unit", lambda unit=unit: unit)
        taken.add(compute.arithmetic(matrix, dtype, batch))
        x = torch.randn(batch, 128, generator=torch.Generator().manual_seed(batch)).to(dtype)
        with torch.no_grad():
            got = module(x).double()
        exact = F.linear(x.double(), dense.double(), module.bias.double())
        size = F.linear(x.double().abs(), dense.double().abs(), module.bias.double().abs())
        most = (2.0**-7 if dtype == torch.bfloat16 else 2.0**-20) * size
        assert bool(((got - exact).abs() <= most).all()), batch
    many = {packed.BFLOAT_PANELS, packed.BFLOATS, None} if narrow else {packed.PANELS, 0}
    assert taken == many | ({3 if dtype == torch.float32 else 2} if matrix.layout.integer else {0})


def test_operators_are_sound() -> None:
    module, _ = filled(nn.Linear(64, 24), PackedLinear, "int4:g32")
    parts, grid = module.parts("weight"), module.packed["weight"].grid
    common = (list(parts.values()), list(parts), grid.spec, [24, 64])
    x = torch.randn(2, 3, 64)
    linear, gather = torch.ops.slimwright.packed_linear, torch.ops.slimwright.packed_gather
    torch.library.opcheck(linear.default, (x, *common, 0, 24, None, -1), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(linear.default, (x, *common, 3, 9, torch.randn(6), -1), test_utils=("test_faketensor",))
    index = torch.tensor([3, 1])
    torch.library.opcheck(
        gather.default, (index, *common, torch.float32), test_utils=("test_schema", "test_faketensor")
    )


def test_a_compiled_module_calls_the_operators() -> None:
    embedding, _ = filled(nn.Embedding(40, 64), PackedEmbedding, "int8:row")
    linear, _ = filled(nn.Linear(64, 24), PackedLinear, "int4:g32")
    ids, called = torch.randint(0, 40, (2, 3)), []

    def backend(graph: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        run = torch.compile(lambda ids: linear(embedding(ids)), fullgraph=True, backend=backend)
        assert torch.equal(run(ids), linear(embedding(ids)))
    assert [name for name in called if "slimwright" in name] == ["slimwright.packed_gather", "slimwright.packed_linear"]


def test_a_matrix_is_described_anew_when_its_tensors_change() -> None:
    module, dense = filled(nn.Linear(64, 24, bias=False), PackedLinear, "int4:g32")
    other, other_dense = filled(nn.Linear(64, 24, bias=False), PackedLinear, "int4:g32")
    x = torch.eye(64)
    with torch.no_grad():
        torch.testing.assert_close(module(x), dense.T)
        first = module.kernel("weight")
        assert module.kernel("weight") is first
        for name in ("weight_scale", "weight_zero"):
            module._buffers[name] = other._buffers[name]
        module._parameters["weight"] = other._parameters["weight"]
        torch.testing.assert_close(module(x), other_dense.T)
        assert module.kernel("weight") is not first
        twin = copy.deepcopy(module)
        torch.testing.assert_close(twin(x), other_dense.T)
        assert twin.kernel("weight") is not module.kernel("weight")


def test_inputs_of_8_bits_are_a_choice_with_its_error() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = filled(nn.Linear(256, 64), PackedLinear, "int4:g128")[0]

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.linear(x),)

    model, x = Model(), torch.randn(1, 256)
    with torch.no_grad():
        plain = model(x)[0]
        error = compute.eight_bit_inputs(model, x=x)
        assert 1e-4 < error < 2e-2
        assert float((model(x)[0] - plain).norm() / plain.norm()) == pytest.approx(error)
        compute.eight_bit_inputs(model, on=False)
        assert torch.equal(model(x)[0], plain)


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    module, _ = filled(nn.Embedding(40, 64), PackedEmbedding, "int4:g32")
    with pytest.raises(SlimwrightError, match="outside"):
        module(torch.tensor([40]))


def test_gradients_and_other_dtypes_go_their_own_way() -> None:
    module, dense = filled(nn.Linear(64, 24, bias=False), PackedLinear, "int4:g32")
    x = torch.randn(2, 64, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 64))
    half = torch.randn(2, 64).half()
    torch.testing.assert_close(module(half), half @ dense.half().T)


def test_doctor_says_which_kernel_serves_which_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    library = packed.library()
    assert library is not None
    found = examine()
    assert library.name in found["kernels"]["packed"]
    assert f"{library.name} integers" in found["grids"]["int4:g128"] and "floats" in found["grids"]["nf4"]
    monkeypatch.setattr(packed, "_load", lambda: (None, "there is no C++ compiler"))
    found = examine()
    assert "no C++ compiler" in found["kernels"]["packed"] and "reference" in found["grids"]["int4:g128"]
    module, dense = filled(nn.Linear(64, 24, bias=False), PackedLinear, "int4:g32")
    with torch.no_grad():
        torch.testing.assert_close(module(torch.eye(64)), dense.T)
    with pytest.raises(SlimwrightError, match="no C"):
        kernel_matrix(parse_grid("int4:g32"), module.parts("weight"), (24, 64))
