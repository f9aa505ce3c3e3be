"""Coordinates of the page's pictures; the template draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimwright.model.structure import ROLES
from slimwright.report.ledger import Entry, is_matrix, mean
from slimwright.report.words import count, decimal, is_number, mapping, significant, size

BITS = (2, 3, 4, 5, 6, 8, 16)
"""Steps of the colour scale; a width takes the nearest, and everything above 9 is 16."""
_CELL_HEIGHT = 26
_LABEL = 96  # for the roles' names at the left
_SIDE = 62  # for the embedding and the head
_GAP = 10
_PANEL = 110.0  # height of what is drawn under the cells


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
    if entries[0].sensitivity is not None:
        words.append(f"sensitivity {significant(entries[0].sensitivity)}")
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
    panels, bottom = [], height + 20.0
    for panel in (_sensitivities(cells), _errors(cells)):
        if panel is not None:
            panels.append({**panel, "top": bottom + 26})
            bottom += _PANEL + 30
    return {
        "name": name,
        "cells": cells,
        "columns": columns,
        "rows": [{"y": line * row + row / 2, "label": role} for line, role in enumerate(roles)],
        "panels": panels,
        "left": _LABEL,
        "width": x,
        "height": bottom + (8 if panels else 0),
        "axis": height + 14,
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
        "group": entries[0].group or entries[0].site,
        "sensitivity": entries[0].sensitivity,
        "errors": (mean(entries, "error_before"), mean(entries, "error_after")),
    }


def _sensitivities(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What each group alone would lose on one option: a dot per group and column."""
    first: dict[tuple[float, str], dict[str, Any]] = {}
    for cell in cells:
        first.setdefault((cell["x"], cell["group"]), cell)
    return _panel("sensitivity", [(cell, None, cell["sensitivity"]) for cell in first.values()])


