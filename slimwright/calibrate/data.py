"""Data that calibration and evaluation read: files, folders, tables, datasets; and the tenth kept from every solver."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimwright.errors import InputError

GENERIC = "generic"
"""The data used where the user gives none: the calibration part of the running Python's own text."""

TABLES = (".jsonl", ".ndjson", ".parquet")
PIECE_CHARACTERS = 4000
"""About how long the pieces are that a text file of its own is cut into, so that some can be kept for evaluation."""

_PAIRS = (
    ("query", "document"),
    ("anchor", "positive"),
    ("question", "answer"),
    ("prompt", "response"),
    ("text", "text_pair"),
)
_COLUMNS = "'text', 'messages', a pair such as 'query' and 'document', or 'image' and 'text'"


@dataclass(frozen=True)
class Document:
    """One sample.

    Attributes:
        name: where it comes from: ``file``, ``file:line`` or ``dataset:row``.
        text: the text; of a pair the first.
        pair: the second text of a pair.
        messages: a conversation for the chat template: mappings with ``role`` and ``content``.
        image: path of an image file, or encoded bytes of one.
        label: its class, as an index or a name; calibration makes no use of it.
    """

    name: str
    text: str = ""
    pair: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    image: str | bytes | None = None
    label: int | str | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content, whatever it is called."""
        image = self.image if isinstance(self.image, bytes) else (self.image or "").encode()
        parts = [self.text, self.pair, [dict(message) for message in self.messages]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode() + b"\0" + image).digest()


def whole_text(document: Document, tokenizer: Any, whose: str = "the model's") -> str:
    """All of a document as one text: a conversation through the chat template, both texts of a pair on their own lines.

    Args:
        whose: the tokenizer's owner, for the error.

    Raises:
        InputError: a conversation, but the tokenizer has no chat template.
    """
    if document.messages:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{document.name} holds messages, but {whose} tokenizer has no chat template: give plain text."
            )
        return str(tokenizer.apply_chat_template(list(document.messages), tokenize=False))
    return document.text if document.pair is None else f"{document.text}\n{document.pair}"


def documents(source: str) -> list[Document]:
    """Everything that ``source`` names, in a fixed order.

    Args:
        source: ``generic``; a text file (cut into pieces at blank lines); ``.jsonl`` or ``.parquet`` with ``text``,
            ``messages``, a pair, or ``image`` and ``text``; a folder of such files; a dataset saved by ``datasets``; or
            the id of a dataset on the hub.

    Raises:
        InputError: nothing there, empty, not UTF-8, or without the columns; the sentence names the file and the line.
    """
    if source == GENERIC:
        from slimwright.zoo.text import standard_library

        return [Document(found.path, found.text) for found in standard_library("calibrate")]
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = list(_saved_dataset(path))
        else:
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
            found = [document for file in files for document in _file(file, str(file.relative_to(path)), folder=True)]
    elif path.exists():
        found = list(_file(path, path.name, folder=False))
    else:
        found = list(_hub_dataset(source))
    found = [document for document in found if document.text.strip() or document.messages or document.image]
    if not found:
        raise InputError(f"The data {source} holds no text: give files with text in them.")
    return found


def split(found: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(for the solvers, for evaluation): about a tenth, chosen by hash of the content, is kept from every solver.

    Equal documents fall on the same side. Where the hashes choose none or all, the last document is for evaluation.

    Raises:
        InputError: a single document, of which nothing can be kept.
    """
    digests = [document.digest for document in found]
    is_kept = [not digest[0] % 10 for digest in digests]
    if all(is_kept) or not any(is_kept):
        if len(set(digests)) < 2:
            raise InputError("The data holds a single document; a tenth is kept for evaluation, so give at least two.")
        is_kept = [digest == max(digests) for digest in digests]
    solvers = [document for document, kept in zip(found, is_kept, strict=True) if not kept]
    return solvers, [document for document, kept in zip(found, is_kept, strict=True) if kept]


def fingerprint(found: Iterable[Document]) -> str:
    """SHA-256 (hex) of the documents' contents, in order."""
    digest = hashlib.sha256()
    for document in found:
        digest.update(document.digest)
    return digest.hexdigest()


