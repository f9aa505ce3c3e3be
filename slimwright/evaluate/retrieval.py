"""Retrieval tasks: one made of the standard library's held-out modules, or a user's in BEIR's layout; their scoring."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.calibrate.data import Document
from slimwright.errors import InputError
from slimwright.evaluate.documents import by_name
from slimwright.evaluate.ranking import score_rankings
from slimwright.evaluate.table import Table

QUERIES = 300
DOCUMENTS = 500
DOCUMENT_CHARACTERS = 500
MOST_OF_A_MODULE = 40
SHORTEST_QUERY = 4  # words
SHORTEST_DOCUMENT = 60  # characters
DEPTH = 1000

Judgements = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class RetrievalTask:
    """Find the documents that belong to each query.

    Attributes:
        queries: text by identifier.
        documents: text by identifier.
        judgements: grades (1 or more: relevant) of documents by query.
    """

    queries: Mapping[str, str]
    documents: Mapping[str, str]
    judgements: Judgements


@cache
def standard_library_task() -> RetrievalTask:
    """Docstring → function, on the held-out modules of the running Python's standard library.

    Queries are the first paragraphs of docstrings, documents the source of functions and methods without their
    docstring, cut at 500 characters; functions without a docstring are documents that belong to no query. At most 40
    functions of a module, 300 queries and 500 documents are taken, in the order of the identifiers' hashes. Texts that
    occur twice (docstrings or bodies) are left out altogether, since no ranking could tell them apart; so are
    docstrings of fewer than four words and bodies of fewer than 60 characters.

    Nothing is random: a version of Python gives the same task on every machine.
    """
    from slimwright.zoo.text import standard_library

    found: list[tuple[str, str | None, str]] = []
    for module in standard_library("heldout"):
        if module.path.endswith(".py"):
            functions = [(f"{module.path}:{name}", query, body) for name, query, body in _functions(module.text)]
            found += sorted(functions, key=_by_hash)[:MOST_OF_A_MODULE]
    bodies, asked = _counts(body for _, _, body in found), _counts(query for _, query, _ in found if query)
    usable = sorted((f for f in found if bodies[f[2]] == 1 and len(f[2]) >= SHORTEST_DOCUMENT), key=_by_hash)
    answers = [f for f in usable if f[1] and asked[f[1]] == 1 and len(f[1].split()) >= SHORTEST_QUERY][:QUERIES]
    names = {name for name, _, _ in answers}
    others = [f for f in usable if f[0] not in names][: DOCUMENTS - len(answers)]
    return RetrievalTask(
        {f"docstring of {name}": str(query) for name, query, _ in answers},
        {name: body for name, _, body in sorted(answers + others)},
        {f"docstring of {name}": {name: 1} for name, _, _ in answers},
    )


def _by_hash(function: tuple[str, str | None, str]) -> bytes:
    return hashlib.sha256(function[0].encode()).digest()


def _counts(texts: Iterator[str]) -> dict[str, int]:
    counted: dict[str, int] = {}
    for text in texts:
        counted[text] = counted.get(text, 0) + 1
    return counted


def _functions(source: str) -> Iterator[tuple[str, str | None, str]]:
    """(qualified name, first paragraph of the docstring, source without docstring) of functions and methods; a function
    inside a function is part of it. Of functions of one name in one module the last counts, as in Python."""
    lines = source.splitlines()
    found: dict[str, tuple[str | None, str]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in getattr(node, "body", []):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                start, stop = child.lineno - 1, child.end_lineno or child.lineno
                doc = ast.get_docstring(child, clean=False)
                kept = lines[start:stop]
                if doc is not None:
                    first = child.body[0]
                    kept = lines[start : first.lineno - 1] + lines[first.end_lineno or first.lineno : stop]
                paragraph = inspect.cleandoc(doc).split("\n\n")[0] if doc else ""
                body = textwrap.dedent("\n".join(kept)).strip()[:DOCUMENT_CHARACTERS]
                if len(child.body) > (doc is not None):
                    found[prefix + child.name] = (" ".join(paragraph.split()) or None, body)

    visit(ast.parse(source), "")
    for name, (query, body) in found.items():
        yield name, query, body


def task_of_pairs(found: Sequence[Document]) -> RetrievalTask:
    """First texts of pairs as queries, their second texts as documents; at most 300 queries and 500 documents, in the
    order of the names' hashes. Pairs that share a text are joined: a query may have several documents."""
    queries: dict[str, str] = {}
    judgements: dict[str, dict[str, int]] = {}
    answers: dict[str, str] = {}
    for pair in sorted(found, key=by_name):
        asked = len(judgements) < QUERIES or pair.text in queries
        if pair.pair is None or (pair.pair not in answers and len(answers) >= DOCUMENTS):
            continue
        answer = answers.setdefault(pair.pair, f"second of {pair.name}")
        if asked:
            query = queries.setdefault(pair.text, f"first of {pair.name}")
            judgements.setdefault(query, {})[answer] = 1
    return RetrievalTask(
        {name: text for text, name in queries.items()}, {name: text for text, name in answers.items()}, judgements
    )


