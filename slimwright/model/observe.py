"""One forward on the meta device, watched: who reads which parameter, how, and what feeds what.

Nothing is computed: tensors have shapes only. What a parameter is used for is seen at torch's function calls, so that
neither names nor classes are trusted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from slimwright.runtime.transformers_private import Conv1D

# What changes nothing that a per-channel factor would notice.
_PASSING = {"to", "dropout", "contiguous", "float", "type_as"}
_MATRIX_PRODUCTS = {"linear", "addmm", "matmul", "__matmul__"}
_MULTIPLYING = {"mul", "__mul__", "__rmul__", "multiply"}


@dataclass
class Call:
    """One call of a module: the tensor objects that went in and came out, by identity."""

    given: int
    returned: int | None = None


@dataclass
class Observation:
    """What one forward showed.

    Attributes:
        uses: module name of a parameter → how it was read: (``linear`` | ``conv1d`` | ``embedding`` by its owner in the
            regular way, or ``functional`` by someone else or in another way; the module that was running).
        dtype_reads: parameters whose ``dtype`` the model's code asked for.
        calls: module path → its calls, in order.
        order: module paths by first call.
        consumers: identity of a tensor → (name of the function, identity of its result, module that was running).
        returned: identities of the tensors that the model returned.
    """

    uses: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    dtype_reads: set[str] = field(default_factory=set)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    consumers: dict[int, list[tuple[str, int | None, str]]] = field(default_factory=dict)
    returned: set[int] = field(default_factory=set)

    def inputs(self, module: str) -> tuple[int, ...]:
        """Identities of the tensors that the module was called with; equal for modules that are fed the same."""
        return tuple(call.given for call in self.calls.get(module, ()))

    def reaches(self, tensor: int, through_product: bool) -> set[str] | None:
        """Modules that are fed this tensor and nothing else is.

        With ``through_product`` the tensor must first be a factor of one elementwise product, once. None if it is used
        in any other way.
        """
        consumers = self.consumers.get(tensor, ())
        if tensor in self.returned or (through_product and len(consumers) != 1):
            return None
        found: set[str] = set()
        for function, result, module in consumers:
            if function in _MATRIX_PRODUCTS and not through_product:
                found.add(module)
            elif function == "view" and result is not None and self.reaches(result, False) == {module}:
                found.add(module)  # Conv1D flattens what it multiplies
            elif function in _PASSING and result is not None and result != tensor:
                inner = self.reaches(result, through_product)
                if inner is None:
                    return None
                found |= inner
            elif function in _MULTIPLYING and through_product and result is not None:
                inner = self.reaches(result, False)
                if inner is None:
                    return None
                found |= inner
            elif function not in _PASSING:
                return None
        return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)


class _Recorder(TorchFunctionMode):
    """Files every torch function call under the module that is running."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.observation = Observation()
        self.running: list[str] = [""]
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.owned: dict[int, dict[str, str]] = {}
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                self.owned.setdefault(id(parameter), {})[path] = f"{path}.{name}" if path else name
        self.alive: list[Any] = []  # so that no identity is given twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if (
            name in ("item", "__bool__")
            and isinstance(args[0], Tensor)
            and args[0].is_meta
            and args[0].dtype == torch.bool
        ):
            return True  # checks on values: there are none, and a valid input passes them
        result = func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        if name == "__get__" and given and id(given[0]) in self.owned and isinstance(result, torch.dtype):
            self.observation.dtype_reads.update(self.owned[id(given[0])].values())
        made = list(_tensors(result))
        if not made:
            return result  # shapes, devices, dtypes
        module = self.running[-1]
        self.alive += [given, made]
        for tensor in given:
            if id(tensor) in self.owned:
                self._use(name, tensor, args, kwargs, module)
            else:
                outcome = id(made[0]) if len(made) == 1 else None
                self.observation.consumers.setdefault(id(tensor), []).append((name, outcome, module))
        return result

    def _use(self, function: str, parameter: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], at: str) -> None:
        """File one read of a parameter."""
        owned = self.owned[id(parameter)]
        kind = "functional"
        if at in owned:
            weight = {"linear": 1, "embedding": 1, "addmm": 2}.get(function)
            regular = weight is not None and (
                (len(args) > weight and args[weight] is parameter) or kwargs.get("weight") is parameter
            )
            owner = self.modules[at]
            if regular and function == "linear" and isinstance(owner, nn.Linear):
                kind = "linear"
            elif regular and function == "embedding" and isinstance(owner, nn.Embedding):
                kind = "embedding"
            elif regular and function == "addmm" and isinstance(owner, Conv1D):
                kind = "conv1d"
            elif isinstance(owner, nn.Linear) and behaves_as_linear(owner):
                kind = "linear"
        for name in [owned[at]] if at in owned else list(owned.values())[:1]:
            self.observation.uses.setdefault(name, []).append((kind, at))


