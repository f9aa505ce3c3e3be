"""How far a result is from its source, gathered batch by batch in the metrics that the model's outputs call for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimwright.calibrate.sensitivity import EMBEDDINGS
from slimwright.evaluate.quality import ClassifierQuality, EncoderQuality, LanguageQuality
from slimwright.job.held_out import HeldOut

Outputs = dict[str, Tensor]


class Gathering:
    """Quality of one model: of classes where it gives one distribution a sample, of tokens where it gives more, of the
    vectors of both towers where it has two, else of its hidden states."""

    def __init__(self) -> None:
        self._classes = ClassifierQuality()
        self._language = LanguageQuality()
        self._vectors: dict[str, EncoderQuality] = {}
        self._kind = ""

    def add(self, batch: HeldOut, before: Outputs, after: Outputs) -> None:
        """Add one batch, one document a row.

        Args:
            before, after: the source's and the result's outputs by name.
        """
        logits = before.get("logits")
        self._kind = _kind(logits)
        if self._kind == "classes":
            self._classes.add(batch.names, before["logits"], after["logits"], batch.labels)
        elif self._kind == "tokens":
            self._add_tokens(batch, before["logits"], after["logits"])
        else:
            self._add_vectors(batch, before, after)

    def result(self, seed: int) -> tuple[dict[str, Any], dict[str, int]]:
        """The report's quality, every leaf ``{value, low, high}``, and on how much it was measured."""
        if self._kind == "classes":
            found = self._classes.result(seed)
        elif self._kind == "tokens":
            found = self._language.result(seed)
        else:
            found = {}
            for tower, vectors in self._vectors.items():
                for name, value in vectors.result(seed).items():
                    found[tower + name if isinstance(value, dict) else name] = value
        quality = {name: value for name, value in found.items() if isinstance(value, dict)}
        return quality, {name: value for name, value in found.items() if not isinstance(value, dict)}

    def _add_tokens(self, batch: HeldOut, before: Tensor, after: Tensor) -> None:
        for row, name in enumerate(batch.names):
            old, new = (logits[row].reshape(-1, logits.shape[-1]) for logits in (before, after))
            mask = _counted(batch, row, old.shape[0])
            if batch.target_bytes is None:
                self._language.add(name, old, new, mask)
                continue
            following = batch.inputs["input_ids"][row, 1:]  # the last token has none that came after it
            self._language.add(name, old[:-1], new[:-1], mask[1:], following, batch.target_bytes[row, 1:])

    def _add_vectors(self, batch: HeldOut, before: Outputs, after: Outputs) -> None:
        towers = {name.partition("_")[0] + "_": name for name in EMBEDDINGS if name in before}
        if len(towers) < 2:
            names = ("last_hidden_state", *EMBEDDINGS, "pooler_output")
            towers = {"": next((name for name in names if name in before), next(iter(before)))}
        for tower, key in towers.items():
            quality = self._vectors.setdefault(tower, EncoderQuality())
            for row, name in enumerate(batch.names):
                old, new = (found[key][row].reshape(-1, found[key].shape[-1]) for found in (before, after))
                quality.add(name, old, new, _counted(batch, row, old.shape[0]))


def _kind(logits: Tensor | None) -> str:
    if logits is None or logits.ndim < 2 or logits.shape[-1] < 2:
        return "vectors"
    return "classes" if logits.ndim == 2 else "tokens"


def _counted(batch: HeldOut, row: int, length: int) -> Tensor:
    """(length,) the positions of a row that count."""
    if batch.mask is None or batch.mask.shape[1] < length:
        return torch.ones(length, dtype=torch.bool)
    return batch.mask[row, :length]
