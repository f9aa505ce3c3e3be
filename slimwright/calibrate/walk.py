"""Walks: the forwards of all batches in lock step, one unit (a block, or a site outside blocks) at a time.

Every batch's forward is an ordinary call of the model that is suspended whenever it reaches a unit, and goes on with
the output it is given. So whatever a model does between its blocks (per-layer masks, position biases threaded from
block to block, cross-attention, image features put among the tokens) happens as in any forward, and needs no case here.
Suspended forwards are greenlets: they share one thread, and so torch's thread pool and its settings.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from transformers import PreTrainedModel

from slimwright.errors import SlimwrightError
from slimwright.model.structure import Site, Structure

SPILLED_BYTES = 1 << 16
"""Smallest tensor that is moved to a file when hidden states take more memory than they may."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward.

    Attributes:
        inputs: keyword arguments of the model's forward.
        masks: boolean masks of the tokens that count, by the shape (batch, length) of the sequence they belong to; a
            sequence whose shape has none counts wholly.
        documents: name of each row's document.
        outputs: (rows, length) positions whose output counts, where these are not those of the sequence: of a text with
            an image in it, the text's.
        pieces: of each row (document, tokens) in the order of its tokens, where rows are joined from pieces of several;
            empty: a row is of its document alone.
    """

    inputs: dict[str, Tensor]
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    documents: tuple[str, ...] = ()
    outputs: Tensor | None = None
    pieces: tuple[tuple[tuple[str, int], ...], ...] = ()

    def tokens_of(self, documents: Collection[str]) -> Tensor:
        """(rows, tokens) bool: which tokens are of these documents; (rows, 1) where each row is of one document."""
        if not self.pieces:
            return torch.tensor([[name in documents] for name in self.documents], dtype=torch.bool)
        rows = [
            torch.cat([torch.full((tokens,), name in documents) for name, tokens in pieces]) for pieces in self.pieces
        ]  # fmt: skip
        return torch.stack(rows)

    def by_rows(self, x: Tensor) -> Tensor | None:
        """``x`` (..., n) as (rows, tokens, n), where it is the batch's tokens one by one; None where it is not."""
        inputs = list(self.inputs.values())
        rows = inputs[0].shape[0]
        if x.ndim >= 3:
            return x.reshape(rows, -1, x.shape[-1]) if x.shape[0] == rows else None
        lengths = {1} | {tensor.shape[1] for tensor in inputs if tensor.ndim == 2 and tensor.shape[0] == rows}
        whole = any(x.shape[0] == rows * length for length in lengths)
        return x.reshape(rows, -1, x.shape[-1]) if x.ndim == 2 and whole else None

    def counted(self, x: Tensor) -> Tensor:
        """The rows (tokens, in) of ``x`` (..., in) whose tokens count, padding left out."""
        mask = self.masks.get(tuple(x.shape[:2])) if x.ndim >= 3 else None
        if mask is None and x.ndim == 2:
            mask = next((m.reshape(-1) for m in self.masks.values() if m.numel() == x.shape[0]), None)
        return (x if mask is None else x[mask]).reshape(-1, x.shape[-1])

    def named(self, x: Tensor) -> str:
        """The document of the first row of ``x`` that holds NaN or Inf in a token that counts, for an error message;
        the batch's first where rows cannot be told apart."""
        mask = self.masks.get(tuple(x.shape[:2]))
        bad = ~torch.isfinite(x).flatten(2).all(-1) if x.ndim >= 3 else torch.zeros(1, 1, dtype=torch.bool)
        rows = (bad if mask is None else bad & mask).any(-1).nonzero()
        row = int(rows[0]) if len(rows) else 0
        return f"the sample '{self.documents[row]}'" if row < len(self.documents) else "the calibration data"

    def predicted(self, logits: Tensor) -> Tensor:
        """The rows (tokens, classes) of the model's output whose tokens count."""
        if self.outputs is not None and logits.shape[:2] == self.outputs.shape:
            return logits[self.outputs]
        return self.counted(logits)


@dataclass(frozen=True)
class Unit:
    """What one step of a walk runs: a block with its sites, or the module of one site outside blocks.

    Attributes:
        module: module path.
        sites: the sites that it multiplies with.
        runs: how often one forward runs it.
    """

    module: str
    sites: tuple[Site, ...]
    runs: int = 1
    block: bool = True


