"""The running Python's standard library as text, split once into train, calibrate and held-out by hash of the path."""

import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from slimwright.errors import InputError

Part = Literal["train", "calibrate", "heldout"]

# Left out, by name of a path component. Tests: many distributions ship Python without them, so that with them the split
# would differ between installations of one version. `config-*` and `_sysconfigdata*` say how this Python was built.
TESTS = frozenset({"test", "tests", "idle_test"})
INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})
BUILD_PREFIXES = ("config-", "_sysconfigdata")
# The help topics are documents of their own; the module that holds them would put the same text into a second part.
TOPICS_MODULE = "pydoc_data/topics.py"

REPEATED_SHARE = 0.5
SHORTEST_TELLING_LINE = 20  # characters; shorter lines (`return None`) say nothing about where a text comes from


@dataclass(frozen=True)
class Document:
    """One module's source (`path` relative to the library, posix) or one help topic (`path` is `help:NAME`)."""

    path: str
    text: str

    @property
    def bytes(self) -> int:
        """Length of the text in UTF-8, in bytes."""
        return len(self.text.encode())


def standard_library(part: Part) -> list[Document]:
    """The documents of one part, ordered by path: about 80 % train, 10 % calibrate, 10 % held-out (by count).

    Neither the part of a document nor its being left out depends on the machine, only on the library's version. A
    document more than half of whose lines stand in longer documents (the generated code pages of `encodings`, a help
    topic inside another) is left out of every part, so that no part holds a near copy of another part's text.
    """
    return [document for document in _distinct_documents() if part_of(document.path) == part]


def part_of(path: str) -> Part:
    """The part that a document's path belongs to: SHA-256 of the path, modulo ten."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 10
    if bucket == 0:
        return "heldout"
    return "calibrate" if bucket == 1 else "train"


@cache
def _distinct_documents() -> tuple[Document, ...]:
    """Every document of the library, by path, without empty ones and without those that mostly repeat longer ones."""
    documents = _modules() + _help_topics()
    if not documents:
        raise InputError(
            f"no source file of Python's standard library lies in {sysconfig.get_path('stdlib')}: "
            "use a Python that is installed with its source"
        )
    seen: set[str] = set()
    distinct = []
    for document in sorted(documents, key=lambda document: (-document.bytes, document.path)):
        lines = telling_lines(document.text)
        if repeated_share(lines, seen) <= REPEATED_SHARE:
            distinct.append(document)
            seen |= lines
    return tuple(sorted(distinct, key=lambda document: document.path))


def telling_lines(text: str) -> set[str]:
    """The distinct lines of a text, stripped, that are long enough to be recognised; all of them if none is."""
    lines = {line.strip() for line in text.splitlines()} - {""}
    return {line for line in lines if len(line) >= SHORTEST_TELLING_LINE} or lines


def repeated_share(lines: set[str], seen: set[str]) -> float:
    """The share of `lines`, weighted by their length, that `seen` holds."""
    return sum(len(line) for line in lines & seen) / sum(len(line) for line in lines)


def _modules() -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if relative.as_posix() == TOPICS_MODULE or _is_excluded(relative):
            continue
        with tokenize.open(file) as source:  # honours the file's own encoding line
            text = source.read()
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
    return documents


def _is_excluded(relative: Path) -> bool:
    return any(part in TESTS or part in INSTALLED or part.startswith(BUILD_PREFIXES) for part in relative.parts)


def _help_topics() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(f"help:{name}", text) for name, text in topics.items() if text.strip()]
