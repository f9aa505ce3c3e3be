"""Sizes, grids, plans and dry runs of whole jobs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from slimwright.errors import InputError
from slimwright.job.fit import FitReport
from tests.job.conftest import PLAIN, files, fitted, tiny


@pytest.mark.parametrize("grid", ["int4:g32", "nf4", "fp8", "int3:row"])
def test_the_forecast_of_bytes_is_exact_for_a_grid(grid: str, tmp_path: Path) -> None:
    forecast = fitted(tiny(), tmp_path / "out", grid=grid, dry_run=True)
    assert forecast.out is None and list(tmp_path.iterdir()) == []
    assert forecast["dry_run"] and forecast["forecast"]["bytes_exact"]
    report = fitted(tiny(), tmp_path / "out", grid=grid)
    assert report["size"]["after"] == forecast["forecast"]["bytes"] == report["job"]["predicted"]["bytes"]
    assert report["size"]["after"] == sum(len(content) for content in files(tmp_path / "out").values())
    solved = {line["grid"] for line in report["ledger"] if line["state"] == "data-free"}
    assert len(solved) == 1


def test_a_dry_run_of_a_search_writes_nothing(tmp_path: Path) -> None:
    forecast = fitted(tiny(), tmp_path / "out", size="40%", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and not forecast["forecast"]["bytes_exact"]
    assert forecast["forecast"]["seconds"] > 0 and forecast["forecast"]["disk_bytes"] > forecast["forecast"]["bytes"]


def test_a_rule_beside_a_grid_and_beside_a_size(tmp_path: Path) -> None:
    for number, options in enumerate(({"grid": "int4:g32"}, {"size": "60%"})):
        report = fitted(
            tiny(), tmp_path / f"out{number}", rules=("lm_head: keep", "down_proj: int8:g64"), **options
        )  # fmt: skip
        lines = {line["site"]: line for line in report["ledger"]}
        assert lines["model.embed_tokens.weight"]["state"] == "kept"
        assert lines["model.embed_tokens.weight"]["reason"] == "asked by a rule"
        assert lines["model.layers.0.mlp.down_proj.weight"]["grid"] == "int8:g64"


def test_the_plan_of_a_result_gives_the_result_again_and_can_be_edited(result: FitReport, tmp_path: Path) -> None:
    assert result.out is not None
    again = fitted(tiny(), tmp_path / "again", plan=str(result.out / "plan.yaml"))
    assert files(tmp_path / "again") == files(result.out) and again["hash"] == result["hash"]
    plan = yaml.safe_load((result.out / "plan.yaml").read_text())
    plan["assignments"]["model.embed_tokens"] = {"grid": "keep"}
    plan["assignments"]["model.layers.0.mlp.down_proj"] = {"grid": "nf4", "method": PLAIN}
    (tmp_path / "edited.yaml").write_text(yaml.safe_dump(plan))
    edited = fitted(tiny(), tmp_path / "edited", plan=str(tmp_path / "edited.yaml"))
    before = {line["site"]: (line["grid"], line["method"]) for line in result["ledger"]}
    after = {line["site"]: (line["grid"], line["method"]) for line in edited["ledger"]}
    assert after.pop("model.embed_tokens.weight") == (None, None)
    assert after.pop("model.layers.0.mlp.down_proj.weight")[0].startswith("nf4")
    assert after.items() <= before.items()
    assert edited["verified"]["ok"]


def test_a_budget_above_the_source_copies_it_and_says_so(tmp_path: Path) -> None:
    report = fitted(tiny(), tmp_path / "out", size="1GB")
    assert any("above the size of the source" in note for note in report["notes"])
    assert all(line["state"] == "kept" for line in report["ledger"])
    assert "import slimwright" not in report["how_to_load"]
    assert report["quality"]["kl"]["value"] == pytest.approx(0, abs=1e-9)


def test_a_rule_holds_even_under_a_budget_above_the_source(tmp_path: Path) -> None:
    report = fitted(tiny(), tmp_path / "out", size="1GB", rules=("down_proj: int4:g32",))
    lines = {line["site"]: line for line in report["ledger"]}
    assert lines["model.layers.0.mlp.down_proj.weight"]["grid"] == "int4:g32"
    assert lines["model.embed_tokens.weight"]["state"] == "kept"


@pytest.mark.parametrize("rules", [(), ("embed: keep",)])
def test_an_impossible_budget_names_the_smallest_which_then_is_feasible(rules: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="smallest possible is") as refused:
        fitted(tiny(), tmp_path / "out", size="1kB", rules=rules)
    assert list(tmp_path.iterdir()) == [], "refused before anything is written"
    smallest = int(re.search(r"smallest possible is ([0-9]+) bytes", str(refused.value))[1])  # type: ignore[index]
    with pytest.raises(InputError, match="smallest possible"):
        fitted(tiny(), tmp_path / "out", size=f"{smallest - 200}B", rules=rules)
    report = fitted(tiny(), tmp_path / "out", size=f"{smallest}B", rules=rules)
    assert 0.99 * smallest <= report["size"]["after"] <= smallest


@pytest.mark.parametrize("size", ["3.5bit", "30%", "55%", "90%", "101kB"])
def test_sizes_are_used_to_99_percent_and_never_exceeded(size: str, tmp_path: Path) -> None:
    for search in ("dp", "milp"):
        report = fitted(tiny(), tmp_path / search, size=size, search=search)
        assert 0.99 * report["budget"]["bytes"] <= report["size"]["after"] <= report["budget"]["bytes"]


def test_shards_hold_the_size_too(tmp_path: Path) -> None:
    report = fitted(tiny(), tmp_path / "out", size="50%", max_shard_bytes=40_000)
    assert len(files(tmp_path / "out")) > 2
    assert report["size"]["after"] <= report["budget"]["bytes"]
    assert report["size"]["after"] == sum(len(content) for content in files(tmp_path / "out").values())