def walk_units(structure: Structure) -> dict[str, Unit]:
    """The units of a model by module path: every block, and every module outside blocks that multiplies with a site.

    Embeddings are looked up, not multiplied: they belong to none, but a head tied to one does.
    """
    inside: dict[str, list[Site]] = {}
    units: dict[str, Unit] = {}
    for site in structure.sites.values():
        if site.block is not None:
            inside.setdefault(site.block, []).append(site)
        elif site.kind != "embedding":
            units[site.module] = Unit(site.module, (site,), block=False)
    for stack in structure.stacks:
        for block in stack.blocks:
            units[block.module] = Unit(block.module, tuple(inside.get(block.module, ())), block.runs)
    for alias, owner in structure.ties.items():
        tied = structure.sites.get(owner)
        module = structure.to_module.get(alias, alias).rpartition(".")[0]
        if tied is not None and tied.kind == "embedding" and module and module not in units:
            units[module] = Unit(module, (tied,), block=False)
    return units


def run_forward(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's output for a batch, without a cache of keys and values."""
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    dtype = model.dtype  # of images and sounds: not every model converts them itself
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.inputs.items()}
    return model(**inputs, **extra)


class Call:
    """One suspended forward, at the unit that it has reached."""

    def __init__(self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.unit = unit
        self._forward = forward
        self.args = args
        self.kwargs = kwargs

    def output(self) -> Any:
        """Run the unit on its inputs; may be called more than once."""
        return self.again(self.args, self.kwargs)

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the unit on other inputs."""
        return self._forward(*args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor among its inputs, one level into tuples, lists and dicts."""
        found: list[Tensor] = []
        for value in (*self.args, *self.kwargs.values()):
            inner = (
                value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else [value]
            )
            found += [item for item in inner if isinstance(item, Tensor)]
        return found


class Step:
    """One unit of a walk with the batches that have reached it, in the batches' order.

    Whoever walks may run :meth:`output` as often as it likes; :meth:`advance` gives the batch the output to go on with.
    Batches that were not advanced are run and advanced when the walk goes on.
    """

    def __init__(self, walk: Walk, unit: Unit, indices: list[int], run: int) -> None:
        self._walk = walk
        self.unit = unit
        self.indices = indices
        self.run = run

    @property
    def final(self) -> bool:
        """Whether the unit does not run again."""
        return self.run + 1 >= self.unit.runs

    def output(self, index: int) -> Any:
        """The unit's output for one of :attr:`indices`."""
        call = self._walk.calls[index]
        assert call is not None
        return call.output()

    def show(self, index: int) -> None:
        """Let whoever watches see the unit's inputs, without an output: a module outside blocks is not run for it."""
        call = self._walk.calls[index]
        assert call is not None
        if self.unit.block:
            call.output()
            return
        watch = self._walk.watch_of(self.unit)
        if watch is not None:
            watch(call.tensors()[0], 0)

    def batch(self, index: int) -> Batch:
        return self._walk.batches[index]

    @property
    def batches(self) -> list[Batch]:
        """All of the walk's."""
        return self._walk.batches

    def hidden(self, index: int) -> Tensor:
        """The first tensor that the unit is given: its hidden states."""
        call = self._walk.calls[index]
        assert call is not None
        return call.tensors()[0]

    def advance(self, index: int, output: Any) -> None:
        """Let the batch go on to its next unit."""
        self._walk.resume(index, output)

    def left(self) -> list[int]:
        """Batches that were not advanced yet."""
        return [index for index in self.indices if index not in self._walk.advanced]


class Walk:
    """Forwards of all batches, unit by unit.

    Args:
        model: its units' modules are patched while the walk lasts.
        structure: of the model.
        batches: inputs.
        cap: bytes that the suspended forwards' tensors may take in memory; what is more goes to mapped files.
        scratch: directory of those files; None is the system's.
        finish: called with the index of a batch and the model's output when its forward is over.
        gradients: keep the graph of what happens between units.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        batches: Sequence[Batch],
        cap: int | None = None,
        scratch: Path | None = None,
        finish: Callable[[int, Any], None] | None = None,
        gradients: bool = False,
    ) -> None:
        self.model = model
        self.units = walk_units(structure)
        self.batches = list(batches)
        self.calls: list[Call | None] = [None] * len(self.batches)
        self.advanced: set[int] = set()
        self.spilled_bytes = 0
        self._cap = cap
        self._scratch = scratch
        self._finish = finish
        self._gradients = gradients
        self._main = getcurrent()
        self._forwards: list[greenlet] = []

    def __iter__(self) -> Iterator[Step]:
        """The steps, in the order in which forwards reach the units. Leaving the loop early drops the forwards."""
        self._main = getcurrent()
        patched = [(path, self._patch(unit)) for path, unit in self.units.items()]
        runs: dict[str, int] = {}
        try:
            with without_caches(self.model), torch.set_grad_enabled(self._gradients):
                self._forwards = [greenlet(partial(run_forward, self.model)) for _ in self.batches]
                for index, batch in enumerate(self.batches):
                    self._note(index, self._forwards[index].switch(batch))
                while any(call is not None for call in self.calls):
                    unit = next(call.unit for call in self.calls if call is not None)
                    here = [i for i, call in enumerate(self.calls) if call is not None and call.unit is unit]
                    step = Step(self, unit, here, runs.get(unit.module, 0))
                    self.advanced = set()
                    yield step
                    for index in step.left():
                        step.advance(index, step.output(index))
                    runs[unit.module] = step.run + 1
        finally:
            for path, original in patched:
                self._unpatch(path, original)
            for forward in self._forwards:
                if forward and not forward.dead:
                    forward.throw(GreenletExit)
            self._forwards, self.calls = [], [None] * len(self.batches)

    def watch_of(self, unit: Unit) -> Callable[[Tensor, int], None] | None:
        """Who watches the inputs of a streamed module outside blocks."""
        watch: Callable[[Tensor, int], None] | None = self.model.get_submodule(unit.module).source.watch  # type: ignore[union-attr,assignment]
        return watch

    def resume(self, index: int, output: Any) -> None:
        """Give a suspended forward its unit's output; it runs on to its next unit or its end."""
        self.calls[index] = None
        self.advanced.add(index)
        self._note(index, self._forwards[index].switch(output))

    def _patch(self, unit: Unit) -> Any:
        module = self.model.get_submodule(unit.module)
        own = module.__dict__.get("forward")
        original = module.forward

        def suspended(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() is self._main:  # a block inside a block that this walk runs
                return original(*args, **kwargs)
            return self._main.switch(Call(unit, original, args, kwargs))

        module.__dict__["forward"] = suspended
        return own

    def _unpatch(self, path: str, own: Any) -> None:
        module = self.model.get_submodule(path)
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def _note(self, index: int, reached: Any) -> None:
        """Remember where a forward stopped, or that it is over."""
        if isinstance(reached, Call):
            self.calls[index] = reached
            if self._cap is not None:
                self._spill()
        else:
            self.calls[index] = None
            if self._finish is not None:
                self._finish(index, reached)

    def _spill(self) -> None:
        """Move what the suspended forwards hold beyond the cap into mapped files, the latest first: the first batch is
        the next to run."""
        seen: dict[int, list[Tensor]] = {}
        for call in self.calls:
            for tensor in call.tensors() if call is not None else ():
                storage = tensor.untyped_storage()
                if storage.nbytes() >= SPILLED_BYTES and not storage.filename:
                    seen.setdefault(storage.data_ptr(), []).append(tensor)
        used = sum(tensors[0].untyped_storage().nbytes() for tensors in seen.values())
        for tensors in reversed(list(seen.values())):
            if self._cap is None or used <= self._cap:
                break
            first = tensors[0]
            size = first.untyped_storage().nbytes()
            if any(not t.is_contiguous() or t.numel() * t.element_size() != size for t in tensors):
                continue  # a view of something larger: moving it would free nothing
            mapped = mapped_copy(first, self._scratch)
            for tensor in {id(t): t for t in tensors}.values():
                tensor.data = mapped.view(tensor.shape)
            used -= size
            self.spilled_bytes += size


@contextmanager
def without_caches(model: PreTrainedModel) -> Iterator[None]:
    """Forwards within keep no keys and values: a block may run more than once, and would see what it kept. Not every
    model hands ``use_cache=False`` on to the one inside it, so their configs say so."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def mapped_copy(tensor: Tensor, scratch: Path | None) -> Tensor:
    """A copy whose pages belong to an unlinked file, so that the kernel may write them out.

    Raises:
        SlimwrightError: the file cannot be made.
    """
    handle, path = tempfile.mkstemp(dir=scratch, prefix="hidden-")
    try:
        os.ftruncate(handle, tensor.numel() * tensor.element_size())
        mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped.copy_(tensor.reshape(-1))
    except (OSError, RuntimeError) as error:
        raise SlimwrightError(f"Hidden states cannot be kept in {scratch or tempfile.gettempdir()}: {error}") from None
    finally:
        os.close(handle)
        with suppress(OSError):
            os.unlink(path)
    return mapped.view(tensor.shape)
