"""Language models on text: how likely they find it, and how far they are from a reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slimwright.calibrate.data import Document
from slimwright.errors import InputError
from slimwright.evaluate.bits_per_byte import token_bytes
from slimwright.evaluate.perplexity import token_nats
from slimwright.evaluate.quality import LanguageQuality, TokenRows
from slimwright.evaluate.table import Table

LanguageKind = Literal["causal", "masked", "seq2seq"]


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


def encode(tokenizer: Any, documents: Sequence[Document], kind: LanguageKind = "causal") -> list[Encoded]:
    """Documents as tokens.

    Args:
        tokenizer: of transformers.
        documents: texts.
        kind: for a masked model, with the special tokens that the tokenizer adds around a text; for an encoder-decoder
            the text alone. For a causal model one token comes before each text, so that its first token is predicted
            too: the tokenizer's beginning of text, else its end of text (as lm-evaluation-harness does). Where a
            tokenizer has neither, the first token of each text is not predicted, and its bytes do not count.

    Raises:
        InputError: the tokenizer makes no tokens of any document.
    """
    special, made = kind == "masked", []
    for document in documents:
        if tokenizer.is_fast:
            found = tokenizer(document.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            ids, nbytes = found["input_ids"], token_bytes(document.text, found["offset_mapping"]).tolist()
        else:  # no offsets: every token of the document stands for an equal part of it
            ids = tokenizer(document.text, add_special_tokens=special, verbose=False)["input_ids"]
            whole = len(document.text.encode(errors="surrogatepass"))
            nbytes = [whole * (i + 1) // len(ids) - whole * i // len(ids) for i in range(len(ids))]
        first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
        if kind == "causal" and first is not None:
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


@dataclass(frozen=True)
class Piece:
    """One forward.

    Attributes:
        name: of the document.
        inputs: keyword arguments, (tokens,) int64 each.
        scored: the places whose distributions count.
        targets: the tokens that came there; None: they were in sight. ``nbytes``: what they stand for.
    """

    name: str
    inputs: dict[str, Tensor]
    scored: slice
    targets: Tensor | None = None
    nbytes: Tensor | None = None


def pieces(kind: LanguageKind, documents: Sequence[Encoded], length: int, start: int | None = None) -> Iterator[Piece]:
    """The forwards that a kind of model reads documents in.

    A causal model reads all of a document in windows. An encoder-decoder reads the first half and predicts the second,
    each at most ``length`` tokens. A masked model sees every token of the first ``length``.

    Args:
        kind: of the model.
        documents: tokens, encoded for that kind.
        length: of a window, in tokens.
        start: the token that a decoder begins with.
    """
    for document in documents:
        ids, nbytes = document.ids, document.nbytes
        if kind == "causal":
            for first, end, new in windows(len(ids), length):
                come = slice(new + 1, end + 1)
                places = slice(new - first, end - first)
                yield Piece(document.name, {"input_ids": ids[first:end]}, places, ids[come], nbytes[come])
        elif kind == "seq2seq":
            middle = len(ids) // 2
            come = slice(middle, middle + length)
            before = torch.cat([torch.tensor([start]), ids[come][:-1]])
            inputs = {"input_ids": ids[:middle][:length], "decoder_input_ids": before}
            yield Piece(document.name, inputs, slice(None), ids[come], nbytes[come])
        else:
            yield Piece(document.name, {"input_ids": ids[:length]}, slice(None))


@torch.inference_mode()
def language_table(
    kind: LanguageKind,
    model: Any,
    documents: Sequence[Encoded],
    length: int,
    reference: Any = None,
    vocabulary: int = 0,
) -> Table:
    """How likely a language model finds documents, and how far it is from a reference: one row per document.

    Args:
        kind: of the models.
        model: of transformers.
        documents: tokens, encoded for that kind.
        length: of a window, in tokens.
        reference: another that reads the same tokens; None: no distance. A masked model has nothing else.
        vocabulary: of the tokenizer: where one of the two has more rows of padding than the other, they are cut off.

    Returns:
        ``tokens``; with a reference ``kl`` and ``top1_agreement``; unless masked ``nats`` and ``bytes``.

    Raises:
        InputError: NaN or Inf, a token outside the vocabulary, or vocabularies of unlike size.
    """
    alone, both = TokenRows(), LanguageQuality()
    start = _decoder_start(model) if kind == "seq2seq" else None
    for piece in pieces(kind, documents, length, start):
        logits = _logits(model, piece)
        if reference is None:
            assert piece.targets is not None and piece.nbytes is not None
            alone.add(piece.name, nats=token_nats(logits, piece.targets).numpy(), bytes=piece.nbytes.numpy())
        else:
            pair = _alike(_logits(reference, piece), logits, vocabulary)
            both.add(piece.name, *pair, targets=piece.targets, target_bytes=piece.nbytes)
    return alone.table() if reference is None else both.tables()[1]


def _decoder_start(model: Any) -> int:
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    configs = (model.generation_config, model.config)
    found = (getattr(config, name, None) for name in names for config in configs)
    start = next((token for token in found if isinstance(token, int)), None)
    if start is None:
        raise InputError("The config names no decoder_start_token_id: an encoder-decoder cannot be measured without.")
    return start


def _logits(model: Any, piece: Piece) -> Tensor:
    """(places, vocabulary) logits in their own dtype."""
    vocabulary = model.config.get_text_config().vocab_size
    if max(int(ids.max()) for ids in piece.inputs.values()) >= vocabulary:
        raise InputError(
            f"A token id lies outside the model's vocabulary of {vocabulary}: the tokenizer is not this model's."
        )
    settings = {"use_cache": False} if model.can_generate() else {}
    inputs = {name: ids[None].to(model.device) for name, ids in piece.inputs.items()}
    return model(**inputs, **settings).logits[0, piece.scored]


def _alike(reference: Tensor, candidate: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits of one width: columns that one has more than the other, beyond the tokenizer's, stand for no token."""
    width = min(reference.shape[1], candidate.shape[1])
    if reference.shape[1] != candidate.shape[1] and width < vocabulary:
        raise InputError(
            f"The vocabularies have {reference.shape[1]} and {candidate.shape[1]} entries, but the tokenizer of both "
            f"has {vocabulary}: their distributions cannot be compared."
        )
    return reference[:, :width], candidate[:, :width]
