"""The page of a merge."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from slimwright.report.merge import render_merge

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Open tags, and whether each that needs it was closed."""

    VOID = ("meta", "rect", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(**more: Any) -> dict[str, Any]:
    line = {"tensor": EVIL, "state": "merged", "reason": "", "method": "merge/ties", "dtype": "bfloat16", "bytes": 3000}
    copied = {**line, "tensor": "ids", "state": "copied", "reason": "no floats", "bytes": 1000}
    unread = {"tensor": "b: lm_head.weight", "state": "not read", "reason": "a tied copy", "bytes": 0}
    return {
        "method": "ties", "definitions": "mergekit", "differs_from_the_paper": "it trims each tensor",
        "specs": ["merge/ties"], "models": [EVIL, "b"], "base": None,
        "tensors": {"merged": 1, "copied": 1, "not_read": 1}, "size": {"before": 8000, "after": 4000, "shards": 1},
        "forecast": {"seconds": 2.0, "memory_bytes": 5_000_000},
        "job": {"seconds": 1.0, "peak_memory_bytes": 4_000_000},
        "verified": {"ok": True, "how": "read back"}, "ledger": [line, copied, unread], "notes": [EVIL],
        "how_to_load": "load(x)", "reproduce": "slimwright merge", "versions": {"torch": "2"}, **more,
    }  # fmt: skip


def test_the_page_is_whole_and_escaped() -> None:
    text = render_merge(report(), EVIL)
    page = Page(text)
    assert page.open == [] and "script" not in page.seen and "http" not in text.replace("http-equiv", "")
    found = " ".join(page.words)
    for expected in (
        "ties",
        "mergekit's definitions",
        "it trims each tensor",
        "no floats",
        "verified",
        "2 tensors",
        EVIL,
    ):
        assert expected in found, expected


def test_soups_stores_and_missing_proofs_show() -> None:
    soup = {"tried": [[["a"], 0.5], [["a", "b"], 0.75]]}
    text = render_merge(report(soup=soup, variants={"share_of_entries": {"math": 0.25}}, verified={"ok": None}), "x")
    assert "a + b" in text and "0.75" in text and "math" in text and "not verified" in text
    many = [{**report()["ledger"][0], "tensor": f"t{i}"} for i in range(4100)]
    assert "100 more are in report.json" in render_merge(report(ledger=many), "x")
