"""Structures of the tiny families, discovered once per process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from slimwright.checkpoint import Checkpoint
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from tests.families import cached


@cache
def _structure(name: str) -> Structure:
    return discover(Checkpoint.open(cached(name)))


@pytest.fixture(scope="session")
def structure_of() -> Callable[[str], Structure]:
    return _structure
