"""Errors of outputs against the outputs themselves."""

from __future__ import annotations

import pytest
import torch

from slimwright.job.weights import output_errors
from slimwright.methods import SiteStatistics


def test_output_errors_are_those_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, source = torch.randn(200, 24, generator=generator), torch.randn(5, 24, generator=generator)
    versions = [source + scale * torch.randn(5, 24, generator=generator) for scale in (0.0, 0.1, 1.0)]
    gram = SiteStatistics.from_inputs(x).gram
    assert gram is not None
    found = output_errors(gram, source, *versions)
    for sums, version in zip(found, versions, strict=True):
        expected = float((x @ (version - source).T).square().sum() / (x @ source.T).square().sum())
        assert sums.relative == pytest.approx(expected, rel=1e-4)
