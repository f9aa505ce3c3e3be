"""The store of what walks found: whole or missing, never more than its cap, the least recently used first to go."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from slimwright.calibrate.store import ABANDONED_SECONDS, SUFFIX, StatisticsStore, about


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def aged(directory: Path, key: str, seconds: float) -> None:
    os.utime(directory / (key + SUFFIX), (seconds, seconds))


def test_what_was_put_is_there(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path / "kept", 1 << 20)
    tensors = {
        "a:b.c": torch.tensor([1.0, float("nan"), float("inf"), 1e-300], dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
    }
    assert store.get("key") == {}
    store.put("key", tensors, "some tensors")
    found = store.get("key")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7))
    assert about(tmp_path / "kept" / f"key{SUFFIX}") == "some tensors"
    assert names(tmp_path / "kept") == {f"key{SUFFIX}"}


def test_every_damage_counts_as_missing(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path, 1 << 20)
    path = tmp_path / f"key{SUFFIX}"
    store.put("key", {"a": torch.arange(4.0)}, "four")
    content = path.read_bytes()
    for place in range(0, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        found = store.get("key")
        assert found == {} or torch.equal(found["a"], torch.arange(4.0)), place  # the line about it may be changed
        path.write_bytes(damaged)
        about(path)
    for length in (0, 5, 8, 20, len(content) - 1):
        path.write_bytes(content[:length])
        assert store.get("key") == {} and not path.exists()
        about(path)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path, 10_000)
    for index, key in enumerate(("old", "used", "young")):
        store.put(key, {"x": torch.zeros(600)}, key)
        aged(tmp_path, key, 1000.0 + index)
    assert store.get("old")  # a use
    store.put("new", {"x": torch.zeros(1000)}, "new")
    assert names(tmp_path) == {f"{key}{SUFFIX}" for key in ("old", "young", "new")}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000
    store.put("huge", {"x": torch.zeros(10_000)}, "more than the cap")
    assert store.get("huge") == {} and store.get("new")


def test_what_was_never_finished_is_removed_later(tmp_path: Path) -> None:
    left = tmp_path / ".new-left"
    left.write_bytes(b"half")
    fresh = tmp_path / ".new-fresh"
    fresh.write_bytes(b"half")
    past = left.stat().st_mtime - 2 * ABANDONED_SECONDS
    os.utime(left, (past, past))
    StatisticsStore(tmp_path, 1 << 20).put("key", {"x": torch.zeros(1)}, "")
    assert not left.exists() and fresh.exists()


def test_many_writers_at_once(tmp_path: Path) -> None:
    """Whoever reads finds one writer's tensors whole, or nothing; none fails over what another removes."""
    store = StatisticsStore(tmp_path, 40_000)

    def write(number: int) -> None:
        store.put(f"key-{number % 5}", {"x": torch.full((1000,), float(number))}, str(number))
        found = store.get(f"key-{(number + 1) % 5}")
        assert not found or found["x"].unique().numel() == 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(80)))
    assert all(name.endswith(SUFFIX) for name in names(tmp_path))
    store.put("last", {"x": torch.zeros(1)}, "")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = StatisticsStore(tmp_path / "file", 1 << 20)
    assert store.get("key") == {}
    with pytest.raises(OSError):
        store.put("key", {"x": torch.zeros(1)}, "")
