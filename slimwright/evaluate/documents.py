"""The text that models are measured on, of any source that calibration reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from slimwright.calibrate.data import Document, documents, whole_text
from slimwright.errors import InputError

STANDARD_LIBRARY = "stdlib"
"""The source that is the held-out part of the running Python's standard library."""

LEAST_DOCUMENTS = 32
"""A document takes at most this part of the text that is measured, where there are so many."""


def read_texts(source: str, tokenizer: Callable[[], Any]) -> list[Document]:
    """The documents of a source, each with its whole content in ``text`` (and ``pair``).

    Args:
        source: ``stdlib``, or see :func:`slimwright.calibrate.data.documents`.
        tokenizer: gives the tokenizer whose chat template makes text of conversations; asked only if there are some.

    Raises:
        InputError: nothing is there, it is empty or not UTF-8, a row has no text, or conversations have no template.
    """
    if source == STANDARD_LIBRARY:
        from slimwright.zoo.text import standard_library

        return [Document(module.path, module.text) for module in standard_library("heldout")]
    found = [_plain(document, tokenizer) for document in documents(source)]
    named = dict.fromkeys(document.name for document in found)
    if len(named) < len(found):  # rows of one name would be taken for one document
        found = [replace(document, name=f"{document.name} ({index})") for index, document in enumerate(found)]
    return found


def _plain(document: Document, tokenizer: Callable[[], Any]) -> Document:
    if document.messages:
        return replace(document, text=whole_text(document, tokenizer(), "the reference's"), messages=())
    if not document.text.strip():
        raise InputError(f"{document.name} holds no text, and models of text are measured on text only.")
    return document


def sample(found: Iterable[Document], nbytes: int) -> list[Document]:
    """About ``nbytes`` of text of many documents, the same for the same documents in whatever order they come.

    Documents are taken in the order of their names' hashes, each from its beginning and at most a thirty-second of all
    (or as much as gives each its part, where there are fewer). Pairs are joined.
    """
    order = sorted(found, key=by_name)
    limit = max(1, nbytes // min(LEAST_DOCUMENTS, max(1, len(order))))
    taken, left = [], nbytes
    for document in order:
        text = whole_text(document, None).encode(errors="replace")[: min(limit, left)].decode(errors="ignore")
        if text.strip():
            taken.append(replace(document, text=text, pair=None))
        left -= len(text.encode())
        if left < 4:  # bytes of the longest character
            break
    return taken


def by_name(document: Document) -> tuple[bytes, str]:
    """A key whose order has nothing to do with what the documents hold."""
    return hashlib.sha256(document.name.encode()).digest(), document.name
