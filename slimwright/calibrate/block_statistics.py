"""Statistics of blocks while a walk runs them: how little each changes its tokens, and where its routers send them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from slimwright.calibrate.walk import Batch, Step, Unit


@dataclass(frozen=True)
class BlockSimilarity:
    """Mean cosines over the tokens that count; one minus a cosine is the block's (ShortGPT's block influence) or the
    sublayer's importance (cards: shortgpt, llm-drop).

    Attributes:
        block: between a block's input and its output; of a block that runs several times over all its runs.
        sublayers: between the residual stream before and after a sublayer, by its module path, that of the block's
            child that holds an attention's or an MLP's output projection (``...layers.0.self_attn`` and
            ``...layers.0.mlp``, OPT's ``...layers.0.fc2``, T5's ``...block.0.layer.1``). Where a norm is put on the sum
            (BERT), before that norm. Sublayers that are not added to the stream are not there.
        tokens: how many were seen.
    """

    block: float
    sublayers: dict[str, float]
    tokens: int


@dataclass
class _Sums:
    cosines: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        found = token_cosines(before, after)
        self.cosines[name] = self.cosines.get(name, 0.0) + float(found.sum())
        self.tokens[name] = self.tokens.get(name, 0) + found.numel()

    def mean(self, name: str) -> float:
        return self.cosines[name] / max(1, self.tokens[name])


class BlockStatistic(ABC):
    """Something that is found while a walk runs its blocks, each once on every batch."""

    @abstractmethod
    def watching(self, step: Step, index: int, model: nn.Module) -> AbstractContextManager[Callable[[Any], None]]:
        """While it is entered, the block of the step is run on one batch; what it gives is to be told its output."""


class BlockCosine(BlockStatistic):
    """:class:`BlockSimilarity` of every block that a walk runs.

    Args:
        sublayers: also of the attentions and MLPs inside.
    """

    def __init__(self, sublayers: bool = True) -> None:
        self._sublayers = sublayers
        self._sums: dict[str, _Sums] = {}

    @contextmanager
    def watching(self, step: Step, index: int, model: nn.Module) -> Iterator[Callable[[Any], None]]:
        batch, hidden = step.batch(index), step.hidden(index)
        sums = self._sums.setdefault(step.unit.module, _Sums())

        def add(name: str, before: Tensor, after: Tensor) -> None:
            sums.add(name, batch.counted(before), batch.counted(after))

        def add_block(output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            if isinstance(after, Tensor) and after.shape == hidden.shape:
                add("", hidden, after)

        with ExitStack() as watched:
            if self._sublayers:
                stream = watched.enter_context(ResidualStream(hidden, add))
                for path, sublayer in output_projections(step.unit).items():
                    watched.enter_context(stream.watching(sublayer, model.get_submodule(path)))
            yield add_block

    def result(self) -> dict[str, BlockSimilarity]:
        """By module path of the block, those left out whose output has another shape than their input."""
        return {
            block: BlockSimilarity(
                sums.mean(""), {name: sums.mean(name) for name in sums.cosines if name}, sums.tokens[""]
            )
            for block, sums in self._sums.items()
            if "" in sums.tokens
        }


@dataclass(frozen=True)
class RouterCounts:
    """What a layer's router did with the tokens that count.

    Attributes:
        tokens: how many were routed.
        counts: (experts,) int64, tokens that each expert was chosen for.
        mass: (experts,) float64, the sum over tokens of the weights that its output is given.
        coactivation: (experts, experts) int64, tokens that both were chosen for; on the diagonal the counts.
    """

    tokens: int
    counts: Tensor
    mass: Tensor
    coactivation: Tensor


class RouterRecord(BlockStatistic):
    """:class:`RouterCounts` of every layer of experts, seen where their module is given the chosen experts and their
    weights. Layers whose experts are fed otherwise (Llama 4 runs all of them on every token) are not there."""

    def __init__(self) -> None:
        self._found: dict[str, RouterCounts] = {}

    @contextmanager
    def watching(self, step: Step, index: int, model: nn.Module) -> Iterator[Callable[[Any], None]]:
        with ExitStack() as hooked:
            for path, experts in expert_modules(step.unit).items():
                hook = partial(self._add, path, experts, step.batch(index))
                handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
                hooked.callback(handle.remove)
            yield lambda output: None

    def _add(
        self, path: str, experts: int, batch: Batch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        chosen = next((t for t in given if t.ndim == 2 and t.dtype in (torch.int32, torch.int64)), None)
        weights = [t for t in given if t.is_floating_point() and chosen is not None and t.shape == chosen.shape]
        if chosen is None or not weights:
            return
        routed = torch.zeros(len(chosen), experts, dtype=torch.float64)
        routed.scatter_add_(1, chosen.long(), weights[-1].double())
        places = torch.zeros(len(chosen), experts, dtype=torch.float64).scatter_(1, chosen.long(), 1.0)
        routed, places = batch.counted(routed), batch.counted(places)
        together = (places.t() @ places).long()
        before = self._found.get(path)
        found = RouterCounts(len(places), together.diagonal().clone(), routed.sum(0), together)
        if before is not None:
            found = RouterCounts(
                before.tokens + found.tokens, before.counts + found.counts, before.mass + found.mass,
                before.coactivation + found.coactivation,
            )  # fmt: skip
        self._found[path] = found

    def result(self) -> dict[str, RouterCounts]:
        """By module path of the experts."""
        return dict(self._found)


def expert_modules(unit: Unit) -> dict[str, int]:
    """Module paths of a block's experts, and how many there are in each."""
    found: dict[str, int] = {}
    for site in unit.sites:
        if site.kind == "experts":
            count = site.shape[0] if site.expert is None else site.expert[0] + 1
            found[site.module] = max(found.get(site.module, 0), count)
    return found


