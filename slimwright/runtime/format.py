"""``quantization_config`` of config.json: what the loader must know of a compressed model. Versioned.

::

    {"quant_method": "slimwright", "format_version": 1, "written_by": "0.1.0",
     "grids": {"int4:g128": ["model.layers.0.self_attn.q_proj.weight", ...], ...},
     "dtype": "bfloat16", "other_dtypes": {"float32": [...]}, "fingerprint": "<of the source>"}

Names are disk names of weights; a layer's experts may be collapsed to ``...experts.[0-127].w1.weight``. Everything that
is not named is a plain tensor. Every older version is read (``read_config``); a newer one is refused by number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from slimwright import __version__
from slimwright.errors import InputError
from slimwright.weights import Grid, parse_grid

FORMAT_VERSION = 1
_RANGE = re.compile(r"^(.*)\[0-(\d+)\](.*)$")


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


def _expand(names: Iterable[str]) -> list[str]:
    """Inverse of :func:`_collapse`."""
    expanded: list[str] = []
    for name in names:
        match = _RANGE.match(name)
        if not match:
            expanded.append(name)
            continue
        if int(match[2]) > 1_000_000:
            raise InputError(f"quantization_config names {match[2]} experts in '{name}': the file is damaged.")
        expanded += [f"{match[1]}{index}{match[3]}" for index in range(int(match[2]) + 1)]
    return expanded


def write_config(grids: Mapping[str, Grid], fingerprint: str, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """The ``quantization_config`` for weights by disk name on their grids.

    Args:
        fingerprint: of the source.
        dtypes: the source's dtype of every weight (``bfloat16``), which a dense export gives back.
    """
    by_grid: dict[str, list[str]] = {}
    for name, grid in grids.items():
        by_grid.setdefault(grid.spec, []).append(name)
    by_dtype: dict[str, list[str]] = {}
    for name in grids:
        by_dtype.setdefault(dtypes[name], []).append(name)
    common = max(by_dtype, key=lambda dtype: len(by_dtype[dtype]), default="float32")
    others = {dtype: _collapse(names) for dtype, names in by_dtype.items() if dtype != common}
    return {
        "quant_method": "slimwright",
        "format_version": FORMAT_VERSION,
        "written_by": __version__,
        "grids": {spec: _collapse(names) for spec, names in by_grid.items()},
        "dtype": common,
        **({"other_dtypes": others} if others else {}),
        "fingerprint": fingerprint,
    }


def read_config(config: Mapping[str, Any]) -> dict[str, Grid]:
    """Grids by disk name.

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
    grids = config.get("grids")
    if not isinstance(grids, Mapping) or not all(
        isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) for names in grids.values()
    ):
        raise InputError("quantization_config.grids must map grids to lists of weight names: the file is damaged.")
    found: dict[str, Grid] = {}
    for spec, names in grids.items():
        grid = parse_grid(str(spec))
        for name in _expand(names):
            if name in found:
                raise InputError(f"quantization_config names the weight '{name}' twice: the file is damaged.")
            found[name] = grid
    return found


def read_dtypes(config: Mapping[str, Any]) -> dict[str, str]:
    """The source's dtype by disk name of every packed weight.

    Raises:
        InputError: as :func:`read_config`.
    """
    found = dict.fromkeys(read_config(config), str(config.get("dtype", "float32")))
    others = config.get("other_dtypes", {})
    if not isinstance(others, Mapping):
        raise InputError("quantization_config.other_dtypes must map dtypes to lists of weight names.")
    for dtype, names in others.items():
        found.update(dict.fromkeys(_expand(names), str(dtype)))
    return found
