"""Vocabularies of the inputs aligned by token string: embedding rows are matched by what they mean, not by number.

Read from tokenizer.json, without any tokenizer library. A token that a model lacks takes, in this order: the row that
the configuration names; the only row there is; the base's row; the mean of the rows there are; zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint.files import exists, read_bytes, read_json_object, shown, write_json_atomic
from slimwright.errors import InputError
from slimwright.job.merging.config import MergeConfig
from slimwright.job.merging.layers import find_stacks, layer_of
from slimwright.job.merging.sources import GatheredRows, MergeInput, ModelReference, Origin
from slimwright.job.merging.targets import Inputs, like
from slimwright.job.merging.values import TokenizerChoice

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
_NAMES = ("embed", "wte", "lm_head", "shared", "word_embeddings", "output")


@dataclass(frozen=True)
class Alignment:
    """What aligning changes.

    Attributes:
        origins: by (model, tensor), how the tensors with one row a token are read.
        rows: of them in the result.
        source: whose tokenizer the result has.
        added: tokens of the result that ``source`` lacks, with the settings that they were added with; in order.
        tokens: how many tokens the result has.
        notes: for the user.
    """

    origins: dict[tuple[ModelReference, str], Origin]
    rows: int
    source: ModelReference
    added: tuple[dict[str, Any], ...]
    tokens: int
    notes: tuple[str, ...]


def align(config: MergeConfig, inputs: Inputs) -> Alignment | None:
    """Align the vocabularies, or None where nothing is to be done.

    A configuration in mergekit's form aligns if it has a tokenizer; ours also where the models' vocabularies differ, to
    the vocabulary of the base (the first).

    Raises:
        InputError: a model without tokenizer.json, or a token whose row cannot be found.
    """
    choice = config.tokenizer
    merged = _merged(config)
    if choice is None:
        if config.form == "mergekit" or not _differ(inputs, merged):
            return None
        choice = TokenizerChoice("base")
    leader = like(config)
    source = choice.source if isinstance(choice.source, ModelReference) else leader
    vocabularies = {model: read_vocabulary(inputs[model]) for model in dict.fromkeys([*merged, source, leader])}
    added = _union(vocabularies, source, inputs) if choice.source == "union" else ()
    vocabulary = dict(vocabularies[source])
    known = {*vocabulary, *(token["content"] for token in added)}
    added += tuple({"content": token} for token in choice.tokens if token not in known)
    for number, token in enumerate(added, 1 + max(vocabulary.values(), default=-1)):
        vocabulary[token["content"]] = number
    tables = {model: vocabulary_tensors(inputs[model]) for model in merged}
    rows = max(vocabulary.values()) + 1
    if config.form != "mergekit" and source in tables and not added:
        rows = max(rows, max((inputs[source].origin(name).shape[0] for name in tables[source]), default=rows))
    pad = choice.pad_to_multiple_of
    rows = rows if pad is None else -(-rows // pad) * pad
    origins: dict[tuple[ModelReference, str], Origin] = {}
    for name in tables[leader] if leader in tables else tables[merged[0]]:
        present = {model: inputs[model].origin(name) for model in merged if name in tables[model]}
        filler = _Filler(vocabulary, vocabularies, present, choice, config.base, rows)
        for model, origin in present.items():
            origins[model, name] = GatheredRows(origin, filler.index(model), filler.row)
    lacking = {model: sum(token not in own for token in vocabulary) for model, own in vocabularies.items()}
    notes = tuple(
        f"{count:,} of {len(vocabulary):,} tokens are not in the vocabulary of {model}: it takes the others' rows."
        for model, count in lacking.items() if count
    )  # fmt: skip
    return Alignment(origins, rows, source, added, len(vocabulary), notes)


def _merged(config: MergeConfig) -> list[ModelReference]:
    found = [source.model for part in config.slices for source in part.sources]
    found += [part.base for part in config.slices if part.base]
    return list(dict.fromkeys(found))


def _differ(inputs: Inputs, merged: Sequence[ModelReference]) -> bool:
    """Whether the models have other vocabularies: rows of another number, or tokenizer files with other tokens."""
    counts = {inputs[m].origin(name).shape[0] for m in merged for name in vocabulary_tensors(inputs[m])}
    if len(counts) > 1:
        return True
    files = {}
    for model in merged:
        directory = inputs[model].checkpoint.model_path
        if not exists(directory / TOKENIZER_FILE):
            return False
        files[read_bytes(directory, directory / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)] = model
    if len(files) < 2:
        return False
    vocabularies = [read_vocabulary(inputs[model]) for model in files.values()]
    return any(vocabulary != vocabularies[0] for vocabulary in vocabularies)


def vocabulary_tensors(given: MergeInput) -> list[str]:
    """The tensors outside the layers whose first dimension is the vocabulary."""
    config = given.checkpoint.config
    texts = [config, *(part for part in config.values() if isinstance(part, dict))]
    sizes = {part["vocab_size"] for part in texts if isinstance(part.get("vocab_size"), int)}
    stacks = find_stacks(given.names)
    return [
        name
        for name in given.names
        if any(word in name for word in _NAMES)
        and layer_of(name, stacks) is None
        and given.origin(name).shape[:1]
        and given.origin(name).shape[0] in sizes
    ]


def read_vocabulary(given: MergeInput) -> dict[str, int]:
    """Token strings with their numbers.

    Raises:
        InputError: no tokenizer.json, or one that is not understood.
    """
    return {**_tokens(_tokenizer(given), given), **{a["content"]: a["id"] for a in _added(_tokenizer(given))}}


def _tokenizer(given: MergeInput) -> dict[str, Any]:
    directory = given.checkpoint.model_path
    path = directory / TOKENIZER_FILE
    if not exists(path):
        raise InputError(
            f"{given.reference} has no {TOKENIZER_FILE}, so its vocabulary cannot be aligned: save a fast tokenizer."
        )
    return read_json_object(directory, path, MAX_TOKENIZER_BYTES)


def _tokens(tokenizer: Mapping[str, Any], given: MergeInput) -> dict[str, int]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") if isinstance(tokenizer.get("model"), dict) else None
    if isinstance(vocabulary, dict) and all(isinstance(number, int) for number in vocabulary.values()):
        return dict(vocabulary)
    if isinstance(vocabulary, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in vocabulary):
        return {str(pair[0]): number for number, pair in enumerate(vocabulary)}
    raise InputError(f"{given.reference}: {TOKENIZER_FILE} has no vocabulary that is understood: save it again.")


def _added(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = tokenizer.get("added_tokens") or []
    return [
        a for a in given if isinstance(a, dict) and isinstance(a.get("content"), str) and isinstance(a.get("id"), int)
    ]


def _union(
    vocabularies: Mapping[ModelReference, Mapping[str, int]], source: ModelReference, inputs: Inputs
) -> tuple[dict[str, Any], ...]:
    """Tokens of the other models that the source lacks, ordinary ones first, in the order of the models."""
    known = set(vocabularies[source])
    ordinary: list[dict[str, Any]] = []
    special: list[dict[str, Any]] = []
    for model in vocabularies:
        if model == source:
            continue
        tokenizer = _tokenizer(inputs[model])
        settings = {a["content"]: {k: v for k, v in a.items() if k != "id"} for a in _added(tokenizer)}
        for token, _ in sorted(vocabularies[model].items(), key=lambda item: item[1]):
            if token not in known:
                known.add(token)
                (special if token in settings else ordinary).append(settings.get(token, {"content": token}))
    return (*ordinary, *special)


class _Filler:
    """The rows that models lack, one table at a time, made when they are read."""

    def __init__(
        self, vocabulary: Mapping[str, int], vocabularies: Mapping[ModelReference, Mapping[str, int]],
        present: Mapping[ModelReference, Origin], choice: TokenizerChoice, base: ModelReference | None, rows: int,
    ) -> None:  # fmt: skip
        self._tokens: list[str | None] = [None] * rows
        for token, number in vocabulary.items():
            self._tokens[number] = token
        self._vocabularies, self._present, self._choice, self._base = vocabularies, present, choice, base
        self._mean: Tensor | None = None

    def index(self, model: ModelReference) -> Tensor:
        """(rows,) int64: where each row of the result lies in this model's table; -1 where it lacks it."""
        own, limit = self._vocabularies[model], self._present[model].shape[0]
        found = []
        for number, token in enumerate(self._tokens):
            place = own.get(token, -1) if token is not None else -1
            if token is None and self._padding(model) and number < limit:
                place = number  # a row without a token, of the model whose table the result keeps
            forced = token is not None and self._choice.tokens.get(token, {}).get("force")
            found.append(place if place < limit and not forced else -1)
        return torch.tensor(found, dtype=torch.int64)

    def _padding(self, model: ModelReference) -> bool:
        return model == (self._base or next(iter(self._present)))

    def row(self, number: int) -> Tensor | None:
        """What a model that lacks this row has instead; None for zeros."""
        token = self._tokens[number]
        if token is None:
            return self._row_of(self._base or next(iter(self._present)), number)
        if token in self._choice.tokens and "source" in self._choice.tokens[token]:
            return self._asked(token, self._choice.tokens[token]["source"])
        having = [model for model in self._present if self._place(model, token) is not None]
        if len(having) > 1 and self._base in having:
            having = [self._base]
        found = [row for model in having if (row := self._row_of(model, self._place(model, token))) is not None]
        return torch.stack(found).mean(0) if found else None

    def _asked(self, token: str, source: Any) -> Tensor | None:
        """The row that the configuration names for a token."""
        if isinstance(source, Mapping) and source.get("kind") == "zero":
            return None
        named = source.get("model") if isinstance(source, Mapping) else source
        model = ModelReference.parse(str(named))
        if model not in self._present:
            raise InputError(f"The token {shown(token)!r} takes its row from {model}, which is not one of the models.")
        place = self._place(model, token)
        if isinstance(source, Mapping) and source.get("kind") == "model_token":
            wanted = source.get("token_id")
            place = wanted if isinstance(wanted, int) else self._place(model, str(source.get("token")))
        row = None if place is None else self._row_of(model, place)
        if row is None:
            raise InputError(f"The token {shown(token)!r} takes its row from {model}, which has none for it.")
        return row

    def _place(self, model: ModelReference, token: str) -> int | None:
        place = self._vocabularies[model].get(token)
        return place if place is not None and place < self._present[model].shape[0] else None

    def _row_of(self, model: ModelReference, number: int | None) -> Tensor | None:
        if model not in self._present or number is None or not 0 <= number < self._present[model].shape[0]:
            return None
        return self._present[model].rows(slice(number, number + 1))[0].float()


