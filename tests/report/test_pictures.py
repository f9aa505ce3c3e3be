"""Coordinates of the pictures."""

from __future__ import annotations

from slimwright.report import pictures, render_report
from slimwright.report.ledger import read_ledger
from tests.report.sample import sample_report


def test_what_the_search_saw() -> None:
    search = {
        "unit": "nats per token",
        "predicted": 0.02,
        "curve": [[100, 1.0], [200, 0.1], [400, 0.001], [500, 0.0]],
        "everywhere": [["int2", 110, 1.5], ["int4", 220, 0.2], ["int4:g16", 260, 0.3], ["keep", 500, 0.0]],
        "families": [["quantization alone", 250, 0.03], ["low rank alone", 249, 0.9]],
    }
    found = pictures.searched(search, 250, 0.04)
    assert found is not None
    assert len(found["line"].split()) == 3  # a loss of nothing has no place on a logarithmic scale
    assert [dot["title"].split()[0] for dot in found["single"]] == ["int2", "int4"]  # int4:g16: larger, loses more
    assert [dot["label"]["text"] for dot in found["family"]] == ["quantization alone", "low rank alone"]
    (chosen,), (measured,) = found["chosen"], found["measured"]
    assert chosen["at"][0] == measured["at"][0] and chosen["at"][1] > measured["at"][1]  # y grows downwards
    assert "250" in chosen["title"] and "0.04" in measured["title"]
    assert pictures.searched({}, 250, 0.04) is None
    everything = found["chosen"] + found["measured"] + found["family"] + found["single"]
    boxes = [
        (x - 8 * len(text) if label["left"] else x, y, 8 * len(text))
        for dot in everything
        if (label := dot["label"])
        for x, y, text in [(label["x"], label["y"], label["text"])]
    ]
    for place, (x, y, long) in enumerate(boxes):  # no label covers another
        assert x >= 0 and x + long <= found["width"]
        assert not any(x < a + wide and a < x + long and abs(y - b) < 14 for a, b, wide in boxes[:place])
    assert pictures.searched({"curve": [[1, None], ["x", 2], [3, float("nan")]]}, None, None) is None


def test_what_the_search_saw_is_brought_to_the_measured_scale() -> None:
    search = {
        "unit": "nats per token", "predicted": 0.02, "curve": [[100, 1.0], [250, 0.02], [400, 0.001]],
        "everywhere": [["int4", 220, 0.2]], "scale": {"value": 2.0, "low": 1.8, "high": 2.2},
    }  # fmt: skip
    found = pictures.searched(search, 250, 0.04)
    assert found is not None and found["scale"] == "2.00"
    (chosen,), (measured,), (single,) = found["chosen"], found["measured"], found["single"]
    assert "0.4" in single["title"] and "0.02" in chosen["title"]
    place = next(point for point in found["line"].split() if point.startswith(f"{measured['at'][0]},"))
    assert place == f"{measured['at'][0]},{measured['at'][1]}"  # the line now passes through what was measured
    assert pictures.searched({**search, "scale": None}, 250, 0.04)["scale"] == ""  # type: ignore[index]


def test_sensitivity_stands_under_the_bits() -> None:
    report = sample_report(blocks=2)
    query = "model.layers.1.self_attn.q_proj"
    report["search"] = {"unit": "nats per token", "sensitivity": {"option": "int4:g64", "loss": {query: 0.004}}}
    (stack,) = pictures.stacks(read_ledger(report))
    sensitive, errors = stack["panels"]
    assert [panel["name"] for panel in stack["panels"]] == ["sensitivity", "relative error"]
    (dot,) = sensitive["dots"]
    column = next(column for column in stack["columns"] if column["block"] == 1)
    assert abs(dot["x"] - column["x"]) < 30 and "sensitivity 0.004" in dot["title"]
    matrices = [entry for entry in read_ledger(report) if entry.error_after and entry.role != "norm"]
    assert len(errors["dots"]) == len(matrices)
    first = [dot["x"] for dot in errors["dots"] if "layers.0." in dot["title"]]
    assert first == sorted(set(first))  # side by side, in the order of the rows
    assert sensitive["top"] + 110 < errors["top"] < stack["height"]
    html = render_report(report)
    assert "Bits, sensitivity and error per layer" in html and "alone would lose on int4:g64" in html
