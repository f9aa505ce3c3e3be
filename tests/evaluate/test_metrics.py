"""Perplexity, bits per byte, accuracy and paired intervals against closed forms, scipy and brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import bootstrap

from slimwright.errors import InputError
from slimwright.evaluate import (
    ACCURACY,
    BITS_PER_BYTE,
    KL,
    PERPLEXITY,
    LanguageQuality,
    Metric,
    Table,
    compare_logits,
    interval,
    paired_interval,
    perplexity,
    token_bytes,
    token_nats,
)
from slimwright.evaluate.accuracy import correct

# -- perplexity and bits per byte --------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [5, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_equal_scipy(cells, dtype, monkeypatch):
    monkeypatch.setattr(perplexity, "_CELLS", cells)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(11, 37, generator=generator)).to(dtype)
    targets = torch.randint(37, (11,), generator=generator)
    expected = -log_softmax(logits.double().numpy(), axis=1)[np.arange(11), targets.numpy()]
    np.testing.assert_allclose(token_nats(logits, targets).numpy(), expected, rtol=1e-12)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    quality = LanguageQuality()
    for document in range(3):
        zeros = torch.zeros(4 + document, 50)
        targets = torch.arange(4 + document)
        quality.add(document, zeros, zeros, targets=targets, target_bytes=torch.full((4 + document,), 2))
    found = quality.result()
    for when in ("before", "after"):
        assert found["perplexity"][when] == pytest.approx(dict.fromkeys(("value", "low", "high"), 50.0))
        assert found["bits_per_byte"][when]["value"] == pytest.approx(math.log2(50) / 2)
    assert found["perplexity"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_quality_with_targets():
    generator = torch.Generator().manual_seed(1)
    quality, sums = LanguageQuality(), []
    for document, tokens in enumerate((20, 30, 25, 40)):
        x = 2 * torch.randn(tokens, 30, generator=generator)
        y = x + 0.5 * torch.randn(tokens, 30, generator=generator)
        targets = torch.randint(30, (tokens,), generator=generator)
        nbytes = torch.randint(0, 6, (tokens,), generator=generator)
        mask = torch.arange(tokens) % 5 != 0
        x[0], targets[0] = math.nan, 10**9  # what is masked may hold anything
        quality.add(document, x, y, mask, targets, nbytes)
        rows, chosen = np.flatnonzero(mask), targets[mask].numpy()
        sums.append(
            [-log_softmax(part.double().numpy(), axis=1)[rows, chosen].sum() for part in (x, y)]
            + [len(rows), int(nbytes[mask].sum())]
        )
    before, after, tokens, nbytes = np.array(sums).T
    found = quality.result()
    assert found["tokens"] == tokens.sum() and found["documents"] == 4
    for when, nats in (("before", before), ("after", after)):
        assert found["perplexity"][when]["value"] == pytest.approx(math.exp(nats.sum() / tokens.sum()))
        expected = interval(nats, tokens)
        assert found["perplexity"][when]["low"] == pytest.approx(math.exp(expected.low))
        assert found["bits_per_byte"][when] == pytest.approx(interval(nats / math.log(2), nbytes).to_json())
    difference = found["perplexity"]["difference"]
    assert difference["value"] == pytest.approx(
        found["perplexity"]["after"]["value"] - found["perplexity"]["before"]["value"]
    )
    assert difference["low"] < difference["value"] < difference["high"]


def test_targets_go_with_their_bytes_and_with_all_documents():
    logits, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(InputError, match="only one was given"):
        LanguageQuality().add("a", logits, logits, targets=targets)
    quality = LanguageQuality()
    quality.add("a", logits, logits)
    with pytest.raises(InputError, match="some of the documents only"):
        quality.add("b", logits, logits, targets=targets, target_bytes=targets)


def test_bad_targets():
    with pytest.raises(InputError, match="outside the model's vocabulary of 4"):
        token_nats(torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        token_nats(torch.zeros(2, 4), torch.tensor([0, -1]))
    with pytest.raises(InputError, match="NaN"):
        token_nats(torch.tensor([[0.0, math.nan]]), torch.tensor([0]))
    with pytest.raises(InputError, match="shapes"):
        token_nats(torch.zeros(2, 4), torch.tensor([0]))


def test_bytes_of_tokens_by_hand():
    text = "  né 🙂x "
    # Spaces before `n`; é is two bytes; the emoji's four bytes are three tokens; the last space is skipped.
    offsets = [(0, 0), (2, 3), (3, 4), (5, 6), (5, 6), (5, 6), (6, 7), (0, 0)]
    assert token_bytes(text, offsets).tolist() == [0, 3, 2, 5, 0, 0, 2, 0]
    assert token_bytes(text, offsets).sum() == len(text.encode())
    assert token_bytes("", []).tolist() == [] and token_bytes("", [(0, 0)]).tolist() == [0]
    with pytest.raises(InputError, match="outside the text"):
        token_bytes("ab", [(0, 3)])


# -- accuracy ----------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    logits = torch.tensor([[1.0, 2.0], [3.0, 3.0], [0.0, -1.0], [5.0, 6.0]])
    right = correct(logits, torch.tensor([1, 0, 1, 0]))
    assert right.tolist() == [True, True, False, False]
    table = Table.of(list("abcd"), correct=right.numpy())
    assert ACCURACY.score(table).value == 0.5
    with pytest.raises(InputError, match="run from 0 to 2, but the model has 2 classes"):
        correct(logits, torch.tensor([1, 0, 2, 0]))
    with pytest.raises(InputError, match="shapes"):
        correct(logits, torch.tensor([1, 0]))
    with pytest.raises(InputError, match="NaN"):
        correct(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))


# -- pairs -------------------------------------------------------------------------------------------------------


def test_paired_interval_equals_scipys_percentile_bootstrap():
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 500, 1500).astype(float)
    before = weights * generator.gamma(2.0, 1.0, 1500)
    after = before + weights * generator.normal(0.02, 0.05, 1500)
    found = paired_interval((before, weights), (after, weights), resamples=4000, transform=np.exp)
    expected = bootstrap(
        (before, after, weights),
        lambda a, b, w, axis=-1: np.exp(b.sum(axis) / w.sum(axis)) - np.exp(a.sum(axis) / w.sum(axis)),
        paired=True,
        method="percentile",
        n_resamples=4000,
        batch=100,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    assert found.value == pytest.approx(np.exp(after.sum() / weights.sum()) - np.exp(before.sum() / weights.sum()))
    alone = interval(before, weights)
    assert width < 0.5 * (np.exp(alone.high) - np.exp(alone.low)), "what both find hard cancels"


def test_paired_intervals_cover_the_truth():
    generator = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        weights = generator.integers(100, 300, 30)
        hard = generator.normal(3, 1, 30)
        before, after = (weights * (hard + generator.normal(shift, 0.02, 30)) for shift in (0, 0.01))
        found = paired_interval((before, weights), (after, weights), seed=trial, resamples=400)
        hits += found.low <= 0.01 <= found.high
    assert 0.9 <= hits / 200 <= 0.99


def test_metrics_on_tables():
    before = Table.of(["a", "b", "empty"], nats=[4.0, 6.0, 0.0], tokens=[2, 2, 0], bytes=[8, 12, 0])
    after = Table.of(["a", "b", "empty"], nats=[5.0, 7.0, 0.0], tokens=[2, 2, 0], bytes=[8, 12, 0])
    assert PERPLEXITY.score(before).value == pytest.approx(math.exp(2.5))
    assert BITS_PER_BYTE.score(before).value == pytest.approx(10 / math.log(2) / 20)
    assert PERPLEXITY.difference(before, after).value == pytest.approx(math.exp(3) - math.exp(2.5))
    found = BITS_PER_BYTE.difference(before, after)
    # One nat more in each: of the draws (aa, ab, ba, bb) the extremes are 2 / 16 and 2 / 24 nats per byte.
    assert (found.low, found.high) == pytest.approx((2 / 24 / math.log(2), 2 / 16 / math.log(2)))
    assert not KL.within(before)
    with pytest.raises(InputError, match="'kl' needs the columns"):
        KL.score(before)
    with pytest.raises(InputError, match="other documents"):
        PERPLEXITY.difference(before, Table.of(["a", "c", "empty"], nats=[1, 2, 0], tokens=[1, 1, 0]))
    with pytest.raises(InputError, match="some are empty"):
        PERPLEXITY.difference(before, Table.of(["a", "b", "empty"], nats=[1, 2, 3], tokens=[1, 1, 1]))
    with pytest.raises(InputError, match="3 rows"):
        Table.of(["a", "b", "c"], nats=[1.0])
    with pytest.raises(InputError, match="same documents twice"):
        paired_interval(([1, 2], [1, 1]), ([1, 2, 3], [1, 1, 1]))
    again = Table.from_json(before.to_json())
    assert again.names == before.names and all((again.columns[c] == before.columns[c]).all() for c in before.columns)


def test_a_metric_without_weights_is_a_mean():
    table = Table.of(list("abc"), score=[0.0, 1.0, 0.5])
    assert Metric("score", "score").score(table).value == 0.5


def test_tables_of_a_quality_hold_what_was_compared():
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 9, generator=generator), torch.randn(12, 9, generator=generator)
    quality = LanguageQuality()
    quality.add("a", x[:5], y[:5])
    quality.add("b", x[5:], y[5:])
    before, after = quality.tables()
    assert before.names == after.names == ("a", "b") and set(before.columns) == {"tokens"}
    np.testing.assert_allclose(
        after.columns["kl"], [compare_logits(x[:5], y[:5])["kl"].sum(), compare_logits(x[5:], y[5:])["kl"].sum()]
    )
