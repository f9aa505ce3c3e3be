"""Coordinates of the pictures."""

from __future__ import annotations

from slimwright.report import pictures


def test_what_the_search_saw() -> None:
    search = {
        "unit": "nats per token",
        "predicted": 0.02,
        "curve": [[100, 1.0], [200, 0.1], [400, 0.001], [500, 0.0]],
        "everywhere": [["int2", 110, 1.5], ["int4", 220, 0.2], ["int4:g16", 260, 0.3], ["keep", 500, 0.0]],
    }
    found = pictures.searched(search, 250, 0.04)
    assert found is not None
    assert len(found["line"].split()) == 3  # a loss of nothing has no place on a logarithmic scale
    assert [dot["label"] for dot in found["single"]] == ["int2", "int4"]  # int4:g16 is larger and loses more
    (chosen,), (measured,) = found["chosen"], found["measured"]
    assert chosen["at"][0] == measured["at"][0] and chosen["at"][1] > measured["at"][1]  # y grows downwards
    assert "250" in chosen["title"] and "0.04" in measured["title"]
    assert pictures.searched({}, 250, 0.04) is None
    assert pictures.searched({"curve": [[1, None], ["x", 2], [3, float("nan")]]}, None, None) is None
