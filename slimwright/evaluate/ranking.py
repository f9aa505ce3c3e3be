"""Scores of rankings by trec_eval's rules: nDCG, recall, reciprocal rank, average precision.

Sources: usnistgov/trec_eval, ``form_res_rels.c`` (order), ``m_ndcg_cut.c``, ``m_recall.c``, ``m_recip_rank.c``,
``m_map.c``. Scores are compared as float32, documents of equal score stand in descending order of their identifier's
bytes, the gain is the grade itself (linear), and what is not judged counts as not relevant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimwright.errors import InputError
from slimwright.evaluate.table import Metric, Table

NDCG_AT_10 = Metric("ndcg_at_10", "ndcg_at_10")
RECALL_AT_100 = Metric("recall_at_100", "recall_at_100")
MRR = Metric("mrr", "reciprocal_rank")
MAP = Metric("map", "average_precision")
RANKING = (NDCG_AT_10, RECALL_AT_100, MRR, MAP)


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Documents from the best to the worst: by score as float32, then by identifier, both descending.

    Raises:
        InputError: a score is NaN.
    """
    rounded = {document: np.float32(score) for document, score in scores.items()}
    if any(np.isnan(score) for score in rounded.values()):
        raise InputError("A score is NaN: the ranking has no order.")
    return sorted(rounded, key=lambda document: (rounded[document], document.encode()), reverse=True)


def ndcg(order: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """Discounted cumulative gain of the first k over that of the best order of all judged documents; 0 without gain."""

    def discounted(gains: Sequence[int]) -> float:
        return sum(max(gain, 0) / np.log2(rank + 2) for rank, gain in enumerate(gains[:k]))

    ideal = discounted(sorted(grades.values(), reverse=True))
    return float(discounted([grades.get(document, 0) for document in order[:k]]) / ideal) if ideal else 0.0


def recall(order: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    """The share of the relevant documents (grade 1 or more) that are among the first k; 0 if none is relevant."""
    relevant = {document for document, grade in grades.items() if grade >= 1}
    return len(relevant.intersection(order[:k])) / len(relevant) if relevant else 0.0


def reciprocal_rank(order: Sequence[str], grades: Mapping[str, int]) -> float:
    """1 / rank of the first relevant document; 0 if none is in the ranking."""
    return next((1 / rank for rank, document in enumerate(order, 1) if grades.get(document, 0) >= 1), 0.0)


def average_precision(order: Sequence[str], grades: Mapping[str, int]) -> float:
    """The mean over the relevant documents of the precision at their rank; one that is not in the ranking gives 0."""
    relevant, found, total = sum(grade >= 1 for grade in grades.values()), 0, 0.0
    for rank, document in enumerate(order, 1):
        if grades.get(document, 0) >= 1:
            found += 1
            total += found / rank
    return total / relevant if relevant else 0.0


def score_rankings(
    run: Mapping[str, Mapping[str, float]], judgements: Mapping[str, Mapping[str, int]], complete: bool = False
) -> Table:
    """One row per query, by its identifier, with the columns that :data:`RANKING` needs.

    Args:
        run: scores of documents by query.
        judgements: grades of documents by query.
        complete: all judged queries count, those without a ranking with 0 (``trec_eval -c``); else only those in both.

    Raises:
        InputError: no query is in both, or a score is NaN.
    """
    queries = sorted(judgements if complete else judgements.keys() & run.keys())
    if not judgements.keys() & run.keys():
        raise InputError("No query of the ranking has a judgement: the queries' identifiers do not belong together.")
    columns: dict[str, list[float]] = {
        "ndcg_at_10": [], "recall_at_100": [], "reciprocal_rank": [], "average_precision": [],
    }  # fmt: skip
    for query in queries:
        order, grades = ranked(run.get(query, {})), judgements[query]
        columns["ndcg_at_10"].append(ndcg(order, grades, 10))
        columns["recall_at_100"].append(recall(order, grades, 100))
        columns["reciprocal_rank"].append(reciprocal_rank(order, grades))
        columns["average_precision"].append(average_precision(order, grades))
    return Table.of(queries, **columns)
