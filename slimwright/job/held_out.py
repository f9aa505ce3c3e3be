"""What a result's quality is measured on: the user's documents that no solver saw, else held-out generic text, else
random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from slimwright.calibrate.data import Document, documents, split, whole_text
from slimwright.calibrate.feeding import TEXT, fed, load_processor, usable
from slimwright.calibrate.tokens import causal, samples
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.evaluate.accuracy import class_indices, labels_of
from slimwright.evaluate.bits_per_byte import token_bytes
from slimwright.model.inputs import dummy_inputs

RETRIEVED_QUERIES, RETRIEVED_DOCUMENTS = 300, 420
"""What a job asks of the retrieval task, a third of it (`slimwright measure` asks all of it)."""

RETRIEVED_TOKENS = 130_000
"""What two models embed for it, about."""

RETRIEVED_BELOW = 200_000_000
"""Parameters up to which encoders are tried on a retrieval task."""

SHORTEST_SEQUENCE = 8
"""Tokens of an evaluated sequence at least."""


@dataclass(frozen=True)
class HeldOut:
    """One batch.

    Attributes:
        names: of each row's document, each once in a run.
        inputs: keyword arguments of a forward.
        mask: (rows, length) tokens that count; None: all.
        target_bytes: (rows, length) UTF-8 bytes that each token of ``input_ids`` stands for, where the model reads from
            left to right and the tokenizer says; None: no perplexity.
        labels: (rows,) int64, of samples whose class is known; None: it is not.
    """

    names: list[str]
    inputs: dict[str, Tensor]
    mask: Tensor | None = None
    target_bytes: Tensor | None = None
    labels: Tensor | None = None


def given_documents(source: str, model: Any, note: Callable[[str], None] = lambda sentence: None) -> list[Document]:
    """The documents of a source that hold what the model reads.

    Args:
        note: told how many were left out.

    Raises:
        InputError: nothing is there, or no document holds it.
    """
    found = documents(source)
    chosen = usable(found, fed(model), source, type(model).__name__)
    if len(chosen) < len(found):
        note(f"{len(found) - len(chosen)} of the {len(found)} documents of {source} do not hold what the model reads.")
    return chosen


def held_out(
    source: Checkpoint, model: Any, *, data: str, eval_data: str, tokens: int, batch_tokens: int, seed: int
) -> tuple[str, list[HeldOut]]:
    """What it is, in words, and the batches.

    Args:
        data: the user's data, of which a tenth is kept from the solvers; empty: none was given.
        eval_data: data for evaluation only, taken instead.
        tokens: how many are wanted.
        batch_tokens: of one forward.
        seed: of random inputs.

    Raises:
        InputError: the user's data holds too little text.
    """
    length = _length(model, tokens, batch_tokens)
    given = eval_data or data
    tokenizer = load_reader(source, model)
    if given:
        found = given_documents(given, model)
        found = found if eval_data else split(found)[1]
        words = eval_data or f"a tenth of {data}, kept from the solvers"
        if fed(model) == TEXT and causal(model.config) and not class_indices(model):
            batches = list(_rows(tokenizer, model, found, length, tokens, batch_tokens, whole=False))
        else:
            batches = _of_samples(tokenizer, model, found, given, length, tokens, batch_tokens, seed)
        if not batches:
            raise InputError(f"The data {given} holds too little text to measure the result's quality on.")
        return words, batches
    if tokenizer is not None and fed(model) == TEXT:
        from slimwright.zoo.text import standard_library

        text = [Document(found.path, found.text[: 16 * length]) for found in standard_library("heldout")]
        batches = list(_rows(tokenizer, model, text, length, tokens, batch_tokens, whole=True))
        if batches:
            return "held-out text of the Python standard library", batches
    return "random inputs", list(_random(model, length, tokens, batch_tokens, seed))


def _length(model: Any, tokens: int, batch_tokens: int) -> int:
    """Tokens of one sequence; few where the config does not say how many positions there are."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 68
    return max(SHORTEST_SEQUENCE, min(256, int(longest) - 4, batch_tokens, tokens // 2))


def _rows(
    tokenizer: Any,
    model: Any,
    found: Sequence[Document],
    length: int,
    tokens: int,
    batch_tokens: int,
    whole: bool,
) -> Iterator[HeldOut]:
    """Documents cut into rows of at most ``length`` tokens; ``whole``: one row of just that many of each, and none of a
    shorter document."""
    vocabulary = model.config.get_text_config().vocab_size
    rows: list[tuple[str, list[int], list[int] | None]] = []
    count = max(2, min(512, tokens // length)) if whole else 1 << 30
    seen = 0
    for document in found:
        ids, sizes = _encode(tokenizer, document)
        if ids and max(ids) >= vocabulary:
            continue
        pieces = [slice(0, length)] if whole else [slice(s, s + length) for s in range(0, len(ids), length)]
        for number, piece in enumerate(pieces):
            row = ids[piece]
            if len(row) < (length if whole else 2):
                continue
            name = document.name if number == 0 else f"{document.name} ({number + 1})"
            rows.append((name, row, None if sizes is None else sizes[piece]))
            seen += len(row)
        if len(rows) >= count or seen >= max(tokens, 2 * length):
            break
    read = causal(model.config) and not class_indices(model)
    probe = dummy_inputs(model, batch=1, length=length)
    step = max(1, min(batch_tokens // length, 64))
    for first in range(0, len(rows), step):
        members = rows[first : first + step]
        width = max(len(row) for _, row, _ in members)
        padded = torch.full((len(members), width), getattr(tokenizer, "pad_token_id", None) or 0, dtype=torch.int64)
        mask = torch.zeros(len(members), width, dtype=torch.bool)
        stand_for = torch.zeros(len(members), width, dtype=torch.int64)
        for index, (_, row, own) in enumerate(members):
            padded[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = True
            if own is not None:
                stand_for[index, : len(row)] = torch.tensor(own)
        inputs = {"input_ids": padded}
        if not mask.all():
            inputs["attention_mask"] = mask.long()
        if "decoder_input_ids" in probe:
            inputs["decoder_input_ids"] = padded[:, : probe["decoder_input_ids"].shape[1]]
        known = read and all(own is not None for _, _, own in members)
        yield HeldOut(
            [name for name, _, _ in members], inputs, None if mask.all() else mask, stand_for if known else None
        )  # fmt: skip


def _encode(tokenizer: Any, document: Document) -> tuple[list[int], list[int] | None]:
    """Token ids of a document, and the bytes of each where the tokenizer gives offsets."""
    text, special = whole_text(document, tokenizer), not document.messages  # a chat template writes them itself
    fast = bool(getattr(tokenizer, "is_fast", False))
    made = tokenizer(text, add_special_tokens=special, verbose=False, return_offsets_mapping=fast)
    ids = list(made["input_ids"])
    return ids, token_bytes(text, made["offset_mapping"]).tolist() if fast else None


def _of_samples(
    reader: Any,
    model: Any,
    found: Sequence[Document],
    given: str,
    length: int,
    tokens: int,
    batch_tokens: int,
    seed: int,
) -> list[HeldOut]:
    """As calibration makes batches; shorter sequences where there is little text. A classifier gets whole documents."""
    classes = class_indices(model)
    labels = labels_of(given, found, classes) if classes else None
    of_document = {} if labels is None else dict(zip((document.name for document in found), labels.tolist()))
    if classes and causal(model.config):
        batch_tokens = 1  # such a model finds the last token by its padding token, which it need not have
    while True:
        try:
            made = samples(
                model, reader, found, tokens=tokens, length=length, seed=seed, batch_tokens=batch_tokens,
                whole=bool(classes),
            )  # fmt: skip
            break
        except InputError:
            if length <= SHORTEST_SEQUENCE or fed(model) != TEXT:
                raise
            length //= 2
    batches, seen = [], dict[str, int]()
    for batch in made.batches:
        names = []
        for name in batch.documents:
            seen[name] = seen.get(name, 0) + 1
            names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
        first = next(iter(batch.inputs.values()))
        mask = batch.masks.get(tuple(first.shape)) if batch.outputs is None else batch.outputs
        own = torch.tensor([of_document[name] for name in batch.documents]) if of_document else None
        batches.append(HeldOut(names, batch.inputs, mask, labels=own))
    return batches


def _random(model: Any, length: int, tokens: int, batch_tokens: int, seed: int) -> Iterator[HeldOut]:
    rows = max(1, min(batch_tokens // length, 64))
    count = max(2, min(512, tokens // length))
    for made in range(0, count, rows):
        batch = min(rows, count - made)
        names = [f"random-{made + index}" for index in range(batch)]
        yield HeldOut(names, dummy_inputs(model, batch=batch, length=length, seed=seed + made))


def retrieves(directory: Path, parameters: int) -> bool:
    """Whether a sentence-transformers directory is tried on the retrieval task: the package is there, and the model not
    too large."""
    known = (directory / "modules.json").exists() and find_spec("sentence_transformers") is not None
    return known and parameters <= RETRIEVED_BELOW


def retrieval_quality(
    written: Path, original: PreTrainedModel, parameters: int, seed: int, queries: int | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """``ndcg_at_10`` before and after on a retrieval task made of held-out modules, and how many ``queries`` it was
    measured on; nothing where the result is not tried on it (:func:`retrieves`).

    Args:
        original: the source, loaded with streamed weights: it takes the packed model's place in the same pipeline.
        queries: at most; None: :data:`RETRIEVED_QUERIES`.
    """
    if not retrieves(written, parameters):
        return {}, {}
    from sentence_transformers import SentenceTransformer

    from slimwright.evaluate.embed import embed
    from slimwright.evaluate.ranking import NDCG_AT_10
    from slimwright.evaluate.retrieval import score_task, standard_library_task

    most = RETRIEVED_QUERIES if queries is None else queries
    task = standard_library_task(most, RETRIEVED_DOCUMENTS * most // RETRIEVED_QUERIES)
    model = SentenceTransformer(str(written), device="cpu")
    tables = []
    for stage in ("after", "before"):
        if stage == "before":
            transformer = model[0]
            place = (
                "model" if "model" in transformer._modules else "auto_model"
            )  # its name before sentence-transformers 5
            setattr(transformer, place, original)
            assert transformer.auto_model is original
        asked = embed(model, None, list(task.queries.values()), "query")
        tables.append(score_task(task, asked, embed(model, None, list(task.documents.values()))))
    after, before = tables
    return {NDCG_AT_10.name: NDCG_AT_10.change(before, after, seed)}, {"queries": len(task.queries)}


def load_reader(source: Checkpoint, model: Any) -> Any | None:
    """What turns data into the model's inputs: its tokenizer, or its processor if it reads images or sounds; None if it
    has none that loads."""
    if fed(model) == TEXT:
        return load_tokenizer(source)
    try:
        return load_processor(source.model_path, fed(model))
    except InputError:
        return None


def load_tokenizer(source: Checkpoint) -> Any | None:
    """The source's tokenizer, or None if it has none that loads."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    if not any((source.model_path / name).exists() for name in names):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source.model_path)
    except Exception:  # any tokenizer library may fail in its own way; the report then says: random inputs
        return None
