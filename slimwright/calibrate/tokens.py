"""From documents to the batches of a walk: tokenized, packed or padded as the model expects."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from slimwright.calibrate.data import Document, whole_text
from slimwright.calibrate.feeding import TEXT, Feed, Row, batches_of, fed, ordered
from slimwright.calibrate.walk import Batch
from slimwright.errors import InputError
from slimwright.model.inputs import dummy_inputs

BATCH_TOKENS = 2048
"""Tokens of one forward: enough to keep the matrix products busy."""


@dataclass(frozen=True)
class Samples:
    """What a walk runs on.

    Attributes:
        batches: the forwards.
        tokens: how many tokens count.
        kind: what they are, for the report: ``text``, ``images``, ``images and text``, ``sounds``, ``sounds and text``
            or ``random inputs``.
        digest: SHA-256 (hex) of all token ids and features.
        example: token ids of the first sample and the text that it was made from, for the log.
    """

    batches: tuple[Batch, ...]
    tokens: int
    kind: str
    digest: str
    example: dict[str, Any] = field(default_factory=dict)


RANDOM = "random inputs"
"""What a model that reads no text is walked with."""


def reads_text(model: Any) -> bool:
    """Whether the model's inputs are token ids and nothing else."""
    return fed(model) == TEXT


def sequence_length(config: PretrainedConfig, asked: int | None = None, most: int = 512) -> int:
    """Tokens of one sequence: what was asked, at most what the model has positions for.

    Raises:
        InputError: more was asked than the model has positions.
    """
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    positions = next(
        (value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), None
    )
    if asked and positions and asked > positions:
        raise InputError(f"--calibration-length {asked} is more than the {positions} positions that the model has.")
    length = asked or most
    return max(8, min(length, positions - 4)) if positions else length


def causal(config: PretrainedConfig) -> bool:
    """Whether the model reads a text from left to right: such texts are packed, not padded."""
    kind = config.get_text_config().model_type
    if getattr(config, "is_encoder_decoder", False):
        return False
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return bool(getattr(config, "is_decoder", False))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def samples(
    model: Any,
    tokenizer: Any | None,
    found: Sequence[Document],
    *,
    tokens: int,
    length: int | None = None,
    seed: int = 0,
    experts: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    whole: bool = False,
) -> Samples:
    """Batches for a walk over ``model``.

    Documents are cut into pieces of about ``length`` tokens, which are taken in an order drawn from ``seed`` until
    ``tokens`` are there, so that a few long documents do not make all of them. A causal model gets the pieces joined,
    its end token between them, and cut to equal lengths: nothing is padded. An encoder gets one piece (or pair) a row,
    at most ``length`` tokens of it, padded to the longest of its batch, padding masked. An encoder-decoder reads a
    piece with its encoder and the piece's beginning with its decoder. What reads images or sounds gets one document a
    row, see :mod:`slimwright.calibrate.feeding`.

    Args:
        model: a transformers model (its forward's signature and config are read).
        tokenizer: of the model, or its processor if it reads images or sounds; None: random inputs.
        tokens: how many are wanted; fewer are made where the data has fewer.
        length: of a sequence; None is 512 or what the model has positions for.
        experts: the model routes tokens to experts, which do not see the mask: rows of a batch then have equal lengths.
        batch_tokens: tokens of one forward.
        whole: each document is one row, cut off at ``length``, whatever the model.

    Raises:
        InputError: the documents hold too little text for one sequence, messages without a chat template, an image or
            a sound that cannot be read.
    """
    config = model.config
    length = sequence_length(config, length)
    if tokenizer is None:
        return _random(model, tokens, length, seed, batch_tokens)
    if not reads_text(model):
        return _of_media(Feed(model, tokenizer, length), ordered(found, seed), tokens, batch_tokens)
    probe = dummy_inputs(model, batch=1, length=min(length, 16))
    order = ordered(found if whole else [piece for document in found for piece in _cut(document, length)], seed)
    vocabulary = config.get_text_config().vocab_size
    if causal(config) and not whole:
        batches, counted, example = _packed(tokenizer, order, tokens, length, vocabulary, batch_tokens)
    else:
        batches, counted, example = _padded(
            tokenizer, order, tokens, length, vocabulary, probe, experts, batch_tokens
        )  # fmt: skip
    if not batches:
        raise InputError(
            f"The data has too little text: what of it the solvers may see ({len(found)} "
            f"document{'s' if len(found) != 1 else ''}) does not make one sequence of {length} tokens: give more, or a "
            "smaller --calibration-length."
        )
    return Samples(tuple(batches), counted, "text", _digest(batches), example)


def _encode(tokenizer: Any, document: Document, special: bool, length: int | None = None) -> list[int]:
    """Token ids of one document, chats through the template."""
    if document.messages:  # the template writes the special tokens
        text = whole_text(document, tokenizer)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    arguments: dict[str, Any] = {"add_special_tokens": special, "verbose": False}
    if length is not None:
        arguments |= {"truncation": True, "max_length": length}
    if document.pair is not None and special:
        return list(tokenizer(document.text, document.pair, **arguments)["input_ids"])
    return list(tokenizer(whole_text(document, tokenizer), **arguments)["input_ids"])


