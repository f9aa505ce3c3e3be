"""What a job works towards, what its passes work on, and what must hold between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimwright.calibrate.data import Document
from slimwright.checkpoint import (
    Checkpoint,
    Claim,
    Journal,
)
from slimwright.errors import InputError, SlimwrightError
from slimwright.job import verify as verification
from slimwright.job.beside import Beside
from slimwright.job.build import Calibration
from slimwright.job.forecast import Forecast
from slimwright.job.ledger import Entry, check_complete
from slimwright.job.progress import Reporter
from slimwright.job.request import OWN
from slimwright.job.targets import TargetOptions
from slimwright.job.units import Unit
from slimwright.model.structure import Structure
from slimwright.model.surgery import Droppable
from slimwright.plan import Edit, Plan
from slimwright.runtime.kv_format import KvFormat
from slimwright.search import Option
from slimwright.search.tree import Node


@dataclass(frozen=True)
class Target:
    """What the job works towards: bytes, the plan where it is fixed, else the options and the bytes of all that is no
    site, the forecast, the state of the source, the documents to calibrate on, what is done to the model first,
    whether scales of activations are to be found, the plan's cache and its formats by layer, what the search may drop,
    what the budget counts beside weight files, in whose form the result is to be, and the forms of others that are
    taken where they lose little."""

    budget: int
    fixed: Plan | None
    options: Mapping[str, list[Option]]
    rest: int
    predicted: Forecast
    state: str
    documents: Sequence[Document] = ()
    edits: Sequence[Edit] = ()
    ranges: bool = False
    cache: Mapping[str, str] = field(default_factory=dict)
    formats: Mapping[int, KvFormat] = field(default_factory=dict)
    nodes: Sequence[Node] = ()
    droppable: Droppable | None = None
    beside: Beside = Beside()
    name: str = OWN
    alternatives: Sequence[TargetOptions] = ()


@dataclass
class State:
    """What the passes work on."""

    held: Claim
    directory: Path
    source: Checkpoint
    structure: Structure
    target: Target
    journal: Journal
    reporter: Reporter
    plan: Plan | None = None
    units: list[Unit] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    side_files: tuple[str, ...] = ()
    outcome: verification.Outcome | None = None
    data: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    calibrated_on: dict[str, Any] = field(default_factory=dict)
    searched: dict[str, Any] = field(default_factory=dict)
    scales: list[Path] = field(default_factory=list)

    def planned(self) -> Plan:
        """The plan, which the passes' order guarantees."""
        assert self.plan is not None
        return self.plan


def _plan_fits(state: State) -> str | None:
    """The plan says something legal of every group, and the same of weights that runtimes fuse."""
    try:
        state.planned().check(state.structure)
    except InputError as error:
        return str(error)
    return None


def _ties_hold(state: State) -> str | None:
    """A tied weight owns no bytes."""
    owners = [unit.name for unit in state.units if unit.name in state.structure.ties and unit.entries]
    return f"the tied weight '{owners[0]}' was written a second time" if owners else None


def _files_whole(state: State) -> str | None:
    """The weight files hold the planned tensors under the source's names."""
    planned = {state.structure.written_name(entry.name) for unit in state.units for entry in unit.entries}
    found = set(Checkpoint.open(state.held.partial).tensors)
    return None if planned == found else f"the files' tensors differ from the plan: {sorted(planned ^ found)[:3]}"


def _ledger_complete(state: State) -> str | None:
    """Every tensor of the source is accounted for, and so is every byte."""
    try:
        check_complete(state.entries, state.source, sum(e.nbytes for u in state.units for e in u.entries))
    except SlimwrightError as error:
        return str(error).rstrip(".")
    return None


CHECKS: dict[str, Callable[[State], str | None]] = {
    "dense": lambda state: "weights are packed already" if state.entries else None,
    "ties": _ties_hold,
    "plan": _plan_fits,
    "files": _files_whole,
    "ledger": _ledger_complete,
    "verified": lambda state: None if state.outcome is not None and state.outcome.ok else "it was not verified",
}
"""What must hold for each property that the passes name."""
