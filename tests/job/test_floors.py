"""Floors on quality: what they are in writing, how a candidate is judged, which candidate comes next."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from typing import Any

import pytest

from slimwright.errors import InputError, MetricError
from slimwright.job.candidates import Candidate, first_loss, next_loss
from slimwright.job.floors import Floor, Judged


def leaf(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


QUALITY: dict[str, Any] = {
    "kl": leaf(0.02, 0.018, 0.023),
    "top1_agreement": leaf(0.95, 0.94, 0.96),
    "perplexity": {"before": leaf(10, 9, 11), "after": leaf(10.2, 9, 11), "difference": leaf(0.2, 0.1, 0.3)},
    "ndcg_at_10": {"before": leaf(0.5, 0.4, 0.6), "after": leaf(0.49, 0.4, 0.6), "difference": leaf(-0.01, -0.02, 0.0)},
}


@pytest.mark.parametrize(
    ("text", "met", "value", "worst"),
    [
        ("kl:0.023", True, 0.02, 0.023),
        ("kl:0.0229", False, 0.02, 0.023),
        ("top1:94%", True, 0.95, 0.94),
        ("top1:0.945", False, 0.95, 0.94),
        ("ppl:3%", True, 0.02, 0.03),
        ("ppl:2.9%", False, 0.02, 0.03),
        ("ndcg@10:4%", True, 0.02, 0.04),
        ("ndcg@10:3%", False, 0.02, 0.04),
    ],
)
def test_a_floor_is_judged_at_the_worse_end(text: str, met: bool, value: float, worst: float) -> None:
    judged = Floor.parse(text).judge(QUALITY, {"tokens": 1000}, Path(), None)
    assert judged.met is met
    assert judged.value == pytest.approx(value)
    assert judged.worst == pytest.approx(worst)
    assert (judged.strain <= 1 + 1e-12) is met


def test_a_quality_that_the_model_does_not_have() -> None:
    with pytest.raises(InputError, match="have no accuracy; they have kl, top1, ppl, ndcg@10"):
        Floor.parse("accuracy:1%").judge(QUALITY, {"tokens": 1000}, Path(), None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("kl", "is not of the form"),
        ("kl:", "is not of the form"),
        ("kl:much", "is not of the form"),
        ("kl:nan", "is not of the form"),
        ("kl:0", "more than 0"),
        ("ppl:-1%", "more than 0"),
        ("top1:100%", "lies between 0 and 1"),
        ("top1:99", "lies between 0 and 1"),
        ("topp1:99%", "did you mean 'top1'"),
        ("./none.sh:0.5", "there is no file './none.sh'"),
    ],
)
def test_what_is_no_floor(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Floor.parse(text)


def script(folder: Path, code: str) -> str:
    path = folder / "measure.py"
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_a_command_is_taken_as_it_is(tmp_path: Path) -> None:
    command = script(tmp_path, "import sys; print('note'); print('score', len(sys.argv[1]))")
    model = tmp_path / "model"
    length = len(str(model))
    assert Floor.parse(f"{command}:{length}").judge({}, {}, model, None).met
    assert not Floor.parse(f"{command}:{length + 1}").judge({}, {}, model, None).met


@pytest.mark.parametrize(
    ("code", "seconds", "match"),
    [
        ("raise SystemExit('no luck')", None, r"gave no number .*exit 1: no luck"),
        ("print('a lot')", None, "gave no number"),
        ("print('nan')", None, "gave no number"),
        ("import os; os.write(1, b'\\xff\\xfe')", None, "prints no text"),
        ("import threading; threading.Event().wait()", 0.2, "was stopped after"),
    ],
)
def test_a_command_that_gives_nothing(tmp_path: Path, code: str, seconds: float | None, match: str) -> None:
    floor = Floor.parse(f"{script(tmp_path, code)}:0.5")
    with pytest.raises(MetricError, match=match) as raised:
        floor.judge({}, {}, tmp_path, seconds)
    assert raised.value.exit_code == 2


def test_a_command_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    """A script's own child holds a pipe open as long as it lives."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    code = (
        f"import subprocess, sys\nheld = open({str(tmp_path / 'pipe')!r}, 'w')\n"
        "subprocess.run([sys.executable, '-c', 'import threading; threading.Event().wait()'], pass_fds=[held.fileno()])"
    )
    with pytest.raises(MetricError, match="was stopped after 1 s"):
        Floor.parse(f"{script(tmp_path, code)}:0.5").judge({}, {}, tmp_path, 1)
    ended, _, _ = select.select([reader], [], [], 30)
    assert ended and os.read(reader, 1) == b""
    os.close(reader)


