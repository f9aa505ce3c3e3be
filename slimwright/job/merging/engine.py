"""The work of a merge: tiles stream through threads that read, compute and write; the main thread keeps the order.

A tensor is a *task*: some surveys, each of all its tiles, then the tiles of the result. Tiles of several tensors are in
flight at once, so that no thread waits for the last tile of a survey. What surveys find is added up in the order of the
tiles, whatever order they end in. A thread of its own brings finished tensors to the disk and then into the journal.
"""

from __future__ import annotations

import math
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from slimwright.checkpoint import CheckpointWriter, Journal
from slimwright.checkpoint.files import shown
from slimwright.errors import InputError
from slimwright.job.merging.plan import MergePlan, Unit, survey_groups
from slimwright.job.parallel import workers
from slimwright.methods.blending import blended
from slimwright.methods.merging import BLOCK, MergeMethod, State, StoredTile, Sums, Tile, add_sums

TILE_ELEMENTS = 4 * BLOCK
"""Elements of a tile: 4 MB in float32 a model. Smaller tiles stay longer in a core's cache, but Python's lock changes
hands after every operation: with a quarter of it the system's share of the time was twice as large."""

COMMIT_BYTES = 256_000_000
"""What is written between two commits."""

FEW = 4096
"""Elements that are compared before the rest of a tile."""

MAX_ELEMENTS = 16 << 20
"""Elements of the largest tile of rows: 64 MB in float32."""


@dataclass(frozen=True)
class Done:
    """What became of one tensor.

    Attributes:
        state: of the method, which the proof needs.
        equal: by input, whether the result equals it (the base last).
    """

    state: State
    equal: tuple[bool, ...]


