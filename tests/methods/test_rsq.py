"""Token weights and RSQ: the card's effect, closed forms, degenerate cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method
from slimwright.methods.token_weights import (
    TokenWeights,
    activation_change,
    activation_norm,
    attention_concentration,
    circularly_shifted,
    first_tokens,
    token_distance,
    token_rarity,
)
from tests.methods.setups import setup


def important_tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of S, a tenth of them drawn with another covariance, and which."""
    inputs, generator = setup().inputs.clone(), torch.Generator().manual_seed(seed)
    important = torch.randperm(4096, generator=generator)[:410]
    inputs[important] = inputs[important] @ torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    return inputs, important


@pytest.mark.parametrize("seed", range(3))
def test_important_tokens_gain_and_the_others_pay(seed: int) -> None:
    """Card, at 3 bits and weights 1 against 0.02: the error on the important tokens falls 0.316 → 0.220, on all it
    rises 0.178 → 0.241; weights that are shuffled lose the gain."""
    weight = setup().weight
    inputs, important = important_tokens(seed)
    r = torch.full((4096,), 0.02)
    r[important] = 1
    shuffled = r[torch.randperm(4096, generator=torch.Generator().manual_seed(9))]

    def errors(weights: Tensor | None) -> tuple[float, float]:
        stats = SiteStatistics.from_inputs(inputs, weights)
        delta = method("quantize/rsq").solve(weight, stats).dense() - weight
        found = [float((x @ delta.T).norm() / (x @ weight.T).norm()) for x in (inputs[important], inputs)]
        return found[0], found[1]

    plain, aware, mixed = errors(None), errors(r), errors(shuffled)
    assert aware[0] < 0.8 * plain[0]
    assert aware[1] > 1.1 * plain[1]
    assert mixed[0] > 0.97 * plain[0]


def test_both_conventions_by_hand() -> None:
    scores = torch.tensor([[0.0, 5.0, 10.0], [3.0, 3.0, 3.0]])
    paper = TokenWeights(r_min=0.2, convention="paper").of(scores)
    torch.testing.assert_close(paper, torch.tensor([[0.04, 0.36, 1.0], [1.0, 1.0, 1.0]]))
    code = TokenWeights(r_min=0.2, convention="code").of(scores)
    torch.testing.assert_close(code, torch.tensor([[1 / 3, 1.0, 5 / 3], [1.0, 1.0, 1.0]]))


def test_masked_tokens_have_no_weight_and_change_nothing() -> None:
    scores, mask = torch.tensor([[9.0, 1.0, 2.0, -7.0]]), torch.tensor([[0, 1, 1, 0]])
    for convention in ("paper", "code"):
        weights = TokenWeights(0.1, convention=convention)
        found = weights.of(scores, mask)
        assert found[0, [0, 3]].tolist() == [0, 0]
        torch.testing.assert_close(found[:, 1:3], weights.of(scores[:, 1:3]))
    assert TokenWeights().of(scores, mask * 0).tolist() == [[0, 0, 0, 0]]


def test_the_weighted_gram_is_the_gram_of_scaled_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, r = torch.randn(50, 8, generator=generator) + 1, torch.rand(50, generator=generator)
    r[:5] = 0
    stats = SiteStatistics.from_inputs(x, r.square())
    scaled = x * r[:, None]
    torch.testing.assert_close(stats.gram, scaled.T @ scaled / r.square().sum())
    torch.testing.assert_close(stats.mean, (x * r.square()[:, None]).sum(0) / r.square().sum())
    assert stats.tokens == 45
    torch.testing.assert_close(stats.absmax, x[5:].abs().amax(0))
    torch.testing.assert_close(stats.gram, SiteStatistics.from_inputs(x, 7 * r.square()).gram)
    plain, alike = SiteStatistics.from_inputs(x), SiteStatistics.from_inputs(x, torch.full((50,), 3.0))
    torch.testing.assert_close(alike.gram, plain.gram)
    torch.testing.assert_close(alike.mean, plain.mean)


def test_equal_weights_make_rsq_gptq() -> None:
    site = setup()
    assert (TokenWeights(r_min=1.0).of(torch.rand(1, 4096)) == 1).all()
    stats = SiteStatistics.from_inputs(site.inputs, torch.ones(4096))
    ours = method("quantize/rsq", r_min=1.0).solve(site.weight, stats)
    theirs = method("quantize/gptq", grid="int3:row:sym", act_order=False, clip="mse").solve(site.weight, stats)
    assert torch.equal(ours.codes, theirs.codes)


def test_scores_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = torch.softmax(torch.randn(2, 3, 5, 5, generator=generator), dim=3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    hidden, after = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    ids = torch.tensor([[1, 2, 1, 4, 4], [0, 4, 1, 1, 0]])
    found = {
        "attention": attention_concentration(attention, mask), "rarity": token_rarity(ids, mask),
        "norm": activation_norm(hidden), "change": activation_change(hidden, after),
        "distance": token_distance(hidden, mask),
    }  # fmt: skip
    real = [(sample, token) for sample in range(2) for token in range(5) if mask[sample, token]]
    for sample, token in real:
        others = [other for s, other in real if s == sample]
        expected = {
            "attention": sum(attention[sample, h, q, token] for h in range(3) for q in others),
            "rarity": -sum(ids[place] == ids[sample, token] for place in real),
            "norm": hidden[sample, token].norm(),
            "change": -(after - hidden)[sample, token].norm(),
            "distance": sum((hidden[sample, token] - hidden[sample, o]).square().sum() for o in others)
            / (len(others) - 1),
        }
        for name, value in expected.items():
            assert float(found[name][sample, token]) == pytest.approx(float(value), rel=1e-5), name


def test_first_and_last_tokens() -> None:
    mask = torch.ones(1, 64)
    assert first_tokens(mask)[0].tolist() == [1] * 8 + [0] * 56
    assert first_tokens(mask, 1 / 32, 1 / 32)[0].tolist() == [1] * 2 + [0] * 60 + [1] * 2
    padded = torch.cat([torch.zeros(1, 10), mask], dim=1)
    assert first_tokens(padded)[0].tolist() == [0] * 10 + [1] * 8 + [0] * 56


def test_shifted_sequences_hold_every_token_early() -> None:
    ids = torch.arange(16)[None]
    found = circularly_shifted(ids, 4)
    assert found.shape == (4, 16) and torch.equal(found[:1], ids)
    assert sorted(found[:, :4].flatten().tolist()) == list(range(16))
    assert torch.equal(circularly_shifted(ids, 1), ids)


def test_bad_weights_are_refused() -> None:
    x = torch.ones(3, 2)
    for bad in (torch.ones(2), torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, torch.nan, 1.0])):
        with pytest.raises(InputError, match="weights"):
            SiteStatistics.from_inputs(x, bad)
    with pytest.raises(InputError, match="samples, tokens"):
        TokenWeights().of(torch.ones(3))
    with pytest.raises(InputError, match="NaN or Inf"):
        TokenWeights().of(torch.tensor([[1.0, torch.nan]]))
