"""What ``slimwright measure`` found: the table on the terminal and the self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import ROUNDED
from rich.table import Table
from rich.text import Text

from slimwright.report import words
from slimwright.report.template import render
from slimwright.report.words import DASH, is_number

SPEED_NAMES = {
    "load_seconds": "Load time",
    "prefill_tokens_per_second": "Prefill, tokens per second",
    "decode_tokens_per_second": "Decoding, tokens per second",
    "texts_per_second": "Texts per second",
    "images_per_second": "Images per second",
    "peak_memory_bytes": "Peak memory",
    "anonymous_memory_bytes": "Peak memory without mapped files",
}

REFERENCE_NAMES = {
    "kl": "KL from the reference",
    "cosine_mean": "Cosine to the reference, mean",
    "cosine_min": "Cosine to the reference, least",
}

Row = tuple[str, list[str]]


def sections(report: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(title, rows of (label, a cell for each model)): sizes, each source's quality, speed."""
    models = report["models"]
    found: list[tuple[str, list[Row]]] = [
        (
            "",
            [
                ("Weight files", [words.size(model["bytes"]) for model in models]),
                ("Parameters", [words.count(model["parameters"]) for model in models]),
                ("Bits per weight", [words.decimal(model["bits_per_weight"]) for model in models]),
            ],
        )
    ]
    for source in dict.fromkeys(name for model in models for name in model["quality"]):
        leaves = [model["quality"].get(source, {}) for model in models]
        metrics = dict.fromkeys(name for leaf in leaves for name in leaf)
        rows = [(label(name), [words.estimate(name, leaf.get(name)) for leaf in leaves]) for name in metrics]
        found.append((source, rows))
    speeds = [model["speed"] for model in models]
    names = dict.fromkeys(name for speed in speeds for name in speed)
    if names:
        rows = [(SPEED_NAMES.get(name, name), [_speed(name, speed.get(name)) for speed in speeds]) for name in names]
        found.append(("speed and memory", rows))
    return found


def differences(report: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(source, rows) of what each model differs by from the reference; cells of the reference are left out."""
    reference = report["reference"]
    against = [one for one in report["differences"] if one["against"] == reference]
    others = [model["name"] for model in report["models"] if model["name"] != reference]
    found = []
    for source in dict.fromkeys(one["data"] for one in against):
        rows = []
        for metric in dict.fromkeys(one["metric"] for one in against if one["data"] == source):
            cells = {one["model"]: one for one in against if (one["data"], one["metric"]) == (source, metric)}
            rows.append((label(metric), [_signed(metric, cells.get(name)) for name in others]))
        found.append((source, rows))
    return found


def label(metric: str) -> str:
    return {**words.QUALITY_NAMES, **REFERENCE_NAMES}.get(metric, metric.replace("_", " "))


def measure_tables(report: Mapping[str, Any]) -> list[Table]:
    """The terminal's tables: the models side by side, and their paired differences from the reference."""
    reference = str(report["reference"])
    names = [model["name"] for model in report["models"]]
    first = _table("Side by side", [f"{name} (reference)" if name == reference else name for name in names])
    for title, rows in sections(report):
        _fill(first, title, rows)
    pairs = differences(report)
    if not pairs:
        return [first]
    second = _table(f"Difference from {reference} (paired)", [name for name in names if name != reference])
    for title, rows in pairs:
        _fill(second, title, rows)
    return [first, second]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=Text(words.printable(title)), title_justify="left", title_style="bold", box=ROUNDED)
    table.add_column("")
    for column in columns:
        table.add_column(Text(words.printable(column)), overflow="fold")
    return table


def _fill(table: Table, title: str, rows: list[Row]) -> None:
    table.add_section()
    if title:
        table.add_row(Text(words.printable(title), style="bold"))
    for name, cells in rows:
        table.add_row(*(Text(words.printable(cell)) for cell in (name, *cells)))


def render_measurement(report: Mapping[str, Any]) -> str:
    """``measure.html``: one self-contained page from the contents of measure.json; text from it is escaped."""
    settings = report["settings"]
    return render(
        "measure.html.jinja",
        models=[words.printable(model["name"]) for model in report["models"]],
        paths=[(words.printable(model["name"]), words.printable(model["path"])) for model in report["models"]],
        reference=words.printable(report["reference"]),
        sections=sections(report),
        differences=differences(report),
        data=[
            (words.printable(one["name"]), words.printable(one["source"]), words.count(one["documents"]))
            for one in report["data"]
        ],
        settings=[(name.replace("_", " "), words.printable(value)) for name, value in settings.items() if value],
        versions=list(report["versions"].items()),
        notes=[words.printable(note) for note in report["notes"]],
    )


def _speed(name: str, leaf: Any) -> str:
    if not isinstance(leaf, Mapping) or not is_number(leaf.get("value")):
        return DASH
    write = words.size if name.endswith("_bytes") else words.duration if name.endswith("_seconds") else _rate
    value, low, high = (write(leaf[key]) for key in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def _rate(value: float) -> str:
    return words.count(value) if value >= 100 else words.significant(value)


def _signed(metric: str, leaf: Any) -> str:
    if not isinstance(leaf, Mapping):
        return DASH
    scale, unit = (100, " points") if metric in words.PERCENT else (1, "")
    value, low, high = (f"{scale * leaf[key]:+.3g}" for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"
