"""LoRA adapters at run time: read, checked against the model, applied to the rows that ask for them.

The files are PEFT's; the sums are ours, because rows of one batch may have different adapters: beside a layer's own
output comes ``scale * up(down(x))`` for the rows of each adapter, in float32 as PEFT computes it. The model's own
weights stay as they are, packed or not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimwright.checkpoint import Checkpoint, Lineage, fingerprint
from slimwright.checkpoint.files import shown
from slimwright.errors import InputError, NotBuiltError
from slimwright.formats.peft import LowRankChange, base_fingerprint, read_adapter
from slimwright.runtime.transformers_private import Conv1D

SAME_SITES = frozenset({"quantize"})
"""Edits after which an adapter of the model before still fits: weights are rounded, none is changed in meaning."""


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter that requests can name.

    Attributes:
        name: by which they do.
        directory: where it was read.
        changes: by module.
        checked: how it is known to belong to the model.
        base: the model that PEFT names as its base.
        nbytes: in memory.
    """

    name: str
    directory: Path
    changes: Mapping[str, LowRankChange]
    checked: str
    nbytes: int
    base: str | None = None


class Applied:
    """Adds adapters' changes to the outputs of a model's layers. Used by one thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._rows: list[tuple[ServedAdapter, Tensor | None]] = []
        self._reached: set[str] = set()

    @contextlib.contextmanager
    def rows(self, adapters: Sequence[ServedAdapter | None]) -> Iterator[None]:
        """Forwards in here are of as many rows, each with its adapter or none. Layers are hooked only meanwhile, so
        that rows without adapters can go through the model in one call of the kernels."""
        found: dict[ServedAdapter, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                found.setdefault(adapter, []).append(row)
        self._rows = [
            (adapter, None if len(rows) == len(adapters) else torch.tensor(rows)) for adapter, rows in found.items()
        ]
        names = {name for adapter in found for name in adapter.changes}
        hooks = [self._modules[name].register_forward_hook(self._hook(name)) for name in names]
        try:
            yield
        finally:
            self._rows = []
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def check(self, adapter: ServedAdapter) -> None:
        """See that an adapter's changes reach the model.

        Raises:
            NotBuiltError: a layer that it changes does not run as a module of its own.
        """
        self._reached = set()
        with self.rows([adapter]):
            self._model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        if missed := sorted(set(adapter.changes) - self._reached):
            raise NotBuiltError(
                f"{shown(adapter.directory)} changes {missed[0]}, which this model runs inside another layer: such "
                "adapters are not served in this version; merge it into the model with `slimwright merge`."
            )

    def _hook(self, name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            for adapter, rows in self._rows:
                change = adapter.changes.get(name)
                if change is None:
                    continue
                self._reached.add(name)
                x = arguments[0] if rows is None else arguments[0][rows]
                more = (x.float() @ change.down.T) @ change.up.T * change.scale
                if rows is None:
                    output = (output + more).to(output.dtype)
                else:
                    output = output.index_add(0, rows, more.to(output.dtype))
            return output

        return hook


def open_adapter(name: str, directory: str | Path, model: Any, lineage: Lineage) -> ServedAdapter:
    """Read an adapter and check that it belongs to the model.

    Where its file tells the fingerprint of its base (or the base that PEFT names is a directory here), that must be the
    model's own or an ancestor's from which only rounding came; otherwise shapes are all that can be compared.

    Args:
        name: for requests.
        directory: as PEFT wrote it.
        model: the loaded model.
        lineage: of the model.

    Raises:
        InputError: no adapter, damaged, of another base, or of layers that the model does not have.
        NotBuiltError: a kind of adapter that is not served.
    """
    found = read_adapter(directory)
    where = shown(found.path)
    if found.replaced:
        raise NotBuiltError(
            f"{where} replaces whole weights ({next(iter(found.replaced))}): such adapters are not served in this "
            "version; merge it into the model with `slimwright merge`."
        )
    checked = _check_base(found.path, found.base_model, lineage)
    modules = dict(model.named_modules())
    changes = {}
    for weight, change in found.changes.items():
        site = weight.removesuffix(".weight")
        module = modules.get(site)
        if module is None:
            raise InputError(f"{where} changes {shown(site)}, which this model does not have: it is of another base.")
        if change.magnitude is not None or isinstance(module, nn.Embedding):
            kind = "DoRA" if change.magnitude is not None else "an adapter of the embedding"
            raise NotBuiltError(
                f"{where} is {kind}, which is not served in this version; merge it into the model with "
                "`slimwright merge`."
            )
        into, out = _widths(module)
        if (change.down.shape[1], change.up.shape[0]) != (into, out):
            raise InputError(
                f"{where} changes {shown(site)} from {change.down.shape[1]} to {change.up.shape[0]} features, but this "
                f"model's has {into} and {out}: it is of another base."
            )
        changes[site] = change
    nbytes = sum(part.nbytes for change in changes.values() for part in (change.down, change.up))
    return ServedAdapter(name, found.path, changes, checked, nbytes, found.base_model)


def _widths(module: nn.Module) -> tuple[Any, Any]:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


def _check_base(directory: Path, base: str | None, lineage: Lineage) -> str:
    """How the adapter is known to be of this model."""
    told, how = base_fingerprint(directory), "fingerprint"
    if told is None and base and os.path.isdir(base):
        with contextlib.suppress(InputError):
            told, how = fingerprint(Checkpoint.open(base)), "fingerprint of its base's directory"
    if told is None:
        return "shapes"
    edits = lineage.edits_since(told)
    if edits is None:
        raise InputError(
            f"{shown(directory)} is an adapter of another base: that has the fingerprint {shown(told[:12])}, this "
            f"model {lineage.fingerprint[:12]}. Serve the model that it was trained on, or a result made of it."
        )
    touching = [str(edit.get("edit")) for edit in edits if edit.get("edit") not in SAME_SITES]
    if touching:
        raise InputError(
            f"{shown(directory)} is an adapter of this model's ancestor, whose weights were changed since "
            f"({', '.join(touching)}): train it again on this model."
        )
    return how
