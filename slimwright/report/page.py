"""``report.html``: one self-contained page (no request, no script) from the contents of ``report.json``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from slimwright.report import pictures, words
from slimwright.report.ledger import PARTS, REST, Entry, by, mean, merge_experts, read_ledger
from slimwright.report.template import render
from slimwright.report.words import DASH, is_number, mapping

MAX_ROWS = 4000
"""Rows of the full ledger on the page; beyond that it refers to ``report.json``."""


def render_report(report: Mapping[str, Any]) -> str:
    """The page for a report.

    Fields may be missing: what they would show is left out or a dash. Text from the report is escaped throughout, for
    names and paths come from whoever made the model.

    Args:
        report: the contents of ``report.json``. Beside its contract these are used where they are there: in the ledger
            ``role``, ``block`` (index or module path), ``parameters``, ``bytes_before``; in ``verified`` any further
            figures; ``measured_on.tokens`` and ``measured_on.documents``; ``reproduce`` (commands).

    Returns:
        HTML.
    """
    return render("report.html.jinja", **view(report))


def model_name(report: Mapping[str, Any]) -> str:
    """The last part of the model's path or hub id."""
    path = str(mapping(report.get("model")).get("path") or "model")
    return words.printable(path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path)


def before_after(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, before, after) of size and quality, for the page and the terminal."""
    size, model = mapping(report.get("size")), mapping(report.get("model"))
    before, parameters = size.get("before"), model.get("parameters")
    wide = 8 * before / parameters if is_number(before) and is_number(parameters) and parameters else None
    rows = [
        ("Weight files", words.size(before), words.size(size.get("after"))),
        ("Bits per weight", words.decimal(wide), words.decimal(size.get("bits_per_weight"))),
    ]
    perfect = {"kl": "0", "top1_agreement": "100 %"}
    for name, leaf in mapping(report.get("quality")).items():
        if not isinstance(leaf, Mapping):
            continue
        label = words.QUALITY_NAMES.get(name, str(name).replace("_", " "))
        if "value" in leaf:
            best = "1" if "cosine" in str(name) else perfect.get(name, DASH)
            rows.append((label, best, words.estimate(str(name), leaf)))
        elif "after" in leaf:
            was, now = (words.estimate(str(name), leaf.get(when)) for when in ("before", "after"))
            rows.append((label, was, now))
    return rows


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    model, size, budget, job, verified, quality, search = (
        mapping(report.get(key)) for key in ("model", "size", "budget", "job", "verified", "quality", "search")
    )
    entries = read_ledger(report)
    ok = verified.get("ok")
    return {
        "name": model_name(report),
        "before": words.size(size.get("before")),
        "after": words.size(size.get("after")),
        "bits": words.decimal(size.get("bits_per_weight")),
        "shrunk": words.share(size.get("after"), size.get("before")),
        "facts": [
            (label, words.printable(value))
            for label, value in (
                ("Model", model.get("path")),
                ("Family", model.get("family")),
                ("Parameters", words.count(model.get("parameters"))),
                ("Asked for", budget.get("asked")),
                ("Fingerprint", model.get("fingerprint")),
            )
            if value not in (None, "", DASH)
        ],
        "verified": {
            "known": bool(verified),
            "ok": ok is True,
            "how": verified.get("how") or "",
            "figures": [
                (str(key).replace("_", " "), _figure(value))
                for key, value in verified.items()
                if key not in ("ok", "how") and value is not None
            ],
        },
        "tiles": _tiles(quality, job),
        "table": before_after(report),
        "evaluated": _evaluated(mapping(report.get("measured_on"))),
        "stacks": pictures.stacks(entries),
        "legend": pictures.legend(entries),
        "layers": _layers(pictures.stacks(entries), search),
        "searched": _searched(report, size, quality),
        "prediction": _prediction(report, quality),
        "candidates": _candidates(report),
        "parts": _parts(entries, size),
        "states": _states(entries),
        "kept": _kept(entries),
        "forecast": _forecast(job, size),
        "job": [
            ("Evaluations of the model", words.count(job.get("evaluations"))),
            *([("Search", f"{search['solver']} on {search['loss']}")] if search.get("loss") else []),
            *(
                [("KL that the search predicted", _figure(search.get("predicted")))]
                if search.get("unit") == "nats per token"
                else []
            ),
            *(
                [("Budget used", words.share(size.get("after"), budget["bytes"]))]
                if is_number(budget.get("bytes"))
                else []
            ),
        ],
        "ledger": _rows(entries),
        "ledger_more": max(0, len(merge_experts(entries)) - MAX_ROWS),
        "samples": [
            {key: str(sample.get(key) or "") for key in ("prompt", "before", "after")}
            for sample in report.get("samples") or []
            if isinstance(sample, Mapping)
        ],
        "notes": _lines(report.get("notes")),
        "how_to_load": "\n".join(_lines(report.get("how_to_load"))),
        "reproduce": "\n".join(_lines(report.get("reproduce")) or _command(model, budget)),
        "versions": [(str(key), _figure(value)) for key, value in mapping(report.get("versions")).items()],
        "hash": str(report.get("hash") or ""),
        "format_version": report.get("format_version", DASH),
    }


def _layers(stacks: Sequence[Mapping[str, Any]], search: Mapping[str, Any]) -> dict[str, str]:
    """Heading and explanation of the picture of the layers: it shows what the report has."""
    panels = {panel["name"]: panel for stack in stacks for panel in stack["panels"]}
    sentences, shown = [], ["Bits"]
    if "sensitivity" in panels:
        shown.append("sensitivity")
        option = mapping(search.get("sensitivity")).get("option")
        sentences.append(
            f"Sensitivity is what each group of weights alone would lose on {option}, in {search.get('unit')}: "
            "the higher, the more bits it deserves."
        )
    if "relative error" in panels:
        shown.append("error")
        sentences.append("The relative error is how far each weight is from the source's: lower is closer.")
        if panels["relative error"]["moved"]:
            sentences.append("A line begins at the error of plain rounding on the same grid.")
    if len(shown) > 1:
        sentences.append("Below the cells, dots stand in the order of the rows, in their colours.")
    *first, last = shown
    return {
        "heading": f"{' and '.join([', '.join(first), last] if first else [last])} per layer",
        "words": " ".join(sentences),
    }


def _searched(report: Mapping[str, Any], size: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any] | None:
    search = mapping(report.get("search"))
    measured = mapping(quality.get("kl")).get("value") if "nats" in str(search.get("unit")) else None
    return pictures.searched(search, size.get("after"), measured)


def _prediction(report: Mapping[str, Any], quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The loss that the search predicted beside the KL that was measured."""
    search = mapping(report.get("search"))
    predicted, measured = search.get("predicted"), mapping(quality.get("kl"))
    if "nats" not in str(search.get("unit")) or not is_number(predicted) or not is_number(measured.get("value")):
        return []
    error, scale = search.get("error"), mapping(search.get("scale"))
    spread = f" ± {words.significant(error)} (standard error)" if is_number(error) and error > 0 else ""
    ratio = [words.decimal(scale[key]) for key in ("value", "low", "high") if is_number(scale.get(key))]
    return [
        ("Predicted loss, nats per token", words.significant(predicted) + spread),
        ("Measured KL", words.estimate("kl", measured)),
        ("Measured by predicted", f"{ratio[0]} ({ratio[1]} to {ratio[2]})" if len(ratio) == 3 else DASH),
        *(
            (f"With {name}, predicted", f"{words.significant(loss)} at {words.size(nbytes)}")
            for name, nbytes, loss in pictures.named_points(search.get("families"))
        ),
    ]


