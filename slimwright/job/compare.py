"""What the measuring processes found, scored and compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from slimwright.evaluate.accuracy import ACCURACY, correct
from slimwright.evaluate.bits_per_byte import BITS_PER_BYTE
from slimwright.evaluate.bootstrap import Estimate
from slimwright.evaluate.cosine import COSINE_MEAN, cosine_similarity
from slimwright.evaluate.divergence import KL, TOP1_AGREEMENT, compare_logits
from slimwright.evaluate.perplexity import PERPLEXITY
from slimwright.evaluate.ranking import NDCG_AT_10, RANKING, RECALL_AT_100
from slimwright.evaluate.retrieval import score_task
from slimwright.evaluate.subject import Kind
from slimwright.evaluate.table import Metric, Table
from slimwright.job.sources import Source

Entry = tuple[Metric, Table]
MIXED = tuple(replace(metric, name=f"mixed_{metric.name}") for metric in (NDCG_AT_10, RECALL_AT_100))
"""Queries by the model, documents by the reference."""


@dataclass
class Measured:
    """What one model gave.

    Attributes:
        entries: metric and table by source (or task) and the metric's name.
        notes: what was not compared, and why.
    """

    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, kind: Kind, sources: Sequence[Source], found: Mapping[str, Any], reference: Mapping[str, Any] | None
    ) -> Measured:
        """Make tables of what a process found.

        Args:
            kind: of the models.
            sources: that they were measured on.
            found: its result.
            reference: that of the reference's process; None if this is the reference.
        """
        made = cls()
        if kind in ("causal", "masked", "seq2seq"):
            made._language(sources, found, reference)
        elif kind == "encoder":
            made._encoder(sources, found, reference)
        else:
            made._classifier(sources, found, reference)
        return made

    def add(self, source: str, metric: Metric, table: Table) -> None:
        """Add a metric, if the table has it."""
        if metric.within(table):
            self.entries.setdefault(source, {})[metric.name] = (metric, table)

    def add_tasks(self, tables: Mapping[str, Any]) -> None:
        """Add the tables of lm-evaluation-harness's tasks."""
        for task, found in tables.items():
            table = Table.from_json(found)
            for column in table.columns:
                self.add(task, Metric(column, column), table)

    def _language(
        self, sources: Sequence[Source], found: Mapping[str, Any], reference: Mapping[str, Any] | None
    ) -> None:
        for source in sources:
            alike = reference is None or found["digests"][source.name] == reference["digests"][source.name]
            if not alike:
                rest = "; bits per byte are comparable" if source.name in found["tables"] else ""
                self.notes.append(
                    f"reads '{source.name}' as other tokens than the reference, so KL, top-1 agreement and perplexity "
                    f"are not compared{rest}."
                )
            if source.name not in found["tables"]:
                continue
            table = Table.from_json(found["tables"][source.name])
            for metric in (KL, TOP1_AGREEMENT, PERPLEXITY) if alike else ():
                self.add(source.name, metric, table)
            self.add(source.name, BITS_PER_BYTE, table)

    def _encoder(
        self, sources: Sequence[Source], found: Mapping[str, Any], reference: Mapping[str, Any] | None
    ) -> None:
        ours, theirs = (load_file(part["tensors"]) if part else None for part in (found, reference))
        assert ours is not None
        for source in sources:
            texts, queries = ours[f"{source.name}/texts"], ours.get(f"{source.name}/queries")
            expected = None if theirs is None else theirs[f"{source.name}/texts"]
            comparable = expected is not None and expected.shape == texts.shape
            if expected is not None and comparable:
                cosine = cosine_similarity(expected, texts).numpy()
                self.add(source.name, COSINE_MEAN, Table.of(source.names, cosine=cosine))
            elif expected is not None:
                widths = f"vectors of {texts.shape[1]} features, the reference of {expected.shape[1]}"
                self.notes.append(f"gives {widths}: no cosine and no mixed retrieval.")
            if source.task is None or queries is None:
                continue
            ranked = score_task(source.task, queries, texts, found["similarity"])
            for metric in RANKING:
                self.add(source.name, metric, ranked)
            if reference is None:
                mixed = ranked  # the reference's queries on its own documents: what mixed retrieval is compared with
            elif comparable and expected is not None:
                mixed = score_task(source.task, queries, expected, reference["similarity"])
            else:
                continue
            for metric in MIXED:
                self.add(source.name, metric, mixed)

    def _classifier(
        self, sources: Sequence[Source], found: Mapping[str, Any], reference: Mapping[str, Any] | None
    ) -> None:
        ours: dict[str, Tensor] = load_file(found["tensors"])
        theirs = None if reference is None else load_file(reference["tensors"])
        for source in sources:
            logits = ours[f"{source.name}/logits"]
            columns: dict[str, np.ndarray] = {"tokens": np.ones(len(logits))}
            if source.labels is not None:
                columns["correct"] = correct(logits, source.labels).numpy()
            else:
                self.notes.append(f"'{source.name}' has no labels: no accuracy.")
            if theirs is not None:
                compared = compare_logits(theirs[f"{source.name}/logits"], logits)
                columns |= {name: values.numpy() for name, values in compared.items()}
            table = Table.of(source.names, **columns)
            for metric in (ACCURACY, KL, TOP1_AGREEMENT):
                self.add(source.name, metric, table)


def score(measured: Measured, seed: int) -> dict[str, dict[str, Any]]:
    """By source and metric ``{value, low, high}``; beside the mean cosine the least, which has no interval."""
    found: dict[str, dict[str, Any]] = {}
    for source, entries in measured.entries.items():
        leaves = found.setdefault(source, {})
        for name, (metric, table) in entries.items():
            leaves[name] = metric.score(table, seed).to_json()
            if metric is COSINE_MEAN:
                least = float(table.columns["cosine"].min())
                leaves["cosine_min"] = Estimate(least, least, least).to_json()
    return found


def compare(measured: Mapping[str, Measured], seed: int) -> list[dict[str, Any]]:
    """The paired difference of every two models, the later minus the earlier, in every metric that both have."""
    found = []
    names = list(measured)
    for index, model in enumerate(names):
        for against in names[:index]:
            for source, entries in measured[model].entries.items():
                others = measured[against].entries.get(source, {})
                for name, (metric, table) in entries.items():
                    if name in others and others[name][1].names == table.names:
                        difference = metric.difference(others[name][1], table, seed)
                        found.append(
                            {"model": model, "against": against, "data": source, "metric": name, **difference.to_json()}
                        )
    return found


def speed_range(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By figure ``{value, low, high}``: the median over the processes, the least and the most."""
    if not runs:
        return {}
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    columns = {name: [run[name] for run in runs] for name in shared}
    return {
        name: {"value": float(np.median(values)), "low": min(values), "high": max(values)}
        for name, values in columns.items()
    }
