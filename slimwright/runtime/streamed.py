"""Models whose weights stay on disk: every site's module computes from row tiles that a *source* hands out.

Used where a second model is needed beside the packed one and must not need memory: the dense reference of the
verification (the plan applied to the source by plain-tensor code), the source itself for the quality figures, and large
weights that a plan keeps dense. Everything that is not a site is loaded by transformers as usual.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimwright.errors import SlimwrightError
from slimwright.model.structure import Site
from slimwright.runtime.placeholder import add_placeholders
from slimwright.weights.activations import Activations

TILE_BYTES = 64 << 20
"""Bytes of a tile in float32 (DESIGN §1.5)."""


class WeightSource(ABC):
    """Hands out rows of one site's logical matrix (experts stacked along the rows).

    Attributes:
        held: (rows, columns) of any float dtype: the whole matrix, used instead of :meth:`rows` while it is there.
        empty: whether every weight is zero, so that nothing need be multiplied.
        activations: how a linear layer's input is rounded before it is multiplied, and watched; None: not.
        watch: called with every input (..., in) that a forward multiplies the weight with, and the number of the expert
            (0 where the site is one matrix).
        watch_output: called with every product that is part of a graph of gradients, the number of the expert (of an
            embedding's lookup the ids instead), and the columns of the product that are this weight's.
    """

    held: Tensor | None = None
    empty: bool = False
    activations: Activations | None = None
    watch: Callable[[Tensor, int], None] | None = None
    watch_output: Callable[[Tensor, Any, slice], None] | None = None

    def __init__(self, site: Site) -> None:
        self.site = site

    @abstractmethod
    def rows(self, rows: slice) -> Tensor:
        """(rows, columns) float32 of any range with start and stop."""

    def gather(self, index: Tensor) -> Tensor:
        """(n, columns) float32 of single rows, ``index`` (n,) sorted without repeats."""
        return torch.cat([self.rows(slice(i, i + 1)) for i in index.tolist()])

    def expert(self, index: int) -> Tensor:
        """(out, in) of one of the stacked experts; of all, where the site is one expert."""
        out = self.site.weight_shape[-2]
        part = slice(index * out, (index + 1) * out)
        return self.rows(part) if self.held is None else self.held[part]


def _no_weight(self: Any) -> Tensor:
    site = self.source.site
    weight = torch.zeros((), dtype=getattr(self, "dtype", torch.float32)).expand(site.rows, site.columns)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


_WEIGHT = property(_no_weight)
"""What a model finds that asks a weight's dtype, device or shape, or initialises it: one zero, seen as the matrix."""


class _StreamedLinear(nn.Module):
    """``x Wᵀ + b`` in row tiles; stands for nn.Linear, transformers' Conv1D and a tied head."""

    source: WeightSource
    weight = _WEIGHT

    def __init__(self, source: WeightSource, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.__dict__["source"] = source
        self.bias = bias
        self.out_features, self.in_features = source.site.rows, source.site.columns
        self.nf = self.out_features

    def forward(self, x: Tensor) -> Tensor:
        source = self.source
        if source.empty:
            zeros = x.new_zeros(*x.shape[:-1], self.out_features)
            return zeros if self.bias is None else zeros + self.bias
        if source.activations is not None:
            x = source.activations.round(x)
        if source.watch is not None:
            source.watch(x, 0)
        if source.held is not None:
            out = nn.functional.linear(x, source.held.to(x.dtype), self.bias)
        else:
            step = max(1, TILE_BYTES // 4 // self.in_features)
            pieces = []
            for start in range(0, self.out_features, step):
                tile = source.rows(slice(start, min(start + step, self.out_features)))
                pieces.append(nn.functional.linear(x, tile.to(x.dtype)))
            out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
            out = out if self.bias is None else out + self.bias
        if source.watch_output is not None and out.requires_grad:
            source.watch_output(out, 0, slice(None))
        return out


class _StreamedEmbedding(nn.Embedding):
    """Reads only the rows that are looked up. The embedding's own class comes first in the method resolution order, so
    that scales and offsets of its forward stay."""

    source: WeightSource
    dtype: torch.dtype
    weight = _WEIGHT  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        index, inverse = torch.unique(ids, return_inverse=True)
        held = self.source.held
        rows = self.source.gather(index) if held is None else held[index]
        out = rows.to(self.dtype)[inverse]
        if self.source.watch_output is not None:
            self.source.watch_output(out.requires_grad_(torch.is_grad_enabled()), ids, slice(None))
        return out.clone() if out.requires_grad else out  # CTRL scales its embeddings in place, which no leaf allows


class _Expert:
    """Stands for a fused parameter: ``[expert]`` is that expert's dense matrix as the module holds it."""

    def __init__(self, sources: list[WeightSource], transposed: bool, dtype: torch.dtype) -> None:
        self.sources = sources
        self.transposed = transposed
        self.dtype = dtype

    def __getitem__(self, index: Any) -> Tensor:
        number = int(index)
        own = [source for source in self.sources if source.site.expert is None]
        if own:
            matrix = own[0].expert(number)
        else:
            own = [s for s in self.sources if s.site.expert is not None and s.site.expert[0] == number]
            own.sort(key=lambda source: (source.site.expert or (0, 0, 0))[1])
            matrix = torch.cat([source.expert(0) for source in own])
            number = 0
        matrix = (matrix.t() if self.transposed else matrix).to(self.dtype)
        watches = [source.watch for source in own if source.watch is not None]
        outputs = [(source.watch_output, source.site) for source in own if source.watch_output is not None]
        if not watches and not outputs:
            return matrix

        def show(out: Tensor) -> None:
            first = 0
            for watch, site in outputs:  # matrices that the module concatenates lie side by side in its output
                width = site.weight_shape[-2]
                watch(out, number, slice(first, first + width))
                first += width

        return _Watched.of(matrix, lambda x: [watch(x, number) for watch in watches], show)


class _Watched(torch.Tensor):
    """A matrix that says what it is multiplied with, and the product: an expert's exist only inside its module."""

    report: Callable[[Tensor], Any]
    report_output: Callable[[Tensor], Any]

    @staticmethod
    def of(matrix: Tensor, report: Callable[[Tensor], Any], report_output: Callable[[Tensor], Any]) -> Tensor:
        watched = matrix.as_subclass(_Watched)
        watched.report, watched.report_output = report, report_output
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            given = [*args, *(kwargs[key] for key in ("weight", "other", "mat2") if key in kwargs)]
            x, weight = given[0], given[1]
            if isinstance(weight, _Watched) and not isinstance(x, _Watched):
                weight.report(x)
                with torch._C.DisableTorchFunctionSubclass():
                    out = func(*args, **kwargs)
                    if out.requires_grad:
                        weight.report_output(out)
                    return out
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_PRODUCTS = {
    nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__,
    torch.Tensor.mm, torch.Tensor.bmm,
}  # fmt: skip
"""What a module may multiply its input with an expert's matrix by: the input comes first."""


def replace_sites(model: PreTrainedModel, sources: Mapping[str, WeightSource], dtype: torch.dtype) -> None:
    """Replace the modules of sites by streamed ones, on the meta model before its weights are loaded.

    Args:
        sources: by disk name of the site; their module paths are those of this model's class.
        dtype: what the model computes in; its parameters may have another until they are loaded.
    """
    modules = dict(model.named_modules())
    experts: dict[tuple[str, str], list[WeightSource]] = {}
    for source in sources.values():
        site = source.site
        module = modules.get(site.module)
        if module is None:
            raise SlimwrightError(f"The module '{site.module}' of '{site.name}' is not in {type(model).__name__}.")
        if site.kind == "experts":
            experts.setdefault((site.module, site.parameter), []).append(source)
        else:
            _stream_module(model, site.module, source, dtype)
    for (path, parameter), members in experts.items():
        _stream_experts(modules[path], parameter, members, dtype)
    owned = {f"{source.site.module}.{source.site.parameter}": source for source in sources.values()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, owner in list(tied.items()):
        if owner in owned:
            _stream_module(model, target.rpartition(".")[0], owned[owner], dtype)
            del tied[target]
    model.all_tied_weights_keys = tied
    model._tied_weights_keys = dict(tied)


def _stream_module(model: PreTrainedModel, path: str, source: WeightSource, dtype: torch.dtype) -> None:
    """Let one linear, Conv1D, head or embedding compute from a source."""
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        own = type(module)
        bases = (_StreamedEmbedding,) if own is nn.Embedding else (own, _StreamedEmbedding)
        module.__class__ = type(f"Streamed{own.__name__}", bases, {})
        module.__dict__["source"] = source  # buffers that are not saved (Gemma's scale) are still to be initialised
        module.__dict__["dtype"] = dtype
        del module._parameters["weight"]
    else:
        streamed = _StreamedLinear(source, getattr(module, "bias", None))
        streamed.__dict__["dtype"] = dtype
        streamed._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(path, streamed)


def _stream_experts(module: nn.Module, parameter: str, sources: list[WeightSource], dtype: torch.dtype) -> None:
    """Let the module's own eager forward read its fused parameter expert by expert."""
    del module._parameters[parameter]
    proxy = _Expert(sources, sources[0].site.transposed, dtype)
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {parameter: property(lambda self: proxy)})
    module._is_hf_initialized = True  # type: ignore[assignment]
    if hasattr(module, "config"):
        config = copy.copy(module.config)
        config._experts_implementation_internal = "eager"  # type: ignore[union-attr]
        module.config = config  # type: ignore[assignment]


@register_quantization_config("slimwright-streamed")
class StreamedConfig(QuantizationConfigMixin):
    """Carries the sources into ``from_pretrained``; never saved."""

    def __init__(self, sources: Mapping[str, WeightSource] | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.quant_method = "slimwright-streamed"  # type: ignore[assignment]
        self.sources = sources or {}
        self.dtype = dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer("slimwright-streamed")
class StreamedQuantizer(HfQuantizer):
    """Replaces modules before loading; the weights of the sites are then simply not asked for."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config: Any = self.quantization_config
        replace_sites(model, config.sources, config.dtype)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def load_streamed(
    cls: type[PreTrainedModel],
    directory: Path,
    config: PretrainedConfig,
    sources: Mapping[str, WeightSource],
    tensors: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model of ``directory`` with the given sites streamed.

    Args:
        cls: the transformers class.
        config: its config, without a quantization_config.
        tensors: everything that is no site by disk name, taken instead of the files' contents.
        dtype: what it computes in.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the sites' tensors are unexpected keys here, by design
    logging.disable_progress_bar()
    try:
        model = cls.from_pretrained(
            None if tensors is not None else directory,
            config=config,
            dtype=dtype,
            quantization_config=StreamedConfig(sources, dtype),
            state_dict=tensors,
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    add_placeholders(model, dtype)
    return model.eval()
