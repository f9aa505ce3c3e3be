"""A model of full shape that takes no memory: weights are one number seen as a matrix, and every output projection is
zero. What its forward shows on the CPU (which modules give zeros, which parameters the output still depends on) tells
what can be dropped, without names of families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimwright.model.dropped import DroppedForm, drop_module
from slimwright.model.structure import Site, Structure

SPREAD = 1 << 16
"""Elements up to which a parameter that is no site gets values of its own; larger ones are one number."""


def hollow_model(model: PreTrainedModel, structure: Structure, outputs: Mapping[str, Any]) -> PreTrainedModel:
    """Fill a model from the meta device in place.

    Every product of a site is a fixed vector that keeps its dependence on input and weight in autograd's graph; that of
    an output projection is zero in the same way. Other parameters are random.

    Args:
        model: on the meta device.
        structure: of it.
        outputs: module names of the parameters that are zero.
    """
    generator = torch.Generator().manual_seed(0)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _filled(parameter, f"{path}.{name}" in outputs, generator)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                fresh = torch.zeros(buffer.shape, dtype=buffer.dtype)
                if buffer.is_floating_point():
                    fresh = torch.rand(buffer.shape, generator=generator).to(torch.float32)
                module._buffers[name] = fresh
    experts: dict[str, list[Site]] = {}
    for site in structure.sites.values():
        module = model.get_submodule(site.module)
        if site.kind == "experts":
            experts.setdefault(site.module, []).append(site)
        elif site.kind == "embedding":
            width = site.columns
            module.forward = partial(_looked_up, module, torch.randn(width, generator=generator))  # type: ignore[method-assign]
        else:
            zero = f"{site.module}.{site.parameter}" in outputs
            made = torch.zeros(site.rows) if zero else torch.randn(site.rows, generator=generator)
            module.forward = partial(_product, module, made)  # type: ignore[method-assign]
    for path in experts:
        module = model.get_submodule(path)
        module.forward = partial(_experts, module)  # type: ignore[method-assign]
    return model.eval()


def _filled(parameter: nn.Parameter, zero: bool, generator: torch.Generator) -> nn.Parameter:
    dtype = parameter.dtype if not parameter.is_floating_point() else torch.float32
    if zero or parameter.numel() > SPREAD or not parameter.is_floating_point():
        value = torch.full((), 0.0 if zero else 0.02).to(dtype).expand(parameter.shape)
    else:
        value = 0.5 + 0.3 * torch.randn(parameter.shape, generator=generator)
    return nn.Parameter(value, requires_grad=value.is_floating_point())


def _corner(parameter: Tensor) -> Tensor:
    """One element, which ties what is made of it to the parameter in autograd's graph."""
    return parameter[(0,) * parameter.ndim]


def _product(module: nn.Module, made: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x[..., :1] * _corner(module.weight) * 1e-3 + made  # type: ignore[arg-type]


def _looked_up(module: nn.Module, made: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    spread = torch.sin(1.0 + ids.unsqueeze(-1).float() * (1.0 + torch.arange(len(made)) % 7))
    return made * spread + _corner(module.weight) * 1e-3  # type: ignore[arg-type]


def _experts(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    tied = [_corner(parameter) for parameter in module._parameters.values() if parameter is not None]
    tied += [v.sum() for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
    return x * 0.0 * torch.stack(tied).sum()


@contextmanager
def dropped(model: PreTrainedModel, forms: Mapping[str, DroppedForm]) -> Iterator[None]:
    """Meanwhile the modules at these paths are dropped."""
    kept = []
    for path, form in forms.items():
        module = model.get_submodule(path)
        held = ("_modules", "_parameters", "_buffers")
        kept.append((module, type(module), dict(module.__dict__), {name: dict(getattr(module, name)) for name in held},
                     set(module._non_persistent_buffers_set)))  # fmt: skip
        drop_module(module, form)
        module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        for module, own, attributes, contents, passing in kept:
            module.__class__ = own
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in contents.items():
                getattr(module, name).update(content)
            module._non_persistent_buffers_set.update(passing)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Meanwhile the module's forward is another."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def float_tensors(value: Any) -> Iterator[Tensor]:
    """Float tensors of a model's output; caches left out."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in ("past_key_values", "cache_params"):
                yield from float_tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from float_tensors(inner)


def reached(outputs: Any) -> set[int]:
    """Identities of the leaves that the output depends on in autograd's graph."""
    stack = [tensor.grad_fn for tensor in float_tensors(outputs) if tensor.grad_fn is not None]
    seen: set[Any] = set(stack)
    found: set[int] = set()
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found
