"""Single values of a merge's configuration, read and checked: references, dtypes, sizes, the tokenizer's choice.

Every function raises :class:`InputError` where the value cannot be, with ``where`` it stands.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slimwright.errors import InputError
from slimwright.job.merging.parameters import nearest
from slimwright.job.merging.sources import ModelReference

_TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")


@dataclass(frozen=True)
class TokenizerChoice:
    """Which vocabulary the result has.

    Attributes:
        source: ``base``, ``union``, or a model.
        tokens: embeddings of single tokens: by token ``{"source": ..., "force": ...}``.
        pad_to_multiple_of: rows of the embedding.
    """

    source: str | ModelReference
    tokens: Mapping[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


def read_list(value: Any, name: str, where: str) -> list[Any]:
    """A list with at least one entry."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: '{name}' is a list with at least one entry.")
    return value


def read_reference(value: Any, what: str, where: str) -> ModelReference | None:
    """A model as a configuration names it, also in mergekit's long form; None for None."""
    if value is None:
        return None
    if isinstance(value, Mapping):  # mergekit's long form
        inner = value.get("model")
        path = inner.get("path") if isinstance(inner, Mapping) else inner
        if isinstance(inner, Mapping) and inner.get("revision"):
            path = f"{path}@{inner['revision']}"
        lora = value.get("lora")
        lora = lora.get("path") if isinstance(lora, Mapping) else lora
        value = f"{path}+{lora}" if lora else path
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {what} is a directory or hub id, not {value!r}.")
    return ModelReference.parse(value)


def read_dtype(value: Mapping[str, Any], where: str) -> str | None:
    """The result's dtype by torch's name, or None."""
    for key in ("out_dtype", "dtype"):
        given = value.get(key)
        if given is None:
            continue
        names = {"float32", "float16", "bfloat16", "float64"}
        name = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}.get(
            str(given), str(given).removeprefix("torch.")
        )
        if name not in names:
            raise InputError(f"{where}: '{key}' is one of {', '.join(sorted(names))}, not {given!r}.")
        return name
    return None


def read_tokenizer(value: Mapping[str, Any], where: str) -> TokenizerChoice | None:
    """Which vocabulary is asked for, or None."""
    plain, full = value.get("tokenizer_source"), value.get("tokenizer")
    if plain is not None and full is not None:
        raise InputError(f"{where}: give 'tokenizer_source' or 'tokenizer', not both.")
    if plain is None and full is None:
        return None
    if isinstance(full, str):
        plain, full = full, None
    settings = {"source": plain} if full is None else full
    if not isinstance(settings, Mapping):
        raise InputError(f"{where}: 'tokenizer' is base, union, a model, or has 'source' and 'tokens'.")
    for key in settings:
        if key not in _TOKENIZER_KEYS:
            raise InputError(f"{where}: unknown key '{key}' of 'tokenizer'{nearest(key, _TOKENIZER_KEYS)}")
    source = settings.get("source", "union")
    if not isinstance(source, str) or not source:
        raise InputError(f"{where}: the tokenizer's source is base, union or a model, not {source!r}.")
    pad = settings.get("pad_to_multiple_of")
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or pad < 1):
        raise InputError(f"{where}: 'pad_to_multiple_of' is a whole number above 0, not {pad!r}.")
    tokens = settings.get("tokens") or {}
    if not isinstance(tokens, Mapping) or not all(isinstance(item, Mapping) for item in tokens.values()):
        raise InputError(f"{where}: 'tokens' of the tokenizer is a mapping of tokens to 'source' and 'force'.")
    reference = source.removeprefix("model:")
    return TokenizerChoice(
        source if source in ("base", "union") else ModelReference.parse(reference),
        {str(token): dict(item) for token, item in tokens.items()}, pad,
    )  # fmt: skip


def read_text(value: Any, name: str, where: str) -> str | None:
    """Text, or None."""
    if value is not None and (not isinstance(value, str) or not value):
        raise InputError(f"{where}: '{name}' is text, not {value!r}.")
    return value


def read_size(value: Any, where: str) -> int:
    """Bytes: a number, or one with K, M, G (or B, as mergekit's billion) behind it, as in 500MB, 5GB, 5B."""
    text = str(value).strip().upper()
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(K|M|G|B)?B?", text)
    size = int(float(match[1]) * {None: 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}[match[2]]) if match else 0
    if size < 1:
        raise InputError(f"{where}: 'out_shard_size' is a size such as 5GB, not {value!r}.")
    return size
