"""A second fit of the same model and data at another size does not walk again, and ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimwright.calibrate.sensitivity import ReverseWalk
from slimwright.calibrate.store import SUFFIX, StatisticsStore
from slimwright.calibrate.tokens import Samples
from slimwright.calibrate.walk import Batch, Walk
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job import cache
from slimwright.job.build import Calibration
from slimwright.job.fit import fit
from slimwright.job.reuse import Reuse
from slimwright.job.walked import WalkedModel
from slimwright.model.discover import discover
from slimwright.model.inputs import dummy_inputs
from slimwright.model.skeleton import skeleton
from tests.families import cached
from tests.job.conftest import files, fitted, tiny

DATA = {"method": "quantize/gptq", "calibration_tokens": 512, "calibration_length": 16, "statistics_cache": "1GB"}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; kernels stay those of the user's."""
    from slimwright import kernels

    kernels.library()
    monkeypatch.setenv("SLIMWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran: ``reverse`` for each reverse walk, ``walk`` for each walk (a reverse walk begins with one)."""
    ran: list[str] = []
    reverse, walk = ReverseWalk.run, Walk.__iter__
    monkeypatch.setattr(ReverseWalk, "run", lambda self, *a: ran.append("reverse") or reverse(self, *a))
    monkeypatch.setattr(Walk, "__iter__", lambda self: ran.append("walk") or walk(self))
    return ran


def run(out: Path, **options: object):
    return fitted(tiny(), out, **{**DATA, **options})


def test_another_size_does_not_walk_again(tmp_path: Path, kept: Path, walks: list[str]) -> None:
    run(tmp_path / "first", size="40%")
    with_head = walks.count("walk")
    assert walks.count("reverse") == 1 and len(list(kept.glob(f"*{SUFFIX}"))) == 2
    walks.clear()
    report = run(tmp_path / "second", size="30%")
    assert walks.count("reverse") == 0 and walks.count("walk") == with_head - 2
    assert report["search"]["error"] > 0  # the batches' are kept too
    assert report["search"]["scale"]["value"] == report["quality"]["kl"]["value"] / report["search"]["predicted"]
    run(tmp_path / "fresh", size="30%", statistics_cache="off")
    assert files(tmp_path / "second") == files(tmp_path / "fresh")
    assert (tmp_path / "second" / "plan.yaml").read_bytes() == (tmp_path / "fresh" / "plan.yaml").read_bytes()

    # What is damaged is found out again.
    for path in kept.iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    walks.clear()
    run(tmp_path / "third", size="30%")
    assert walks.count("reverse") == 1 and files(tmp_path / "third") == files(tmp_path / "fresh")

    # Other data, or another method, walks; the sensitivities are the data's alone.
    walks.clear()
    run(tmp_path / "method", size="30%", method="quantize/gptq,clip=none")
    assert walks.count("reverse") == 0 and walks.count("walk") == with_head - 1
    walks.clear()
    run(tmp_path / "data", size="30%", seed=1)
    assert walks.count("reverse") == 1


def test_switched_off_nothing_is_written(tmp_path: Path, kept: Path) -> None:
    run(tmp_path / "out", size="40%", statistics_cache="off")
    assert not kept.exists()
    with pytest.raises(InputError, match=r"'much' is not a size such as .*; or give off"):
        fit(tiny(), str(tmp_path / "other"), size="40%", statistics_cache="much")


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, kept: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    kept.parent.mkdir(parents=True)
    kept.write_text("a file in the way")
    run(tmp_path / "out", size="40%", quiet=False)
    assert "is not kept" in capsys.readouterr().err


def test_the_cache_lists_and_removes_entries(kept: Path) -> None:
    store = StatisticsStore(kept, 1 << 20)
    store.put("losses-a", {"x": torch.zeros(10)}, "losses of options: a model on 10 tokens of text")
    store.put("losses-b", {"x": torch.zeros(10)}, "another")
    (kept.parent / "zoo-x").write_bytes(bytes(10))
    found = cache.entries()
    assert [entry["name"] for entry in found] == ["statistics/losses-a", "statistics/losses-b", "zoo-x"]
    assert found[0]["what"] == "losses of options: a model on 10 tokens of text"
    assert cache.remove(["statistics/losses-a"]) == found[0]["bytes"]
    assert [path.stem for path in kept.iterdir()] == ["losses-b"]
    with pytest.raises(InputError, match=r"no entry 'statistics/losses-a'"):
        cache.remove(["statistics/losses-a"])
    assert cache.remove(["statistics"]) > 0 and not kept.exists()
    assert cache.remove(None) == 10 and cache.entries() == []


def test_cosines_and_routers_are_walked_for_once(tmp_path: Path, kept: Path, walks: list[str]) -> None:
    source = Checkpoint.open(str(cached("mixtral", torch.float32)))
    structure = discover(source)
    batches = tuple(Batch(dummy_inputs(skeleton(source.config), batch=2, length=8, seed=seed)) for seed in range(2))
    calibration = Calibration(Samples(batches, 32, "random tokens", "0" * 64), 1 << 30, tmp_path, False, print)
    walked = WalkedModel(source, structure, calibration)
    reuse = Reuse(source, calibration, 1 << 20, "mixtral", "")
    cosines, routers = reuse.block_cosines(walked), reuse.router_record(walked)
    assert cosines == walked.block_cosines() and len(cosines) == 2
    assert sum(own.tokens for own in routers.values()) == 64
    walks.clear()
    again = Reuse(source, calibration, 1 << 20, "mixtral", "")
    assert again.block_cosines(walked) == cosines
    for path, own in again.router_record(walked).items():
        assert torch.equal(own.coactivation, routers[path].coactivation) and torch.equal(own.mass, routers[path].mass)
    assert not walks
    assert Reuse(source, calibration, 1 << 20, "mixtral", "edited").block_cosines(walked) == cosines
    assert walks == ["walk"]
