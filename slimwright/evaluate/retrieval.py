"""Retrieval tasks: one made of the standard library's held-out modules, or a user's in BEIR's layout; their scoring."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimwright.calibrate.data import Document
from slimwright.errors import InputError
from slimwright.evaluate.documents import by_name
from slimwright.evaluate.ranking import score_rankings
from slimwright.evaluate.table import Table

QUERIES = 1000
DOCUMENTS = 1400
DOCUMENT_CHARACTERS = 400
MOST_OF_A_MODULE = 320
SHORTEST_QUERY = 3  # words
SHORTEST_DOCUMENT = 60  # characters
DEPTH = 1000
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

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
def standard_library_task(most_queries: int = QUERIES, most_documents: int = DOCUMENTS) -> RetrievalTask:
    """Words → code, on the held-out modules of the running Python's standard library.

    Documents are the passages of at most 400 characters that the source of functions and methods is cut into at line
    ends, without docstrings and comments. The query of a function's first passage is the first paragraph of its
    docstring; of a function without one, the words of its name and parameters, and then the passage lacks that line.
    The query of any other passage is the first comment in it; passages without one are documents that belong to no
    query. At most 320 passages of a module are taken, and 1,000 queries and 1,400 documents in all (or as many as asked
    for), in the order of the identifiers' hashes.
    Texts that occur twice (queries or passages) are left out altogether, since no ranking could tell them apart; so are
    queries of fewer than three words and passages of fewer than 60 characters.

    No passage has two queries, so that queries may be drawn as if they were independent. Nothing is random: a version
    of Python gives the same task on every machine.
    """
    from slimwright.zoo.text import standard_library

    found: list[Passage] = []
    for module in standard_library("heldout"):
        if module.path.endswith(".py"):
            own = [Passage(f"{module.path}:{p.name}", p.query, p.code) for p in _passages(module.text)]
            found += sorted(own, key=_by_hash)[:MOST_OF_A_MODULE]
    codes, asked = Counter(p.code for p in found), Counter(p.query for p in found)
    usable = sorted((p for p in found if codes[p.code] == 1 and len(p.code) >= SHORTEST_DOCUMENT), key=_by_hash)
    answers = [p for p in usable if asked[p.query] == 1 and len(p.query.split()) >= SHORTEST_QUERY][:most_queries]
    names = {p.name for p in answers}
    others = [p for p in usable if p.name not in names][: most_documents - len(answers)]
    return RetrievalTask(
        {f"words of {p.name}": p.query for p in answers},
        {p.name: p.code for p in sorted(answers + others)},
        {f"words of {p.name}": {p.name: 1} for p in answers},
    )


class Passage(NamedTuple):
    """A piece of a function: its identifier, the words that ask for it (or none), and its code."""

    name: str
    query: str
    code: str


def _by_hash(passage: Passage) -> bytes:
    return hashlib.sha256(passage.name.encode()).digest()


def _passages(source: str) -> Iterator[Passage]:
    """The passages of a module's functions and methods; a function inside a function is part of it. Of functions of one
    name the last counts, as in Python."""
    lines, comments = source.splitlines(), _comments(source)
    found: dict[str, list[Passage]] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in getattr(node, "body", []):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                doc = ast.get_docstring(child, clean=False)
                if len(child.body) > (doc is not None):
                    found[prefix + child.name] = _cut(prefix + child.name, child, doc, lines, comments)

    visit(ast.parse(source), "")
    for passages in found.values():
        yield from passages


def _comments(source: str) -> dict[int, tuple[int, str]]:
    """Column and words of the comment of each line, by number (from 1), that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: (t.start[1], t.string.lstrip("#: ").strip()) for t in tokens if t.type == tokenize.COMMENT}


def _cut(
    name: str,
    function: ast.FunctionDef | ast.AsyncFunctionDef,
    doc: str | None,
    lines: Sequence[str],
    comments: Mapping[int, tuple[int, str]],
) -> list[Passage]:
    """A function's passages, each with the words that ask for it, see :func:`standard_library_task`; a comment is a
    whole line or several in a row."""
    within: list[ast.AST] = [node for node in ast.walk(function) if _documented(node)]
    inner = {n for node in within for n in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}  # type: ignore[attr-defined]
    first = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split()) if doc else ""
    start = function.lineno
    if not first and function.body[0].lineno > start:
        first, start = _words_of(name, function.args), function.body[0].lineno
    kept: list[tuple[str, str]] = []  # a line of code and the words above it
    above = ""
    for number in range(start, (function.end_lineno or function.lineno) + 1):
        line = lines[number - 1]
        column, words = comments.get(number, (len(line), ""))
        code = line[:column].rstrip()
        if code and number not in inner:
            kept.append((code, above))
            above = ""
        elif words and not code:
            above = f"{above} {words}".strip()
    dedented = textwrap.dedent("\n".join(line for line, _ in kept)).split("\n")
    made: list[list[tuple[str, str]]] = []
    room = 0
    for line, (_, words) in zip(dedented, kept, strict=True):
        if len(line) + 1 > room:
            made.append([])
            room = DOCUMENT_CHARACTERS
        made[-1].append((line[:DOCUMENT_CHARACTERS], words))
        room -= len(line) + 1
    passages = []
    for index, part in enumerate(made):
        enough = (words for _, words in part if len(words.split()) >= SHORTEST_QUERY and not _is_code(words))
        query = first if index == 0 and len(first.split()) >= SHORTEST_QUERY else next(enough, "")
        label = name if index == 0 else f"{name} [{index + 1}]"
        passages.append(Passage(label, query, "\n".join(line for line, _ in part)))
    return passages


def _words_of(name: str, parameters: ast.arguments) -> str:
    """The words that a function's name, its class's and its parameters' are made of."""
    given = [p.arg for p in (*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs)]
    names = [*name.split("."), *(p for p in given if p not in ("self", "cls"))]
    return " ".join(word.lower() for found in names for word in _WORDS.findall(found))


def _is_code(comment: str) -> bool:
    """Whether a comment is code that was put aside."""
    try:
        ast.parse(comment)
    except SyntaxError:
        return False
    return True


def _documented(node: ast.AST) -> bool:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None


def task_of_pairs(found: Sequence[Document]) -> RetrievalTask:
    """First texts of pairs as queries, their second texts as documents; at most 1,000 queries and 1,400 documents, in
    the order of the names' hashes. Pairs that share a text are joined: a query may have several documents."""
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
