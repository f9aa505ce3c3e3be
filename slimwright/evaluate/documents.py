"""Reading the text that models are measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimwright.errors import InputError

STANDARD_LIBRARY = "stdlib"
"""The source that is the held-out part of the running Python's standard library."""

LEAST_DOCUMENTS = 32
"""A document takes at most this part of the text that is measured, where there are so many."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: unique within its source.
        text: not empty.
        label: the class, as its index or its name, where the source has one.
    """

    name: str
    text: str
    label: int | str | None = None


def documents(source: str) -> Iterable[Document]:
    """The documents of a source.

    Args:
        source: ``stdlib``; a file of text; ``.jsonl`` or ``.parquet`` with the column ``text`` (and, where there are
            classes, ``label``); or a folder of any of these.

    Raises:
        InputError: nothing is there, it is empty or not UTF-8, or a row has no text.
    """
    if source == STANDARD_LIBRARY:
        from slimwright.zoo.text import standard_library

        return [Document(module.path, module.text) for module in standard_library("heldout")]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        found = [
            Document(f"{file.relative_to(path)}{inner}", text, label)
            for file in files
            for inner, text, label in _read(file)
        ]
    elif path.is_file():
        found = [Document(f"{path.name}{inner}", text, label) for inner, text, label in _read(path)]
    else:
        raise InputError(f"The data '{source}' does not exist: name a file, a folder or `{STANDARD_LIBRARY}`.")
    found = [document for document in found if document.text.strip()]
    if not found:
        raise InputError(f"The data '{source}' holds no text.")
    return found


def sample(found: Iterable[Document], nbytes: int) -> list[Document]:
    """About ``nbytes`` of text of many documents, the same for the same documents in whatever order they come.

    Documents are taken in the order of their names' hashes, each from its beginning and at most a thirty-second of all
    (or as much as gives each its part, where there are fewer).
    """
    order = sorted(found, key=lambda document: (hashlib.sha256(document.name.encode()).digest(), document.name))
    limit = max(1, nbytes // min(LEAST_DOCUMENTS, max(1, len(order))))
    taken, left = [], nbytes
    for document in order:
        text = document.text.encode(errors="replace")[: min(limit, left)].decode(errors="ignore")
        if text.strip():
            taken.append(Document(document.name, text, document.label))
        left -= len(text.encode())
        if left < 4:  # bytes of the longest character
            break
    return taken


def fingerprint(found: Sequence[Document]) -> str:
    """SHA-256 over names, texts and labels."""
    content = json.dumps([[document.name, document.text, document.label] for document in found])
    return hashlib.sha256(content.encode()).hexdigest()


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read(file: Path) -> Iterator[tuple[str, str, int | str | None]]:
    """(what is added to the file's name, text, label) of each document of a file."""
    if file.suffix == ".parquet":
        yield from _rows(file, _parquet(file))
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{file} is not text in UTF-8: convert it or take it out of the data.")
    if file.suffix != ".jsonl":
        yield "", text, None
        return
    yield from _rows(file, _lines(file, text))


def _lines(file: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{file}, line {number} is not JSON.") from None


def _parquet(file: Path) -> Iterator[Any]:
    if find_spec("pyarrow") is None:
        raise InputError(f"Reading {file} needs pyarrow: `pip install pyarrow`, or convert the file to .jsonl.")
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in ("text", "label", "id") if name in table.schema_arrow.names]
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} cannot be read as parquet: {(str(error).splitlines() or ['damaged'])[0]}.") from None


def _rows(file: Path, rows: Iterable[Any]) -> Iterator[tuple[str, str, int | str | None]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) and row else "none"
            raise InputError(f"{file}, row {number} has no `text` that is a string (its columns: {columns[:200]}).")
        label = row.get("label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
            raise InputError(f"{file}, row {number} has a `label` that is neither a number nor a name.")
        yield f":{number}", row["text"], label
