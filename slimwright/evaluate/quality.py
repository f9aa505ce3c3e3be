"""Quality of a candidate against its reference, gathered batch by batch and given with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.accuracy import ACCURACY, correct
from slimwright.evaluate.bits_per_byte import BITS_PER_BYTE
from slimwright.evaluate.bootstrap import Estimate, interval
from slimwright.evaluate.cosine import cosine_similarity, mean_pool
from slimwright.evaluate.divergence import KL, TOP1_AGREEMENT, compare_logits
from slimwright.evaluate.perplexity import PERPLEXITY, token_nats
from slimwright.evaluate.table import Table

_PIECES = 32


class TokenRows:
    """Figures of tokens, gathered document by document into a table.

    With a single document, its tokens are cut in order into (at most) 32 consecutive pieces of equal length that take
    the documents' place: an interval then says how much the figures vary within that text, and nothing about others.
    """

    def __init__(self) -> None:
        self._documents: dict[Hashable, list[dict[str, np.ndarray]]] = {}

    def add(self, document_id: Hashable, **columns: np.ndarray) -> None:
        """Add tokens of a document, in order; each column is (tokens,), and all parts have the same columns."""
        if len(next(iter(columns.values()))):
            self._documents.setdefault(document_id, []).append(columns)

    @property
    def documents(self) -> int:
        return len(self._documents)

    @property
    def tokens(self) -> int:
        return sum(len(next(iter(part.values()))) for parts in self._documents.values() for part in parts)

    def table(self) -> Table:
        """One row per document (or piece) with each column's sum, and ``tokens``.

        Raises:
            InputError: fewer than two tokens were added.
        """
        if self.tokens < 2:
            raise InputError(
                f"Quality needs at least two tokens to compare, but there are {self.tokens}: give more text."
            )
        names = [str(name) for name in self._documents]
        rows = [
            {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}
            for parts in self._documents.values()
        ]
        if len(rows) == 1:
            pieces = min(_PIECES, self.tokens)
            cut = {column: np.array_split(values, pieces) for column, values in rows[0].items()}
            rows = [{column: parts[index] for column, parts in cut.items()} for index in range(pieces)]
            names = [f"{names[0]} [{index}]" for index in range(pieces)]
        sums = {column: [float(row[column].sum()) for row in rows] for column in rows[0]}
        return Table.of(names, tokens=[float(len(next(iter(row.values())))) for row in rows], **sums)


class LanguageQuality:
    """KL divergence in nats per token and top-1 agreement, over the tokens of all documents; where the tokens that came
    are given too, perplexity and bits per byte of both models.

    Intervals come from the bootstrap over documents (of one document: over its pieces, see :class:`TokenRows`).

    Nine bytes a token are kept, 33 with targets.
    """

    def __init__(self) -> None:
        self._rows = TokenRows()
        self._with_targets: bool | None = None

    def add(
        self,
        document_id: Hashable,
        reference: Tensor,
        candidate: Tensor,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
        target_bytes: Tensor | None = None,
    ) -> None:
        """Add tokens of a document; a long document may come in several parts, in order.

        Args:
            document_id: the same for all parts of one document.
            reference: (tokens, vocabulary) logits.
            candidate: the same shape.
            mask: (tokens,) true where a token counts; None: all count.
            targets: (tokens,) int64, the token that came at each place (for a causal model the next one); to all calls
                or to none. Where the mask is false they may hold anything.
            target_bytes: (tokens,) UTF-8 bytes that each target stands for, see
                :func:`slimwright.evaluate.bits_per_byte.token_bytes`; together with ``targets``.

        Raises:
            InputError: see :func:`compare_logits` and :func:`token_nats`; targets in some calls only, or without bytes.
        """
        if (targets is None) != (target_bytes is None):
            raise InputError("Perplexity and bits per byte need the targets and their bytes, but only one was given.")
        if self._with_targets not in (None, targets is not None):
            raise InputError("Targets were given for some of the documents only.")
        self._with_targets = targets is not None
        compared = compare_logits(reference, candidate, mask)
        columns = {"kl": compared["kl"].numpy(), "top1_agreement": compared["top1_agreement"].numpy()}
        if targets is not None and target_bytes is not None:
            counted = torch.ones(len(reference), dtype=torch.bool) if mask is None else mask.bool().cpu()
            columns["before"] = token_nats(reference[counted.to(reference.device)], targets[counted]).numpy()
            columns["after"] = token_nats(candidate[counted.to(candidate.device)], targets[counted]).numpy()
            columns["bytes"] = target_bytes[counted].numpy()
        self._rows.add(document_id, **columns)

    def tables(self) -> tuple[Table, Table]:
        """Before and after: one row per document with the columns ``tokens`` and, with targets, ``nats`` and ``bytes``;
        the second has ``kl`` and ``top1_agreement`` too.

        Raises:
            InputError: fewer than two tokens were added.
        """
        found = self._rows.table()
        shared = {name: found.columns[name] for name in ("tokens", "bytes") if name in found.columns}
        distance = {name: found.columns[name] for name in ("kl", "top1_agreement")}
        if not self._with_targets:
            return Table(found.names, shared), Table(found.names, {**shared, **distance})
        return (
            Table(found.names, {**shared, "nats": found.columns["before"]}),
            Table(found.names, {**shared, **distance, "nats": found.columns["after"]}),
        )

    def result(self, seed: int = 0) -> dict[str, Any]:
        """``{"kl": {value, low, high}, "top1_agreement": {...}, "tokens": n, "documents": n}``; with targets also
        ``"perplexity"`` and ``"bits_per_byte"``, each ``{"before": {...}, "after": {...}, "difference": {...}}`` with
        the paired interval of after − before.

        Raises:
            InputError: fewer than two tokens were added.
        """
        before, after = self.tables()
        found: dict[str, Any] = {metric.name: metric.score(after, seed).to_json() for metric in (KL, TOP1_AGREEMENT)}
        for metric in (PERPLEXITY, BITS_PER_BYTE) if self._with_targets else ():
            found[metric.name] = metric.change(before, after, seed)
        return {**found, "tokens": self._rows.tokens, "documents": self._rows.documents}


class EncoderQuality:
    """Cosine similarity of embeddings: the mean over all texts, with its bootstrap interval, and the least one.

    The least cosine is a fact about these texts, not the estimate of a mean: the bootstrap is not valid for extremes
    (no draw can go below the least that was seen), so ``cosine_min`` has low = value = high.
    """

    def __init__(self) -> None:
        self._cosines: dict[Hashable, float] = {}

    def add(self, document_id: Hashable, reference: Tensor, candidate: Tensor, mask: Tensor | None = None) -> None:
        """Add one text.

        Args:
            document_id: of the text; each is added once.
            reference: (features,) embedding, or (tokens, features) hidden states, pooled by their mean.
            candidate: the same shape.
            mask: (tokens,) true where a token counts; for hidden states only.

        Raises:
            InputError: added before, shapes that do not fit, no token that counts, NaN or Inf.
        """
        if document_id in self._cosines:
            raise InputError(f"The text '{document_id}' was added twice.")
        if reference.ndim not in (1, 2) or reference.shape != candidate.shape:
            raise InputError(
                "Embeddings must be (features,) or (tokens, features) and alike, but have shapes "
                f"{tuple(reference.shape)} and {tuple(candidate.shape)}."
            )
        if reference.ndim == 2:
            reference, candidate = mean_pool(reference, mask), mean_pool(candidate, mask)
        self._cosines[document_id] = float(cosine_similarity(reference, candidate))

    def result(self, seed: int = 0) -> dict[str, Any]:
        """``{"cosine_mean": {value, low, high}, "cosine_min": {...}, "documents": n}``.

        Raises:
            InputError: fewer than two texts were added.
        """
        cosines = list(self._cosines.values())
        if len(cosines) < 2:
            raise InputError(f"Quality needs at least two texts to compare, but there are {len(cosines)}: give more.")
        least = min(cosines)
        return {
            "cosine_mean": interval(cosines, np.ones(len(cosines)), seed).to_json(),
            "cosine_min": Estimate(least, least, least).to_json(),
            "documents": len(cosines),
        }


class ClassifierQuality:
    """KL divergence and top-1 agreement between two classifiers, and the accuracy of both where the classes are known.

    Intervals come from the bootstrap over samples.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(self, names: Sequence[str], reference: Tensor, candidate: Tensor, labels: Tensor | None = None) -> None:
        """Add samples.

        Args:
            names: of the samples.
            reference: (samples, classes) logits.
            candidate: the same shape.
            labels: (samples,) indices of classes; to all calls or to none.

        Raises:
            InputError: see :func:`compare_logits` and :func:`slimwright.evaluate.accuracy.correct`; labels in some
                calls only.
        """
        if self._names and (labels is not None) != ("before" in self._columns):
            raise InputError("Labels were given for some of the samples only.")
        columns = {name: found.numpy() for name, found in compare_logits(reference, candidate).items()}
        if labels is not None:
            columns |= {"before": correct(reference, labels).numpy(), "after": correct(candidate, labels).numpy()}
        self._names += names
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    def result(self, seed: int = 0) -> dict[str, Any]:
        """``{"kl": {value, low, high}, "top1_agreement": {...}, "documents": n}``; with labels also ``"accuracy"``:
        ``{"before": {...}, "after": {...}, "difference": {...}}`` with the paired interval of after − before.

        Raises:
            InputError: fewer than two samples were added.
        """
        if len(self._names) < 2:
            raise InputError(
                f"Quality needs at least two samples to compare, but there are {len(self._names)}: give more."
            )
        columns = {name: np.concatenate(parts).astype(np.float64) for name, parts in self._columns.items()}
        table = Table.of(
            self._names, tokens=np.ones(len(self._names)), kl=columns["kl"], top1_agreement=columns["top1_agreement"]
        )
        found: dict[str, Any] = {metric.name: metric.score(table, seed).to_json() for metric in (KL, TOP1_AGREEMENT)}
        if "before" in columns:
            before, after = (Table.of(self._names, correct=columns[when]) for when in ("before", "after"))
            found[ACCURACY.name] = ACCURACY.change(before, after, seed)
        return {**found, "documents": len(self._names)}