def test_a_floor_narrower_than_its_interval_is_refused_with_the_tokens_needed() -> None:
    wide = {"top1_agreement": leaf(0.90, 0.88, 0.92)}
    judged = Floor.parse("top1:99.9%").judge(wide, {"tokens": 1000}, Path(), None)
    with pytest.raises(InputError, match=r"narrower than the 95 % interval .*\(1000 tokens\): give --eval-tokens \d+"):
        judged.refuse_narrow()
    Floor.parse("top1:80%").judge(wide, {"tokens": 1000}, Path(), None).refuse_narrow()  # it is kept
    Floor.parse("top1:91%").judge(wide, {"tokens": 1000}, Path(), None).refuse_narrow()  # missed, but it can be shown


def test_what_is_no_number_of_tokens_is_called_what_it_is() -> None:
    wide = Floor.parse("cosine:0.999").judge({"cosine_mean": leaf(0.9, 0.88, 0.92)}, {"documents": 34}, Path(), None)
    with pytest.raises(InputError, match=r"\(34 documents\): give --eval-tokens and --eval-data for about \d+ times"):
        wide.refuse_narrow()


def test_a_fall_of_shared_answers_is_not_refused_before_better_candidates() -> None:
    """Its interval is narrower for a candidate that answers more queries alike."""
    judged = Floor.parse("ndcg@10:3%").judge(QUALITY, {"documents": 34, "queries": 300}, Path(), None)
    judged.refuse_narrow()
    assert not judged.met and judged.value_met and (judged.count, judged.unit) == (300, "queries")
    assert not Floor.parse("ndcg@10:1%").judge(QUALITY, {"queries": 300}, Path(), None).value_met


def test_a_share_that_one_token_would_miss_is_refused_before_work() -> None:
    Floor.parse("top1:99%").check_tokens(400)
    Floor.parse("kl:0.00001").check_tokens(64)
    with pytest.raises(InputError, match=r"--eval-tokens 38400 "):
        Floor.parse("top1:99.99%").check_tokens(16384)


def candidate(number: int, predicted: float, strain: float) -> Candidate:
    return Candidate(number, 1000, predicted, (Judged("kl:1", 0, 0, strain <= 1, strain, 0.1, 9),))


def test_the_next_candidate_follows_what_was_measured() -> None:
    floors = [Floor.parse("kl:0.1")]
    assert first_loss(floors) < 0.1
    after_one = next_loss(floors, [candidate(1, 0.1, 2.0)], last=False)
    assert after_one == pytest.approx(0.1 * 0.96 / 2)
    # strain = (predicted / 0.1) ** 1.25 through both
    two = [candidate(1, 0.2, 2**1.25), candidate(2, 0.15, 1.5**1.25)]
    assert next_loss(floors, two, last=False) == pytest.approx(0.1 * 0.96**0.8)
    # two that are nearly alike say nothing of the slope
    alike = [candidate(1, 0.1, 1.2), candidate(2, 0.101, 1.1)]
    assert next_loss(floors, alike, last=False) == pytest.approx(0.101 * 0.96 / 1.1)
    assert next_loss(floors, two, last=True) < next_loss(floors, two, last=False)  # the last one is careful
    assert next_loss(floors, [candidate(1, 0.1, 1e-9)], last=False) == pytest.approx(0.8)  # never a leap
