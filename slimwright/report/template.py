"""The pages' templates: self-contained HTML, everything that comes from a report escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file; a value that it wants and does not get is an error."""
    environment = Environment(
        loader=PackageLoader("slimwright.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)
