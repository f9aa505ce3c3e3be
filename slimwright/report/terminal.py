"""The before/after table that ``slimwright fit`` ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from slimwright.report import words
from slimwright.report.page import before_after, model_name
from slimwright.report.words import mapping


def terminal_table(report: Mapping[str, Any]) -> Table:
    """Before and after: file size, bits per weight, quality with intervals, whether it is verified, one generated line.

    Args:
        report: the contents of ``report.json``; fields may be missing.

    Returns:
        A rich renderable. No text in it is read as markup or as terminal control.
    """
    table = Table(title=Text(model_name(report)), title_justify="left", title_style="bold", box=ROUNDED)
    table.add_column("")
    table.add_column("before", overflow="fold")
    table.add_column("after", overflow="fold", style="bold")
    for row in before_after(report):
        table.add_row(*(Text(words.printable(cell)) for cell in row))
    verified = mapping(report.get("verified"))
    if verified:
        word, style = ("yes", "green") if verified.get("ok") is True else ("NO", "red")
        table.add_row(Text("Verified"), Text(""), Text(word, style=style))
    samples = report.get("samples") or []
    if samples and isinstance(samples[0], Mapping):
        sample = {
            key: words.printable(" ".join(str(samples[0].get(key) or "").split()), 120)
            for key in ("prompt", "before", "after")
        }
        table.add_section()
        table.add_row(
            Text(sample["prompt"], style="italic"), Text(sample["before"]), Text(sample["after"], style="not bold")
        )
    return table