def resized(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """config.json for another number of rows."""
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size" and isinstance(value, int):
            new[key] = rows
        else:
            new[key] = resized(value, rows) if isinstance(value, dict) else value
    return new


def write_tokenizer(alignment: Alignment, inputs: Inputs, directory: Path, copy: Callable[[Path], object]) -> None:
    """Give the result the tokenizer of the source, with the added tokens.

    Args:
        alignment: of the vocabularies.
        inputs: every model.
        directory: of the result, which has the leader's side files already.
        copy: puts one file of the source into it.
    """
    source = inputs[alignment.source].checkpoint.model_path
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if exists(source / name):
            copy(source / name)
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "spiece.model"):
        (directory / name).unlink(
            missing_ok=True
        )  # a second vocabulary beside tokenizer.json, without the added tokens
    if not alignment.added:
        return
    tokenizer = _tokenizer(inputs[alignment.source])
    first = alignment.tokens - len(alignment.added)
    known = read_vocabulary(inputs[alignment.source])
    first = max(known.values(), default=-1) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    entries = [{"id": first + number, **plain, **token} for number, token in enumerate(alignment.added)]
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *entries]
    write_json_atomic(directory / "tokenizer.json", tokenizer)
    path = directory / "tokenizer_config.json"
    if exists(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            decoder |= {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries}
            write_json_atomic(path, settings)
