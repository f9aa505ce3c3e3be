"""Golomb's code of ternary vectors: exact there and back, and as small as the paper says."""

import math

import pytest
import torch

from slimwright.errors import InputError
from slimwright.formats.golomb import Ternary, decode, encode, expected_bits


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 7, 5000])
def test_there_and_back(share: float, numel: int) -> None:
    generator = torch.Generator().manual_seed(int(1000 * share) + numel)
    values = (torch.rand(numel, generator=generator) < share).float() * 0.375
    values *= torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0)
    assert torch.equal(decode(encode(values)), values)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3])
def test_size_is_that_of_the_formula_and_near_the_entropy(share: float) -> None:
    numel = 200_000
    generator = torch.Generator().manual_seed(1)
    values = torch.zeros(numel)
    count = int(share * numel)
    values[torch.randperm(numel, generator=generator)[:count]] = 1.0
    values *= torch.where(torch.rand(numel, generator=generator) < 0.5, -1.0, 1.0)
    found = 8 * encode(values).code.numel()
    assert abs(found / (count * expected_bits(share)) - 1) < 0.03
    entropy = -(1 - share) * math.log2(1 - share) - share * math.log2(share / 2)
    assert entropy * numel < found < 1.1 * entropy * numel


def test_what_cannot_be_coded_is_refused() -> None:
    with pytest.raises(InputError, match="ternary"):
        encode(torch.tensor([1.0, 2.0]))
    coded = encode(torch.tensor([0.0, 1.0, -1.0] * 40))
    with pytest.raises(InputError, match="cut short"):
        decode(Ternary(coded.numel, coded.nonzero, coded.bits, coded.scale, coded.code[:3]))
    with pytest.raises(InputError, match="behind its end"):
        decode(Ternary(5, coded.nonzero, coded.bits, coded.scale, coded.code))
