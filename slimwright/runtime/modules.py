"""Packed modules: what stands in a loaded model where the weights are compressed.

A module is packed in place: its parameter becomes the payload (uint8, same name, one dimension more), the grid's other
parts become buffers beside it, and its class becomes a subclass of the one it had, so that everything which asks
``isinstance(m, nn.Linear)`` or reads ``embed_scale`` still finds what it knew. No dense copy of a weight ever exists:
the kernels read the packed bytes (:mod:`slimwright.runtime.compute`); where there are none the reference decodes tiles
of rows of at most :data:`TILE_BYTES` and multiplies tile by tile; the backward pass decodes them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimwright.errors import InputError
from slimwright.kernels.packed import DTYPES, Matrix
from slimwright.runtime import compute
from slimwright.weights import (
    Component,
    Form,
    Grid,
    component_parts,
    decode_rows,
    disk_shapes,
    matrix_ranges,
    matrix_shape,
)
from slimwright.weights.activations import Activations
from slimwright.weights.matrix import kernel_matrix

TILE_BYTES = 8 * 2**20
"""Most bytes (as float32) of a dense weight that exist at one time; tiles that stay in the caches decode 4 times faster
than tiles of 64 MB."""
COMPILED_TILE_BYTES = 64 * 2**20
"""The same in a compiled model, where every tile makes the graph longer and the decoding is fused."""


def _tile_elements() -> int:
    return (COMPILED_TILE_BYTES if torch.compiler.is_compiling() else TILE_BYTES) // 4


@dataclass(frozen=True)
class PackedSpec:
    """How one parameter is packed.

    Attributes:
        grid: the number format, or another form.
        shape: (out, in), or (experts, out, in) for stacked experts.
        transposed: whether the module and the source file hold the dense weight as (..., in, out).
    """

    grid: Form
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense parameter that the module was built with."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


def tile_slices(grid: Form, shape: tuple[int, ...], rows: slice | None = None) -> Iterator[slice]:
    """Ranges of matrix rows of at most :data:`TILE_BYTES` as float32, starting where the grid's tiles may start."""
    count, columns = matrix_shape(shape)
    start, stop = (0, count) if rows is None else (rows.start, rows.stop)
    multiple = grid.row_multiple(columns)
    step = max(multiple, _tile_elements() // columns // multiple * multiple)
    while start < stop:
        end = min(stop, (start // step + 1) * step)
        yield slice(start, end)
        start = end


# -- multiplication ------------------------------------------------------------------------------------------------


def _multiply(
    x: Tensor, bias: Tensor | None, grid: Grid, shape: tuple[int, ...], rows: slice, parts: Any, digits: int
) -> Tensor:
    """By the kernels where they can. A compiled model's GPU code is made of the reference, by torch."""
    if compute.usable(grid, x, parts) and (bias is None or bias.dtype == x.dtype):
        return compute.packed_linear(x, parts, grid, shape, rows, bias, digits)
    if x.device.type == "cuda" and not torch.compiler.is_compiling():
        found = compute.gpu_linear(x, parts, grid, shape, rows, bias)
        if found is not None:
            return found
    return _multiply_tiles(x, bias, grid, shape, rows, parts)


def _multiply_tiles(
    x: Tensor, bias: Tensor | None, grid: Grid, shape: tuple[int, ...], rows: slice, parts: Any
) -> Tensor:
    """The reference."""
    outputs = []
    plain = parts[""].reshape(matrix_shape(shape)) if grid.plain and parts[""].is_contiguous() else None
    for tile in tile_slices(grid, shape, rows):
        weight = (decode_rows(grid, parts, shape, tile) if plain is None else plain[tile]).to(x.dtype)
        part_bias = None if bias is None else bias[tile.start - rows.start : tile.stop - rows.start]
        outputs.append(F.linear(x, weight, part_bias))
        del weight
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class _PackedMultiply(torch.autograd.Function):
    """:func:`_multiply` that keeps the packed parts for the backward pass instead of dense tiles."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        grid: Grid,
        shape: tuple[int, ...],
        rows: slice,
        names: tuple[str, ...],
        digits: int,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.grid, ctx.shape, ctx.rows, ctx.names = grid, shape, rows, names
        return _multiply(x, bias, grid, shape, rows, dict(zip(names, parts)), digits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = dict(zip(ctx.names, ctx.saved_tensors))
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for tile in tile_slices(ctx.grid, ctx.shape, ctx.rows):
                weight = decode_rows(ctx.grid, parts, ctx.shape, tile).to(gradient.dtype)
                piece = gradient[..., tile.start - ctx.rows.start : tile.stop - ctx.rows.start] @ weight
                del weight
                grad_x = piece if grad_x is None else grad_x.float().add_(piece)
            assert grad_x is not None
            grad_x = grad_x.to(gradient.dtype)
        grad_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None, None, None, *([None] * len(ctx.names))


def packed_linear(
    x: Tensor,
    parts: Mapping[str, Tensor],
    spec: PackedSpec,
    bias: Tensor | None = None,
    rows: slice | None = None,
    digits: int = compute.AUTOMATIC,
) -> Tensor:
    """``x @ W[rows].T + bias`` in x's dtype (autocast's, where it is on), ``W`` in tiles; differentiable in x and bias.

    Args:
        x: (..., in), floating point.
        parts: tensors by suffix of a weight packed as ``spec`` says.
        bias: (rows,) in x's dtype.
        rows: which rows of the matrix; None is all.
        digits: see :func:`slimwright.runtime.compute.multiply`.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    rows = slice(0, matrix_shape(spec.shape)[0]) if rows is None else rows
    grid = spec.grid
    if not isinstance(grid, Grid):
        return _factored_linear(x, parts, spec, bias, rows, digits)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if needs_grad and torch.compiler.is_compiling():  # the partitioner recomputes the decoding
        return _multiply_tiles(x, bias, grid, spec.shape, rows, parts)
    if needs_grad:
        return _PackedMultiply.apply(x, bias, grid, spec.shape, rows, tuple(parts), digits, *parts.values())
    return _multiply(x, bias, grid, spec.shape, rows, parts, digits)


def _factored_linear(
    x: Tensor, parts: Mapping[str, Tensor], spec: PackedSpec, bias: Tensor | None, rows: slice, digits: int
) -> Tensor:
    """:func:`packed_linear` through the factors, one after the other, beside the weight that they correct."""

    def product(x: Tensor, component: Component, rows: slice, bias: Tensor | None = None) -> Tensor:
        own = PackedSpec(component.grid, component.shape)
        return packed_linear(x, component_parts(component, parts), own, bias, rows, digits)

    *base, left, right = spec.grid.components(spec.shape)
    products = [
        product(product(x, right, right.rows_for(own, spec.shape[-2])), left, own)
        for own in matrix_ranges(rows, spec.shape[-2])
    ]
    out = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    if base:
        return product(x, base[0], rows, bias) + out
    return out if bias is None else out + bias


def _plain_call(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels may be called without going through torch's dispatcher: ordinary tensors, no gradients, and
    nothing that watches or transforms operators."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in DTYPES
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# -- what a module shows under the weight's name -------------------------------------------------------------------

_HARMLESS = {"size", "dim", "numel", "nelement", "element_size", "stride", "data_ptr", "untyped_storage", "storage",
             "is_contiguous", "is_floating_point", "is_complex", "to", "cpu", "cuda", "detach", "contiguous",
             "requires_grad_", "get_device", "storage_offset", "__repr__", "__format__", "__hash__", "__len__",
             "is_pinned", "is_shared", "__reduce_ex__", "_is_view", "ndimension", "empty_like",
             "has_names", "is_inference"}  # fmt: skip
_TRANSPOSES = {"T", "mT", "H", "mH"}


class PackedWeight(nn.Parameter):
    """What ``module.weight`` of a packed module gives: the payload, as seen by code that asks the weight its dtype.

    Models write ``x.to(self.wo.weight.dtype)`` or ``embed_scale.to(self.weight.dtype)``; the dtype shown is therefore
    the one the module computes in, while the storage (``parameters()``, ``state_dict()``) is uint8. Computing with it,
    or asking for ``.data`` in order to change the weight, raises.
    """

    owner: PackedModule
    parameter: str
    _is_hf_initialized: bool

    @classmethod
    def of(cls, owner: PackedModule, name: str) -> PackedWeight:
        payload = owner.payload(name)
        views = owner.__dict__.setdefault("views", {})
        if name in views and views[name][0] is payload:
            return views[name][1]
        view = torch.Tensor._make_subclass(cls, payload, False)
        view.owner, view.parameter = owner, name
        view._is_hf_initialized = True  # or transformers' initialization would write into it
        views.pop(name, None)
        if payload.device.type == "meta":  # transformers tells offloaded parameters apart by identity
            views[name] = (payload, view)
        return view

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.owner.compute_dtype

    @property
    def data(self) -> Any:  # type: ignore[override]
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        """Moving the payload changes nothing, nor does casting it, as PEFT's preparation for training does."""
        stored = self.owner.payload(self.parameter)
        if value.shape != stored.shape:
            self._refuse()
        if value is not self:
            stored.data = value.detach().to(stored.dtype)

    def _refuse(self, *_: Any) -> Any:
        raise InputError(
            f"A weight on {self.owner.packed[self.parameter].grid} is packed, not a plain tensor to use or change:"
            " keep the adapter beside it instead of merging, or call model.dequantize() first."
        )

    def copy_(self, source: Tensor, non_blocking: bool = False) -> PackedWeight:  # type: ignore[override]
        """What ``load_state_dict`` does: takes a payload of the same kind, nothing else."""
        stored = self.owner.payload(self.parameter)
        if source.shape != stored.shape or source.dtype != stored.dtype:
            self._refuse()
        stored.copy_(source, non_blocking)
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        spec = self.owner.packed[self.parameter]
        return f"PackedWeight({spec.grid}, {list(spec.dense_shape)}, {self.device})"

    def __getitem__(self, index: Any) -> Any:
        spec = self.owner.packed[self.parameter]
        if len(spec.shape) != 3:
            self._refuse()
        parts, one, rows = self.owner.expert(self.parameter, int(index))
        return ExpertWeight(
            [
                lambda x: (
                    packed_linear(x, parts, one, rows=rows)
                    if one.grid.plain
                    else self.owner.multiply_rows(self.parameter, rows, x)
                )
            ],
            lambda: [decode_rows(one.grid, parts, one.shape, rows)],
            spec.transposed,
            self.owner.compute_dtype,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        harmless = (
            name in _HARMLESS
            or (name == "__get__" and attribute not in _TRANSPOSES)
            or (name in ("__set__", "__delete__") and attribute in ("requires_grad", "grad"))
        )
        if not harmless:
            next(arg for arg in _flatten(args, kwargs) if isinstance(arg, PackedWeight))._refuse()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if isinstance(result, PackedWeight) and name != "__get__":  # ``to`` may give the same object
                result = result.as_subclass(Tensor)
            return result


def _flatten(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *(kwargs or {}).values()):
        yield from value if isinstance(value, (list, tuple)) else (value,)


class _Parameters(dict[str, Any]):
    """``_parameters`` of a packed module: who walks over the parameters sees packed ones as :class:`PackedWeight`,
    because ``next(model.parameters()).dtype`` is asked everywhere; who takes one by name gets the payload as it is."""

    def __init__(self, owner: PackedModule, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self.owner = owner

    def items(self) -> Any:
        for name, parameter in super().items():
            if parameter is not None and name in self.owner.packed:
                yield name, PackedWeight.of(self.owner, name)
            else:
                yield name, parameter

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Parameters, (self.owner, {}), None, None, iter(list(dict.items(self)))


_Factors = tuple[Matrix | Tensor, ...]


def _described(spec: PackedSpec, parts: Mapping[str, Tensor]) -> _Factors | None:
    """See :meth:`PackedModule.factors`. Experts with factors, each its own, are none."""
    if isinstance(spec.grid, Grid):
        matrix = None if spec.grid.plain else kernel_matrix(spec.grid, parts, matrix_shape(spec.shape))
        return None if matrix is None else (matrix,)
    found: list[Matrix | Tensor] = []
    for component in spec.grid.components(spec.shape):
        own = component_parts(component, parts)
        factor = own[""] if component.grid.plain else kernel_matrix(component.grid, own, component.matrix_shape)
        if factor is None or len(component.shape) != 2:
            return None
        found.append(factor)
    return tuple(found)


class PackedModule(nn.Module):
    """Mixin of all packed modules: the parts under their names, moved but never recast."""

    packed: dict[str, PackedSpec]
    """By parameter name."""
    compute_dtype: torch.dtype
    """The dtype that the dense parameter would have."""
    own_class: ClassVar[type[nn.Module]]
    """The class the module had before it was packed."""
    input_digits: int = compute.AUTOMATIC
    """Bytes that stand for an input in integer products; see :func:`slimwright.runtime.compute.eight_bit_inputs`."""

    def pack_parameter(self, name: str, spec: PackedSpec) -> None:
        """Replace the parameter ``name`` by empty parts on the meta device."""
        self.__dict__.setdefault("packed", {})[name] = spec
        if not isinstance(self._parameters, _Parameters):
            self.__dict__["_parameters"] = _Parameters(self, self._parameters)
        for suffix, part in disk_shapes(spec.grid, spec.dense_shape if spec.grid.plain else spec.shape).items():
            tensor = torch.empty(part.shape, dtype=part.dtype, device="meta")
            if suffix:
                self._buffers[name + suffix] = tensor
            elif part.dtype.is_floating_point:  # a plain grid: as a buffer, it does not decide model.dtype
                self._parameters.pop(name, None)
                self._buffers[name] = tensor
            else:
                self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def part_names(self) -> Iterator[str]:
        """Names of all parts in this module."""
        for name, spec in self.packed.items():
            for suffix in disk_shapes(spec.grid, spec.shape):
                yield name + suffix

    def payload(self, name: str) -> Tensor:
        """The tensor under the weight's own name, as it is stored."""
        tensor = self._parameters[name] if name in self._parameters else self._buffers[name]
        assert tensor is not None
        return tensor

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of one packed parameter by suffix."""
        spec, found = self.packed[name], {}
        for suffix, part in disk_shapes(spec.grid, spec.shape).items():
            tensor = self._buffers[name + suffix] if suffix else self.payload(name)
            assert tensor is not None
            # accelerate's offloading casts what it reads to the dtype that the weight shows; bytes survive that exactly
            found[suffix] = tensor if tensor.dtype == part.dtype else tensor.to(part.dtype)
        if spec.grid.plain and spec.transposed:  # a plain tensor lies as the source's does
            found[""] = found[""].transpose(-1, -2)
        return found

    def expert(self, name: str, index: int) -> tuple[dict[str, Tensor], PackedSpec, slice]:
        """Parts, spec and rows of one expert of a parameter packed as one tensor."""
        spec, parts = self.packed[name], self.parts(name)
        rows = slice(index * spec.shape[1], (index + 1) * spec.shape[1])
        if spec.grid.plain:  # flattening a transposed one would copy it whole
            return {"": parts[""][index]}, PackedSpec(spec.grid, spec.shape[1:]), slice(0, spec.shape[1])
        return parts, spec, rows

    def kernel(self, name: str) -> Matrix | None:
        """One parameter that is packed on a grid, for the compiled kernels; None where they cannot read it, or where it
        has factors."""
        found = self.factors(name)
        return found[0] if found is not None and len(found) == 1 and isinstance(found[0], Matrix) else None

    def factors(self, name: str) -> tuple[Matrix | Tensor, ...] | None:
        """What multiplies for one packed parameter, described anew when its tensors change: the matrix on a grid, or
        the components of its form, each for the compiled kernels or a plain tensor (out, in). None where the kernels
        cannot read one of them."""
        kernels = cast(
            dict[str, tuple[_Factors, list[tuple[str, Tensor, int]]]], self.__dict__.setdefault("kernels", {})
        )
        kept = kernels.get(name)
        if kept is not None:
            for key, tensor, address in kept[1]:
                now = self._buffers.get(key)
                if (self._parameters.get(key) if now is None else now) is not tensor or tensor.data_ptr() != address:
                    break
            else:
                return kept[0]
        spec, parts = self.packed[name], self.parts(name)
        usable = compute.ready() and all(part.device.type == "cpu" for part in parts.values())
        made = _described(spec, parts) if usable else None
        if made is not None:
            kernels[name] = (made, [(name + suffix, part, part.data_ptr()) for suffix, part in parts.items()])
        return made

    def multiply_rows(self, name: str, rows: slice | None, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W[rows].T + bias`` of one packed parameter."""
        if not torch.compiler.is_compiling() and _plain_call(x, bias):
            found = self.factors(name)
            if found is not None and len(found) == 1:
                matrix = cast(Matrix, found[0])
                start, stop = (0, matrix.layout.rows) if rows is None else (rows.start, rows.stop)
                return compute.multiply(matrix, x, bias, start, stop, self.input_digits)
            if found is not None and rows is None:
                *base, left, right = found
                out = self._by(left, self._by(right, x), None if base else bias)
                return out.add_(self._by(base[0], x, bias)) if base else out
        return packed_linear(x, self.parts(name), self.packed[name], bias, rows, self.input_digits)

    def _by(self, factor: Matrix | Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ F.T + bias``."""
        if isinstance(factor, Matrix):
            return compute.multiply(factor, x, bias, 0, factor.layout.rows, self.input_digits)
        return F.linear(x, factor.to(x.dtype), bias)

    def dense_parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """The dense parameter in the module's own orientation, decoded tile by tile."""
        spec, parts = self.packed[name], self.parts(name)
        dense = torch.empty(matrix_shape(spec.shape), dtype=dtype, device=parts[""].device)
        for rows in tile_slices(spec.grid, spec.shape):
            dense[rows] = decode_rows(spec.grid, parts, spec.shape, rows).to(dtype)
        dense = dense.reshape(spec.shape)
        return dense.transpose(-1, -2).contiguous() if spec.transposed else dense

    def unpack_parameter(self, name: str, dtype: torch.dtype) -> None:
        """Put the dense parameter back."""
        dense = self.dense_parameter(name, dtype)
        spec = self.packed.pop(name)
        for suffix in disk_shapes(spec.grid, spec.shape):
            self._buffers.pop(name + suffix, None)
            self._non_persistent_buffers_set.discard(name + suffix)
        self._parameters[name] = nn.Parameter(dense, requires_grad=dtype.is_floating_point)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self.payload(name) for name in self.part_names() if name in self._parameters}
        kept |= {name: self._buffers[name] for name in self.part_names() if name in self._buffers}  # type: ignore[misc]
        for name in kept:
            (self._parameters if name in self._parameters else self._buffers).pop(name)
        moved = dict(kept)
        try:
            super()._apply(fn, recurse)
            self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
            for name, tensor in kept.items():  # as bytes, so that no cast of floating point tensors applies
                moved[name] = fn(tensor.detach().view(torch.uint8)).view(tensor.dtype)
        finally:
            for name, tensor in moved.items():
                if isinstance(kept[name], nn.Parameter):
                    self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
                else:
                    self._buffers[name] = tensor
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("views", "kernels")}

    def __reduce_ex__(self, protocol: Any) -> Any:
        base, own = type(self).packed_base, type(self).own_class  # type: ignore[attr-defined]
        return _empty_instance, (base, own), self.__getstate__()


def _empty_instance(base: type[PackedModule], own: type[nn.Module]) -> PackedModule:
    cls = packed_class(base, own)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def packed_class(base: type[PackedModule], own: type[nn.Module]) -> type[PackedModule]:
    """The subclass of ``own`` whose ``super().forward()`` reaches ``base``: [own, base, nn.Linear or nn.Embedding]."""
    bases: tuple[type, ...] = (base,) if issubclass(base, own) else (own, base)
    if base is PackedConv1D:
        bases = (base,)

    def forward(self: Any, *args: Any, packed_use: str | None = None, **kwargs: Any) -> Any:
        if packed_use is not None:
            return getattr(self, packed_use)(*args)
        return super(cls, self).forward(*args, **kwargs)  # type: ignore[arg-type]

    if issubclass(base, PackedLinear) and own is not nn.Linear and _is_plain_linear(own):  # type: ignore[arg-type]
        bases = (base, own)  # its forward reads the weight as a tensor, and is no other than nn.Linear's

    namespace: dict[str, Any] = {"packed_base": base, "own_class": own, "__module__": own.__module__}
    if issubclass(base, _OneWeight):
        namespace["forward"] = forward
    name = base.__name__ if own in (nn.Linear, nn.Embedding) else f"Packed{own.__name__}"
    cls = type(name, bases, namespace)
    return cls


@functools.cache
def _is_plain_linear(own: type[nn.Module]) -> bool:
    """Whether a subclass of nn.Linear has a forward of its own that computes what nn.Linear's does."""
    if own.forward is nn.Linear.forward:
        return False
    probe, generator = own.__new__(own), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        nn.Linear.__init__(probe, 8, 6, device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    with torch.device("cpu"), torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
        x = torch.randn(4, 8, generator=generator)
        try:
            return torch.allclose(probe(x), F.linear(x, probe.weight, probe.bias), atol=1e-5)  # type: ignore[arg-type]
        except Exception:  # needs more than nn.Linear has: it stays itself
            return False


# -- linear, Conv1D, embedding -------------------------------------------------------------------------------------


class _OneWeight(PackedModule):
    """A module with one weight, ``weight``; called with ``packed_use`` it serves a module that is tied to it.

    Tied modules call the module itself, not its methods, so that accelerate's hooks bring offloaded parts in.
    """

    @property
    def weight(self) -> Any:
        if torch.compiler.is_compiling():  # no subclass in the graph; only dtype, device and rows are ever asked here
            return self.payload("weight").new_empty(self.packed["weight"].dense_shape[0], 0, dtype=self.compute_dtype)
        return PackedWeight.of(self, "weight")

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("weight", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if isinstance(param, PackedWeight):
            param = param.owner._parameters[param.parameter]
        if name == "weight":
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``."""
        return self.multiply_rows("weight", None, x, bias)

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of ``W`` in :attr:`compute_dtype`: (*ids.shape, columns). Only these rows are unpacked."""
        spec, parts, flat = self.packed["weight"], self.parts("weight"), ids.reshape(-1)
        grid, columns = spec.grid, spec.shape[-1]
        assert isinstance(grid, Grid)  # the quantizer refuses others where rows are looked up

        if (
            ids.device.type == "cpu"
            and self.compute_dtype in DTYPES
            and compute.usable(grid, torch.empty(0, dtype=self.compute_dtype), parts)
        ):
            rows = compute.packed_gather(flat, parts, grid, spec.shape, self.compute_dtype)
            return rows.reshape(*ids.shape, columns)

        def gather(index: Tensor) -> Tensor:
            return grid.gather(parts, index, spec.shape).to(self.compute_dtype)

        step = max(1, _tile_elements() // columns)
        if not torch.compiler.is_compiling() and flat.shape[0] == 0:
            rows = torch.empty(0, columns, dtype=self.compute_dtype, device=ids.device)
        elif torch.compiler.is_compiling() or flat.shape[0] <= step:
            rows = gather(flat)
        else:
            rows = torch.cat([gather(index) for index in flat.split(step)])
        return rows.reshape(*ids.shape, columns)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid={self.packed['weight'].grid}"


class _Multiplied(_OneWeight, nn.Linear):
    """A module that multiplies its input with its weight."""

    activations: Activations | None = None
    """How its input is rounded first."""

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x if self.activations is None else self.activations.round(x), self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activations is None else f", activations={self.activations}")


class PackedLinear(_Multiplied):
    """A linear layer on packed weights."""


class PackedConv1D(_Multiplied):
    """GPT-2's ``Conv1D``, whose dense weight is (in, out): packed as (out, in) it is a linear layer, also for PEFT."""


class PackedEmbedding(_OneWeight, nn.Embedding):
    """An embedding on packed weights; the embedding's own class scales or offsets around it."""

    def forward(self, input: Tensor) -> Tensor:
        return self.lookup(input)


class _Tied(PackedModule):
    """A module whose weight is another packed module's: it owns no tensor of it, so nothing is tied, missed or saved
    twice."""

    @property
    def source(self) -> _OneWeight:
        return self.__dict__["source_module"]

    @property
    def weight(self) -> Any:
        return self.source.weight

    @weight.setter
    def weight(self, value: Any) -> None:
        raise InputError("This weight is tied to a packed one: call model.dequantize() before replacing it.")

    def call_source(self, use: str, x: Tensor, *args: Any) -> Tensor:
        """Use the source's weight on its device (its hooks bring an offloaded one in)."""
        payload = self.source.payload("weight")
        if payload.device.type == "meta" or payload.device == x.device:
            return self.source(x, *args, packed_use=use).to(x.device)
        moved = [None if arg is None else arg.to(payload.device) for arg in args]
        return self.source(x.to(payload.device), *moved, packed_use=use).to(x.device)


class TiedHead(_Tied, nn.Linear):
    """A head that computes from the packed tensors of the embedding it is tied to; it may have its own bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.call_source("project", x, self.bias)


class TiedEmbedding(_Tied, nn.Embedding):
    """An embedding that reads the packed tensors of the module it is tied to."""

    def forward(self, input: Tensor) -> Tensor:
        return self.call_source("lookup", input)


# -- experts -------------------------------------------------------------------------------------------------------


class ExpertWeight:
    """One expert's matrix, not yet decoded: ``F.linear(x, w)``, ``x @ w`` and transposes of it multiply tile by tile;
    anything else gets the dense matrix in the module's own orientation.

    Args:
        multiply: functions x → x @ W.T of the matrices that are stacked along the outputs.
        dense: gives these matrices, (out, in).
        transposed: whether the module holds the weight as (in, out).
        dtype: the dtype that the dense parameter would have.
    """

    def __init__(
        self,
        multiply: list[Callable[[Tensor], Tensor]],
        dense: Callable[[], list[Tensor]],
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        self.multiply, self.matrices, self.transposed, self.dtype = multiply, dense, transposed, dtype

    def linear(self, x: Tensor) -> Tensor:
        """``x @ W.T`` with W (out, in)."""
        outputs = [multiply(x) for multiply in self.multiply]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def dense(self) -> Tensor:
        """The matrix in the module's orientation and dtype."""
        weight = torch.cat([matrix.to(self.dtype) for matrix in self.matrices()])
        return weight.t() if self.transposed else weight

    def t(self) -> ExpertWeight:
        return ExpertWeight(self.multiply, self.matrices, not self.transposed, self.dtype)

    @property
    def T(self) -> ExpertWeight:  # noqa: N802
        return self.t()

    def transpose(self, dim0: int, dim1: int) -> ExpertWeight:
        return self if dim0 % 2 == dim1 % 2 else self.t()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and isinstance(args[1], cls) and not args[1].transposed:
            out, bias = args[1].linear(args[0]), args[2] if len(args) > 2 else kwargs.get("bias")
            return out if bias is None else out + bias
        if (
            func in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
            and isinstance(args[1], cls)
            and not isinstance(args[0], cls)
            and args[1].transposed
        ):
            return args[1].linear(args[0])
        return func(
            *(arg.dense() if isinstance(arg, cls) else arg for arg in args),
            **{key: arg.dense() if isinstance(arg, cls) else arg for key, arg in kwargs.items()},
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)


class ExpertStack:
    """Stands for a fused (experts, out, in) parameter whose experts lie in modules of their own; ``[i]`` gives one."""

    _is_hf_initialized = True

    def __init__(self, experts: list[list[ExpertLeaf]], shape: tuple[int, ...]) -> None:
        self.experts, self.shape = experts, shape

    @property
    def dtype(self) -> torch.dtype:
        return self.experts[0][0].compute_dtype

    @property
    def device(self) -> torch.device:
        return next(self.experts[0][0].parameters()).device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> ExpertWeight:
        leaves = self.experts[int(index)]
        # the modules are called, not their methods, so that hooks bring offloaded parts in
        return ExpertWeight(list(leaves), lambda: [leaf.matrix() for leaf in leaves], False, self.dtype)


class ExpertLeaf(nn.Module):
    """One expert's matrix under the checkpoint's own name, called as ``x @ W.T``."""

    compute_dtype: torch.dtype

    def matrix(self) -> Tensor:
        """(out, in)."""
        raise NotImplementedError


class PackedExpertLeaf(_OneWeight, ExpertLeaf):
    """One expert's packed matrix."""

    def __init__(self, spec: PackedSpec, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.packed, self.compute_dtype, self._is_hf_initialized = {}, dtype, True
        self.pack_parameter("weight", spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def matrix(self) -> Tensor:
        return self.dense_parameter("weight", self.compute_dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Module.__reduce_ex__(self, protocol)


class DenseExpertLeaf(ExpertLeaf):
    """One expert's plain matrix, beside packed ones of other layers or experts."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        self._is_hf_initialized = True

    @property
    def compute_dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def matrix(self) -> Tensor:
        return self.weight


class PackedExperts(PackedModule):
    """Mixin for modules of fused experts, run by their class's own eager forward.

    ``stacks`` maps a fused parameter's name to the modules of its experts; parameters packed as one tensor are in
    ``packed``.
    """

    stacks: dict[str, ExpertStack]

    def __getattr__(self, name: str) -> Any:
        stack = self.__dict__.get("stacks", {}).get(name)
        return super().__getattr__(name) if stack is None else stack

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        return _empty_experts, (cls.own_class, cls.fused_names), self.__getstate__()  # type: ignore[attr-defined]


def _empty_experts(own: type[nn.Module], fused: tuple[str, ...]) -> PackedModule:
    cls = experts_class(own, fused)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def experts_class(own: type[nn.Module], fused: tuple[str, ...]) -> type[PackedExperts]:
    """The packed subclass of an experts class.

    Args:
        own: the class; its undecorated forward loops over experts and indexes the fused parameters.
        fused: names of the parameters packed as one (experts, out, bytes, 1) tensor.
    """
    dispatched = hasattr(
        own, "_apply_gate"
    )  # transformers' use_experts_implementation chooses among whole-tensor kernels
    eager = getattr(own.forward, "__wrapped__", own.forward) if dispatched else own.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return eager(self, *args, **kwargs)

    def register_parameter(self: Any, name: str, param: nn.Parameter | None) -> None:
        if name in self.packed:
            self._parameters[name] = param
        else:
            nn.Module.register_parameter(self, name, param)

    namespace: dict[str, Any] = {
        "forward": forward,
        "register_parameter": register_parameter,
        "own_class": own,
        "fused_names": fused,
        "__module__": own.__module__,
    }
    for name in fused:
        namespace[name] = property(functools.partial(PackedWeight.of, name=name))
    return type(f"Packed{own.__name__}", (PackedExperts, own), namespace)
