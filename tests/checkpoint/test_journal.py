"""The journal: what was committed is there after any crash, and nothing else is."""

from pathlib import Path

import pytest
import torch

from slimwright.checkpoint import Journal, environment_key, job_key
from slimwright.errors import InputError


def make(path: Path) -> list[bytes]:
    with Journal.open(path, "key") as journal:
        for unit in range(3):
            journal.append(f"unit {unit}", {"rank": unit, "name": "ä\n"})
            journal.commit()
    return path.read_bytes().splitlines(keepends=True)


def test_committed_units_are_found_again(tmp_path: Path) -> None:
    make(tmp_path / "j")
    with Journal.open(tmp_path / "j", "key") as journal:
        assert journal.done == {f"unit {unit}": {"rank": unit, "name": "ä\n"} for unit in range(3)}
        journal.append("lost")
        assert "lost" not in journal.done, "a unit counts only when it is on the disk"
    assert "lost" not in Journal.open(tmp_path / "j", "key").done


def test_a_tail_cut_at_any_byte_is_dropped(tmp_path: Path) -> None:
    lines = make(tmp_path / "j")
    whole = b"".join(lines)
    ends = [sum(map(len, lines[: count + 1])) for count in range(4)]
    for length in range(len(whole) + 1):
        (tmp_path / "j").write_bytes(whole[:length])
        with Journal.open(tmp_path / "j", "key") as journal:
            assert len(journal.done) == sum(end <= length for end in ends[1:])
            journal.append("next", 1)
            journal.commit()
        with Journal.open(tmp_path / "j", "key") as journal:
            assert journal.done["next"] == 1


def test_a_commit_counts_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """What was found together may not be found again for a part of it: a block's layers solved on one Gram."""
    make(tmp_path / "j")
    before = (tmp_path / "j").stat().st_size
    with Journal.open(tmp_path / "j", "key") as journal:
        for unit in "abc":
            journal.append(unit, unit)
        journal.commit()
        assert list(journal.done)[3:] == ["a", "b", "c"]
    whole = (tmp_path / "j").read_bytes()
    for length in range(before, len(whole) + 1):
        (tmp_path / "j").write_bytes(whole[:length])
        with Journal.open(tmp_path / "j", "key") as journal:
            assert len(journal.done) == (6 if length == len(whole) else 3)
        assert (tmp_path / "j").stat().st_size == (len(whole) if length == len(whole) else before)


def test_a_damaged_line_ends_the_journal(tmp_path: Path) -> None:
    lines = make(tmp_path / "j")
    lines[2] = lines[2].replace(b'"rank":1', b'"rank":7')
    (tmp_path / "j").write_bytes(b"".join(lines))
    assert list(Journal.open(tmp_path / "j", "key").done) == ["unit 0"]


def test_another_job_is_refused_or_replaced(tmp_path: Path) -> None:
    make(tmp_path / "j")
    with pytest.raises(InputError, match="another job"):
        Journal.open(tmp_path / "j", "other")
    assert Journal.open(tmp_path / "j", "other", reset=True).done == {}
    assert Journal.open(tmp_path / "j", "other").done == {}


def test_payloads_are_values_not_references(tmp_path: Path) -> None:
    payload = {"list": [1]}
    with Journal.open(tmp_path / "j", "key") as journal:
        journal.append("a", payload)
        payload["list"].append(2)
        journal.commit()
        assert journal.done["a"] == {"list": [1]}
        with pytest.raises(ValueError):
            journal.append("b", float("nan"))


def test_keys(tmp_path: Path) -> None:
    assert job_key(a=1, b={"x": 1, "y": 2}) == job_key(b={"y": 2, "x": 1}, a=1)
    assert job_key(a=1) != job_key(a="1") != job_key(b=1)
    with pytest.raises(ValueError):
        job_key(a=float("inf"))
    with pytest.raises(TypeError):
        job_key(a=object())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = job_key(**environment_key())
        torch.set_num_threads(2)
        assert job_key(**environment_key()) != one
    finally:
        torch.set_num_threads(before)
