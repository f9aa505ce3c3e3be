"""Evaluations: how far a model with some groups on grids is from the original, on the calibration's documents.

Where the model's weights and Grams fit, a choice is carried out by its own solver, on one half of the calibration's
batches, and judged on the other: what a solver gains is in it, and what it only fits to its own data is not. Larger
models are rounded plainly, in tiles while they are multiplied. Everything is counted, and written into the journal so
that an interrupted job does not measure twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimwright.calibrate.sensitivity import EMBEDDINGS
from slimwright.calibrate.walk import Batch, run_forward, without_caches
from slimwright.checkpoint import Checkpoint, Journal
from slimwright.errors import InputError
from slimwright.evaluate.divergence import compare_logits
from slimwright.job.build import Calibration
from slimwright.job.parallel import in_order
from slimwright.job.source import ParallelSource, PlainSource, planned_source
from slimwright.job.walked import WalkedModel, walk_dtype
from slimwright.job.walked_build import solved_parts
from slimwright.job.weights import solve_rows, without_data
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.model.structure import Site, Structure
from slimwright.plan import Assignment

EVALUATED_TOKENS, EVALUATED_LOGITS = 512, 1 << 23
"""Tokens and logits of one forward at most, where one row does not have more: what is drawn at random is forwards."""

COMMIT_SECONDS = 2.0
"""Evaluations that a crash may lose."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Attributes:
        loss: nats of KL per token from the original, or one minus the cosine where the model gives no distribution;
            infinite where an output is not finite.
        error: its standard error over documents.
        tokens: that it was measured on.
    """

    loss: float
    error: float
    tokens: int


class Evaluator:
    """Measures assignments; groups that are not named stay as they are.

    Args:
        source: the model, seen through the edits of the job.
        cap: bytes for the original's outputs, for compressed weights and for Grams together. Weights are kept where the
            whole model fits twice into half of it, and solved with data where all Grams with their factors fit into a
            quarter; else they are rounded anew in tiles whenever they are multiplied with.
        journal: keeps every finished evaluation.
        step: called after each evaluation.
        seed: of the random choices of documents.

    Attributes:
        evaluations: so far, those of an earlier run of the job included.
        solves: whether choices are carried out by solvers with data; else by plain rounding.
    """

    def __init__(
        self,
        source: Checkpoint,
        structure: Structure,
        calibration: Calibration,
        cap: int,
        journal: Journal | None = None,
        step: Callable[[], None] = lambda: None,
        seed: int = 0,
    ) -> None:
        self.evaluations = 0
        self._structure, self._source, self._seed, self._step = structure, source, seed, step
        self._walked = WalkedModel(source, structure, calibration)
        self._dtype = walk_dtype(source, structure)
        self._groups = structure.choice_groups()
        self._journal, self._committed = journal, time.monotonic()
        self._known: dict[str, Measured] = {}
        weights = self._dtype.itemsize * sum(site.numel for site in structure.sites.values())
        self._stored_cap = cap // 2 if 2 * weights <= cap // 2 else 0
        batches = calibration.samples.batches
        self.solves = bool(self._stored_cap) and len(batches) > 1 and _gram_bytes(structure) <= cap // 4
        width = outputs_a_token(structure)
        most = min(EVALUATED_LOGITS, EVALUATED_TOKENS * width)
        self._batches = list(small_batches(batches[1::2] if self.solves else batches, width, logits=most))
        self._solved_on = replace(calibration, samples=replace(calibration.samples, batches=batches[::2]))
        self._statistics: dict[str, list[SiteStatistics]] = {}
        self._stored: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._outputs_cap = cap // 4 if self.solves else cap // 2
        self._outputs: dict[int, Judged] = {}

    @property
    def tokens(self) -> int:
        """Tokens that are there at most, padding included."""
        return sum(_length(batch) for batch in self._batches)

    def __call__(self, choices: Mapping[str, Assignment], tokens: int = 0, draw: int = 0) -> Measured:
        """Measure an assignment.

        Args:
            choices: by group; tensors that are no sites (casts) are left as they are.
            tokens: about how many to measure on; 0: all.
            draw: which random choice of the documents; the same for the same number, whatever is measured.

        Raises:
            InputError: a group that the model does not have.
        """
        made = {group: choice for group, choice in choices.items() if group not in self._structure.castable}
        if not self.solves:
            made = {group: plainly(choice) for group, choice in made.items()}
        if unknown := [group for group in made if group not in self._groups]:
            raise InputError(f"'{unknown[0]}' is no group of this model.")
        made = {group: choice for group, choice in made.items() if not choice.kept}
        chosen = self._drawn(tokens, draw)
        key = _key(made, chosen)
        if key not in self._known:
            self._known[key] = self._from_journal(key) or self._measure(made, chosen)
            self._note(key, self._known[key])
            self.evaluations += 1
            self._step()
        return self._known[key]

    # -- what is measured on ---------------------------------------------------------------------------------------

    def _drawn(self, tokens: int, draw: int) -> list[int]:
        """Indices of batches, ascending."""
        if not tokens or tokens >= self.tokens:
            return list(range(len(self._batches)))
        seen, chosen = 0, list[int]()
        for index in np.random.default_rng([self._seed, draw]).permutation(len(self._batches)).tolist():
            if seen >= tokens:
                break
            chosen.append(index)
            seen += _length(self._batches[index])
        return sorted(chosen)

    # -- the journal -----------------------------------------------------------------------------------------------

    def _from_journal(self, key: str) -> Measured | None:
        found = None if self._journal is None else self._journal.done.get(key)
        if found is None:
            return None
        loss, error, tokens = found
        return Measured(math.inf if loss is None else loss, math.inf if error is None else error, tokens)

    def _note(self, key: str, found: Measured) -> None:
        if self._journal is None or key in self._journal.done:
            return
        finite = math.isfinite(found.loss)
        self._journal.append(key, [found.loss if finite else None, found.error if finite else None, found.tokens])
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._journal.commit()
            self._committed = time.monotonic()

    # -- forwards --------------------------------------------------------------------------------------------------

    def _measure(self, made: Mapping[str, Assignment], chosen: Sequence[int]) -> Measured:
        sums: list[tuple[float, int]] = []
        for index in chosen:
            before = self._original(index)
            self._stand(made)
            try:
                sums += divergences(self._batches[index], before, self._run(index))
            except InputError:
                return Measured(math.inf, math.inf, sum(tokens for _, tokens in sums))
        return _mean(sums)

    def _original(self, index: int) -> Judged:
        """The original's outputs for a batch, kept as long as they fit the cap."""
        if index in self._outputs:
            return self._outputs[index]
        self._stand({})
        found = self._run(index)
        size = sum(4 * tensor.numel() for tensor in found.tensors)
        if size <= self._outputs_cap:
            self._outputs_cap -= size
            self._outputs[index] = found
        return found

    def _run(self, index: int) -> Judged:
        with torch.inference_mode(), without_caches(self._walked.model):
            return judged(run_forward(self._walked.model, self._batches[index]))

    def _stand(self, made: Mapping[str, Assignment]) -> None:
        """Let every site stand as chosen."""
        for group, sites in self._groups.items():
            choice = made.get(group)
            for site in sites:
                place = self._walked.sources[site.name]
                if not self._stored_cap:
                    place.current = ParallelSource(self._made(site, choice))
                else:
                    place.held = self._weights(site, choice)

    def _made(self, site: Site, choice: Assignment | None) -> Any:
        return PlainSource(self._source, site) if choice is None else planned_source(self._source, site, choice)

    def _weights(self, site: Site, choice: Assignment | None) -> Tensor:
        """The whole matrix, from the store where it is there; what was used longest ago makes room."""
        key = (site.name, "" if choice is None else choice.model_dump_json(exclude={"reason"}))
        if key in self._stored:
            self._stored.move_to_end(key)
            return self._stored[key]
        place = self._walked.sources[site.name]
        if choice is not None and choice.solved and choice.solver().needs:
            place.held = self._solved(site, choice.solver().for_role(site.role))
        else:
            place.current = self._made(site, choice)
            place.hold(self._dtype)
        assert place.held is not None
        self._stored[key] = place.held
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._stored.values())
        while size > self._stored_cap:
            _, oldest = self._stored.popitem(last=False)
            size -= oldest.numel() * oldest.element_size()
        return place.held

    def _solved(self, site: Site, solver: WeightSolver) -> Tensor:
        """(rows, columns), what a solver makes of a site on the original's statistics; of what is only looked up and of
        experts that saw too little, without data."""
        if not self._statistics:
            walked = WalkedModel(self._source, self._structure, self._solved_on)
            for sites, collector in walked.collected(lambda unit: unit.sites):
                self._statistics |= {own.name: collector.statistics(own) for own in sites}
        found = self._statistics.get(site.name, [SiteStatistics.none()])
        held = torch.empty(site.rows, site.columns, dtype=self._dtype)

        def fill(part: tuple[slice, WeightSolver, SiteStatistics]) -> None:
            rows, own, stats = part
            held[rows] = solve_rows(self._source, site, own, rows, stats)[1].dense().to(self._dtype)

        for _ in in_order(fill, solved_parts(self._source, site, solver, found)):
            pass
        return held


