"""Coordinates of the page's pictures; the template draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimwright.model.structure import ROLES
from slimwright.report.ledger import Entry, is_matrix, mean
from slimwright.report.words import count, decimal, significant, size

BITS = (2, 3, 4, 5, 6, 8, 16)
"""Steps of the colour scale; a width takes the nearest, and everything above 9 is 16."""
_CELL_HEIGHT = 26
_LABEL = 96  # for the roles' names at the left
_SIDE = 62  # for the embedding and the head
_GAP = 10


def colour(bits: float | None) -> int:
    """The step of the colour scale; 0 where the width is unknown."""
    if bits is None:
        return 0
    return 16 if bits > 9 else min(BITS[:-1], key=lambda step: abs(step - bits))


def _order(role: str) -> tuple[bool, int, str]:
    """The roles' order, experts after the rest."""
    plain = role.removeprefix("expert ")
    return plain != role, ROLES.index(plain) if plain in ROLES else len(ROLES), role


def _title(entries: Sequence[Entry]) -> str:
    first = entries[0]
    name = first.site if len(entries) == 1 else f"{len(entries)} weights like {first.site}"
    bits = {entry.bits for entry in entries if entry.bits is not None}
    width = "bits unknown" if not bits else f"{decimal(mean(entries, 'bits'))} bits"
    if len(bits) > 1:
        width += f" ({decimal(min(bits))} to {decimal(max(bits))})"
    grids = sorted({entry.grid for entry in entries if entry.grid})
    words = [name, ", ".join(grids[:3]) or first.state, width, size(sum(entry.bytes for entry in entries))]
    error = mean(entries, "error_after")
    if error is not None:
        words.append(f"relative error {significant(error)}")
    return "\n".join(words)


