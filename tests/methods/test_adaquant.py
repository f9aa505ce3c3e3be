"""AdaQuant and the correction of biases: the card's effect on held-out inputs, and closed forms."""

from __future__ import annotations

import pytest
import torch

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method
from slimwright.methods.correction import bias_shift
from tests.methods.setups import setup


@pytest.mark.parametrize("spec", ["int4:row", "int4:g64", "int3:g64:real", "int4:g64:sym"])
def test_halves_the_error_on_inputs_it_did_not_see(spec: str) -> None:
    site = setup()
    weight, seen, held_out = site.weight[:64], site.inputs[:3072].double(), site.inputs[3072:].double()
    stats = SiteStatistics.from_inputs(seen)

    def error(**knobs: object) -> float:
        values = method("quantize/adaquant", grid=spec, **knobs).solve(weight, stats).dense()
        return float((held_out @ (values - weight).double().T).square().mean())

    assert error() < 0.5 * error(iters=0, clip="none")
    assert error() < 0.6 * error(iters=0)


@pytest.mark.parametrize("spec", ["int2:row", "int3:g64:sym"])
def test_no_row_is_worse_than_it_began(spec: str) -> None:
    site = setup(outliers=True)
    losses = [
        site.row_losses(
            method("quantize/adaquant", grid=spec, damp=0.0, iters=iters).solve(site.weight, site.stats).dense()
        )
        for iters in (0, 20)
    ]
    assert (losses[1] <= losses[0] * (1 + 1e-4)).all()


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_without_iterations_it_rounds_to_nearest(clip: str) -> None:
    site = setup()
    ours = method("quantize/adaquant", grid="int3:g64", iters=0, clip=clip).solve(site.weight, site.stats)
    theirs = method("quantize/rtn", grid="int3:g64", clip=clip).solve(site.weight, site.stats)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.params["scale"], theirs.params["scale"])


def test_the_bias_shift_is_the_least_squares_bias() -> None:
    site = setup()
    inputs = site.inputs + torch.linspace(-1, 2, 256)
    stats = SiteStatistics.from_inputs(inputs)
    value = method("quantize/rtn", grid="int2:g64").solve(site.weight, stats)
    shift = bias_shift(site.weight, value, stats)
    residual = inputs.double() @ (site.weight - value.dense()).double().T  # what the bias has to make up for
    torch.testing.assert_close(shift.double(), residual.mean(0), rtol=1e-4, atol=1e-4)
    delta = (value.dense() - site.weight).double()
    left = (residual - shift).square().sum(1).mean()
    torch.testing.assert_close((delta @ stats.centred_gram().double() * delta).sum(), left, rtol=1e-3, atol=0)


def test_knowing_that_the_bias_is_corrected_helps() -> None:
    site = setup()
    inputs = site.inputs + torch.randn(256, generator=torch.Generator().manual_seed(1))
    stats = SiteStatistics.from_inputs(inputs)

    def error(bias: bool) -> float:
        value = method("quantize/adaquant", grid="int3:g64", bias=bias).solve(site.weight, stats)
        output = inputs @ (site.weight - value.dense()).T - bias_shift(site.weight, value, stats)
        return float(output.square().mean())

    assert error(True) < 0.95 * error(False)


def test_a_bias_needs_the_mean_input() -> None:
    site = setup()
    stats = SiteStatistics(tokens=1, gram=site.stats.gram)
    with pytest.raises(InputError, match="'mean'"):
        method("quantize/adaquant", bias=True).solve(site.weight, stats)
    with pytest.raises(InputError, match="'mean'"):
        bias_shift(site.weight, method("quantize/adaquant", iters=0).solve(site.weight, stats), stats)


def test_other_grids_than_integers_are_refused() -> None:
    with pytest.raises(InputError, match="int grid"):
        method("quantize/adaquant", grid="nf4")
