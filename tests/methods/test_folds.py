"""AWQ, SmoothQuant and SmoothQuant+ against their cards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, WeightSolver, method
from slimwright.methods.folding import candidate_losses, chosen
from slimwright.weights import parse_grid
from tests.methods.setups import Setup, setup

ROUND = method("quantize/rtn", grid="int4:g64", clip="none")


def rounded(site: Setup, scale: Tensor, solver: WeightSolver = ROUND) -> Tensor:
    return solver.solve(site.weight * scale, SiteStatistics.none()).dense() / scale


def test_awq_on_outliers() -> None:
    """The card: relative output error 0.0948 without, 0.0532 with the scales (its own draw of the setup)."""
    site = setup(outliers=True)
    scale = method("fold/awq").scales([site.weight], site.stats, ROUND)
    assert site.output_error(rounded(site, torch.ones(256))) == pytest.approx(0.0948, rel=0.1)
    assert site.output_error(rounded(site, scale)) == pytest.approx(0.0532, rel=0.15)
    assert site.output_error(rounded(site, scale)) < 0.75 * site.output_error(rounded(site, torch.ones(256)))


def test_awq_takes_the_best_ratio_and_never_loses() -> None:
    for site in (setup(), setup(outliers=True)):
        fold = method("fold/awq")
        errors = [site.output_error(rounded(site, fold.trial(site.stats, index / 20))) for index in range(20)]
        found = site.output_error(rounded(site, fold.scales([site.weight], site.stats, ROUND)))
        assert found == pytest.approx(min(errors), rel=1e-4)
        assert found <= errors[0]


def test_awq_s_first_ratio_is_no_scale() -> None:
    site = setup(outliers=True)
    assert (method("fold/awq").trial(site.stats, 0.0) == 1).all()
    assert (method("fold/awq", n_grid=1).scales([site.weight], site.stats, ROUND) == 1).all()


def test_awq_judges_all_consumers_together() -> None:
    site = setup(outliers=True)
    parts = list(site.weight.split([64, 64, 128]))
    fold = method("fold/awq")
    together = fold.scales(parts, site.stats, ROUND)
    assert torch.equal(together, fold.scales([site.weight], site.stats, ROUND))


@pytest.mark.parametrize("spec", ["int3:g64", "int3:g48", "int2:row", "int3:g64:sym"])
def test_the_clip_search_is_brute_force_on_the_inputs(spec: str) -> None:
    """The least error of each group's own part of the output, by running the inputs through it."""
    site, grid = setup(outliers=True), parse_grid(spec)
    weight = site.weight[:6]
    value = method("quantize/awq", grid=grid).solve(weight, site.stats)
    found = value.dense()
    size = grid.group or 256
    for row, start in itertools.product(range(6), range(0, 256, size)):
        part, x = weight[row : row + 1, start : start + size], site.inputs[:, start : start + size].double()
        own = parse_grid(f"{spec.split(':', maxsplit=1)[0]}:row{':sym' if grid.symmetric else ''}")

        def error(values: Tensor, x: Tensor = x, part: Tensor = part) -> float:
            return float((x @ (values - part).double().T).square().sum())

        trials = []
        for index in range(10):
            clipped = part.clamp(-part.abs().max() * (1 - index / 20), part.abs().max() * (1 - index / 20))
            trials.append(error(own.round(part, own.fit(clipped))))
        assert error(found[row : row + 1, start : start + size]) == pytest.approx(min(trials), rel=1e-3)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_clip_search_beats_min_max(outliers: bool) -> None:
    site = setup(outliers)
    clipped = method("quantize/awq", grid="int3:g64").solve(site.weight, site.stats).dense()
    plain = method("quantize/rtn", grid="int3:g64", clip="none").solve(site.weight, site.stats).dense()
    assert site.loss(clipped) < 0.95 * site.loss(plain)


def test_without_shrinking_the_clip_search_is_min_max() -> None:
    site = setup()
    clipped = method("quantize/awq", grid="int3:g64", max_shrink=0.0).solve(site.weight, site.stats)
    assert torch.equal(
        clipped.codes, method("quantize/rtn", grid="int3:g64", clip="none").solve(site.weight, site.stats).codes
    )


def test_smoothquant_s_formula() -> None:
    """Two linears, three inputs, by hand."""
    x = torch.tensor([[4.0, -1.0, 0.25], [-16.0, 0.5, 0.0]])
    weights = [torch.tensor([[1.0, 0.5, -4.0]]), torch.tensor([[-0.25, 2.0, 1.0]])]
    stats = SiteStatistics.from_inputs(x)
    for alpha, expected in ((0.5, [4.0, 0.5**0.5, 0.25]), (0.0, [1.0, 0.5, 0.25]), (1.0, [16.0, 1.0, 0.25])):
        for name in ("fold/smoothquant", "fold/smoothquant_plus"):
            scale = method(name, alpha=alpha).scales(weights, stats, ROUND)
            torch.testing.assert_close(scale, torch.tensor(expected))
            assert (method(name, alpha=alpha, identity=True).scales(weights, stats, ROUND) == 1).all()


def test_smoothquant_plus_on_outliers() -> None:
    """The card: 0.0948 without; 0.0540, 0.0544, 0.0874, 0.1475 with α = 0.25, 0.5, 0.75, 1 (its own draw)."""
    site = setup(outliers=True)
    for alpha, card in ((0.25, 0.0540), (0.5, 0.0544), (0.75, 0.0874), (1.0, 0.1475)):
        scale = method("fold/smoothquant_plus", alpha=alpha).scales([site.weight], site.stats, ROUND)
        assert site.output_error(rounded(site, scale)) == pytest.approx(card, rel=0.25)


def test_smoothquant_plus_chooses_one_strength_for_all_groups() -> None:
    fold = method("fold/smoothquant_plus", steps=10)
    candidates = fold.candidates()
    assert [candidate.alpha for candidate in candidates] == [index / 10 for index in range(11)]
    sites = [setup(outliers=True), setup(outliers=True, seed=1)]
    losses = [candidate_losses(fold, [site.weight], site.stats, ROUND) for site in sites]
    alpha = chosen(fold, losses).alpha
    assert 0 < alpha < 1
    sums = [first + second for first, second in zip(*losses, strict=True)]
    for candidate, found in zip(candidates, sums, strict=True):
        error = 0.0
        for site in sites:
            scale = method("fold/smoothquant_plus", alpha=candidate.alpha).scales([site.weight], site.stats, ROUND)
            error += float((site.inputs @ (rounded(site, scale) - site.weight).T).square().sum(1).mean())
        assert found == pytest.approx(error, rel=1e-3)
        assert sums[candidates.index(chosen(fold, losses))] <= found
    assert chosen(method("fold/smoothquant_plus", steps=2), [[2.0, 1.0, 1.0]]).alpha == 0.5
    assert method("fold/smoothquant_plus", steps=0, alpha=0.3).candidates() == (
        method("fold/smoothquant_plus", steps=0, alpha=0.3),
    )


def test_choosing_needs_a_gram() -> None:
    site = setup()
    with pytest.raises(InputError, match="'gram'"):
        candidate_losses(
            method("fold/smoothquant_plus"), [site.weight], SiteStatistics(absmax=site.stats.absmax), ROUND
        )
