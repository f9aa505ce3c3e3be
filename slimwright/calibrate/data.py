"""Data that calibration and evaluation read: files, folders, tables, datasets; and the tenth kept from every solver."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from slimwright.errors import InputError

GENERIC = "generic"
"""The data used where the user gives none: the calibration part of the running Python's own text."""

TABLES = (".jsonl", ".ndjson", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
PIECE_CHARACTERS = 4000
"""About how long the pieces are that a text file of its own is cut into, so that some can be kept for evaluation."""

_PAIRS = (
    ("query", "document"),
    ("anchor", "positive"),
    ("question", "answer"),
    ("prompt", "response"),
    ("text", "text_pair"),
)
_COLUMNS = "'text', 'messages', a pair such as 'query' and 'document', 'image' or 'audio', alone or with 'text'"


@dataclass(frozen=True)
class Document:
    """One sample.

    Attributes:
        name: where it comes from: ``file``, ``file:line`` or ``dataset:row``.
        text: the text; of a pair the first.
        pair: the second text of a pair.
        messages: a conversation for the chat template: mappings with ``role`` and ``content``.
        image: path of an image file, or encoded bytes of one.
        audio: path of a sound file, or encoded bytes of one.
        label: its class, as an index or a name; calibration makes no use of it.
    """

    name: str
    text: str = ""
    pair: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    image: str | bytes | None = None
    audio: str | bytes | None = None
    label: int | str | None = None

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content, that of files included, whatever it is called.

        Raises:
            InputError: a file cannot be read.
        """
        parts = [self.text, self.pair, [dict(message) for message in self.messages]]
        found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode() + b"\0")
        for medium in (self.image, self.audio):
            if medium is not None:
                found.update(medium_bytes(medium, self.name))
        return found.digest()


def medium_bytes(medium: str | bytes, name: str) -> bytes:
    """The encoded bytes of an image or a sound.

    Args:
        medium: they, or the path of their file.
        name: of the document, for the error.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(medium, bytes):
        return medium
    try:
        return Path(medium).read_bytes()
    except OSError as error:
        raise InputError(f"The file {medium} of {name} cannot be read: {error.strerror}.") from None


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
            ``messages``, a pair, ``image`` or ``audio`` (alone or with text); a folder of such files, of images or of
            sounds, where ``x.txt`` is the text of ``x.png``; a dataset saved by ``datasets``; or the id of a dataset on
            the hub.

    Raises:
        InputError: nothing there, empty, not UTF-8, without the columns, or naming a file that is not there; the
            sentence names the file and the line.
    """
    if source == GENERIC:
        from slimwright.zoo.text import standard_library

        return [Document(found.path, found.text) for found in standard_library("calibrate")]
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = list(_saved_dataset(path))
        else:
            found = list(_folder(path))
    elif path.exists():
        found = list(_file(path, path.name, folder=False))
    else:
        found = list(_hub_dataset(source))
    found = [document for document in found if document.text.strip() or document.messages or has_medium(document)]
    if not found:
        raise InputError(f"The data {source} holds no text, image or sound: give files with some in them.")
    return found


def has_medium(document: Document) -> bool:
    """Whether it holds an image or a sound."""
    return document.image is not None or document.audio is not None


def split(found: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(for the solvers, for evaluation): about a tenth, chosen by hash of the content, is kept from every solver.

    Equal documents fall on the same side. Where the hashes choose fewer than two of at least four, two are for
    evaluation, since an interval needs as many; where they choose none or all of fewer, one is.

    Raises:
        InputError: a single document, of which nothing can be kept.
    """
    digests = [document.digest for document in found]
    distinct = sorted(set(digests), key=lambda digest: (not digest[0] % 10, digest))  # those of the tenth last
    if len(distinct) < 2:
        raise InputError("The data holds a single document; a tenth is kept for evaluation, so give at least two.")
    tenth = {digest for digest in distinct if not digest[0] % 10}
    least = 2 if len(distinct) >= 4 else 1
    if len(tenth) < least or len(tenth) == len(distinct):
        tenth = set(distinct[-least:])
    solvers = [document for document, digest in zip(found, digests, strict=True) if digest not in tenth]
    return solvers, [document for document, digest in zip(found, digests, strict=True) if digest in tenth]


def fingerprint(found: Iterable[Document]) -> str:
    """SHA-256 (hex) of the documents' contents, in order."""
    digest = hashlib.sha256()
    for document in found:
        digest.update(document.digest)
    return digest.hexdigest()


# -- readers -------------------------------------------------------------------------------------------------------


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _folder(path: Path) -> Iterator[Document]:
    """The documents of a folder. An image or a sound that a table's row names belongs to that row, and the text beside
    one (``x.txt`` of ``x.png``) belongs to it."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file, path))
    media = {file for file in files if file.suffix.lower() in IMAGES + SOUNDS}
    captions = {file.with_suffix(".txt") for file in media}
    read = {
        file: list(_file(file, str(file.relative_to(path)), folder=True))
        for file in files
        if file not in media and file not in captions
    }
    rows = (document for found in read.values() for document in found)
    named = {Path(m).resolve() for row in rows for m in (row.image, row.audio) if isinstance(m, str)}
    for file in files:
        if file in read:
            yield from read[file]
        elif file in media and file.resolve() not in named:
            (document,) = _file(file, str(file.relative_to(path)), folder=True)
            caption = file.with_suffix(".txt")
            yield replace(document, text=_decoded(caption).strip()) if caption.is_file() else document


def _file(path: Path, name: str, folder: bool) -> Iterator[Document]:
    """The documents of one file; in a folder a text file is one document, and what is of no known kind is passed
    over."""
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        yield Document(name, image=str(path))
    elif suffix in SOUNDS:
        yield Document(name, audio=str(path))
    elif suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path, name)
    elif suffix == ".parquet":
        yield from _parquet(path, name)
    else:
        if not folder:
            yield from _pieces(_decoded(path), name)
            return
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            with suppress(UnicodeDecodeError):
                yield Document(name, content.decode("utf-8-sig"))


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The data {path} is not UTF-8 (byte {error.start}): convert it first.") from None


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
    for column, feature in found.features.items():
        if getattr(feature, "decode", False):  # images and sounds stay encoded: they are decoded where they are used
            found = found.cast_column(column, type(feature)(decode=False))
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
    media = {kind: _medium(row.get(kind), folder, where, kind) for kind in ("image", "audio")}
    if messages is not None:
        return Document(name, messages=tuple(messages), **media)
    for first, second in _PAIRS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return Document(name, row[first], row[second], **media)
    text = row.get("text", row.get("content"))
    if isinstance(text, str):
        return Document(name, text, **media)
    if any(medium is not None for medium in media.values()):
        return Document(name, **media)
    raise InputError(f"The data {where} has the columns {sorted(map(str, row))}; it needs {_COLUMNS}.")


def _medium(value: Any, folder: Path, where: str, kind: str) -> Any:
    """A path, or encoded bytes (as ``datasets`` stores images and sounds); None if there is none.

    Raises:
        InputError: it is something else, or the path of no file.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(f"The data {where} has an '{kind}' that is no path and no encoded bytes.")
    path = folder / value
    if not path.is_file():
        raise InputError(f"The data {where} names the {kind} '{value[:200]}', which is not there.")
    return str(path)
