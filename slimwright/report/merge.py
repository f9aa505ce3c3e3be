"""``report.html`` of a merge: one self-contained page (no request, no script) from the contents of ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimwright.report import pictures, words
from slimwright.report.page import MAX_ROWS
from slimwright.report.template import render
from slimwright.report.words import mapping

_TONES = ("merged", "copied")


def render_merge(report: Mapping[str, Any], name: str) -> str:
    """The page for a merge's report; text from it is escaped, for names and paths come from whoever made the models.

    Args:
        report: the contents of ``report.json``.
        name: of the result.
    """
    return render("merge.html.jinja", **view(report, name))


def view(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the template shows."""
    lines, job, forecast = report["ledger"], mapping(report.get("job")), mapping(report.get("forecast"))
    sizes: dict[str, float] = dict.fromkeys(_TONES, 0)
    for line in lines:
        if line["state"] in sizes:
            sizes[line["state"]] += line["bytes"]
    memory = words.size(job.get("peak_memory_bytes"))
    verified = mapping(report.get("verified"))
    figures = [
        ("Time", forecast.get("seconds"), job.get("seconds"), words.duration),
        ("Peak memory", forecast.get("memory_bytes"), job.get("peak_memory_bytes"), words.size),
    ]
    variants = mapping(report.get("variants"))
    written = [line for line in lines if line["state"] != "not read"]
    return {
        "name": words.printable(name),
        "method": words.printable(report["method"]),
        "whose": "mergekit's definitions" if report["definitions"] == "mergekit" else "the paper's definitions",
        "differs": words.printable(report.get("differs_from_the_paper") or ""),
        "ok": verified.get("ok"),
        "how": words.printable(verified.get("how") or ""),
        "tiles": [
            ("Weight files", words.size(report["size"]["after"]), f"of {words.size(report['size']['before'])} read"),
            ("Tensors merged", words.count(report["tensors"]["merged"]), f"{report['tensors']['copied']} copied"),
            (
                "Made in",
                words.duration(job.get("seconds")),
                f"with {memory} of memory",
            ),
        ],
        "models": [words.printable(model) for model in report["models"]],
        "base": words.printable(report.get("base") or "none"),
        "specs": [words.printable(spec) for spec in report["specs"]],
        "bar": pictures.bar(sizes, sum(sizes.values()), _TONES),
        "states": [(tone, state, words.size(sizes[state])) for tone, state in enumerate(_TONES) if sizes[state]],
        "forecast": [(label, write(guess), write(found)) for label, guess, found, write in figures],
        "soup": [
            (words.printable(" + ".join(names)), words.significant(score))
            for names, score in mapping(report.get("soup")).get("tried", [])
        ],
        "variants": [
            (words.printable(name), words.share(share, 1))
            for name, share in mapping(variants.get("share_of_entries")).items()
        ],
        "rows": [
            {
                "tensor": words.printable(line["tensor"]),
                "state": words.printable(line["state"]),
                "why": words.printable(line["reason"] or line["method"] or ""),
                "dtype": words.printable(line["dtype"]),
                "bytes": words.size(line["bytes"]),
            }
            for line in written[:MAX_ROWS]
        ],
        "more": max(0, len(written) - MAX_ROWS),
        "not_read": len(lines) - len(written),
        "notes": [words.printable(note) for note in report["notes"]],
        "load": str(report.get("how_to_load") or ""),
        "reproduce": str(report.get("reproduce") or ""),
        "versions": [(str(key), words.printable(value)) for key, value in mapping(report.get("versions")).items()],
    }