# -- readers -------------------------------------------------------------------------------------------------------


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _file(path: Path, name: str, folder: bool) -> Iterator[Document]:
    """The documents of one file; in a folder a text file is one document, and a file that is no text is passed over."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, name)
    elif suffix == ".parquet":
        yield from _parquet(path, name)
    else:
        content = path.read_bytes()
        if folder and b"\0" in content[:8192]:
            return
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if folder:
                return
            raise InputError(f"The data {path} is not UTF-8 (byte {error.start}): convert it first.") from None
        if folder:
            yield Document(name, text)
        else:
            yield from _pieces(text, name)


def _pieces(text: str, name: str) -> Iterator[Document]:
    """Cut a text at blank lines into pieces of about :data:`PIECE_CHARACTERS`."""
    piece, number = "", 0
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > PIECE_CHARACTERS:
            yield Document(f"{name}#{number}", piece)
            piece, number = "", number + 1
        piece += ("\n\n" if piece else "") + paragraph
    if piece:
        yield Document(f"{name}#{number}", piece)


def _json_lines(path: Path, name: str) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError):
                    raise InputError(
                        f"The data {path} is not JSON in line {number}: write one object a line."
                    ) from None
                if not isinstance(row, dict):
                    raise InputError(f"The data {path} has no object in line {number}: write one object a line.")
                yield _row(row, f"{name}:{number}", f"{path}, line {number},", path.parent)
    except UnicodeDecodeError as error:
        raise InputError(f"The data {path} is not UTF-8 (byte {error.start}): convert it first.") from None


def _parquet(path: Path, name: str) -> Iterator[Document]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"Reading {path} needs pyarrow: pip install pyarrow, or convert it to .jsonl.") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"The data {path} is not a readable parquet file: {str(error).splitlines()[0]}.") from None
    for number, row in enumerate(table.to_pylist()):
        yield _row(row, f"{name}:{number}", f"{path}, row {number},", path.parent)


def _saved_dataset(path: Path) -> Iterator[Document]:
    datasets = _datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises what its backends raise
        raise InputError(f"The dataset {path} cannot be read: {(str(error).splitlines() or ['?'])[0]}.") from None
    yield from _dataset_rows(found, str(path), path)


def _hub_dataset(source: str) -> Iterator[Document]:
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or Path(source).suffix in (*TABLES, ".txt", ".json"):
        raise InputError(f"The data {source} does not exist.")
    datasets = _datasets(source)
    try:
        found = datasets.load_dataset(source)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"The data {source} is no file, and as a dataset of the hub it cannot be loaded: {reason}."
        ) from None
    yield from _dataset_rows(found, source, Path())


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"The data {source} is no file; to read it as a Hugging Face dataset, pip install datasets."
        ) from None
    return datasets


def _dataset_rows(found: Any, name: str, folder: Path) -> Iterator[Document]:
    """Rows of the split 'train', or of the first."""
    if hasattr(found, "keys"):
        found = found["train"] if "train" in found else found[next(iter(found))]
    for number, row in enumerate(found):
        yield _row(row, f"{name}:{number}", f"{name}, row {number},", folder)


def _row(row: Mapping[str, Any], name: str, where: str, folder: Path) -> Document:
    """One row of a table as a document, with its ``label`` where it is an index or a name."""
    label = row.get("label")
    labelled = isinstance(label, (int, str)) and not isinstance(label, bool)
    return replace(_content(row, name, where, folder), label=label if labelled else None)


def _content(row: Mapping[str, Any], name: str, where: str, folder: Path) -> Document:
    """What a row holds.

    Raises:
        InputError: it has none of the columns, or one of them holds something else.
    """
    messages = row.get("messages", row.get("conversations"))
    if messages is not None:
        good = isinstance(messages, (list, tuple)) and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and m.get("content") is not None for m in messages
        )
        if not good or not messages:
            raise InputError(f"The data {where} has messages that are not a list of objects with 'role' and 'content'.")
        return Document(name, messages=tuple(messages))
    image = _image(row.get("image"), folder)
    for first, second in _PAIRS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return Document(name, row[first], row[second], image=image)
    text = row.get("text", row.get("content"))
    if isinstance(text, str):
        return Document(name, text, image=image)
    if image is not None:
        return Document(name, image=image)
    raise InputError(f"The data {where} has the columns {sorted(map(str, row))}; it needs {_COLUMNS}.")


def _image(value: Any, folder: Path) -> str | bytes | None:
    """A path, or encoded bytes (as ``datasets`` stores images)."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return str(folder / value)
    if isinstance(value, bytes):
        return value
    if hasattr(value, "save"):  # a PIL image, as datasets decodes them
        import io

        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    return None
