"""``quantization_config`` of config.json: what the loader must know of a compressed model. Versioned.

::

    {"quant_method": "slimwright", "format_version": 1, "written_by": "0.1.0",
     "grids": {"int4:g128": ["model.layers.0.self_attn.q_proj.weight", ...], "int3:g64+lowrank:r16": [...], ...},
     "dense": {"bfloat16:896x4864": [...], "float32:768x3072:t": [...]}, "fingerprint": "<of the source>",
     "activations": {"int8:token": [...]}, "cache": {"kv4:g32:w128": [0, 1, ...]},
     "dropped": {"modules": {"zeros:896:2": ["model.layers.3.self_attn", ...], "pass": [...]},
                 "tensors": {"bfloat16:896x896": [...]}, "marks": [...]}, "low_memory": true}

Names are disk names of weights; a layer's experts may be collapsed to ``...experts.[0-127].w1.weight``. Everything
that is not named is a plain tensor. ``activations``, which may be missing, says how the inputs of weights are rounded
(:mod:`slimwright.weights.activations`); ``cache``, which may be missing, how layers keep their keys and values
(:mod:`slimwright.runtime.kv_format`); ``dropped``, which may be missing, what stands for sublayers that are not there
(:class:`Dropped`); ``low_memory``, which may be missing, that the process which loads the model is to return large
buffers to the system (:func:`slimwright.heap.return_large_buffers`). Every older version is read (``read_config``), a
newer one refused. Version 2 brought low-rank forms; what has none is written as version 1, which older programs read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimwright import __version__
from slimwright.errors import InputError
from slimwright.model.dropped import DroppedForm
from slimwright.runtime.kv_format import KvFormat
from slimwright.weights import Form, Grid, parse_form
from slimwright.weights.activations import Activations

FORMAT_VERSION = 2
MOST_WEIGHTS = 1 << 18
"""Packed weights that a config may name: a few bytes of it can claim very many."""
_RANGE = re.compile(r"^(.*)\[0-(\d{1,9})\](.*)$")


def _collapse(names: Iterable[str]) -> list[str]:
    """Replace complete runs of expert indices 0..n by one ``[0-n]`` entry; other names stay as they are."""
    found: dict[str, list[tuple[int, str]]] = {}
    order: list[str] = []
    for name in names:
        match = re.match(r"^(.*\bexperts\.)(\d+)(\..*)$", name)
        key = f"{match[1]}[*]{match[3]}" if match else name
        if key not in found:
            order.append(key)
        found.setdefault(key, []).append((int(match[2]) if match else -1, name))
    collapsed: list[str] = []
    for key in order:
        entries = sorted(found[key])
        indices = [index for index, _ in entries]
        if indices[0] == 0 and len(indices) > 1 and indices == list(range(len(indices))):
            collapsed.append(key.replace("[*]", f"[0-{indices[-1]}]"))
        else:
            collapsed += [name for _, name in entries]
    return collapsed


def _expand(names: Iterable[str], room: int) -> list[str]:
    """Inverse of :func:`_collapse`; InputError if there are more than ``room`` of them."""
    expanded: list[str] = []
    for name in names:
        match = _RANGE.match(name)
        count = int(match[2]) + 1 if match else 1
        if len(expanded) + count > room:
            raise InputError(f"quantization_config names more than {MOST_WEIGHTS:,} weights: the file is damaged.")
        expanded += [f"{match[1]}{index}{match[3]}" for index in range(count)] if match else [name]
    return expanded


@dataclass(frozen=True)
class DenseForm:
    """How a weight was stored in the source: dtype name, shape on disk, and whether its last two dimensions are
    (in, out) there."""

    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def spec(self) -> str:
        """``bfloat16:896x4864`` or ``bfloat16:768x3072:t``."""
        return f"{self.dtype}:{'x'.join(map(str, self.shape))}" + (":t" if self.transposed else "")

    @classmethod
    def parse(cls, spec: str) -> DenseForm:
        """Inverse of :attr:`spec`.

        Raises:
            InputError: not of that form.
        """
        match = re.fullmatch(r"([a-z0-9_]{1,20}):(\d{1,12}(?:x\d{1,12}){1,3})(:t)?", spec)
        if not match:
            raise InputError(
                f"quantization_config.dense has '{spec[:60]}', which is no dtype and shape: it is damaged."
            )
        return cls(match[1], tuple(int(size) for size in match[2].split("x")), match[3] is not None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in) or (experts, out, in)."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


@dataclass(frozen=True)
class Dropped:
    """Sublayers that were dropped.

    Attributes:
        forms: what stands for a module, by its path in the model that was compressed.
        tensors: dtype's name and shape of every tensor that is not there, by disk name: all zeros in a dense export.
        marks: those of them that are there as one byte: where slimwright is not imported, transformers then stops with
            a wrong size instead of filling them at random.
    """

    forms: Mapping[str, DroppedForm] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    marks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        modules: dict[str, list[str]] = {}
        for path, form in self.forms.items():
            modules.setdefault(form.spec, []).append(path)
        tensors: dict[str, list[str]] = {}
        for name, (dtype, shape) in self.tensors.items():
            tensors.setdefault(f"{dtype}:{'x'.join(map(str, shape))}", []).append(name)
        collapsed = {spec: _collapse(names) for spec, names in tensors.items()}
        return {"modules": modules, "tensors": collapsed, "marks": list(self.marks)}


def write_config(
    grids: Mapping[str, Form],
    fingerprint: str,
    dense: Mapping[str, DenseForm] | None = None,
    activations: Mapping[str, Activations] | None = None,
    cache: Mapping[int, KvFormat] | None = None,
    dropped: Dropped | None = None,
    low_memory: bool = False,
) -> dict[str, Any]:
    """The ``quantization_config`` for weights by disk name in their forms.

    Args:
        grids: form by disk name.
        fingerprint: of the source.
        dense: how each weight was stored in the source, which a dense export gives back.
        activations: how what enters a weight is rounded, by disk name; left out of the config where there is none.
        cache: format of the keys and values by layer.
        dropped: what is not there.
        low_memory: whether the process that loads the model is to return large buffers to the system.
    """
    by_grid: dict[str, list[str]] = {}
    by_form: dict[str, list[str]] = {}
    by_rounding: dict[str, list[str]] = {}
    for name, grid in grids.items():
        by_grid.setdefault(grid.spec, []).append(name)
        if dense is not None:
            by_form.setdefault(dense[name].spec, []).append(name)
        if activations is not None and name in activations:
            by_rounding.setdefault(activations[name].spec, []).append(name)
    layers: dict[str, list[int]] = {}
    for index, format in sorted((cache or {}).items()):
        layers.setdefault(format.spec, []).append(index)
    rounded = {spec: _collapse(names) for spec, names in by_rounding.items()}
    return {
        "quant_method": "slimwright",
        "format_version": 1 if all(isinstance(grid, Grid) for grid in grids.values()) else FORMAT_VERSION,
        "written_by": __version__,
        "grids": {spec: _collapse(names) for spec, names in by_grid.items()},
        "dense": {spec: _collapse(names) for spec, names in by_form.items()},
        **({"activations": rounded} if rounded else {}),
        "fingerprint": fingerprint,
        **({"cache": layers} if layers else {}),
        **({"dropped": dropped.to_json()} if dropped is not None and dropped.forms else {}),
        **({"low_memory": True} if low_memory else {}),
    }


def _names(config: Mapping[str, Any], key: str) -> dict[str, list[str]]:
    """A member of the config that maps specs to lists of weight names, the names written out.

    Raises:
        InputError: it does not, or names too many.
    """
    lists = config.get(key)
    if not isinstance(lists, Mapping) or not all(
        isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) for names in lists.values()
    ):
        raise InputError(f"quantization_config.{key} must map specs to lists of weight names: the file is damaged.")
    found: dict[str, list[str]] = {}
    for spec, names in lists.items():
        found[str(spec)] = _expand(names, MOST_WEIGHTS - sum(map(len, found.values())))
    return found


def read_config(config: Mapping[str, Any]) -> dict[str, Form]:
    """Forms by disk name.

    Raises:
        InputError: a newer format version, or a config that is not of the form above.
    """
    version = config.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise InputError("quantization_config has no valid format_version: the file is damaged.")
    if version > FORMAT_VERSION:
        raise InputError(
            f"This model is in format version {version}; this slimwright reads up to {FORMAT_VERSION}: upgrade it."
        )
    found: dict[str, Form] = {}
    for spec, names in _names(config, "grids").items():
        grid = parse_form(spec)
        for name in names:
            if name in found:
                raise InputError(f"quantization_config names the weight '{name}' twice: the file is damaged.")
            found[name] = grid
    return found


def read_dense(config: Mapping[str, Any]) -> dict[str, DenseForm]:
    """How every packed weight was stored in the source.

    Raises:
        InputError: as :func:`read_config`, or a packed weight has no entry.
    """
    found: dict[str, DenseForm] = {}
    for spec, names in _names(config, "dense").items():
        found |= dict.fromkeys(names, DenseForm.parse(spec))
    missing = [name for name in read_config(config) if name not in found]
    if missing:
        raise InputError(f"quantization_config.dense says nothing of '{missing[0]}': the file is damaged.")
    return found


def read_activations(config: Mapping[str, Any]) -> dict[str, Activations]:
    """How the inputs of weights are rounded, by disk name.

    Raises:
        InputError: as :func:`read_config`, no rounding that is known, one without its scale, or of a weight that is not
            packed.
    """
    if "activations" not in config:
        return {}
    found: dict[str, Activations] = {}
    for spec, names in _names(config, "activations").items():
        rounding = Activations.parse(spec)
        if not rounding.ready:
            raise InputError(f"quantization_config.activations has '{spec}' without its scale: the file is damaged.")
        found |= dict.fromkeys(names, rounding)
    packed = read_config(config)
    missing = [name for name in found if name not in packed]
    if missing:
        raise InputError(f"quantization_config.activations names '{missing[0]}', which is not packed: it is damaged.")
    return found


def read_cache(config: Mapping[str, Any]) -> dict[int, KvFormat]:
    """Format of the keys and values by layer; empty where none is packed.

    Raises:
        InputError: not of the form above.
    """
    lists = config.get("cache", {})
    if not isinstance(lists, Mapping) or not all(
        isinstance(layers, (list, tuple)) and all(type(layer) is int and layer >= 0 for layer in layers)
        for layers in lists.values()
    ):
        raise InputError("quantization_config.cache must map formats to lists of layers: the file is damaged.")
    found: dict[int, KvFormat] = {}
    for spec, layers in lists.items():
        found |= dict.fromkeys(layers, KvFormat.parse(str(spec)))
    return found


def read_low_memory(config: Mapping[str, Any]) -> bool:
    """Whether the process that loads the model is to return large buffers to the system.

    Raises:
        InputError: neither true nor false.
    """
    found = config.get("low_memory", False)
    if not isinstance(found, bool):
        raise InputError("quantization_config.low_memory must be true or false: the file is damaged.")
    return found


def read_dropped(config: Mapping[str, Any]) -> Dropped:
    """Sublayers that were dropped; none where the config names none.

    Raises:
        InputError: not of the form above.
    """
    section = config.get("dropped", {})
    if not section:
        return Dropped()
    damaged = InputError("quantization_config.dropped is not of the form that slimwright writes: the file is damaged.")
    if not isinstance(section, Mapping) or not {"modules", "tensors"} <= section.keys():
        raise damaged
    forms: dict[str, DroppedForm] = {}
    for spec, paths in _names(section, "modules").items():
        forms |= dict.fromkeys(paths, DroppedForm.parse(spec))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for spec, names in _names(section, "tensors").items():
        match = re.fullmatch(r"([a-z0-9_]{1,20}):(\d{1,12}(?:x\d{1,12}){0,3})", spec)
        if not match:
            raise damaged
        tensors |= dict.fromkeys(names, (match[1], tuple(int(size) for size in match[2].split("x"))))
    marks = section.get("marks", [])
    if not isinstance(marks, (list, tuple)) or not all(isinstance(m, str) and m in tensors for m in marks):
        raise damaged
    return Dropped(forms, tensors, tuple(marks))