def observe(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Observation:
    """Run ``model`` (on the meta device) once and watch.

    Raises:
        Exception: whatever the model's forward raises when there are no values.
    """
    recorder = _Recorder(model)
    handles = []
    for path, module in recorder.modules.items():
        handles += _hooks(recorder, path, module)
    try:
        with torch.no_grad(), recorder:
            output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    recorder.observation.returned = {id(tensor) for tensor in _tensors(output)}
    recorder.alive.append(output)
    return recorder.observation


def _hooks(recorder: _Recorder, path: str, module: nn.Module) -> list[Any]:
    observation = recorder.observation

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.running.append(path)
        tensor = next(_tensors((args, kwargs)), None)
        recorder.alive.append(tensor)
        if path not in observation.calls:
            observation.order.append(path)
        observation.calls.setdefault(path, []).append(Call(id(tensor) if tensor is not None else 0))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        recorder.running.pop()
        recorder.alive.append(output)
        if isinstance(output, Tensor):
            observation.calls[path][-1].returned = id(output)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


_LINEAR_CLASSES: dict[type[nn.Module], bool] = {}


def behaves_as_linear(module: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own computes ``x Wᵀ + b``: tried on a small copy."""
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    if kind not in _LINEAR_CLASSES:
        generator = torch.Generator().manual_seed(0)
        small = copy.deepcopy(module)
        small.in_features, small.out_features = 6, 4
        small.weight = nn.Parameter(torch.randn(4, 6, generator=generator))
        small.bias = nn.Parameter(torch.randn(4, generator=generator)) if module.bias is not None else None
        x = torch.randn(3, 6, generator=generator)
        try:
            with torch.no_grad():
                found = kind.forward(small, x)  # without the hooks
                _LINEAR_CLASSES[kind] = torch.allclose(found, F.linear(x, small.weight, small.bias), atol=1e-5)
        except Exception:  # a forward that wants other arguments or submodules is not a plain linear
            _LINEAR_CLASSES[kind] = False
    return _LINEAR_CLASSES[kind]


def gain_offset(norm: nn.Module) -> float | None:
    """``c`` of a norm that multiplies by ``weight + c``: 0 as a rule, 1 for Gemma's; None if it does otherwise."""
    outputs = []
    for value in (0.0, 1.0, 3.0):
        found = _normed(norm, value, _sample())
        if found is None:
            return None
        outputs.append(found)
    zero, one, three = outputs
    slope = one - zero
    if not torch.allclose(three - zero, 3 * slope, atol=1e-4) or slope.abs().max() < 1e-3:
        return None
    ratios = zero / slope
    offset = round(float(ratios.median()), 3) + 0.0  # no -0.0
    return offset if torch.allclose(zero, offset * slope, atol=1e-3) else None


def turns_with_its_input(norm: nn.Module) -> bool:
    """Whether a norm with a gain of 1 and no bias turns its output when its input is turned: so do RMS norms, but not
    those that subtract the mean."""
    offset = gain_offset(norm)
    if offset is None or getattr(norm, "bias", None) is not None:
        return False
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    straight, turned = _normed(norm, 1 - offset, _sample()), _normed(norm, 1 - offset, _sample() @ turn)
    return straight is not None and turned is not None and torch.allclose(straight @ turn, turned, atol=1e-3)


def _sample() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def _normed(norm: nn.Module, value: float, x: Tensor) -> Tensor | None:
    """What the norm makes of ``x`` (3, 8) with a weight of ``value`` everywhere and no bias; None if it cannot."""
    small = copy.deepcopy(norm)
    weight = getattr(small, "weight", None)
    if weight is None or weight.ndim != 1:
        return None
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (8,)
    if getattr(small, "bias", None) is not None:
        small.bias = nn.Parameter(torch.zeros(8))
    small.weight = nn.Parameter(torch.full((8,), value))
    try:
        with torch.no_grad():
            return type(small).forward(small, x)
    except Exception:  # a norm that wants more than its input
        return None
