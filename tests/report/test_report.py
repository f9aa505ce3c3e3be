"""The page: self-contained, well-formed, safe against hostile names, whole without some fields, right in figures."""

import copy
import fnmatch
import io
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from slimwright.report import render_report, terminal_table, words
from slimwright.report.ledger import mean, merge_experts, read_ledger

from .sample import line, sample_report

VOID = {"meta", "link", "img", "br", "hr", "input", "base"}
HOSTILE = "</title></style><script>alert(1)</script><img src=http://evil.test/x onerror=alert(1)>'\"{{ 7 * 7 }}\x1b[31m"


class Page(HTMLParser):
    """Tags, attributes and text; fails on unbalanced tags."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag):
        return [data.strip() for inside, data in self.texts if inside == tag and data.strip()]

    def with_class(self, tag, pattern):
        return [
            value for t, name, value in self.attributes if t == tag and name == "class" and re.fullmatch(pattern, value)
        ]


def everywhere(value, text):
    """The report with ``text`` appended to every string in it."""
    if isinstance(value, dict):
        return {key: everywhere(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, text) for item in value]
    return value + text if isinstance(value, str) else value


def assert_nothing_is_fetched_or_run(html):
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "href", "srcset", "xlink:href", "action", "data", "background"} & names
    assert not [name for name in names if name.startswith("on")]
    styles = " ".join([*page.text("style"), *(value for _, name, value in page.attributes if name == "style")])
    assert "url(" not in styles and "@import" not in styles
    return page


@pytest.mark.parametrize("experts", [0, 4])
def test_self_contained_and_complete(experts):
    report = sample_report(experts=experts)
    page = assert_nothing_is_fetched_or_run(render_report(report))
    assert page.text("title")[0] == "tiny-llama: " + page.text("title")[0].removeprefix("tiny-llama: ")
    assert page.text("h1") == ["tiny-llama"]
    headings = page.text("h2")
    for heading in (
        "Before and after",
        "Bits and error per layer",
        "Where the bytes went",
        "Every parameter accounted for",
        "Verification",
        "Forecast and measurement",
        "Kept dense, and why",
        "Ledger",
        "Notes",
        "How to load it",
        "How to make it again",
        "Model and versions",
    ):
        assert heading in headings
    cells = page.text("td") + page.text("strong")
    assert "0.0123 nats per token (0.0117 to 0.0131)" in cells
    assert "93.7 % (93.1 to 94.3)" in cells
    assert "slimwright fit /models/tiny-llama --size 4.25bit --out OUT" in page.text("pre")
    assert report["how_to_load"] in page.text("pre")
    assert "✓ verified after reloading from disk" in page.text("span")


def test_the_picture_has_a_cell_per_block_and_role_in_the_colour_of_its_bits():
    page = Page(render_report(sample_report(blocks=6)))
    squares = page.with_class("rect", r"b\d+")
    assert len(squares) == 6 * 7 + 2  # q k v o gate up down, the embedding and the head; no norms
    assert squares.count("b16") == 1  # the head was kept
    titles = page.text("title")
    first = [title for title in titles if title.startswith("model.layers.0.self_attn.q_proj.weight")]
    assert "int3:g64" in first[0] and "3.50 bits" in first[0] and "relative error 0.194" in first[0]
    assert len(page.with_class("circle", r"b\d+")) == 6 * 7 + 1  # all but the head have an error


def test_bars_share_one_scale_and_add_up():
    report = sample_report()
    page = Page(render_report(report))
    widths = [float(value) for tag, name, value in page.attributes if tag == "rect" and name == "width"]
    squares = 6 * 7 + 2
    before, after, states = widths[squares : squares + 5], widths[squares + 5 : squares + 10], widths[squares + 10 :]
    assert sum(before) == pytest.approx(100, abs=0.01)
    ledger = report["ledger"]
    ratio = sum(entry["bytes"] for entry in ledger) / sum(entry["bytes_before"] for entry in ledger)
    assert sum(after) == pytest.approx(100 * ratio, abs=0.01)
    assert sum(states) == pytest.approx(100, abs=0.01) and len(states) == 2


def test_bytes_before_are_shared_out_when_the_ledger_does_not_tell():
    report = sample_report()
    expected = {entry["site"]: entry["bytes_before"] for entry in report["ledger"]}
    report["size"]["before"] = sum(expected.values())
    for entry in report["ledger"]:
        del entry["bytes_before"], entry["parameters"]  # parameters follow from bytes and bits
    for entry in read_ledger(report):
        assert entry.before == pytest.approx(expected[entry.site], rel=1e-4)


def test_place_comes_from_the_ledger_or_the_name():
    def place(site, **more):
        entry = read_ledger({"ledger": [{"site": site, "bits": 4.0, "bytes": 8, **more}]})[0]
        return entry.stack, entry.block, entry.role

    assert place("encoder.block.3.layer.0.SelfAttention.q.weight") == ("encoder.block", 3, "q")
    assert place("model.layers.3.mlp.up_proj.weight", block=3, role="up") == ("model.layers", 3, "up")
    assert place("model.layers.3.mlp.experts.7.w1.weight", block=3, role="gate") == ("model.layers", 3, "expert gate")
    assert place("layers.1.blocks.0.q.weight", block="swin.layers.1.blocks.0") == ("swin.layers.1.blocks", 0, "q")
    assert place("heads.0.weight", block=None, role="head") == ("", None, "head")
    assert place("lm_head.weight", role="head") == ("", None, "head")
    assert place("weight")[2] == "weight"


def test_two_stacks_are_two_pictures():
    report = sample_report(blocks=2)
    report["ledger"] += [
        line(f"vision.blocks.{b}.fc1.weight", "up", b, 4096, "int8:g128", bits=8.25, error=0.01) for b in range(3)
    ]
    page = Page(render_report(report))
    assert page.text("h3")[:2] == ["model.layers", "vision.blocks"]
    assert len(page.with_class("svg", "map")) == 2
    assert len(page.with_class("rect", r"b\d+")) == 2 * 7 + 3 + 2


def test_experts_share_rows():
    report = sample_report(blocks=16, experts=256, hidden=64)
    assert len(report["ledger"]) > 12_000
    html = render_report(report)
    page = Page(html)
    assert html.count("<tr>") < 300 and len(html) < 250_000
    assert page.text("strong").count("× 256") == 16 * 3
    assert "model.layers.0.mlp.experts.*.gate_proj.weight" in [text.strip() for text in page.text("td")]
    entries = read_ledger(report)
    group = merge_experts(entries)["model.layers.3.mlp.experts.*.up_proj.weight"]
    assert len(group) == 256
    assert mean(group, "bits") == pytest.approx(group[0].bits)
    assert group[0].part == "Experts" and group[0].role == "expert up"


def test_mean_is_by_parameters():
    ledger = [
        {"site": "a.weight", "bits": 4.0, "bytes": 50, "error_after": 0.1},
        {"site": "b.weight", "bits": 8.0, "bytes": 300, "error_after": None},
    ]
    entries = read_ledger({"ledger": ledger})
    assert mean(entries, "bits") == pytest.approx((4 * 100 + 8 * 300) / 400)
    assert mean(entries, "error_after") == pytest.approx(0.1)
    assert mean(entries, "error_before") is None


def test_hostile_text_is_shown_not_obeyed():
    plain = sample_report(blocks=2)
    html = render_report(everywhere(plain, HOSTILE))
    page = assert_nothing_is_fetched_or_run(html)
    assert sorted(set(page.tags)) == sorted(set(Page(render_report(plain)).tags))
    assert any("<script>alert(1)</script>" in text for text in page.text("pre"))
    assert "{{ 7 * 7 }}" in html.replace("&#39;", "'")


def test_a_command_quotes_the_path():
    report = sample_report()
    report["model"]["path"] = "/models/it's here; rm -rf x"
    assert "slimwright fit '/models/it'\"'\"'s here; rm -rf x' --size 4.25bit --out OUT" in Page(
        render_report(report)
    ).text("pre")
    report["reproduce"] = ["slimwright fit X --grid int4:g128 --out Y"]
    assert "slimwright fit X --grid int4:g128 --out Y" in Page(render_report(report)).text("pre")


@pytest.mark.parametrize("key", [*sample_report(), None])
@pytest.mark.parametrize("instead", ["missing", None, {}, []])
def test_missing_fields(key, instead):
    report = sample_report(blocks=1)
    for name in [key] if key else list(report):
        if instead == "missing":
            del report[name]
        else:
            report[name] = copy.copy(instead)
    assert_nothing_is_fetched_or_run(render_report(report))
    Console(file=io.StringIO()).print(terminal_table(report))


def test_missing_and_broken_leaves():
    for value in (None, math.nan, math.inf, "text", -1, 0, True, []):
        report = sample_report(blocks=1)
        for section in ("model", "size", "budget", "job", "verified", "versions"):
            report[section] = dict.fromkeys(report[section], value)
        report["quality"]["kl"] = dict.fromkeys(("value", "low", "high"), value)
        report["ledger"] = [
            {key: was if isinstance(was, str) else value for key, was in entry.items()} for entry in report["ledger"]
        ]
        html = render_report(report)
        assert_nothing_is_fetched_or_run(html)
        cells = Page(html).text("td")
        assert cells and not {"nan", "inf", "None"} & set(cells)
        Console(file=io.StringIO()).print(terminal_table(report))


@pytest.mark.parametrize(
    ("ok", "word"), [(False, "✗ not verified"), (None, "✗ not verified"), ("yes", "✗ not verified")]
)
def test_only_true_is_verified(ok, word):
    report = sample_report()
    report["verified"]["ok"] = ok
    html = render_report(report)
    assert word in html and "✓" not in html
    output = io.StringIO()
    Console(file=output, width=100).print(terminal_table(report))
    assert "NO" in output.getvalue()
    del report["verified"]
    assert "the report holds no verification" in render_report(report)


def test_terminal_table():
    output = io.StringIO()
    Console(file=output, width=120).print(terminal_table(sample_report()))
    text = output.getvalue()
    for words_of_it in ("53.0 MB", "22.1 MB", "16.00", "0.0123 nats per token (0.0117 to 0.0131)", "93.7 %", "yes"):
        assert words_of_it in text
    assert "def read_lines(path):" in text and "list(open(path))" in text


def test_terminal_table_obeys_nothing():
    output = io.StringIO()
    hostile = everywhere(sample_report(), " [bold red]x[/bold] [link=http://evil.test]\x1b]0;title\x07\x9b2J")
    hostile["model"]["path"] = "[red]model\x1b[2J"
    Console(file=output, width=200, force_terminal=False).print(terminal_table(hostile))
    text = output.getvalue()
    assert "\x1b" not in text and "\x07" not in text and "\x9b" not in text
    assert "[bold red]x[/bold]" in text and "[red]model" in text


def test_encoders():
    report = sample_report()
    report["quality"] = {
        "cosine_mean": {"value": 0.99812, "low": 0.9978, "high": 0.9984},
        "cosine_min": {"value": 0.9712, "low": 0.9712, "high": 0.9712},
    }
    cells = Page(render_report(report)).text("strong")
    assert "0.9981 (0.9978 to 0.9984)" in cells and "0.9712" in cells


def test_qualities_before_and_after():
    report = sample_report()
    leaves = [{"value": value, "low": value - 1, "high": value + 2} for value in (12.3456, 14.0)]
    report["quality"]["perplexity"] = dict(zip(("before", "after"), leaves))
    report["quality"]["broken"] = {"after": 3}
    output = io.StringIO()
    Console(file=output, width=200).print(terminal_table(report))
    (row,) = [line for line in output.getvalue().splitlines() if "Perplexity" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "Perplexity",
        "12.35 (11.35 to 14.35)",
        "14 (13 to 16)",
    ]
    page = Page(render_report(report))
    assert "14 (13 to 16)" in page.text("strong") and "12.35 (11.35 to 14.35)" in page.text("td")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (88_500_000, "88.5 MB"),
        (999_949_999, "1.00 GB"),
        (1.3e10, "13.0 GB"),
    ]
    + [(7e15, "7000 TB"), (None, "–"), (math.nan, "–"), ("1", "–"), (99_960, "100 kB"), (9_996, "10.0 kB")],
)
def test_sizes(value, text):
    assert words.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (48.2, "48 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(value, text):
    assert words.duration(value) == text


def test_the_template_is_packaged():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["slimwright"]
    assert any(fnmatch.fnmatch("report/report.html.jinja", pattern) for pattern in patterns)