def _check(ids: Sequence[int], vocabulary: int) -> None:
    if ids and max(ids) >= vocabulary:
        raise InputError(
            f"The tokenizer gives the id {max(ids)}, but the model has {vocabulary} embeddings: they do not fit; "
            "put the model's own tokenizer beside it, or fit without data (--data none)."
        )


def _packed(
    tokenizer: Any, order: Sequence[Document], tokens: int, length: int, vocabulary: int, batch_tokens: int
) -> tuple[list[Batch], int, dict[str, Any]]:
    end = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    owners: list[str] = []
    for document in order:
        ids = _encode(tokenizer, document, special=False)
        _check(ids, vocabulary)
        if isinstance(end, int) and end < vocabulary:
            ids = [*ids, end]
        stream += ids
        owners += [document.name] * len(ids)
        if len(stream) >= tokens:
            break
    count = min(-(-tokens // length), len(stream) // length)
    rows = torch.tensor(stream[: count * length]).view(count, length)
    names = tuple(owners[row * length] for row in range(count))
    pieces = [
        tuple((name, len(list(own))) for name, own in groupby(owners[row * length : (row + 1) * length]))
        for row in range(count)
    ]
    step = max(1, batch_tokens // length)
    batches = [
        Batch(
            {"input_ids": rows[first : first + step]},
            documents=names[first : first + step],
            pieces=tuple(pieces[first : first + step]),
        )
        for first in range(0, count, step)
    ]
    return batches, count * length, _example(tokenizer, stream[:length]) if count else {}


def _padded(
    tokenizer: Any,
    order: Sequence[Document],
    tokens: int,
    length: int,
    vocabulary: int,
    probe: dict[str, Tensor],
    experts: bool,
    batch_tokens: int,
) -> tuple[list[Batch], int, dict[str, Any]]:
    rows: list[tuple[list[int], str]] = []
    counted = 0
    for document in order:
        ids = _encode(tokenizer, document, special=True, length=length)
        _check(ids, vocabulary)
        if len(ids) >= 2:
            rows.append((ids, document.name))
            counted += len(ids)
        if counted >= tokens:
            break
    example = _example(tokenizer, rows[0][0]) if rows else {}
    rows.sort(key=lambda row: -len(row[0]))  # stable: rows of about one length share a batch
    batches: list[Batch] = []
    first = 0
    while first < len(rows):
        width = len(rows[first][0])
        last = first + max(1, batch_tokens // width)
        members = [row for row in rows[first:last] if not experts or len(row[0]) == width]
        first += len(members)
        padding = getattr(tokenizer, "pad_token_id", None) or 0
        padded = torch.full((len(members), width), padding, dtype=torch.int64)
        mask = torch.zeros(len(members), width, dtype=torch.bool)
        for index, (row, _) in enumerate(members):
            padded[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
        inputs = {"input_ids": padded, "attention_mask": mask.long()}
        masks: dict[tuple[int, ...], Tensor] = {tuple(mask.shape): mask}
        if "decoder_input_ids" in probe:
            # The decoder reads the piece's own beginning; another length than the encoder's tells the masks apart.
            short = max(1, width // 2 if width > 1 else 1)
            inputs["decoder_input_ids"] = padded[:, :short]
            masks[(len(members), short)] = mask[:, :short]
        batches.append(Batch(inputs, masks, tuple(name for _, name in members)))
    return batches, counted, example


def _cut(document: Document, length: int) -> list[Document]:
    """A long text as pieces of about ``length`` tokens (four characters each); pairs and chats stay whole."""
    if document.messages or document.pair is not None or len(document.text) <= 4 * length:
        return [document]
    size = 4 * length
    return [
        Document(document.name, document.text[start : start + size]) for start in range(0, len(document.text), size)
    ]


def _example(tokenizer: Any, ids: Sequence[int]) -> dict[str, Any]:
    return {"token_ids": list(ids[:32]), "text": tokenizer.decode(ids[:32])}


def _random(model: Any, tokens: int, length: int, seed: int, batch_tokens: int) -> Samples:
    """Random inputs, for models that read no text or have no tokenizer."""
    rows = max(1, min(batch_tokens, tokens) // length)
    batches: list[Batch] = []
    counted = 0
    while counted < tokens:
        inputs = dummy_inputs(model, batch=rows, length=length, seed=seed + len(batches))
        batches.append(Batch(inputs, documents=tuple(f"random-{len(batches)}-{row}" for row in range(rows))))
        counted += rows * length
    return Samples(tuple(batches), counted, RANDOM, _digest(batches))


def _of_media(feed: Feed, order: Sequence[Document], tokens: int, batch_tokens: int) -> Samples:
    """Images and sounds, alone or with text: documents until ``tokens`` positions are there."""
    rows: list[Row] = []
    counted = 0
    for document in order:
        rows.append(feed.row(document))
        counted += rows[-1].tokens
        if counted >= tokens:
            break
    batches = batches_of(rows, batch_tokens)
    kind = ("images" if "image" in feed.kinds else "sounds") + (" and text" if "text" in feed.kinds else "")
    return Samples(tuple(batches), counted, kind, _digest(batches), dict(rows[0].example))


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
