"""Limits that only a measurement settles: floors on quality (``--keep``) and the memory of the running result
(``--memory``). Whole candidates are made, proven and measured one after another, each with what the one before taught;
at most three.

A candidate is an ordinary fit into the scratch directory, so it resumes as one does. What was measured is journaled;
the best candidate's files become the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimwright.checkpoint import (
    Checkpoint,
    Claim,
    Journal,
    claim,
    environment_key,
    job_key,
    source_state,
    write_bytes_atomic,
    write_json_atomic,
)
from slimwright.checkpoint.files import rename
from slimwright.checkpoint.publish import JOB_FILE
from slimwright.errors import BudgetError, InputError, QualityError
from slimwright.evaluate.retrieval import QUERIES
from slimwright.job import verify as verification
from slimwright.job.beside import Beside
from slimwright.job.floors import Floor, Judged
from slimwright.job.memory import MemoryWatch
from slimwright.job.open import open_source
from slimwright.job.request import DEFAULT_SEARCH, FitOptions, FitReport, finished_report
from slimwright.job.running import SMALL, Running, check_running, measure_running
from slimwright.model.discover import discover
from slimwright.report import render_report
from slimwright.sizes import parse_bytes

CANDIDATES = 3
"""Whole candidates that a job measures at most."""

CLOSE = 0.9
"""Share of what a floor allows, or of the memory, from which another candidate would save too little."""

FIRST_WEIGHTS = 0.25
"""Share of a ``--memory``, without the KV cache, that the first candidate's weights have at least, whatever is guessed
of what runs beside them."""

LEAST_MEMORY_USED, MOST_MEMORY_AIMED = 0.93, 0.985
"""Shares of a ``--memory`` that a result uses at least, and that a candidate after the first is to use."""

FIRST_SHARE = 0.7
"""Predicted loss of the first candidate as a share of what the floors allow: measured losses were 1.1 to 1.4 times the
predicted ones (docs/search.md)."""

ROUNDED, ROUNDING = "int4:row", "quantize/rtn"
"""What a small model is plainly rounded to, and how, to see what it runs in."""

PACKED_MOST = 2.2
"""Weights of a model whose layers are all packed, as a multiple of the rounded one's, at most."""

MOST_STEP = 8.0
"""Factor by which the predicted loss changes from one candidate to the next, at most."""

