"""Language models on text: how likely they find it, and how far they are from a reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.bits_per_byte import token_bytes
from slimwright.evaluate.documents import Document
from slimwright.evaluate.perplexity import token_nats
from slimwright.evaluate.quality import LanguageQuality, TokenRows
from slimwright.evaluate.table import Table


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        name: of the document.
        ids: (tokens,) int64.
        nbytes: (tokens,) int64, bytes of UTF-8 that each token stands for; 0 for special tokens.
    """

    name: str
    ids: Tensor
    nbytes: Tensor


def encode(tokenizer: Any, documents: Sequence[Document], special: bool = False) -> list[Encoded]:
    """Documents as tokens.

    Args:
        tokenizer: of transformers.
        documents: texts.
        special: for masked models, with the special tokens that the tokenizer adds around a text. Else one token comes
            before each text, so that its first token is predicted too: the tokenizer's beginning of text, else its end
            of text (as lm-evaluation-harness does). Where a tokenizer has neither, the first token of each text is not
            predicted, and its bytes do not count.

    Raises:
        InputError: the tokenizer makes no tokens of any document.
    """
    made = []
    for document in documents:
        if tokenizer.is_fast:
            found = tokenizer(
                document.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
            )  # fmt: skip
            ids, nbytes = found["input_ids"], token_bytes(document.text, found["offset_mapping"]).tolist()
        else:  # no offsets: every token of the document stands for an equal part of it
            ids = tokenizer(document.text, add_special_tokens=special, verbose=False)["input_ids"]
            whole = len(document.text.encode())
            nbytes = [whole * (i + 1) // len(ids) - whole * i // len(ids) for i in range(len(ids))]
        if not special:
            first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
            if first is not None:
                ids, nbytes = [first, *ids], [0, *nbytes]
        if len(ids) > 1:
            made.append(Encoded(document.name, torch.tensor(ids), torch.tensor(nbytes)))
    if not made:
        raise InputError("The tokenizer makes no tokens of the text: it is not the model's tokenizer.")
    return made


def tokens_digest(documents: Sequence[Encoded]) -> str:
    """SHA-256 over all names and token ids: equal if and only if two models read the same tokens."""
    content = json.dumps([[document.name, document.ids.tolist()] for document in documents])
    return hashlib.sha256(content.encode()).hexdigest()


def windows(tokens: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, first to score) of the inputs of each forward: together every token but the first is predicted once.

    A window of inputs ``first..end`` predicts the tokens ``first+1..end+1``; those from ``first to score + 1`` on are
    new. Windows are ``length`` long and step by half of that, so that each token but those of the first window is
    predicted from at least half a window.
    """
    scored = 0
    for first in range(0, tokens - 1, max(1, length // 2)):
        end = min(first + length, tokens - 1)
        if end > scored:
            yield first, end, max(scored, first)
            scored = end


@torch.inference_mode()
def causal_table(
    model: Any, documents: Sequence[Encoded], length: int, reference: Any | None = None, vocabulary: int = 0
) -> Table:
    """How likely a causal model finds documents: one row per document with ``tokens``, ``nats`` and ``bytes``.

    Args:
        model: a causal language model.
        documents: tokens.
        length: of a window, in tokens.
        reference: another of the same tokens; then the columns ``kl`` and ``top1_agreement`` are there too.
        vocabulary: of the tokenizer: where one of the two has more rows of padding than the other, they are cut off.

    Raises:
        InputError: NaN or Inf, a token outside the vocabulary, or vocabularies of unlike size.
    """
    alone, both = TokenRows(), LanguageQuality()
    for document in documents:
        ids = document.ids
        for first, end, new in windows(len(ids), length):
            scored = slice(new - first, end - first)
            logits = _logits(model, ids[first:end])[scored]
            targets, nbytes = ids[new + 1 : end + 1], document.nbytes[new + 1 : end + 1]
            if reference is None:
                nats = token_nats(logits, targets).numpy()
                alone.add(document.name, nats=nats, bytes=nbytes.numpy())
            else:
                expected = _logits(reference, ids[first:end])[scored]
                both.add(document.name, *_alike(expected, logits, vocabulary), targets=targets, target_bytes=nbytes)
    return alone.table() if reference is None else both.tables()[1]


@torch.inference_mode()
def masked_table(model: Any, documents: Sequence[Encoded], length: int, reference: Any, vocabulary: int = 0) -> Table:
    """How far a masked language model is from a reference at every place of the first ``length`` tokens, none of them
    masked: ``tokens``, ``kl`` and ``top1_agreement``. Otherwise as :func:`causal_table`."""
    found = LanguageQuality()
    for document in documents:
        ids = document.ids[:length]
        found.add(document.name, *_alike(_logits(reference, ids), _logits(model, ids), vocabulary))
    return found.tables()[1]


def _logits(model: Any, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) logits in their own dtype."""
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise InputError(
            f"A token id lies outside the model's vocabulary of {vocabulary}: the tokenizer is not this model's."
        )
    settings = {"use_cache": False} if model.can_generate() else {}
    return model(input_ids=ids[None].to(model.device), **settings).logits[0]


def _alike(reference: Tensor, candidate: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits of one width: columns that one has more than the other, beyond the tokenizer's, stand for no token."""
    width = min(reference.shape[1], candidate.shape[1])
    if reference.shape[1] != candidate.shape[1] and width < vocabulary:
        raise InputError(
            f"The vocabularies have {reference.shape[1]} and {candidate.shape[1]} entries, but the tokenizer of both "
            f"has {vocabulary}: their distributions cannot be compared."
        )
    return reference[:, :width], candidate[:, :width]