def token_cosines(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of each token (tokens, size) with itself later: (tokens,) float64. Exactly 1 where nothing changed, also
    between vectors of zeros; 0 where one alone is zero."""
    x, y = before.double(), after.double()
    squares = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    cosines = ((x * y).sum(-1) / squares).clamp(-1, 1)
    return torch.where(squares > 0, cosines, (x == y).all(-1).double())


def output_projections(unit: Unit) -> dict[str, str]:
    """Module paths of what ends the sublayers of a block (attentions' output projections, MLPs' down projections, the
    modules of fused experts) → that of the block's child which holds it: routed and shared experts are one sublayer."""
    found = {}
    for site in unit.sites:
        if site.role in ("o", "down"):
            child, *rest = site.module.removeprefix(unit.module + ".").split(".")
            found[site.module] = ".".join([unit.module, child, *(rest[:1] if rest and rest[0].isdigit() else [])])
    return found


@dataclass(frozen=True)
class _Tag:
    """What a tensor is made of: the residual stream, or what sublayers are about to add to it, by their names."""

    stream: bool
    added: dict[str, Tensor] = field(default_factory=dict)


class ResidualStream(TorchFunctionMode):
    """While it is entered, follows a block's input through additions, and the outputs of sublayers until they are added
    to it, whatever lies between (norms, dropout, scales, views). A product with a weight ends what is followed. Works
    for norms before, after or both, for attention and MLP side by side, and for residuals inside a module.

    Args:
        hidden: the block's input.
        found: told of each addition: name, stream before, and after with that sublayer alone.
    """

    def __init__(self, hidden: Tensor, found: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._tags = WeakTensorKeyDictionary()
        self._tags[hidden] = _Tag(True)
        self._found = found

    @contextmanager
    def watching(self, name: str, module: nn.Module) -> Iterator[None]:
        """Take what the module returns for the output of a sublayer of that name."""

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            returned = output[0] if isinstance(output, tuple) else output
            self._tags[returned] = _Tag(False, {name: returned})

        handle = module.register_forward_hook(ended)
        try:
            yield
        finally:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            return func(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        tagged = [(value, tag) for value in given if (tag := self._tags.get(value)) is not None]
        if not tagged:
            return func(*args, **kwargs)
        if func in _IN_PLACE and tagged[0][0] is args[0]:  # about to change
            first, tag = tagged[0]
            tagged[0] = (first.clone(), replace(tag, added={k: v.clone() for k, v in tag.added.items()}))
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and (func in _IN_PLACE or out is not tagged[0][0]):
            tag = self._after(func in _ADDITIONS, tagged, out)
            if tag is not None:
                self._tags[out] = tag
            else:
                self._tags.pop(out, None)
        return out

    def _after(self, addition: bool, tagged: list[tuple[Tensor, _Tag]], out: Tensor) -> _Tag | None:
        """What the result of one function on tagged tensors is."""
        streams = [value for value, tag in tagged if tag.stream]
        added = {name: value for _, tag in tagged for name, value in tag.added.items()}
        if streams and added:
            if not addition or streams[0].shape != out.shape:
                return None
            for name, value in added.items():
                alone = out if len(added) == 1 else streams[0] + value
                self._found(name, streams[0], alone)
            return _Tag(True)
        if streams:
            return _Tag(True) if out.numel() == streams[0].numel() else None
        if len(added) == 1:
            return _Tag(False, dict.fromkeys(added, out))
        return _Tag(False, added) if addition else None


_PRODUCTS = {
    F.linear, F.conv1d, F.scaled_dot_product_attention, F.embedding, torch.matmul, torch.mm, torch.bmm, torch.addmm,
    torch.baddbmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm,
}  # fmt: skip
_IN_PLACE = {torch.Tensor.add_, torch.Tensor.__iadd__}
_ADDITIONS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, *_IN_PLACE}