CAUTION = 0.6
"""Share of what the floors allow that the last candidate aims at, where none before it came near to keeping them."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One candidate, measured.

    Attributes:
        number: from 1.
        bytes: of its weight files.
        predicted: its predicted loss; None where nothing was searched.
        judged: against every floor.
        running: memory of a run, where that is limited.
        beside: bytes that its limit counted beside the weight files.
        smallest: whether no smaller one is possible.
    """

    number: int
    bytes: int
    predicted: float | None
    judged: tuple[Judged, ...] = ()
    running: Running | None = None
    smallest: bool = False
    beside: int = 0

    @property
    def kept(self) -> bool:
        """Whether it keeps every floor."""
        return all(one.met for one in self.judged)

    @property
    def total(self) -> int:
        """Bytes that its run took."""
        assert self.running is not None
        return self.running.total

    @property
    def strain(self) -> float:
        """How much of what the tightest floor allows is used; above 1: missed."""
        return max((one.strain for one in self.judged), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """For the journal and the report."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Candidate:
        judged = tuple(Judged(**one) for one in found["judged"])
        running = None if found["running"] is None else Running(**found["running"])
        return cls(**{**found, "judged": judged, "running": running})


def next_loss(floors: Sequence[Floor], tried: Sequence[Candidate], last: bool) -> float:
    """The predicted loss that the next candidate is to stay under, from those that were measured.

    The strain of the floors is taken to grow as a power of the loss: with the floors' own exponents after one
    candidate, with that through the two nearest after more.

    Args:
        last: no other will follow.
    """
    known = sorted((c for c in tried if c.predicted), key=lambda c: abs(math.log(max(c.strain, 1e-9))))
    assert known, "a search predicts a loss"
    best = known[0]
    assert best.predicted is not None
    tightest = max(range(len(floors)), key=lambda index: best.judged[index].strain)
    exponent = floors[tightest].exponent
    if len(known) > 1 and known[1].predicted and known[1].strain > 0 and best.strain > 0:
        apart = math.log(known[1].predicted / best.predicted)
        if abs(apart) > 0.1:  # nearer ones differ by what their intervals differ
            through = math.log(known[1].strain / best.strain) / apart
            exponent = min(1.5 * exponent, max(0.6 * exponent, through))
    aim = 0.96
    if last and not any(candidate.kept for candidate in tried):  # the farther what was measured, the more careful
        aim = 0.9 - (0.9 - CAUTION) * min(1.0, abs(math.log(best.strain)))
    factor = (aim / max(best.strain, 1e-9)) ** (1 / exponent)
    return best.predicted * min(MOST_STEP, max(1 / MOST_STEP, factor))


def weights_left(memory: int, ran: Sequence[Running], careful: bool = False) -> int:
    """Bytes that the next candidate's weights may have under a ``--memory``; below 1 where nothing is left.

    What runs of one result differ by is left free, as far as that leaves the candidate in the middle of what it may
    use. Between one that took less and one that took more it is interpolated, since what runs beside weights depends on
    their forms.

    Args:
        ran: those that were tried, in order, before them what else was run.
        careful: whether to leave more: less used than should be is better than nothing made.
    """
    newest = ran[-1]
    middle = (1 + LEAST_MEMORY_USED) / 2 * memory
    aim = max(middle, MOST_MEMORY_AIMED * memory - newest.spread / 2)
    if careful:
        aim = middle - newest.spread
    less = max((one for one in ran if one.total < aim), key=lambda one: one.total, default=None)
    more = min((one for one in ran if one.total > aim), key=lambda one: one.total, default=None)
    if less and more:
        share = (aim - less.total) / (more.total - less.total)
        return int(less.weights + share * (more.weights - less.weights))
    return max(int(aim) - newest.anonymous, (memory - newest.anonymous) // 2)


def _counted(running: Running, beside: int) -> Running:
    """A run with what the search counts beside weight files among the weights, which a limit decides."""
    return dataclasses.replace(running, weights=running.weights + beside, anonymous=running.anonymous - beside)


def _measured(journal: Journal) -> list[Candidate]:
    """The candidates that were measured, in order."""
    return [Candidate.from_json(journal.done[unit]) for unit in sorted(journal.done) if unit.startswith("measured-")]


def first_loss(floors: Sequence[Floor]) -> float:
    """Nats per token that the floors allow, roughly, before anything is measured."""
    allowed = []
    for floor in floors:
        if floor.command:
            allowed.append(0.05)
        elif floor.name == "top1":  # of an LM at a KL of k, about the root of k/8 of the tokens flip
            allowed.append(8 * (1 - floor.limit) ** 2)
        elif floor.name == "cosine":
            allowed.append(1 - floor.limit)
        else:
            allowed.append((1.5 if floor.name == "bits_per_byte" else 1.0) * floor.limit)
    return FIRST_SHARE * min(allowed)


class Confirmed:
    """A fit whose limits are settled by measuring candidates.

    Args:
        asked: with floors or a memory limit.
        watch: memory of the process tree.
        fit: makes one candidate.
    """

    def __init__(self, asked: FitOptions, watch: MemoryWatch, fit: Callable[[FitOptions], FitReport]) -> None:
        self.floors = asked.floors
        if asked.eval_queries is None and any(floor.name == "ndcg@10" for floor in self.floors):
            asked = dataclasses.replace(asked, eval_queries=QUERIES)  # all there are: a floor wants a narrow interval
        self.asked = asked
        self.watch = watch
        self.fit = fit
        self.memory = None if asked.memory is None else parse_bytes(asked.memory, "--memory")
        self.guess: Running | None = None
        """Of a run under a ``--memory``, before anything was run."""
        self.most = 0
        """Bytes that limits of candidates count beside the weight files of a model of which nothing was dropped."""
        self.extremes: dict[str, Running] = {}
        """Runs of what is no candidate: ``original``, ``rounded``."""
        self.started = time.monotonic()

    def run(self) -> FitReport:
        """Make, measure, publish.

        Raises:
            QualityError: the floors cannot be kept within the other limits.
            InputError: what a candidate cannot be; nothing is left.
        """
        asked = self.asked
        source = open_source(asked.model)
        if asked.memory is not None:
            self.guess = check_running(source, asked)
            if "drop" in asked.families:
                structure = discover(source, trust_remote_code=asked.trust_remote_code)
                self.most = Beside.of(source, structure, self._request({})).most
        self._check_tokens(source)
        if asked.dry_run:
            return self._forecast(source)
        assert asked.out is not None
        state = source_state(source)
        with claim(asked.out, job_key(source=state, recipe=asked.recipe())) as held:
            if held.status == "finished":
                return finished_report(held.out)
            key = job_key(source=state, recipe=asked.recipe(), environment=environment_key())
            with Journal.open(held.scratch / "candidates", key, reset=True) as journal:
                try:
                    best = self._search(held, source, journal)
                except (InputError, QualityError):  # what was asked cannot be, so nothing of it is worth keeping
                    if not self.watch.exceeded:
                        shutil.rmtree(held.partial)
                    raise
                data = self._adopt(held, journal, best)
            held.publish()
        return FitReport(data, held.out)

    def _check_tokens(self, source: Checkpoint) -> None:
        """Refuse floors that are too narrow for what they will be measured on, as far as that can be known."""
        if any(floor.name == "top1" for floor in self.floors):
            structure = discover(source, trust_remote_code=self.asked.trust_remote_code)
            spare = verification.spare_bytes(self.watch.cap)
            tokens, _ = verification.tokens_for(
                structure.parameters, verification.logits_width(structure), spare, self.asked.eval_tokens
            )
            for floor in self.floors:
                floor.check_tokens(tokens)

    # -- candidates ------------------------------------------------------------------------------------------------

    def _search(self, held: Claim, source: Checkpoint, journal: Journal) -> Candidate:
        """The best of at most three candidates."""
        asked = self.asked
        tried = _measured(journal)
        self._run_extremes(held, source, journal)
        limits = self._limits(source, tried)
        while limits is not None and len(tried) < CANDIDATES:
            number = len(tried) + 1
            candidate = self._measure(held, number, limits)
            journal.append(f"measured-{number}", candidate.to_json())
            journal.commit()
            tried.append(candidate)
            best = self._best(tried)
            for other in tried:
                if other is not best:
                    shutil.rmtree(self._directory(held, other.number), ignore_errors=True)
            limits = self._limits(source, tried)
        best = self._best(tried)
        if asked.memory is not None:
            self._check_memory(best)
        if not best.kept:
            raise QualityError(self._missed(held, tried, best))
        return best

    def _run_extremes(self, held: Claim, source: Checkpoint, journal: Journal) -> None:
        """Under a small ``--memory``, what a small model takes as it is and plainly rounded to 4 bits. A first guess is
        as large as such a model, and what runs beside weights grows with those that stay in 16 bits."""
        if self.memory is None or max(source.total_bytes, self.memory) > SMALL:
            return
        if source.quantization is not None:  # the forms of candidates are not its own
            return
        if self.asked.cache is None:  # nor would the cache be
            self._run_once("original", journal, lambda: measure_running(source.path, self.asked, held.scratch, True))
        with suppress(InputError):  # not every rule and shape can be so
            self._run_once("rounded", journal, lambda: self._rounded(held))

    def _run_once(self, name: str, journal: Journal, run: Callable[[], Running]) -> None:
        """Measure something that is no candidate, or take what an earlier run of the job has measured."""
        if name not in journal.done:
            journal.append(name, dataclasses.asdict(run()))
            journal.commit()
        self.extremes[name] = Running(**journal.done[name])

    def _rounded(self, held: Claim) -> Running:
        directory = held.scratch / "rounded"
        request = dataclasses.replace(
            self._request({}), out=str(directory), grid=ROUNDED, method=ROUNDING, search=DEFAULT_SEARCH, loss=None,
            folds=None, activations=None, allow=(), data="none", eval_tokens=64, eval_queries=2, quiet=True,
        )  # fmt: skip
        self.fit(request)
        found = measure_running(directory, self.asked, held.scratch)
        shutil.rmtree(directory)
        return found

    def _limits(self, source: Checkpoint, tried: Sequence[Candidate]) -> dict[str, Any] | None:
        """Fields of the next candidate's request; None where there is nothing better to try."""
        asked = self.asked
        if self.memory is not None:
            return self._memory_limits(source, tried, self.memory)
        if asked.size is not None or asked.grid is not None or asked.plan is not None:
            return None if tried else {}
        if not tried:
            return {"predicted_loss": first_loss(self.floors)}
        newest = tried[-1]
        if not newest.predicted:  # it could not lose less, or was copied
            return None
        if not newest.kept:
            for one in newest.judged:
                one.refuse_narrow()
        if any(c.kept and c.strain >= CLOSE for c in tried):
            return None
        wanted = next_loss(self.floors, tried, last=len(tried) == CANDIDATES - 1)
        near = min(abs(math.log(wanted / c.predicted)) for c in tried if c.predicted)
        return None if near < 0.02 and any(c.kept for c in tried) else {"predicted_loss": wanted}

    def _memory_limits(self, source: Checkpoint, tried: Sequence[Candidate], memory: int) -> dict[str, Any] | None:
        assert self.guess is not None
        ran = [_counted(one, self.most) for one in self.extremes.values()]
        ran += [_counted(one.running, one.beside) for one in tried if one.running is not None]
        if tried:
            used = tried[-1].total / memory
            enough = used >= LEAST_MEMORY_USED or tried[-1].bytes >= source.total_bytes
            if enough if used <= 1 else tried[-1].smallest:
                return None
        elif not ran:
            ran = [_counted(self.guess, self.most)]
        last = len(tried) == CANDIDATES - 1
        left = weights_left(memory, ran, careful=last and all(one.total > memory for one in tried))
        if not tried and "rounded" in self.extremes:  # up to 9 bits nothing else comes on top
            packed = self.most + int(PACKED_MOST * self.extremes["rounded"].weights)
            left = max(left, min(packed, weights_left(memory, ran[-1:])))
        elif not tried and not self.extremes:  # a guess refuses nothing
            left = max(left, int(FIRST_WEIGHTS * (memory - self.guess.cache + self.most)))
        return {"size": f"{max(1, left)}B"}

    def _measure(self, held: Claim, number: int, limits: dict[str, Any]) -> Candidate:
        """Make one candidate and measure it."""
        asked = self.asked
        directory = self._directory(held, number)
        job_time = None if asked.job_time is None else asked.job_time - (time.monotonic() - self.started)
        request = dataclasses.replace(
            self._request(limits), out=str(directory), job_time=job_time,
            published_as=asked.published_as or str(held.out),
        )  # fmt: skip
        report, smallest = self._fitted(request)
        data = report.data
        on = data.get("measured_on", {})
        judged = tuple(floor.judge(data["quality"], on, directory, job_time) for floor in self.floors)
        running = None if asked.memory is None else measure_running(directory, asked, held.scratch)
        searched = data.get("search", {})
        beside = searched.get("beside_bytes", self.most)
        return Candidate(number, data["size"]["after"], searched.get("nats"), judged, running, smallest, beside)

    def _request(self, limits: Mapping[str, Any]) -> FitOptions:
        """What a candidate is asked as."""
        running = None if self.guess is None else (self.guess.context, self.guess.batch)
        return dataclasses.replace(
            self.asked, **limits, memory=None, context=None, batch=None, keep=(), running=running
        )  # fmt: skip

    def _fitted(self, request: FitOptions) -> tuple[FitReport, bool]:
        """A fit; where a memory leaves less to the weights than any choice takes, that of the smallest choice, which a
        run then judges."""
        try:
            return self.fit(request), False
        except BudgetError as error:
            if self.asked.memory is None:
                raise
            return self.fit(dataclasses.replace(request, size=f"{error.smallest}B")), True

    def _best(self, tried: Sequence[Candidate]) -> Candidate:
        """The smallest that keeps the floors (of a memory, the largest that fits), else the one that comes nearest."""
        if self.memory is not None:
            fitting = [c for c in tried if c.total <= self.memory]
            if fitting:
                return max(fitting, key=lambda c: c.bytes)
            return min(tried, key=lambda c: c.total)
        kept = [c for c in tried if c.kept]
        return min(kept, key=lambda c: c.bytes) if kept else min(tried, key=lambda c: c.strain)

    def _check_memory(self, best: Candidate) -> None:
        assert self.memory is not None and best.running is not None
        if best.total > self.memory:
            raise InputError(
                f"--memory {self.asked.memory} is too little: the smallest candidate ran in "
                f"{best.total / 1e6:.1f} MB ({best.bytes / 1e6:.1f} MB of weights, "
                f"{best.running.anonymous / 1e6:.1f} MB of KV cache and workspace)."
            )

    def _missed(self, held: Claim, tried: Sequence[Candidate], best: Candidate) -> str:
        """What could not be kept, and the frontier: what each size would keep by the prediction, scaled to what was
        measured."""
        words = "; ".join(one.sentence for one in best.judged)
        text = f"The floors cannot be kept: at {best.bytes} bytes, {words}."
        for one in best.judged:
            if one.value_met and not one.met:
                text += (
                    f" Of {one.floor} only the interval misses, on {one.count} {one.unit}: a wider floor may be kept."
                )
        report = self._directory(held, best.number) / "report.json"
        if not report.exists() or not best.predicted:
            return text
        data = json.loads(report.read_text(encoding="utf-8"))
        parameters = data["model"]["parameters"]
        tightest = max(range(len(self.floors)), key=lambda index: best.judged[index].strain)
        exponent = self.floors[tightest].exponent
        points = []
        for size, loss in data["search"]["curve"]:
            strain = best.strain * (loss / data["search"]["predicted"]) ** exponent if loss > 0 else 0.0
            points.append((size, strain))
        enough = next((size for size, strain in points if strain <= 1), None)
        bits = 8 / parameters
        shown = ", ".join(f"{bits * size:.2f}bit {strain:.2g}" for size, strain in points[:: len(points) // 8 + 1])
        hint = "" if enough is None else f" They would be kept from about {enough} bytes ({bits * enough:.2f}bit)."
        return f"{text}{hint} Share of what {best.judged[tightest].floor} allows, by size: {shown}."

    # -- the result ------------------------------------------------------------------------------------------------

    @staticmethod
    def _directory(held: Claim, number: int) -> Path:
        return held.scratch / f"candidate-{number}"

    def _adopt(self, held: Claim, journal: Journal, best: Candidate) -> dict[str, Any]:
        """Move the best candidate's files to where the result is published from, and complete its report."""
        directory = self._directory(held, best.number)
        if "chosen" not in journal.done:
            report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
            journal.append("chosen", self._completed(report, journal, best))
            journal.commit()
        data: dict[str, Any] = journal.done["chosen"]
        if directory.is_dir():
            for entry in sorted(directory.iterdir()):
                if entry.name != JOB_FILE:
                    rename(entry, held.partial / entry.name)
        write_json_atomic(held.partial / "report.json", data)
        write_bytes_atomic(held.partial / "report.html", render_report(data).encode())
        return data

    def _completed(self, report: dict[str, Any], journal: Journal, best: Candidate) -> dict[str, Any]:
        """A candidate's report as that of this job."""
        asked = self.asked
        tried = _measured(journal)
        limit = best.bytes if self.memory is None else self.memory
        report["budget"] = {**report["budget"], "asked": asked.limit(), "bytes": limit}
        report["confirmation"] = {"chosen": best.number, "candidates": [candidate.to_json() for candidate in tried]}
        if best.running is not None:
            report["running"] = dataclasses.asdict(best.running) | {"total": best.total}
        report["reproduce"] = asked.command()
        report["job"]["seconds"] = time.monotonic() - self.started
        report["job"]["evaluations"] *= len(tried)
        report["job"]["peak_memory_bytes"] = self.watch.peak
        report["notes"] += [f"Floor {one.sentence}." for one in best.judged]
        return report

    def _forecast(self, source: Checkpoint) -> FitReport:
        """What one candidate takes, times those that are measured at most."""
        asked = self.asked
        limits: dict[str, Any] = {}
        if self.memory is not None:
            limits = self._memory_limits(source, [], self.memory) or {}
        elif asked.size is None and asked.grid is None and asked.plan is None:
            limits = {"predicted_loss": first_loss(self.floors)}
        report, _ = self._fitted(self._request(limits))
        most = 1 if not limits else CANDIDATES
        forecast = report.data["forecast"]
        forecast["seconds"] *= most
        forecast["phases"] = {name: seconds * most for name, seconds in forecast["phases"].items()}
        forecast["disk_bytes"] *= min(most, 2)
        report.data["budget"]["asked"] = asked.limit()
        report.data["notes"].append(f"At most {most} candidate{'s are' if most > 1 else ' is'} made and measured.")
        return report
