"""Fits whose limits are settled by measuring: floors on quality, memory of the running result."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimwright.checkpoint import faults, weights_hash
from slimwright.errors import InputError, QualityError
from slimwright.job import candidates, parallel
from slimwright.job.beside import Beside
from slimwright.job.candidates import CANDIDATES, Candidate, weights_left
from slimwright.job.fit import FitReport
from slimwright.job.open import open_source
from slimwright.job.request import FitOptions
from slimwright.job.running import Running
from slimwright.model.discover import discover
from slimwright.runtime.loading import load
from slimwright.search import Option
from tests.families import cached
from tests.job.conftest import files, fitted, in_forked_child, tiny


def kept(out: Path, *floors: str, **options: Any) -> FitReport:
    return fitted(tiny(), out, keep=floors, data="none", eval_tokens=1024, **options)


def test_the_smallest_model_above_a_floor(tmp_path: Path) -> None:
    report = kept(tmp_path / "out", "kl:0.05")
    tried = report["confirmation"]["candidates"]
    assert 1 <= len(tried) <= CANDIDATES and report["job"]["evaluations"] == 2 * len(tried)
    assert report["quality"]["kl"]["high"] <= 0.05
    chosen = tried[report["confirmation"]["chosen"] - 1]
    keeping = [one for one in tried if all(judged["met"] for judged in one["judged"])]
    assert chosen["bytes"] == min(one["bytes"] for one in keeping) == report["size"]["after"]
    assert chosen["judged"][0]["strain"] > 0.5  # it does not keep much more than was asked
    assert report["budget"]["asked"] == "keep kl:0.05" and "--keep kl:0.05" in report["reproduce"]
    # What is on disk is one result, whose papers speak of it and not of a candidate.
    assert report["hash"] == weights_hash(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["confirmation"] == report["confirmation"]
    for name in ("README.md", "report.html", "report.json"):
        assert "candidate-" not in (tmp_path / "out" / name).read_text()
    again = kept(tmp_path / "out", "kl:0.05")
    assert any("finished result of this same job" in note for note in again["notes"])


def test_a_size_and_a_floor_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(
        QualityError, match=r"kl:0\.0001: .* missed\. They would be kept from about \d+ bytes"
    ) as raised:
        kept(tmp_path / "out", "kl:0.0001", size="30%")
    assert raised.value.exit_code == 3 and "by size: " in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    both = kept(tmp_path / "out", "kl:2", size="30%")
    assert both["budget"]["asked"] == "30%, keep kl:2" and both["size"]["bits_per_weight"] > 4.7


def test_a_floor_too_narrow_for_the_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"narrower than the 95 % interval .* give --eval-tokens \d+"):
        kept(tmp_path / "out", "top1:99.99%")
    assert list(tmp_path.iterdir()) == []


def test_a_users_command_gets_the_candidate(tmp_path: Path) -> None:
    script = tmp_path / "eval.py"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        "print(100e4 / sum(f.stat().st_size for f in pathlib.Path(sys.argv[1]).glob('*.safetensors')))\n"
    )
    script.chmod(0o755)
    report = kept(tmp_path / "out", f"{script}:10", size="30%")  # 57 kB: 17.6
    assert report["confirmation"]["candidates"][0]["judged"][0]["value"] == pytest.approx(
        100e4 / report["size"]["after"]
    )
    with pytest.raises(QualityError, match="missed"):
        kept(tmp_path / "other", f"{script}:19", size="30%")


def floored(out: Path) -> FitReport:
    return fitted(tiny(), out, keep=("kl:0.05",), data="none", eval_tokens=128)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights and the plan of a job that was not killed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    floored(out)
    return written(out)


def written(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items()} | {"plan.yaml": (out / "plan.yaml").read_bytes()}


def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first candidate, between candidates, and while the best one is adopted; each run goes on from there."""
    monkeypatch.setattr(parallel, "_pool", None)  # threads do not survive a fork
    out = tmp_path / "out"
    for point in ("journal:1", "rename:1", "publish:1", "publish:2", "publish:6"):
        assert in_forked_child(lambda: floored(out), SLIMWRIGHT_CRASH_AT=point) == faults.CRASH_STATUS, point
    assert in_forked_child(lambda: floored(out)) == 0
    assert written(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_memory_of_the_running_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights take what the cache and the workspace leave; a wrong first guess is mended by what was measured."""
    ran: list[int] = []

    def measured(directory: Path, asked: Any, scratch: Path, low_memory: bool = False) -> Running:
        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        ran.append(weights)
        return Running(64, 2, weights, 1_000_000, 6_000_000)

    monkeypatch.setattr(candidates, "measure_running", measured)
    monkeypatch.setattr("slimwright.job.running.first_guess", lambda source, asked: (45_000, 6_000_000))
    report = fitted(tiny(), tmp_path / "out", memory="6.09MB", context=64, batch=2, data="none")
    original, rounded, candidate = ran  # a model so small is run as it is and plainly rounded before anything is made
    assert candidate < 45_000 < rounded < original
    assert 0.93 * 6.09e6 <= report["running"]["total"] <= 6.09e6
    assert report["running"]["total"] == report["running"]["weights"] + report["running"]["anonymous"]
    shutil.rmtree(tmp_path / "out")
    ran.clear()
    with pytest.raises(InputError, match=r"is too little: the smallest candidate ran in 6\.0 MB"):
        fitted(tiny(), tmp_path / "out", memory="6.01MB", context=64, data="none")
    original, rounded, smallest = ran
    assert smallest < 45_000 < rounded < original
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_fits_a_memory_returns_large_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any process that loads it, and when its plan is run again."""
    monkeypatch.setattr(candidates, "measure_running", lambda *_: Running(64, 2, 30_000, 1_000, 10_000))
    report = fitted(tiny(), tmp_path / "out", memory="40kB", context=64, data="none")
    assert report.out is not None
    told: list[bool] = []
    monkeypatch.setattr("slimwright.runtime.quantizer.return_large_buffers", lambda: told.append(True))
    load(report.out)
    assert told == [True]
    again = fitted(tiny(), tmp_path / "again", plan=str(report.out / "plan.yaml"), method=None, data="none")
    config = (report.out / "config.json").read_bytes()
    assert again.out is not None and (again.out / "config.json").read_bytes() == config and b'"low_memory"' in config
    sized = fitted(tiny(), tmp_path / "sized", size="40kB", data="none")
    assert sized.out is not None and b'"low_memory"' not in (sized.out / "config.json").read_bytes()
    (report.out / "config.json").write_bytes(config.replace(b'"low_memory": true', b'"low_memory": "yes"'))
    with pytest.raises(InputError, match="low_memory must be true or false"):
        load(report.out)


def test_a_memory_counts_copies(tmp_path: Path) -> None:
    """A float32 model copies what is stored in 16 bits when it is loaded, so nothing would be gained by that."""
    model = str(cached("qwen2", torch.float32))
    source = open_source(model)
    structure = discover(source)
    beside = Beside.of(source, structure, FitOptions(model, running=(8, 1)))
    group, sites = next(iter(structure.choice_groups().items()))
    size = sum(source.tensors[site.name].nbytes for site in sites)
    options = [
        Option(group, "bf16", size // 2, 0.1),
        Option(group, "keep", size, 0.0),
        Option(group, "int4:row", 9, 1.0),
    ]
    counted = beside.of_table({group: options})[group]
    assert [after.cost - before.cost for before, after in zip(options, counted, strict=True)] == [size, 0, 0]
    assert beside.of_choices({group: options[0]}, []) == size and beside.of_choices({group: options[1]}, []) == 0
    report = fitted(model, tmp_path / "out", grid="bf16", data="none")
    assert report.out is not None and next(load(report.out).parameters()).dtype == torch.float32
    assert Beside.of(source, structure, FitOptions(model)).of_table({group: options})[group] == options


def test_a_guess_of_the_memory_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes for too little is tried."""
    monkeypatch.setattr("slimwright.job.running.first_guess", lambda source, asked: (1000, 6_000_000))
    monkeypatch.setattr(candidates, "measure_running", lambda *_: Running(64, 2, 30_000, 1_000, 10_000))
    report = fitted(tiny(), tmp_path / "out", memory="40kB", context=64, batch=2, data="none")
    assert report["running"]["total"] == 40_000 and report["size"]["after"] < 40_000


def ran(weights: int, beside: int, spread: int = 0) -> Running:
    return Running(64, 1, weights, 0, beside, 5, spread)


def test_the_weights_that_a_memory_leaves() -> None:
    """To the next candidate, from runs that differ, and from forms that take more beside them than others."""
    assert weights_left(100_000, [ran(60_000, 10_000)]) == 88_500  # 98.5 % of it
    assert weights_left(100_000, [ran(60_000, 10_000, spread=2000)]) == 87_500
    assert weights_left(100_000, [ran(60_000, 10_000, spread=9000)]) == 86_500  # the middle of what may be used
    # Half of what was added to the weights came with as much beside them again: 98.5 % lies between.
    assert weights_left(100_000, [ran(60_000, 20_000), ran(78_500, 38_500)]) == 69_250
    # The last one, where none has fitted, leaves more.
    tried = [ran(80_000, 30_000, 6000), ran(75_000, 28_000, 6000)]
    assert weights_left(100_000, tried) == 68_500 and weights_left(100_000, tried, careful=True) == 62_500


def test_runs_that_differ_leave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate whose run took too little, one whose run took too much: the third lies between."""
    beside = iter((9_000, 10_000, 5_000, 14_000, 8_000))  # of the original, rounded plainly, then of the candidates

    def measured(directory: Path, asked: Any, scratch: Path, low_memory: bool = False) -> Running:
        weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        return Running(64, 2, weights, 0, next(beside), 5, 12_000)

    monkeypatch.setattr(candidates, "measure_running", measured)
    report = fitted(tiny(), tmp_path / "out", memory="60kB", context=64, data="none")
    first, second, third = report["confirmation"]["candidates"]
    assert first["bytes"] < third["bytes"] < second["bytes"] and report["confirmation"]["chosen"] == 3
    assert 0.93 * 60e3 <= report["running"]["total"] <= 60e3
    assert report["running"]["runs"] == 5 and report["running"]["spread"] == 12_000


def test_a_run_is_measured_in_a_fresh_process(tmp_path: Path) -> None:
    report = fitted(tiny("llama"), tmp_path / "out", memory="800MB", context=32, batch=2, data="none")
    running = report["running"]
    assert running["context"] == 32 and running["batch"] == 2
    assert 0 < running["cache"] < running["anonymous"] < 400e6
    assert any("above the size of the source" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context": 64, "size": "4bit"}, "give it with --memory"),
        ({"memory": "6GB", "size": "4bit"}, "exclude each other"),
        ({"memory": "1kB"}, "cannot hold this model: the KV cache"),
        ({"memory": "6GB", "context": 10**9}, "more than the .* positions"),
        ({"memory": "6GB", "batch": 0}, "at least 1"),
        ({"keep": ("kl:x",)}, "is not of the form"),
        ({"keep": ("ndcg@10:1%",), "size": "5bit"}, "have no ndcg@10; they have kl, top1"),
    ],
)
def test_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        fitted(tiny(), tmp_path / "out", data="none", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_survives_the_journal() -> None:
    one = Candidate(2, 10, 0.5, (), Running(1, 2, 3, 4, 5))
    assert Candidate.from_json(json.loads(json.dumps(one.to_json()))) == one