def stacks(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One picture per stack: a column per block, a row per role; the embedding left of the first, the rest right of the
    last. Without blocks there is one picture of what stands outside."""
    shown = [entry for entry in entries if is_matrix(entry)]
    outside = [entry for entry in shown if entry.block is None]
    left = [entry for entry in outside if entry.role == "embed"]
    right = [entry for entry in outside if entry.role != "embed"]
    names = list(dict.fromkeys(entry.stack for entry in shown if entry.block is not None)) or [""]
    return [
        _stack(
            name,
            [entry for entry in shown if entry.block is not None and entry.stack == name],
            left if place == 0 else [],
            right if place == len(names) - 1 else [],
        )
        for place, name in enumerate(names)
        if shown
    ]


def _stack(name: str, inside: list[Entry], left: list[Entry], right: list[Entry]) -> dict[str, Any]:
    blocks = sorted({entry.block for entry in inside if entry.block is not None})
    roles = sorted({entry.role for entry in inside}, key=_order)
    height = max(len(roles), 2, len(left), len(right)) * _CELL_HEIGHT
    row = height / max(len(roles), 1)
    wide = max(7.0, min(60.0, 740 / max(len(blocks), 1)))
    x = float(_LABEL)
    cells: list[dict[str, Any]] = []
    columns: list[dict[str, Any]] = []

    def side(members: list[Entry]) -> None:
        nonlocal x
        for place, entry in enumerate(members):
            each = height / len(members)
            cells.append(_cell((x, place * each, _SIDE, each), [entry], entry.role))
        if members:
            x += _SIDE + _GAP

    side(left)
    every = math.ceil(24 / wide)
    found: dict[tuple[int, str], list[Entry]] = {}
    for entry in inside:
        if entry.block is not None:
            found.setdefault((entry.block, entry.role), []).append(entry)
    for place, block in enumerate(blocks):
        columns.append({"x": x + wide / 2, "label": str(block) if place % every == 0 else "", "block": block})
        for line, role in enumerate(roles):
            if (block, role) in found:
                text = _short(mean(found[block, role], "bits")) if wide >= 30 else ""
                cells.append(_cell((x, line * row, wide, row), found[block, role], text))
        x += wide
    if blocks:
        x += _GAP
    side(right)
    return {
        "name": name,
        "cells": cells,
        "columns": columns,
        "rows": [{"y": line * row + row / 2, "label": role} for line, role in enumerate(roles)],
        "width": x,
        "height": height + 20,
        "axis": height + 14,
        "errors": _errors(cells, x),
    }


def _cell(box: tuple[float, float, float, float], entries: list[Entry], text: str) -> dict[str, Any]:
    x, y, width, height = box
    return {
        "x": round(x, 2),
        "y": round(y, 2),
        "width": round(width - 1.5, 2),
        "height": round(height - 1.5, 2),
        "step": colour(mean(entries, "bits")),
        "text": text,
        "title": _title(entries),
        "errors": (mean(entries, "error_before"), mean(entries, "error_after")),
    }


def _errors(cells: list[dict[str, Any]], width: float, height: float = 150.0) -> dict[str, Any] | None:
    """Relative errors on a logarithmic scale: a dot per cell under its column; None if nothing has an error."""
    dots = [(cell, before, after) for cell in cells for before, after in [cell["errors"]] if after and after > 0]
    if not dots:
        return None
    values = [value for _, before, after in dots for value in (before, after) if value and value > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        return round(6 + (height - 12) * (high - math.log10(value)) / (high - low), 2)

    ticks = range(low, high + 1, max(1, (high - low) // 5))
    return {
        "dots": [
            {
                "x": round(cell["x"] + cell["width"] / 2, 2),
                "y": y(after),
                "start": y(before) if before and before - after > 0.02 * after else None,
                "step": cell["step"],
                "title": cell["title"],
            }
            for cell, before, after in dots
        ],
        "ticks": [{"y": y(10.0**power), "label": f"{10.0**power:g}"} for power in ticks],
        "height": height,
        "width": width,
        "left": _LABEL,
        "moved": any(before and before - after > 0.02 * after for _, before, after in dots),
    }


def _short(bits: float | None) -> str:
    """``4.25``, ``8``"""
    return "" if bits is None else f"{bits:.2f}".rstrip("0").rstrip(".")


def bar(parts: dict[str, float], whole: float, tones: Sequence[str]) -> list[dict[str, Any]]:
    """Segments of a bar in percent of ``whole``; a part's tone is its place in ``tones``."""
    segments, x = [], 0.0
    for name, value in parts.items():
        width = 100 * value / whole if whole else 0.0
        segments.append(
            {"x": round(x, 3), "width": round(width, 3), "title": f"{name}: {size(value)}", "tone": tones.index(name)}
        )
        x += width
    return segments


def legend(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The steps of the colour scale that occur, with the parameters at each."""
    found: dict[int, int] = {}
    for entry in entries:
        if is_matrix(entry):
            step = colour(entry.bits)
            found[step] = found.get(step, 0) + (entry.parameters)
    names = {0: "unknown", 16: "dense (above 9 bits)"}
    return [
        {"step": step, "label": names.get(step, f"about {step} bits"), "parameters": count(found[step])}
        for step in sorted(found)
    ]


_PLOT = (720.0, 250.0)


def searched(search: Mapping[str, Any], chosen: float | None, measured: float | None) -> dict[str, Any] | None:
    """What the search saw: least loss by size, one grid everywhere, the chosen point and what was measured there; None
    where the report has too little of it.

    Args:
        search: of the report.
        chosen: bytes of the result.
        measured: its KL, where losses are in nats too.
    """
    curve = _points((size, loss) for size, loss in search.get("curve") or ())
    single = [(str(name), *point) for name, *rest in search.get("everywhere") or () for point in _points([rest])]
    if len(curve) < 2:
        return None
    front = [one for one in single if not any(b <= one[1] and y < one[2] for _, b, y in single)]
    marks = _points([(chosen, search.get("predicted"))])
    found = _points([(chosen, measured)])
    points = curve + [(b, y) for _, b, y in front] + marks + found
    right = 1.02 * max(b for b, _ in points)
    top, bottom = math.ceil(math.log10(max(y for _, y in points))), math.floor(math.log10(min(y for _, y in points)))
    top = max(top, bottom + 1)
    width, height = _PLOT

    def place(size: float, loss: float) -> tuple[float, float]:
        x = _LABEL + (width - _LABEL - 12) * size / right
        return round(x, 2), round(8 + (height - 36) * (top - math.log10(loss)) / (top - bottom), 2)

    return {
        "line": " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve)),
        "single": [
            {"at": place(b, y), "label": name, "title": f"{name} everywhere\n{size(b)}\nloss {significant(y)}"}
            for name, b, y in front
        ],
        "chosen": [{"at": place(*p), "title": f"chosen\n{size(p[0])}\npredicted {significant(p[1])}"} for p in marks],
        "measured": [{"at": place(*p), "title": f"measured\n{size(p[0])}\nKL {significant(p[1])}"} for p in found],
        "rows": [
            {"y": place(0, 10.0**power)[1], "label": f"{10.0**power:g}"}
            for power in range(bottom, top + 1, max(1, (top - bottom) // 5))
        ],
        "columns": [
            {"x": place(right * part / 4, 10.0**top)[0], "label": size(right * part / 4)} for part in (1, 2, 3)
        ],
        "width": width, "height": height, "left": _LABEL, "unit": str(search.get("unit") or ""),
    }  # fmt: skip


def _points(pairs: Iterable[Any]) -> list[tuple[float, float]]:
    """Those that can stand on a logarithmic scale of losses."""
    found = []
    for pair in pairs:
        values = [value for value in pair if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(values) == 2 and all(math.isfinite(value) for value in values) and values[0] >= 0 and values[1] > 0:
            found.append((float(values[0]), float(values[1])))
    return found
