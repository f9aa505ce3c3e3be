"""The ledger read for the page: where a site sits, what its bytes were, rows that belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimwright.report.words import is_number

PARTS = {
    "Embedding": ("embed",),
    "Attention": ("q", "k", "v", "qkv", "o"),
    "MLP": ("gate", "up", "gate_up", "down"),
    "Experts": ("experts",),
    "Head": ("head",),
}
REST = "Norms, biases, other"
_EXPERT = re.compile(r"(^|\.)experts(\.\d+)?\.")
_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        site: disk name.
        stack: the module list that holds its block, "" outside blocks.
        block: index of its block, None outside blocks.
        role: as the ledger says, else the name of its layer; experts' roles begin with ``expert``.
        parameters: 0 if the ledger does not tell.
        before: bytes in the source, None if unknown.
        sensitivity: what its group alone would lose on an option that all could have, None if unknown.
    """

    site: str
    group: str
    state: str
    reason: str
    method: str
    grid: str
    bits: float | None
    bytes: int
    error_before: float | None
    error_after: float | None
    tokens: int | None
    stack: str
    block: int | None
    role: str
    part: str
    parameters: int
    before: float | None
    sensitivity: float | None = None


def _place(line: Mapping[str, Any], site: str) -> tuple[str, int | None]:
    """Stack and index, from the ledger's ``block`` (an index or a module path) or from the name."""
    block = line.get("block")
    if isinstance(block, str) and block.rpartition(".")[2].isdigit():
        stack, _, index = block.rpartition(".")
        return stack, int(index)
    found = _BLOCK.match(site)
    if isinstance(block, int) and not isinstance(block, bool):
        return found["stack"] if found else "", block
    return (found["stack"], int(found["index"])) if found and "block" not in line else ("", None)


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _part(role: str, expert: bool) -> str:
    if expert:
        return "Experts"
    return next((part for part, roles in PARTS.items() if role in roles), REST)


def read_ledger(report: Mapping[str, Any]) -> list[Entry]:
    """The entries, with what is derived from them.

    ``bytes_before`` of a line is taken where it is there. Otherwise what was kept weighed the same before, and the rest
    of the source's bytes is shared out by parameters.
    """
    lines = [line for line in report.get("ledger") or [] if isinstance(line, Mapping)]
    search = report.get("search")
    found = search.get("sensitivity") if isinstance(search, Mapping) else None
    losses = found.get("loss") if isinstance(found, Mapping) else None
    losses = losses if isinstance(losses, Mapping) else {}
    entries = []
    for line in lines:
        site = str(line.get("site") or "")
        bits, size = line.get("bits"), line.get("bytes")
        size = int(size) if is_number(size) else 0
        parameters = line.get("parameters")
        if not is_number(parameters):
            parameters = 8 * size / bits if is_number(bits) and bits else 0
        stack, block = _place(line, site)
        expert = bool(_EXPERT.search(site)) or line.get("role") == "experts"
        role = str(line.get("role") or (site.split(".")[-2] if site.count(".") else site))
        before = line.get("bytes_before")
        if not is_number(before):
            before = size if line.get("state") == "kept" else None
        entries.append(
            Entry(
                site=site,
                group=str(line.get("group") or ""),
                state=str(line.get("state") or "?"),
                reason=str(line.get("reason") or ""),
                method=str(line.get("method") or ""),
                grid=str(line.get("grid") or ""),
                bits=_number(bits),
                bytes=size,
                error_before=_number(line.get("error_before")),
                error_after=_number(line.get("error_after")),
                tokens=None if (tokens := _number(line.get("tokens"))) is None else int(tokens),
                stack=stack,
                block=block,
                role=f"expert {role}" if expert and role != "experts" else role,
                part=_part(role, expert),
                parameters=round(parameters),
                before=before,
                sensitivity=_number(losses.get(line.get("group"))),
            )
        )
    return _share_out(entries, report)


def _share_out(entries: list[Entry], report: Mapping[str, Any]) -> list[Entry]:
    total = (report.get("size") or {}).get("before")
    unknown = [entry for entry in entries if entry.before is None]
    parameters = sum(entry.parameters for entry in unknown)
    if not unknown or not is_number(total) or not parameters:
        return entries
    each = max(0.0, total - sum(entry.before or 0 for entry in entries)) / parameters
    return [
        entry if entry.before is not None else Entry(**{**vars(entry), "before": each * (entry.parameters)})
        for entry in entries
    ]


def is_matrix(entry: Entry) -> bool:
    """Whether the entry belongs into the pictures: norms and biases weigh next to nothing and are never compressed."""
    return entry.role not in ("norm", "bias") and not entry.site.endswith((".bias", "norm.weight", "_bias"))


def mean(entries: Sequence[Entry], key: str) -> float | None:
    """The mean of an attribute, by parameters."""
    pairs = [(value, entry.parameters or 1) for entry in entries if (value := getattr(entry, key)) is not None]
    weight = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weight if weight else None


def merge_experts(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by name, a layer's experts under one name with ``*`` for their index, in order."""
    merged: dict[str, list[Entry]] = {}
    for entry in entries:
        merged.setdefault(re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.*.", entry.site), []).append(entry)
    return merged


def by(entries: Iterable[Entry], key: str) -> dict[str, list[Entry]]:
    """Entries by an attribute, in order of first appearance."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(str(getattr(entry, key)), []).append(entry)
    return groups
