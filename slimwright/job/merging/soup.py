"""Greedy soup (card: linear, step 3): models join an average one by one, if the user's metric does not fall."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimwright.checkpoint import Journal
from slimwright.job.command import measured as measured_by
from slimwright.job.command import words
from slimwright.job.merging.config import MergeConfig
from slimwright.job.merging.sources import ModelReference


@dataclass(frozen=True)
class Soup:
    """What was chosen: the models, and every set that was tried with its score, in order."""

    models: tuple[ModelReference, ...]
    tried: tuple[tuple[tuple[str, ...], float], ...]

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {"chosen": [str(m) for m in self.models], "tried": [[list(names), score] for names, score in self.tried]}


def choose(models: Sequence[ModelReference], score: Callable[[tuple[ModelReference, ...]], float]) -> Soup:
    """Start with the best model; add each next one, in the order of their own scores, where the average is no worse.

    Args:
        models: at least one.
        score: of the average of some models; higher is better.
    """
    tried: list[tuple[tuple[str, ...], float]] = []

    def measured(group: tuple[ModelReference, ...]) -> float:
        found = score(group)
        tried.append((tuple(map(str, group)), found))
        return found

    own = {model: measured((model,)) for model in dict.fromkeys(models)}
    order = sorted(own, key=lambda model: -own[model])
    chosen: tuple[ModelReference, ...] = (order[0],)
    best = own[order[0]]
    for model in order[1:]:
        found = measured((*chosen, model))
        if found >= best:
            chosen, best = (*chosen, model), found
    return Soup(chosen, tuple(tried))


def greedy_soup(
    config: MergeConfig, folder: Path, average: Callable[[dict[str, Any], Path], object], journal: Journal
) -> tuple[MergeConfig, Soup]:
    """The configuration of the average of the chosen models.

    Args:
        config: with a metric: a command that gets a directory and prints a number last.
        folder: for the averages that are tried, removed afterwards.
        average: merges a configuration into a directory.
        journal: of scores; those that it has are not measured again.
    """
    assert config.metric is not None
    command = words(config.metric)
    (part,) = config.slices
    models = [source.model for source in part.sources]

    def score(group: tuple[ModelReference, ...]) -> float:
        key = json.dumps(["soup", *map(str, group)])
        if key not in journal.done:
            journal.append(key, measured(group))
            journal.commit()
        return float(journal.done[key])

    def measured(group: tuple[ModelReference, ...]) -> float:
        if len(group) == 1 and group[0].adapter is None:
            return measured_by(command, Path(group[0].path))
        out = folder / "candidate"
        try:
            merged: dict[str, Any] = {"method": "linear", "models": [str(model) for model in group]}
            for key in ("dtype", "out_dtype", "tokenizer", "tokenizer_source"):
                if key in config.source:
                    merged[key] = config.source[key]
            average(merged, out)
            return measured_by(command, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    try:
        soup = choose(models, score)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    kept = tuple(source for source in part.sources if source.model in soup.models)
    return replace(config, slices=(replace(part, sources=kept),)), soup
