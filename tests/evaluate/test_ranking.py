"""trec_eval's rules by hand and by brute force, with ties, negative grades and unjudged documents."""

import math

import numpy as np
import pytest

from slimwright.errors import InputError
from slimwright.evaluate import MAP, MRR, NDCG_AT_10, RECALL_AT_100, score_rankings
from slimwright.evaluate.ranking import average_precision, ndcg, ranked, recall, reciprocal_rank


def test_order():
    assert ranked({"a": 1.0, "b": 2.0, "c": 1.5}) == ["b", "c", "a"]
    assert ranked({"a": 1.0, "b": 1.0, "B": 1.0, "é": 1.0, "a2": 1.0}) == ["é", "b", "a2", "a", "B"]
    # Equal as float32, so the identifiers decide, although "a" is the greater as float64.
    assert 1.0 + 1e-9 > 1.0 and ranked({"a": 1.0 + 1e-9, "b": 1.0}) == ["b", "a"]
    assert ranked({"a": 1.0 + 1e-6, "b": 1.0}) == ["a", "b"]
    with pytest.raises(InputError, match="NaN"):
        ranked({"a": math.nan})


def test_by_hand():
    order = ["d1", "d2", "d3", "d4", "d5"]
    grades = {"d2": 3, "d4": 1, "d9": 2, "d1": 0, "d3": -1}
    gain = 3 / math.log2(3) + 1 / math.log2(5)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(order, grades, 10) == pytest.approx(gain / ideal)
    assert ndcg(order, grades, 2) == pytest.approx(3 / math.log2(3) / (3 + 2 / math.log2(3)))
    assert recall(order, grades, 100) == pytest.approx(2 / 3) and recall(order, grades, 3) == pytest.approx(1 / 3)
    assert reciprocal_rank(order, grades) == 0.5
    assert average_precision(order, grades) == pytest.approx((1 / 2 + 2 / 4) / 3)


def test_degenerate():
    assert ndcg(["a", "b", "c"], {"a": 2, "b": 1, "c": 0}, 10) == 1.0  # the best order
    assert ndcg(["a"], {"b": 1}, 10) == recall(["a"], {"b": 1}, 9) == reciprocal_rank(["a"], {"b": 1}) == 0.0
    assert ndcg(["a"], {"a": 0, "b": -2}, 10) == recall(["a"], {"a": 0}, 9) == average_precision(["a"], {"a": 0}) == 0.0
    assert ndcg([], {"a": 1}, 10) == average_precision([], {"a": 1}) == 0.0
    ten = [f"d{i}" for i in range(30)]
    assert ndcg(ten, {"d29": 1}, 30) > 0 == ndcg(ten, {"d29": 1}, 10)


def test_random_runs_against_brute_force():
    """Numpy's own sort and dense vectors; scores of few values force ties, grades go below zero."""
    generator = np.random.default_rng(0)
    names = np.array(sorted({f"{generator.integers(10**6):x}" for _ in range(40)}))
    run, judged, expected = {}, {}, {}
    for query in (f"q{i:03}" for i in range(60)):
        scores = np.round(generator.normal(size=len(names)), 1)
        grade = generator.integers(-1, 4, len(names))
        known = generator.random(len(names)) < 0.4
        if not known.any():
            continue
        run[query] = dict(zip(names.tolist(), scores.tolist()))
        judged[query] = {str(n): int(g) for n, g, k in zip(names, grade, known) if k}
        gain = np.where(known, np.maximum(grade, 0), 0)
        # Ascending names reversed, then a stable sort of the negated scores: equal scores by name, descending.
        reverse = np.arange(len(names))[::-1]
        order = reverse[np.argsort(-scores[reverse], kind="stable")]
        discount = 1 / np.log2(np.arange(2, len(names) + 2))
        best = np.sort(gain[known])[::-1]
        ideal = (best[:10] * discount[: len(best[:10])]).sum()
        hits = (gain[order] > 0).astype(float)
        total = hits.sum()
        expected[query] = (
            (gain[order][:10] * discount[:10]).sum() / ideal if ideal else 0.0,
            hits[:100].sum() / total if total else 0.0,
            1 / (np.argmax(hits) + 1) if total else 0.0,
            (np.cumsum(hits) / np.arange(1, len(hits) + 1) * hits).sum() / total if total else 0.0,
        )
    table = score_rankings(run, judged)
    assert list(table.names) == sorted(expected) and len(expected) > 50
    found = np.stack([table.columns[m.values] for m in (NDCG_AT_10, RECALL_AT_100, MRR, MAP)], 1)
    np.testing.assert_allclose(found, np.array([expected[query] for query in table.names]), atol=1e-12)
    renamed = {name: f"{10**6 - index:07}" for index, name in enumerate(names.tolist())}
    other = score_rankings(
        {q: {renamed[d]: s for d, s in scores.items()} for q, scores in run.items()},
        {q: {renamed[d]: g for d, g in grades.items()} for q, grades in judged.items()},
    )
    assert not np.allclose(other.columns["ndcg_at_10"], table.columns["ndcg_at_10"]), (
        "reversed names break ties otherwise"
    )


def test_which_queries_count():
    run = {"a": {"x": 1.0}, "unjudged": {"x": 1.0}}
    judged = {"a": {"x": 1}, "missing": {"x": 1}}
    assert score_rankings(run, judged).names == ("a",)
    complete = score_rankings(run, judged, complete=True)
    assert complete.names == ("a", "missing") and complete.columns["ndcg_at_10"].tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="do not belong together"):
        score_rankings(run, {"b": {"x": 1}})
