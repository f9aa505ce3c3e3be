"""Quality of a candidate against its reference, gathered batch by batch and given with intervals."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.bootstrap import Estimate, interval
from slimwright.evaluate.cosine import cosine_similarity, mean_pool
from slimwright.evaluate.divergence import compare_logits

_PIECES = 32


class LanguageQuality:
    """KL divergence in nats per token and top-1 agreement, over the tokens of all documents.

    Intervals come from the bootstrap over documents. With a single document, its tokens are cut in order into (at most)
    32 consecutive pieces of equal length that take the documents' place: the interval then says how much the figures
    vary within that text, and nothing about other texts.

    Nine bytes a token are kept.
    """

    def __init__(self) -> None:
        self._documents: dict[Hashable, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, document_id: Hashable, reference: Tensor, candidate: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens of a document; a long document may come in several parts, in order.

        Args:
            document_id: the same for all parts of one document.
            reference: (tokens, vocabulary) logits.
            candidate: the same shape.
            mask: (tokens,) true where a token counts; None: all count.

        Raises:
            InputError: see :func:`compare_logits`.
        """
        compared = compare_logits(reference, candidate, mask)
        if len(compared["kl"]):
            self._documents.setdefault(document_id, []).append(
                (compared["kl"].numpy(), compared["top1_agreement"].numpy())
            )

    def result(self, seed: int = 0) -> dict[str, Any]:
        """``{"kl": {value, low, high}, "top1_agreement": {...}, "tokens": n, "documents": n}``.

        Raises:
            InputError: fewer than two tokens were added.
        """
        documents = [
            (np.concatenate([kl for kl, _ in parts]), np.concatenate([same for _, same in parts]))
            for parts in self._documents.values()
        ]
        tokens = sum(len(kl) for kl, _ in documents)
        if tokens < 2:
            raise InputError(f"Quality needs at least two tokens to compare, but there are {tokens}: give more text.")
        units = documents
        if len(documents) == 1:
            pieces = min(_PIECES, tokens)
            kl, same = documents[0]
            units = list(zip(np.array_split(kl, pieces), np.array_split(same, pieces)))
        weights = [len(kl) for kl, _ in units]
        return {
            "kl": interval([float(kl.sum()) for kl, _ in units], weights, seed).to_json(),
            "top1_agreement": interval([float(same.sum()) for _, same in units], weights, seed).to_json(),
            "tokens": tokens,
            "documents": len(documents),
        }


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