def is_task(folder: str) -> bool:
    """Whether a folder has BEIR's layout."""
    return (Path(folder).expanduser() / "corpus.jsonl").is_file()


def read_task(folder: str) -> RetrievalTask:
    """A task in BEIR's layout: ``corpus.jsonl`` (``_id``, ``text``, ``title``), ``queries.jsonl`` (``_id``, ``text``)
    and ``qrels/test.tsv`` (query, document, grade; a line of headings). Title and text become one, as BEIR does.

    Raises:
        InputError: a file is missing, empty, not UTF-8 or not in this form, or names what is not there.
    """
    root = Path(folder).expanduser()
    documents = {row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _beir(root / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in _beir(root / "queries.jsonl")}
    judgements: dict[str, dict[str, int]] = {}
    file = root / "qrels" / "test.tsv"
    for number, line in enumerate(_text(file).split("\n")[1:], 2):
        if not line.strip():
            continue
        try:
            query, document, grade = line.split("\t")
            judgements.setdefault(query, {})[document] = int(grade)
        except ValueError:
            raise InputError(f"{file}, line {number} is not a query, a document and a grade between tabs.") from None
        if query not in queries:
            raise InputError(f"{file}, line {number} names the query '{query[:80]}', which is not in queries.jsonl.")
    if not judgements:
        raise InputError(f"{file} judges no query.")
    return RetrievalTask({query: queries[query] for query in judgements}, documents, judgements)


def _beir(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise InputError(f"{file}, line {number} is not JSON.") from None
            if not (isinstance(row, dict) and isinstance(row.get("_id"), str) and isinstance(row.get("text"), str)):
                raise InputError(f"{file}, line {number} has no `_id` and `text` that are strings.")
            yield row


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except OSError:
        raise InputError(f"A retrieval task needs the file {file}, which is not there.") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not text in UTF-8.") from None


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


SIMILARITIES: dict[str, Callable[[Tensor], Tensor]] = {"cosine": _unit, "dot": lambda vectors: vectors}
"""What is done to vectors before their inner products are taken."""


def score_task(task: RetrievalTask, queries: Tensor, documents: Tensor, similarity: str = "cosine") -> Table:
    """One row per query with the columns of :data:`slimwright.evaluate.ranking.RANKING`, from an exhaustive search of
    which the best 1000 are ranked.

    Queries and documents may come from two encoders of one space (mixed retrieval).

    Args:
        task: what belongs to what.
        queries: (queries, features) in the order of ``task.queries``, any float dtype.
        documents: (documents, features) in the order of ``task.documents``.
        similarity: ``cosine`` or ``dot``.

    Raises:
        InputError: shapes that do not fit, NaN or Inf.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise InputError(
            f"Vectors of queries {tuple(queries.shape)} and of documents {tuple(documents.shape)} are not of one space."
        )
    if len(queries) != len(task.queries) or len(documents) != len(task.documents):
        raise InputError("There must be one vector for each query and each document of the task.")
    if not (torch.isfinite(queries).all() and torch.isfinite(documents).all()):
        raise InputError("The embeddings hold NaN or Inf: the model is broken or was built wrong.")
    prepare = SIMILARITIES[similarity]
    names, whole = list(task.documents), prepare(documents.double())
    run: dict[str, dict[str, float]] = {}
    for query, vector in zip(task.queries, prepare(queries.double())):
        scores = (whole @ vector).float()
        if len(scores) > DEPTH:  # with all that tie with the last: which of them stay is decided by their identifiers
            kept = (scores >= scores.topk(DEPTH).values[-1]).nonzero()[:, 0].tolist()
        else:
            kept = list(range(len(scores)))
        # A document of the query's own identifier is the query itself (BEIR's duplicate questions).
        run[query] = {names[index]: float(scores[index]) for index in kept if names[index] != query}
    return score_rankings(run, task.judgements)