def _errors(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Relative errors: a dot per cell, and a line from what plain rounding leaves."""
    return _panel("relative error", [(cell, *cell["errors"]) for cell in cells])


def _panel(name: str, values: Sequence[tuple[dict[str, Any], float | None, float | None]]) -> dict[str, Any] | None:
    """Values on a logarithmic scale, a dot for each (cell, start, value) under the cell's column, those of a column
    side by side in the order of the rows; None if there is nothing to show."""
    dots = [(cell, start, value) for cell, start, value in values if value and value > 0]
    if not dots:
        return None
    every = [value for _, *both in dots for value in both if value and value > 0]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        return round(_PANEL * (high - math.log10(value)) / (high - low), 2)

    columns: dict[float, list[dict[str, Any]]] = {}
    for cell, _, _ in dots:
        columns.setdefault(cell["x"], []).append(cell)

    def x(cell: dict[str, Any]) -> float:
        own = sorted(columns[cell["x"]], key=lambda other: other["y"])
        place = next(index for index, other in enumerate(own) if other is cell)
        return round(cell["x"] + cell["width"] * (place + 0.5) / len(own), 2)

    moved = [bool(start and value and start - value > 0.02 * value) for _, start, value in dots]
    step = max(1, -(-(high - low) // 4))
    return {
        "name": name,
        "dots": [
            {"x": x(cell), "y": y(value or 1), "start": y(start) if start and far else None, "step": cell["step"],
             "title": cell["title"]}
            for (cell, start, value), far in zip(dots, moved, strict=True)
        ],
        "ticks": [{"y": y(10.0**power), "label": f"{10.0**power:g}"} for power in range(low, high + 1, step)],
        "moved": any(moved),
    }  # fmt: skip


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


_PLOT = (560.0, 270.0)
_LETTER, _LINE = 8.0, 16.0  # of a label on a phone, about
_MARGIN = 64  # for the losses at the left
_NEAR = 3.0


def searched(search: Mapping[str, Any], chosen: float | None, measured: float | None) -> dict[str, Any] | None:
    """What the search saw: least loss by size, the best of single families, one grid everywhere, the chosen point and
    what was measured there; None where the report has too little of it. Sizes up to three times the chosen one. All but
    the chosen point are multiplied by what was measured of that over what was predicted, where the report has it.

    Args:
        search: of the report.
        chosen: bytes of the result.
        measured: its KL, where losses are in nats too.
    """
    scale = mapping(search.get("scale")).get("value")
    factor = float(scale) if is_number(scale) and scale > 0 else 1.0
    curve = [(size, factor * loss) for size, loss in _points(search.get("curve") or ())]
    if len(curve) < 2:
        return None
    marks = {
        "chosen": [("chosen", *p) for p in _points([(chosen, search.get("predicted"))])],
        "measured": [("measured", *p) for p in _points([(chosen, measured)])],
        "family": [(name, size, factor * loss) for name, size, loss in named_points(search.get("families"))],
        "single": [(name, size, factor * loss) for name, size, loss in named_points(search.get("everywhere"))],
    }
    far = _NEAR * chosen if chosen and any(size <= _NEAR * chosen for size, _ in curve) else math.inf
    curve = [point for point in curve if point[0] <= far]
    least = min(loss for _, loss in curve)
    single = [one for one in marks["single"] if one[1] <= far and one[2] >= least]
    marks["single"] = [one for one in single if not any(b <= one[1] and y < one[2] for _, b, y in single)]
    points = [*curve, *((size, loss) for found in marks.values() for _, size, loss in found)]
    left, right = min(size for size, _ in points), max(size for size, _ in points)
    left, right = max(0.0, left - 0.06 * (right - left)), right + 0.06 * (right - left)
    top, bottom = (math.log10(function(loss for _, loss in points)) for function in (max, min))
    top, bottom = top + 0.05 * (top - bottom) + 0.05, bottom - 0.05 * (top - bottom) - 0.05
    width, height = _PLOT

    def place(size: float, loss: float) -> tuple[float, float]:
        x = _MARGIN + (width - _MARGIN - 12) * (size - left) / (right - left)
        return round(x, 2), round(8 + (height - 36) * (top - math.log10(loss)) / (top - bottom), 2)

    taken: list[tuple[float, float, float, float]] = [
        (x - 7, y - 7, x + 7, y + 7) for found in marks.values() for _, b, v in found for x, y in [place(b, v)]
    ]
    drawn = {
        kind: [
            {"at": place(b, y), "title": f"{name}\n{size(b)}\nloss {significant(y)}",
             "label": _free(kind, name, place(b, y), taken, width)}
            for name, b, y in found
        ]
        for kind, found in marks.items()
    }  # fmt: skip
    quarters = [left + (right - left) * part / 4 for part in range(5)]
    powers = range(math.ceil(bottom), math.floor(top) + 1)
    ticks = [10.0**power for power in powers]
    if len(ticks) < 3:
        ticks = [step * 10.0**power for power in range(math.floor(bottom), math.ceil(top)) for step in (1, 2, 5)]
    return {
        **drawn,
        "line": " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve)),
        "rows": [
            {"y": place(left, tick)[1], "label": f"{tick:g}"} for tick in ticks if bottom <= math.log10(tick) <= top
        ],
        "columns": [{"x": place(tick, 10.0**top)[0], "label": size(tick)} for tick in quarters[1:4]],
        "width": width, "height": height, "left": _MARGIN, "unit": str(search.get("unit") or ""),
        "scale": "" if factor == 1 else decimal(factor),
    }  # fmt: skip


_PLACES = ((11, 4), (9, -9), (-11, 4), (-9, -9), (9, 18), (-9, 18))


def _free(
    kind: str, name: str, at: tuple[float, float], taken: list[tuple[float, float, float, float]], width: float
) -> dict[str, Any] | None:
    """Where a point's label fits beside it without covering another, added to ``taken``; None: nowhere."""
    long = _LETTER * len(name)
    x, y = at
    for dx, dy in _PLACES[: 2 if kind == "single" else None]:
        left = dx < 0
        start = x + dx - (long if left else 0)
        box = (start, y + dy - 10, start + long, y + dy - 10 + _LINE)
        inside = box[0] >= _MARGIN and box[2] <= width
        if inside and not any(
            a[0] < box[2] and box[0] < a[2] and a[1] < box[3] and box[1] < a[3] for a in taken
        ):  # fmt: skip
            taken.append(box)
            return {"x": round(box[2] if left else box[0], 2), "y": round(y + dy, 2), "text": name, "left": left}
    return None


def named_points(points: Any) -> list[tuple[str, float, float]]:
    """(name, bytes, loss) of those that can stand on a logarithmic scale."""
    return [(str(name), *point) for name, *rest in points or () for point in _points([rest])]


def _points(pairs: Iterable[Any]) -> list[tuple[float, float]]:
    """Those that can stand on a logarithmic scale of losses."""
    found = []
    for pair in pairs:
        values = [value for value in pair if isinstance(value, (int, float)) and not isinstance(value, bool)]
        if len(values) == 2 and all(math.isfinite(value) for value in values) and values[0] >= 0 and values[1] > 0:
            found.append((float(values[0]), float(values[1])))
    return found
