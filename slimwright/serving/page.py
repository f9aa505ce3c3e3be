"""``/``: one self-contained page with the model's structure, where its bytes went, a box to try it, and the report."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.ledger import kept_line
from slimwright.model.discover import discover
from slimwright.report import words
from slimwright.report.page import view
from slimwright.report.template import render
from slimwright.serving.served import Served, read_report

REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
"""What a report may load: nothing."""
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def front(served: Served) -> tuple[str, str]:
    """The page, and its Content-Security-Policy: its own script and style, requests to its own server, nothing else.

    Text from the model's files is escaped throughout.
    """
    data, page = read_report(_directory(served))
    facts = view(data if data.get("ledger") else _of_checkpoint(served))
    text = render(
        "serve.html.jinja",
        name=served.name,
        kind="chat" if served.tokenizer.chat_template and served.engine else "text" if served.engine else "encoder",
        size=words.size(served.subject.nbytes),
        tiles=_tiles(served, facts["bits"]),
        adapters=[(adapter.name, adapter.checked) for adapter in served.adapters.values()],
        stacks=facts["stacks"],
        legend=facts["legend"],
        bar=_filled(facts["parts"]["after"]) if facts["parts"] else [],
        rows=facts["parts"]["rows"] if facts["parts"] else [],
        report=bool(page),
    )
    scripts = _SCRIPT.findall(text)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; connect-src 'self'; frame-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def report(served: Served) -> str:
    """``report.html`` of the directory; empty where there is none."""
    return read_report(_directory(served))[1]


def _directory(served: Served) -> Path:
    return served.subject.root


def _filled(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The segments of a bar over its whole width: a report's has the scale of the bar before."""
    whole = max(segment["x"] + segment["width"] for segment in segments) / 100 or 1
    return [{**segment, "x": segment["x"] / whole, "width": segment["width"] / whole} for segment in segments]


def _tiles(served: Served, bits: str) -> list[tuple[str, str, str]]:
    """(label, value, remark)"""
    engine = served.engine
    tiles = [
        ("Parameters", words.count(served.subject.parameters), served.subject.model_class.__name__),
        ("Bits per weight", bits, f"weight files of {words.size(served.subject.nbytes)}"),
    ]
    if engine is None:
        return [*tiles, ("A text", f"{served.context:,} tokens", "at most")]
    cache = engine.batcher.token_bytes
    together = engine.batcher.why_single
    return [
        *tiles,
        ("Context", f"{served.context:,} tokens", f"{words.size(cache)} of cache a token"),
        ("At once", f"{engine.slots} texts", "one by one: " + together if together else "in one forward"),
    ]


def _of_checkpoint(served: Served) -> dict[str, Any]:
    """What a report would tell of a model that has none; empty for what is packed by another program."""
    checkpoint = Checkpoint.open(served.subject.path)
    if checkpoint.quantization is not None:
        return {}
    try:
        structure = discover(checkpoint, trust_remote_code=served.subject.trust_remote_code)
    except InputError:
        return {}
    lines = [
        kept_line(name, structure, "as it is", info, True).to_json() for name, info in checkpoint.tensors.items()
    ]  # fmt: skip
    total = sum(line["bytes"] for line in lines)
    bits = 8 * total / structure.parameters if structure.parameters else None
    return {"ledger": lines, "size": {"after": checkpoint.total_bytes, "bits_per_weight": bits}}
