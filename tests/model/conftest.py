"""Structures of the tiny families, discovered once per process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from slimwright.checkpoint import Checkpoint
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from tests.families import cached


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost these tiny models a hundred times what they save when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _structure(name: str) -> Structure:
    return discover(Checkpoint.open(cached(name)))


@pytest.fixture(scope="session")
def structure_of() -> Callable[[str], Structure]:
    return _structure