def _candidates(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The candidates that were made and measured for a floor or a memory limit."""
    found = mapping(report.get("confirmation"))
    rows = []
    for one in found.get("candidates") or ():
        one = mapping(one)
        judged = [mapping(floor) for floor in one.get("judged") or ()]
        running = mapping(one.get("running"))
        parts = [
            f"{floor.get('floor')}: {words.significant(floor.get('value'))} (at worst "
            f"{words.significant(floor.get('worst'))}), {'kept' if floor.get('met') else 'missed'}"
            for floor in judged
        ]
        if running:
            total = (running.get("weights") or 0) + (running.get("anonymous") or 0)
            parts.append(f"ran in {words.size(total)}")
        rows.append(
            {
                "number": str(one.get("number")),
                "size": words.size(one.get("bytes")),
                "predicted": words.significant(one.get("predicted")),
                "found": "; ".join(parts),
                "chosen": "✓" if one.get("number") == found.get("chosen") else "",
            }
        )
    return rows


def _tiles(quality: Mapping[str, Any], job: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, remark) of what the headline does not say."""
    tiles = []
    for label, before, after in before_after({"quality": quality})[2:]:
        value, bracket, interval = after.partition(" (")
        remark = f"95 % interval {interval.rstrip(')')}" if bracket else f"the source: {before}"
        tiles.append((label, value, remark))
    if is_number(job.get("seconds")):
        memory = job.get("peak_memory_bytes")
        tiles.append(("Made in", words.duration(job["seconds"]), f"with {words.size(memory)} of memory"))
    return [tile for tile in tiles if tile[1] != DASH]


def _lines(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [str(line) for line in value] if isinstance(value, (list, tuple)) else [str(value)]


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return words.significant(value)
    if isinstance(value, int):
        return words.count(value)
    return words.printable(value)


def _evaluated(measured_on: Mapping[str, Any]) -> str:
    counts = ("tokens", "documents")
    found = [f"{words.count(measured_on[key])} {key}" for key in counts if is_number(measured_on.get(key))]
    return " in ".join(found)


def _command(model: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    if not model.get("path") or not budget.get("asked"):
        return []
    return [f"slimwright fit {shlex.quote(str(model['path']))} --size {shlex.quote(str(budget['asked']))} --out OUT"]


def _parts(entries: Sequence[Entry], size: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the bytes went, before and after, by part of the model; None if the ledger does not tell."""
    if not any(entry.bytes for entry in entries):
        return None
    groups = by(entries, "part")
    tones = [*PARTS, REST]
    names = [name for name in tones if name in groups]
    before = {name: sum(entry.before or 0 for entry in groups[name]) for name in names}
    after: dict[str, float] = {name: sum(entry.bytes for entry in groups[name]) for name in names}
    known = all(entry.before is not None for entry in entries)
    whole = max(sum(before.values()) if known else 0, sum(after.values()))
    rows = [
        {
            "name": name,
            "tone": tones.index(name),
            "before": words.size(before[name]) if known else DASH,
            "after": words.size(after[name]),
            "share": words.share(after[name], sum(after.values())),
            "bits": words.decimal(mean(groups[name], "bits")),
        }
        for name in names
    ]
    extra = size.get("after")
    return {
        "rows": rows,
        "before": pictures.bar(before, whole, tones) if known else [],
        "after": pictures.bar(after, whole, tones),
        "headers": words.size(extra - sum(after.values())) if is_number(extra) and extra > sum(after.values()) else "",
    }


def _states(entries: Sequence[Entry]) -> dict[str, Any] | None:
    groups = by(entries, "state")
    tones = ["calibrated", "data-free", "kept"]
    tones += [state for state in groups if state not in tones]
    order = [state for state in tones if state in groups]
    sizes: dict[str, float] = {state: sum(entry.bytes for entry in groups[state]) for state in order}
    whole = sum(sizes.values())
    if not whole:
        return None
    return {
        "bar": pictures.bar(sizes, whole, tones),
        "rows": [
            {
                "name": state,
                "tone": tones.index(state),
                "tensors": words.count(len(groups[state])),
                "parameters": words.count(sum(entry.parameters for entry in groups[state])),
                "bytes": words.size(sizes[state]),
                "share": words.share(sizes[state], whole),
            }
            for state in order
        ],
    }


def _kept(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """What stayed dense, by reason, most bytes first."""
    kept = by([entry for entry in entries if entry.state == "kept"], "reason")
    whole = sum(entry.bytes for entry in entries)
    rows = []
    for reason, members in sorted(kept.items(), key=lambda item: -sum(entry.bytes for entry in item[1])):
        total = sum(entry.bytes for entry in members)
        names = [entry.site for entry in members[:2]] + ([f"{len(members) - 2} more"] if len(members) > 2 else [])
        rows.append(
            {
                "reason": reason or "no reason given",
                "tensors": words.count(len(members)),
                "bytes": words.size(total),
                "share": words.share(total, whole),
                "names": ", ".join(names),
            }
        )
    return rows


def _forecast(job: Mapping[str, Any], size: Mapping[str, Any]) -> list[dict[str, str]]:
    predicted = mapping(job.get("predicted"))
    rows = []
    for label, key, measured, write in (
        ("Size of the result", "bytes", size.get("after"), words.size),
        ("Peak memory of the job", "peak_memory_bytes", job.get("peak_memory_bytes"), words.size),
        ("Time", "seconds", job.get("seconds"), words.duration),
    ):
        guess = predicted.get(key)
        ratio = f"{measured / guess:.2f}×" if is_number(guess) and is_number(measured) and guess else DASH
        rows.append({"label": label, "predicted": write(guess), "measured": write(measured), "ratio": ratio})
    return [row for row in rows if row["predicted"] != DASH or row["measured"] != DASH]


def _rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The full ledger, a layer's experts in one row."""
    rows = []
    for name, members in list(merge_experts(entries).items())[:MAX_ROWS]:

        def text(key: str, members: list[Entry] = members) -> str:
            values = list(dict.fromkeys(value for entry in members if (value := getattr(entry, key))))
            return ", ".join(values[:3]) + (f" and {len(values) - 3} more" if len(values) > 3 else "")

        tokens = [entry.tokens for entry in members if entry.tokens is not None]
        rows.append(
            {
                "site": name if len(members) > 1 else members[0].site,
                "times": f"× {len(members)}" if len(members) > 1 else "",
                "group": text("group") if len(members) == 1 else "",
                "state": text("state"),
                "reason": text("reason"),
                "method": text("method"),
                "grid": text("grid"),
                "bits": words.decimal(mean(members, "bits")),
                "bytes": words.size(sum(entry.bytes for entry in members)),
                "error_before": words.significant(mean(members, "error_before")),
                "error_after": words.significant(mean(members, "error_after")),
                "tokens": words.count(min(tokens)) if tokens else DASH,
            }
        )
    return rows