def _gram_bytes(structure: Structure) -> int:
    """Of the Grams of all distinct inputs, each with a factor."""
    sizes: dict[str, int] = {}
    for site in structure.sites.values():
        matrices = site.rows // site.weight_shape[-2]
        sizes[site.gram_group or site.name] = 2 * 4 * matrices * site.columns**2
    return sum(sizes.values())


def plainly(choice: Assignment) -> Assignment:
    """The same choice by a solver that needs no data."""
    if choice.kept or not choice.solver().needs:
        return choice
    return choice.model_copy(update={"method": without_data(choice.solver()).spec})


def small_batches(batches: Sequence[Batch], width: int, *, tokens: int = 0, logits: int) -> Iterator[Batch]:
    """The batches cut into some of fewer rows.

    Args:
        width: outputs of a token.
        tokens: how many there are to be at most; 0: all.
        logits: outputs of a batch at most, where one row does not have more.
    """
    seen = 0
    for batch in batches:
        first = next(iter(batch.inputs.values()))
        length = first.shape[1] if first.ndim == 2 else 1
        step = max(1, min(first.shape[0], logits // max(1, width * length)))
        for start in range(0, first.shape[0], step):
            if tokens and seen >= tokens:
                return
            rows = slice(start, min(start + step, first.shape[0]))
            inputs = {name: tensor[rows] for name, tensor in batch.inputs.items()}
            masks = {(rows.stop - rows.start, *shape[1:]): mask[rows] for shape, mask in batch.masks.items()}
            outputs = None if batch.outputs is None else batch.outputs[rows]
            yield Batch(inputs, masks, batch.documents[rows], outputs, batch.pieces[rows])
            seen += (rows.stop - rows.start) * length


@dataclass(frozen=True)
class Judged:
    """What of a model's output says how far it is from another, float32.

    Attributes:
        tensors: the logits, or vectors (..., width).
        distribution: whether they are logits.
    """

    tensors: list[Tensor]
    distribution: bool


def judged(output: Any) -> Judged:
    """The logits of an output, else the vectors of both towers, else its first vectors."""
    logits = output.get("logits") if hasattr(output, "get") else None
    if logits is not None and logits.ndim >= 2 and logits.shape[-1] >= 2:
        return Judged([logits.float()], True)
    found = {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim >= 2}
    towers = [found[name].float() for name in EMBEDDINGS if name in found]
    return Judged(towers or [vectors.float() for vectors in list(found.values())[:1]], False)


def divergences(batch: Batch, before: Judged, after: Judged) -> list[tuple[float, int]]:
    """(summed loss, tokens) of each row of a batch: nats of KL, or one minus the cosine, of both towers together.

    Raises:
        InputError: an output is not finite.
    """
    sums: dict[int, tuple[float, int]] = {}
    for old, new in zip(before.tensors, after.tensors, strict=True):
        place = torch.arange(old.shape[0]).view(-1, *[1] * (old.ndim - 1)).expand(*old.shape[:-1], 1).float()
        counted = batch.predicted if before.distribution else batch.counted
        x, y, rows = (counted(t) if t.ndim > 2 else t for t in (old, new, place))
        x, y = (t.reshape(-1, t.shape[-1]) for t in (x, y))
        if before.distribution:
            loss = compare_logits(x, y)["kl"]
        else:
            x, y = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (x, y))
            loss = (x - y).square().sum(1) / 2
            if not torch.isfinite(loss).all():
                raise InputError("The candidate's vectors hold NaN or Inf.")
        rows = rows.reshape(-1)
        for row in rows.unique().int().tolist():
            own = loss[rows == row]
            total, _ = sums.get(row, (0.0, 0))
            sums[row] = total + float(own.sum()), len(own)
    return list(sums.values())


def _mean(sums: Sequence[tuple[float, int]]) -> Measured:
    """Loss per token with the standard error of a ratio over documents."""
    values, weights = np.array(sums, dtype=np.float64).reshape(-1, 2).T
    loss = float(values.sum() / weights.sum())
    count = len(values)
    spread = float(np.sqrt(((values - loss * weights) ** 2).sum() * count / max(1, count - 1))) / float(weights.sum())
    return Measured(loss, spread if count > 1 else math.inf, int(weights.sum()))


def _length(batch: Batch) -> int:
    first = next(iter(batch.inputs.values()))
    return first.shape[0] * (first.shape[1] if first.ndim == 2 else 1)


def outputs_a_token(structure: Structure) -> int:
    """Rows of the largest head or embedding: at least as many as there are logits."""
    return max([site.rows for site in structure.sites.values() if site.role in ("head", "embed")] or [1])


def _key(made: Mapping[str, Assignment], chosen: Sequence[int]) -> str:
    words = {group: choice.model_dump(exclude={"reason"}) for group, choice in sorted(made.items())}
    text = json.dumps([words, list(chosen)], sort_keys=True)
    return f"evaluation:{hashlib.sha256(text.encode()).hexdigest()[:32]}"
