"""What ``slimwright methods`` shows, read from the declarations."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich.console import Console
from rich.table import Table

from slimwright.methods.registry import Method, knob_name, method_class, methods


def _first_line(cls: type[Method]) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def describe(name: str) -> dict[str, Any]:
    """One method: name, what it does, paper, needs, knobs with default, range and meaning.

    Raises:
        InputError: unknown, with the nearest name.
    """
    cls = method_class(name)
    knobs = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        rule = field.metadata
        limits = None if rule.get("low") is None and rule.get("high") is None else [rule.get("low"), rule.get("high")]
        choices = rule.get("choices")
        knobs.append(
            {
                "name": knob_name(field),
                "default": field.default
                if isinstance(field.default, (int, float, bool, type(None)))
                else str(field.default),
                "range": limits,
                "choices": list(choices) if choices else None,
                "help": rule.get("help", ""),
            }
        )
    return {
        "name": name, "summary": _first_line(cls), "doc": inspect.getdoc(cls), "paper": cls.paper,
        "family": cls.family, "needs": list(cls.needs), "knobs": knobs,
    }  # fmt: skip


def describe_all() -> list[dict[str, Any]]:
    """Every registered method."""
    return [describe(name) for name in methods()]


def print_methods(console: Console) -> None:
    """A table of all methods and one of all grids."""
    from slimwright.weights import grid_kinds

    table = Table("method", "what it does", "needs", "paper")
    for found in describe_all():
        table.add_row(found["name"], found["summary"], ", ".join(found["needs"]) or "no data", found["paper"])
    console.print(table)
    grids = Table("grid", "what it is")
    for key, cls in sorted(grid_kinds().items()):
        grids.add_row(key, (inspect.getdoc(cls) or "").splitlines()[0])
    console.print(grids)


def print_method(console: Console, name: str) -> None:
    """One method with its knobs."""
    found = describe(name)
    console.print(f"[bold]{found['name']}[/bold]  {found['paper']}", highlight=False)
    console.print(found["doc"], highlight=False, markup=False)
    table = Table("knob", "default", "range", "meaning")
    for knob in found["knobs"]:
        limits = knob["choices"] or knob["range"]
        table.add_row(knob["name"], str(knob["default"]), "" if limits is None else str(limits), knob["help"])
    console.print(table)