def tile_ranges(unit: Unit) -> Iterator[tuple[int, int]]:
    """Element ranges that cover a tensor, as its method wants them."""
    numel = unit.site.numel
    extent = unit.method.extent if unit.method else "element"
    step = max(1, numel)
    if extent == "element":
        step = TILE_ELEMENTS
    elif extent == "row":
        step = max(1, TILE_ELEMENTS // unit.site.columns) * unit.site.columns
    for start in range(0, max(1, numel), step):
        yield start, min(start + step, numel)


def read_tile(unit: Unit, start: int, stop: int, seed: int) -> Tile:
    """The inputs of a range; in float32 (float64 where one is) when they are looked at, in memory that may be written
    into; the base may not be.

    Raises:
        InputError: NaN or Inf, named with the tensor and the model; perhaps only when the floats are looked at.
    """
    method = unit.method
    assert method is not None
    stored = tuple(origin.read(start, stop) for origin in unit.origins)
    base = None if unit.base is None else unit.base.read(start, stop)

    def refuse(place: int) -> NoReturn:
        raise InputError(
            f"The tensor '{shown(unit.names[place])}' of {unit.models[place]} holds NaN or Inf: repair or replace "
            "the checkpoint."
        )

    tile = StoredTile(unit.site, start, stored, base, seed, refuse)
    if method.extent == "element":
        return tile
    shaped = tuple(method.shaped(tensor, unit.site) for tensor in tile.tensors)
    return Tile(unit.site, start, shaped, None if tile.base is None else method.shaped(tile.base, unit.site), seed)


Steps = Generator[tuple[Callable[[int, int], Any], list[tuple[int, int]], Callable[[Any, Any], Any]], Any, Any]
"""A task in steps: what to do with each range, the ranges, and how the results add up; then what the task gives."""


class Engine:
    """Runs the units of a plan.

    Args:
        plan: what to do.
        writer: of the result's files.
        journal: of finished tensors.
        seed: of everything random.
        step: called with bytes done and in all; may raise to stop the job.
    """

    def __init__(
        self, plan: MergePlan, writer: CheckpointWriter, journal: Journal, seed: int, step: Callable[[int, int], None]
    ) -> None:
        self._plan, self._writer, self._journal = plan, writer, journal
        self._seed, self._step = seed, step

    def run(self) -> dict[str, Done]:
        """Merge and write every tensor; those of an earlier run are taken from the journal."""
        finished = {
            unit.entry.name: _from_payload(self._journal.done[_key(unit)])
            for unit in self._plan.units
            if _key(unit) in self._journal.done
        }
        left = [unit for unit in self._plan.units if unit.entry.name not in finished]
        states = self._whole_model_states(left)
        total = sum(unit.entry.nbytes for unit in self._plan.units)
        done = total - sum(unit.entry.nbytes for unit in left)
        committer = _Committer(self._writer, self._journal)
        try:
            for task in self._stream([_Task(unit, self._merging(unit, states.get(unit.entry.name))) for unit in left]):
                unit, result = task.unit, task.value
                assert isinstance(result, Done)
                finished[unit.entry.name] = result
                committer.finish(_key(unit), _payload(result), unit.entry.nbytes)
                done += unit.entry.nbytes
                self._step(done, total)
        finally:
            committer.close()
        return finished

    # -- what a task does ------------------------------------------------------------------------------------------

    def _whole_model_states(self, left: list[Unit]) -> dict[str, State]:
        """The states of methods that survey all tensors together; kept in the journal once they are settled."""
        states: dict[str, State] = {}
        waiting = {unit.entry.name for unit in left}
        for number, group in enumerate(survey_groups(self._plan.units)):
            if not waiting & {unit.entry.name for unit in group}:
                continue
            key = f"survey:{number}"
            if key not in self._journal.done:
                first = group[0].method
                assert first is not None
                state = first.begin(len(group[0].origins), {unit.entry.name: unit.site for unit in group})
                for _ in range(first.rounds):
                    if state.get("done"):
                        break
                    found = {
                        task.unit.entry.name: task.value
                        for task in self._stream([_Task(unit, self._surveying(unit, state)) for unit in group])
                    }
                    state = first.settle({name: found[name] for name in sorted(found)}, state)
                self._journal.append(key, state)
                self._journal.commit()
            for unit in group:
                states[unit.entry.name] = self._journal.done[key]
        return states

    def _surveying(self, unit: Unit, state: State) -> Steps:
        method = unit.method
        assert method is not None

        def survey(start: int, stop: int) -> Sums:
            return method.survey(read_tile(unit, start, stop, self._seed), state)

        return (yield survey, list(tile_ranges(unit)), add_sums)

    def _settling(self, method: MergeMethod, sums: Mapping[str, Sums], state: State) -> Steps:
        """One survey's end, on a thread too: the main thread has the tiles of other tensors to hand out."""
        return (yield lambda start, stop: method.settle(sums, state), [(0, 0)], _last)

    def _merging(self, unit: Unit, state: State | None) -> Steps:
        method = unit.method
        if method is not None and state is None:
            name = unit.entry.name
            state = method.begin(len(unit.origins), {name: unit.site})
            for _ in range(method.rounds):
                if state.get("done"):
                    break
                sums = yield from self._surveying(unit, state)
                state = yield from self._settling(method, {name: sums}, state)
        settled = state or {}
        blend = None
        if method is not None and method.extent == "element":
            blend = method.blend(len(unit.origins), unit.base is not None, settled)
        same = [True] * (len(unit.origins) + (unit.base is not None))

        def write(start: int, stop: int) -> None:
            if method is None:
                out = unit.origins[0].read(start, stop)
                if out.is_floating_point() and out.element_size() > 1 and not torch.isfinite(out).all():
                    raise InputError(f"The tensor '{shown(unit.names[0])}' of {unit.models[0]} holds NaN or Inf.")
            else:
                made = None
                if blend is not None:
                    made = blended(blend, read_tile(unit, start, stop, self._seed), unit.entry.dtype)
                out = merged_tile(method, unit, start, stop, settled, self._seed) if made is None else made
                self._compare(unit, out, start, same)
            self._writer.write(unit.entry.name, out, start * unit.entry.dtype.itemsize)

        yield write, list(tile_ranges(unit)), _nothing
        return Done(settled, tuple(same) if method is not None else ())

    def _compare(self, unit: Unit, out: Tensor, start: int, same: list[bool]) -> None:
        """Note which inputs the result does not equal; once a tensor differs from a model it is not looked at again."""
        flat = out.reshape(-1)
        for place, origin in enumerate([*unit.origins, *([unit.base] if unit.base is not None else [])]):
            for count in dict.fromkeys((min(FEW, len(flat)), len(flat))):  # most differ at once
                if same[place]:
                    same[place] = torch.equal(origin.read(start, start + count).to(out.dtype), flat[:count])

    # -- tiles on threads ------------------------------------------------------------------------------------------

    def _stream(self, tasks: list[_Task]) -> Iterator[_Task]:
        """Run tasks, giving each when it is finished; tiles of a few of them are in flight at once."""
        pool, size = workers()
        waiting, active = deque(tasks), list[_Task]()
        ended: queue.SimpleQueue[tuple[_Task, int, Future[Any]]] = queue.SimpleQueue()
        flight: set[Future[Any]] = set()
        try:
            while waiting or active:
                while len(flight) < 3 * size:
                    task = next((task for task in active if task.ready), None)
                    if task is None:
                        if not waiting or len(active) > 4 * size:
                            break
                        task = waiting.popleft()
                        active.append(task)
                        if task.advance(None):
                            active.remove(task)
                            yield task
                            continue
                    self._submit(pool, task, ended, flight)
                if not flight:
                    continue
                task, index, future = ended.get()
                flight.discard(future)
                if task.take(index, future.result()) and task.advance(task.total):
                    active.remove(task)
                    yield task
        finally:
            for future in flight:
                future.cancel()
            for future in flight:
                if not future.cancelled():
                    future.exception()

    def _submit(
        self, pool: ThreadPoolExecutor, task: _Task, ended: queue.SimpleQueue[Any], flight: set[Future[Any]]
    ) -> None:
        index, (start, stop) = task.pop()
        future = pool.submit(task.function, start, stop)
        flight.add(future)
        future.add_done_callback(lambda done, task=task, index=index: ended.put((task, index, done)))  # type: ignore[misc]


@dataclass(eq=False)
class _Task:
    """A unit on its way: the step it is in, and how far it is."""

    unit: Unit
    steps: Steps
    function: Callable[[int, int], Any] = field(default=lambda start, stop: None)
    value: Any = None
    total: Any = None
    _ranges: list[tuple[int, int]] = field(default_factory=list)
    _next: int = 0
    _added: int = 0
    _early: dict[int, Any] = field(default_factory=dict)
    _add: Callable[[Any, Any], Any] = field(default=lambda total, more: None)

    def advance(self, total: Any) -> bool:
        """Go to the next step; true if there is none."""
        try:
            self.function, self._ranges, self._add = self.steps.send(total)
        except StopIteration as stop:
            self.value = stop.value
            return True
        self._next = self._added = 0
        self.total = {}
        return False

    @property
    def ready(self) -> bool:
        """Whether a range waits to be started."""
        return self._next < len(self._ranges)

    def pop(self) -> tuple[int, tuple[int, int]]:
        self._next += 1
        return self._next - 1, self._ranges[self._next - 1]

    def take(self, index: int, result: Any) -> bool:
        """Add a result in the order of the ranges; true if it was the step's last."""
        self._early[index] = result
        while self._added in self._early:
            self.total = self._add(self.total, self._early.pop(self._added))
            self._added += 1
        return self._added == len(self._ranges)


def _nothing(total: Any, more: Any) -> None:
    return None


def _last(total: Any, more: Any) -> Any:
    return more


def merged_tile(method: MergeMethod, unit: Unit, start: int, stop: int, state: State, seed: int) -> Tensor:
    """A range of the result, flat, in its dtype.

    Raises:
        InputError: values that are not finite, or beyond the range of the dtype.
    """
    merged = method.combine(read_tile(unit, start, stop, seed), state)
    out = merged.to(unit.entry.dtype).reshape(-1)
    if not math.isfinite(float(out.sum())) and not torch.isfinite(out).all():
        what = "NaN or Inf" if not torch.isfinite(merged).all() else f"values beyond the range of {unit.entry.dtype}"
        raise InputError(
            f"{method.spec} makes {what} of the tensor '{shown(unit.entry.name)}': choose other parameters."
        )
    return out


class _Committer:
    """Brings finished tensors to the disk and notes them, in a thread of its own."""

    def __init__(self, writer: CheckpointWriter, journal: Journal) -> None:
        self._writer, self._journal = writer, journal
        self._pool = ThreadPoolExecutor(1, "slimwright-commit")
        self._waiting: list[tuple[str, Any]] = []
        self._bytes = 0
        self._last: Future[None] | None = None

    def finish(self, key: str, payload: Any, nbytes: int) -> None:
        self._waiting.append((key, payload))
        self._bytes += nbytes
        if self._bytes >= COMMIT_BYTES and (self._last is None or self._last.done()):
            self._begin()

    def _begin(self) -> None:
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(self._commit, self._waiting)
        self._waiting, self._bytes = [], 0

    def _commit(self, lines: list[tuple[str, Any]]) -> None:
        self._writer.sync()
        for key, payload in lines:
            self._journal.append(key, payload)
        self._journal.commit()

    def close(self) -> None:
        """Commit what is left; errors of earlier commits are raised here at the latest."""
        try:
            self._begin()
            assert self._last is not None
            self._last.result()
        finally:
            self._pool.shutdown(wait=True)


def _key(unit: Unit) -> str:
    return f"merge:{unit.entry.name}"


def _payload(done: Done) -> dict[str, Any]:
    return {"state": done.state, "equal": list(done.equal)}


def _from_payload(payload: Mapping[str, Any]) -> Done:
    return Done(payload["state"], tuple(payload["equal"]))
