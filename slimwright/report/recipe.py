"""What a recipe did: the table on the terminal and the self-contained page over all its steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from slimwright.report import words
from slimwright.report.template import render
from slimwright.report.words import DASH

PAGES = {"fit": "report.html", "merge": "report.html", "measure": "measure.html"}
FIGURES = 3
"""Figures of a step's quality that are shown."""

HEADINGS = ("step", "what", "size", "quality", "time")


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for every step, in the order in which they were done."""
    return [
        (
            words.printable(step["step"]),
            words.printable(step["verb"]),
            words.size(step.get("bytes") or _forecast(step, "bytes")),
            _quality(step),
            words.duration(step.get("seconds") or _forecast(step, "seconds")),
        )
        for step in report["steps"]
    ]


def _forecast(step: Mapping[str, Any], name: str) -> Any:
    found = step.get("forecast")
    if not isinstance(found, Mapping):
        return None
    return sum(found["phases"].values()) if name == "seconds" and "phases" in found else found.get(name)


def _quality(step: Mapping[str, Any]) -> str:
    if isinstance(step.get("forecast"), str):
        return words.printable(step["forecast"])
    leaves = [(name, leaf) for name, leaf in (step.get("quality") or {}).items() if isinstance(leaf, Mapping)]
    single = [(name, leaf) for name, leaf in leaves if "value" in leaf]
    parts = [f"{words.printable(name)} {words.significant(leaf['value'])}" for name, leaf in single[:FIGURES]]
    measured = step.get("measured") or {}
    return ", ".join(parts) or (f"{len(measured)} models side by side" if measured else DASH)


def recipe_table(report: Mapping[str, Any]) -> Table:
    """The steps on a terminal."""
    table = Table(box=ROUNDED)
    for heading in HEADINGS:
        table.add_column(heading)
    for row in rows(report):
        table.add_row(*(Text(cell) for cell in row))
    return table


def render_recipe(report: Mapping[str, Any], name: str) -> str:
    """The page; text from the report is escaped.

    Args:
        report: the contents of ``recipe.json``.
        name: of the directory.
    """
    steps = [
        {"cells": row, "page": f"{row[0]}/{PAGES[step['verb']]}" if step["verb"] in PAGES else ""}
        for row, step in zip(rows(report), report["steps"], strict=True)
    ]
    return render(
        "recipe.html.jinja",
        name=words.printable(name),
        steps=steps,
        headings=HEADINGS,
        time=words.duration(report["seconds"]),
    )
