"""Contract of every registered fold."""

import pytest
import torch

from slimwright.errors import InputError
from slimwright.methods import GroupFold, SiteStatistics, method, methods

FOLDS = [name for name, cls in methods().items() if issubclass(cls, GroupFold)]
SOLVER = method("quantize/rtn", grid="int4:g64", clip="none")


def weights(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 128, generator=generator).to(dtype) for rows in (24, 8)]


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 128, generator=generator) + 0.3
    x[:, torch.tensor([5, 77])] *= 20
    return x


def test_there_are_folds() -> None:
    assert {"fold/awq", "fold/smoothquant", "fold/smoothquant_plus"} <= set(FOLDS)


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_positive_and_repeatable(name: str, dtype: torch.dtype) -> None:
    given, stats = weights(dtype), SiteStatistics.from_inputs(inputs())
    before = [weight.clone() for weight in given]
    scale = method(name).scales(given, stats, SOLVER)
    assert scale.shape == (128,) and scale.dtype == torch.float32
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(method(name).scales(given, stats, SOLVER), scale)
    assert all(torch.equal(weight, old) for weight, old in zip(given, before, strict=True))
    assert len(scale.unique()) > 1


@pytest.mark.parametrize("name", FOLDS)
def test_inputs_of_one_channel_share_a_factor(name: str) -> None:
    channels = torch.arange(128) // 64 * 32 + torch.arange(128) % 32  # two heads read each
    scale = method(name).scales(weights(), SiteStatistics.from_inputs(inputs()), SOLVER, channels)
    for channel in range(64):
        assert len(scale[channels == channel].unique()) == 1
    assert len(scale.unique()) > 1


@pytest.mark.parametrize("name", FOLDS)
def test_inputs_that_were_never_seen_keep_a_factor_of_one(name: str) -> None:
    x = inputs()
    x[:, 9] = 0
    scale = method(name).scales(weights(), SiteStatistics.from_inputs(x), SOLVER)
    assert scale[9] == 1
    assert (method(name).scales(weights(), SiteStatistics.from_inputs(x * 0), SOLVER) == 1).all()


@pytest.mark.parametrize("name", FOLDS)
def test_bad_input_is_refused(name: str) -> None:
    stats = SiteStatistics.from_inputs(inputs())
    fold = method(name)
    with pytest.raises(InputError, match="needs the statistic"):
        fold.scales(weights(), SiteStatistics.none(), SOLVER)
    with pytest.raises(InputError, match="the weight has 64"):
        fold.scales([torch.ones(3, 64)], stats, SOLVER)
    with pytest.raises(InputError, match="same inputs"):
        fold.scales([torch.ones(3, 128), torch.ones(3, 64)], stats, SOLVER)
    with pytest.raises(InputError, match="one or more float weights"):
        fold.scales([], stats, SOLVER)
    with pytest.raises(InputError, match="NaN or Inf"):
        fold.scales([torch.full((3, 128), float("nan"))], stats, SOLVER)
    with pytest.raises(InputError, match="channels are given for 3"):
        fold.scales(weights(), stats, SOLVER, torch.zeros(3, dtype=torch.int64))
