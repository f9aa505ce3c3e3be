"""Metrics against scipy and closed forms; coverage of the intervals."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import bootstrap, entropy

from slimwright.errors import InputError
from slimwright.evaluate import (
    EncoderQuality,
    LanguageQuality,
    compare_logits,
    cosine_similarity,
    divergence,
    interval,
    mean_pool,
)


def logits(tokens, vocabulary, seed, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(tokens, vocabulary, generator=generator)
    return x, x + noise * torch.randn(tokens, vocabulary, generator=generator)


# -- divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cells", [7, 64, 1 << 20])
def test_kl_equals_scipy(dtype, cells, monkeypatch):
    monkeypatch.setattr(divergence, "_CELLS", cells)  # tiles of part of a row, of a few rows, of everything
    x, y = (part.to(dtype) for part in logits(9, 33, 0, noise=2))
    found = compare_logits(x, y)
    p, q = (np.exp(log_softmax(part.double().numpy(), axis=1)) for part in (x, y))
    np.testing.assert_allclose(found["kl"].numpy(), entropy(p, q, axis=1), rtol=1e-10, atol=1e-14)
    assert found["top1_agreement"].tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert 0 < found["top1_agreement"].sum() < 9


def test_kl_of_two_entries_has_a_closed_form():
    p, q = 0.9, 0.2
    x = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64) + 5
    y = torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64) - 80
    found = compare_logits(x, y)
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert found["kl"].item() == pytest.approx(expected, rel=1e-12)
    assert found["top1_agreement"].tolist() == [False]


def test_equal_logits_diverge_by_exactly_nothing_and_small_steps_by_their_square():
    x, _ = logits(50, 400, 1)
    assert compare_logits(x, x.clone())["kl"].abs().max() == 0
    step = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1e-5
    p = torch.softmax(x.double(), 1)
    second_order = 0.5 * ((p * step**2).sum(1) - (p * step).sum(1) ** 2)
    torch.testing.assert_close(compare_logits(x.double(), x.double() + step)["kl"], second_order, rtol=1e-3, atol=1e-16)


def test_far_apart_logits_stay_finite():
    x = torch.tensor([[0.0, 1e4], [3e38, -3e38]])
    found = compare_logits(x, x.flip(1))["kl"]
    assert found[0] == 1e4 and found[1] == pytest.approx(6e38)


def test_masked_tokens_do_not_count_and_may_hold_anything():
    x, y = logits(6, 10, 3)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    whole = compare_logits(x, y)["kl"][mask.bool()]
    x[2], y[4] = math.nan, math.inf
    assert torch.equal(compare_logits(x, y, mask)["kl"], whole)
    assert len(compare_logits(x, y, torch.zeros(6))["kl"]) == 0


def test_equal_maxima_go_to_the_first():
    found = compare_logits(torch.tensor([[1.0, 1.0, 0.0]] * 2), torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
    assert found["top1_agreement"].tolist() == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["reference", "candidate"])
def test_broken_logits_are_refused(value, which):
    pair = dict(zip(("reference", "candidate"), logits(4, 8, 4)))
    pair[which][2, 5] = value
    with pytest.raises(InputError, match=f"logits of the {which} hold NaN or Inf"):
        compare_logits(**pair)


def test_unlike_shapes_are_refused():
    x, y = logits(4, 8, 5)
    with pytest.raises(InputError, match=r"\(4, 8\) and \(4, 7\)"):
        compare_logits(x, y[:, :7])
    with pytest.raises(InputError, match="mask"):
        compare_logits(x, y, torch.ones(5))


# -- bootstrap ---------------------------------------------------------------------------------------------------


def test_interval_equals_scipys_percentile_bootstrap():
    generator = np.random.default_rng(0)
    weights = generator.integers(50, 500, 2000).astype(float)
    values = weights * generator.gamma(2.0, 0.01, 2000)
    found = interval(values, weights, resamples=4000)
    expected = bootstrap(
        (values, weights),
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        batch=100,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.value == pytest.approx(values.sum() / weights.sum())
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)
    assert interval(values, weights) == interval(values, weights) != interval(values, weights, seed=1)


@pytest.mark.parametrize(("documents", "least"), [(4, 0.85), (8, 0.88), (40, 0.91)])
def test_intervals_cover_the_truth(documents, least):
    # Documents of unequal length whose mean loss varies; the truth is the ratio of expectations.
    generator = np.random.default_rng(documents)
    trials = 300
    hits = 0
    for trial in range(trials):
        weights = generator.integers(100, 300, documents)
        values = weights * (0.05 + 0.01 * generator.standard_normal(documents))
        found = interval(values, weights, seed=trial, resamples=400)
        hits += found.low <= 0.05 <= found.high
    assert least <= hits / trials <= 0.99


def test_interval_of_equal_documents_is_a_point():
    found = interval([0.1 * n for n in (3, 7, 11)], [3, 7, 11])
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 1e-15
    assert found.to_json() == {"value": found.value, "low": found.low, "high": found.high}


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([1.0], [2.0], "at least two documents"),
        ([1.0, 0.0], [2.0, 0.0], "at least two documents"),
        ([1.0, 2.0], [1.0], "one length"),
        ([1.0, math.nan], [1.0, 1.0], "NaN"),
        ([1.0, 2.0], [1.0, -1.0], "negative"),
    ],
)
def test_bad_documents(values, weights, message):
    with pytest.raises(InputError, match=message):
        interval(values, weights)


# -- cosine ------------------------------------------------------------------------------------------------------


def test_cosine_closed_forms():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1e-30, 0.0], [3e38, 3e38]])
    y = torch.tensor([[4.0, 3.0], [-2.0, 0.0], [0.0, 7.0], [0.0, 0.0], [1.0, 0.0], [2e-38, 0.0], [3e38, 0.0]])
    expected = torch.tensor([24 / 25, -1, 0, 1, 0, 1, math.sqrt(0.5)], dtype=torch.float64)
    torch.testing.assert_close(cosine_similarity(x, y), expected)


def test_mean_pool_ignores_what_is_masked():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [math.nan, math.inf]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]
    assert mean_pool(hidden[:, :2]).tolist() == [[2.0, 4.0]]
    with pytest.raises(InputError, match="no token that counts"):
        mean_pool(hidden, torch.zeros(1, 3))
    with pytest.raises(InputError, match="does not fit"):
        mean_pool(hidden, torch.ones(1, 2))


def test_cosine_refuses_nan():
    with pytest.raises(InputError, match="candidate hold NaN or Inf"):
        cosine_similarity(torch.ones(3), torch.tensor([1.0, math.nan, 1.0]))


# -- quality -----------------------------------------------------------------------------------------------------


def test_language_quality_is_over_tokens_and_parts_of_documents_join():
    x, y = logits(60, 40, 6)
    mask = torch.arange(60) % 7 != 0
    found = LanguageQuality()
    for start, end, document in ((0, 10, "a"), (10, 25, "b"), (25, 40, "a"), (40, 60, "c")):
        found.add(document, x[start:end], y[start:end], mask[start:end])
    compared = compare_logits(x, y, mask)
    result = found.result()
    assert result["tokens"] == int(mask.sum()) and result["documents"] == 3
    assert result["kl"]["value"] == pytest.approx(compared["kl"].mean().item())
    assert result["top1_agreement"]["value"] == pytest.approx(compared["top1_agreement"].double().mean().item())
    label = np.array([0] * 10 + [1] * 15 + [0] * 15 + [2] * 20)[mask.numpy()]
    sums = [compared["kl"].numpy()[label == document].sum() for document in range(3)]
    assert result["kl"] == pytest.approx(interval(sums, np.bincount(label)).to_json())
    assert result == found.result()


def test_one_document_is_cut_into_pieces():
    x, y = logits(640, 30, 7)
    found = LanguageQuality()
    found.add("only", x[:333], y[:333])
    found.add("only", x[333:], y[333:])
    result = found.result()["kl"]
    sums = compare_logits(x, y)["kl"].numpy().reshape(32, 20).sum(1)
    assert result == pytest.approx(interval(sums, [20] * 32).to_json())
    assert result["low"] < result["value"] < result["high"]


def test_no_tokens_are_refused():
    found = LanguageQuality()
    x, y = logits(3, 5, 8)
    found.add("a", x, y, torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match=r"at least two tokens .* there are 1"):
        found.result()


def test_encoder_quality():
    generator = torch.Generator().manual_seed(9)
    found = EncoderQuality()
    expected = []
    for document in range(12):
        x = torch.randn(5, 16, generator=generator)
        y = x + 0.2 * torch.randn(5, 16, generator=generator)
        found.add(document, x, y, torch.tensor([1, 1, 1, 0, 0]))
        expected.append(torch.cosine_similarity(x[:3].mean(0), y[:3].mean(0), dim=0).item())
    result = found.result()
    assert result["cosine_mean"]["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert result["cosine_mean"]["low"] < result["cosine_mean"]["value"] < result["cosine_mean"]["high"]
    assert result["cosine_min"] == pytest.approx(dict.fromkeys(("value", "low", "high"), min(expected)), abs=1e-6)
    assert result["documents"] == 12
    with pytest.raises(InputError, match="added twice"):
        found.add(3, torch.ones(4), torch.ones(4))
    with pytest.raises(InputError, match="at least two texts"):
        EncoderQuality().result()
    with pytest.raises(InputError, match="alike"):
        found.add("new", torch.ones(4), torch.ones(5))
