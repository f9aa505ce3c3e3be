"""Low-rank solvers against optima found otherwise: by singular values, by search, in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods import SiteStatistics, method, parse_method, solver_for
from slimwright.methods.factorizing import spectrum
from slimwright.weights import LowRank, Sum, parse_form

SHAPES = [(24, 40), (40, 24), (32, 32)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int, tokens: int = 500) -> Tensor:
    """Correlated, with a few large channels."""
    mix = random(columns, columns, seed=1) / columns**0.5 + torch.eye(columns)
    x = random(tokens, columns, seed=2) @ mix
    x[:, ::9] *= 8
    return x


def lost(weight: Tensor, value: Tensor, x: Tensor) -> float:
    """Squared error of the outputs a token."""
    return float((x.double() @ (weight - value).double().T).square().sum()) / len(x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_svd_llm_loses_the_whitened_tail_and_nothing_loses_less(shape: tuple[int, int], rank: int) -> None:
    weight, x = random(*shape), inputs(shape[1])
    outputs = x.double() @ weight.double().T  # the least that any matrix of this rank can lose is their tail
    tail = float(torch.linalg.svdvals(outputs)[rank:].square().sum()) / len(x)
    gram = SiteStatistics.from_inputs(x).gram
    found = spectrum(weight, gram)
    assert found.loss(rank) == pytest.approx(tail, rel=1e-4)
    assert lost(weight, (found.left[:, :rank] @ found.right[:rank]).float(), x) == pytest.approx(tail, rel=1e-4)
    solved = method("factorize/svd_llm", rank=rank, damp=0.0).solve(weight, SiteStatistics.from_inputs(x)).dense()
    assert lost(weight, solved, x) <= tail + 1e-4 * lost(weight, torch.zeros_like(weight), x)  # bf16 factors


def test_no_factors_nearby_lose_less() -> None:
    """Brute force: gradient descent from elsewhere ends where the closed form is."""
    weight, x = random(12, 16).double(), inputs(16).double()
    gram = x.T @ x / len(x)
    left, right = (random(12, 3, seed=5).double().requires_grad_(), random(3, 16, seed=6).double().requires_grad_())
    optimizer = torch.optim.LBFGS([left, right], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        change = weight - left @ right
        loss = ((change @ gram) * change).sum()
        loss.backward()
        return loss

    least = float(optimizer.step(closure).detach())  # type: ignore[arg-type]
    least = float(closure().detach())
    assert spectrum(weight.float(), gram.float()).loss(3) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape: tuple[int, int]) -> None:
    weight, side = random(*shape), min(shape)
    singular = inputs(shape[1])
    singular[:, 3] = 0
    few = singular[: shape[1] // 2]
    for metric in (None, SiteStatistics.from_inputs(inputs(shape[1])).gram):
        found = spectrum(weight, metric)
        torch.testing.assert_close((found.left @ found.right).float(), weight, rtol=0, atol=1e-5)
    for x in (singular, few):  # what the data never reach is kept too
        solved = method("factorize/svd_llm", rank=side).solve(weight, SiteStatistics.from_inputs(x)).dense()
        assert float((solved - weight).norm() / weight.norm()) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_low_rank_is_exact_at_its_rank(shape: tuple[int, int]) -> None:
    weight = random(shape[0], 4, seed=8) @ random(4, shape[1], seed=9)
    stats = SiteStatistics.from_inputs(inputs(shape[1]))
    for name in ("factorize/svd", "factorize/asvd", "factorize/svd_llm"):
        for rank in (4, 9):
            solved = method(name, rank=rank).solve(weight, stats).dense()
            assert float((solved - weight).norm() / weight.norm()) < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_with_white_inputs_all_are_plain_svd(shape: tuple[int, int]) -> None:
    weight, rank = random(*shape), 5
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    white = SiteStatistics(100, torch.eye(shape[1]) * 3, absmean=torch.ones(shape[1]))
    for name in ("factorize/svd", "factorize/asvd", "factorize/svd_llm"):
        solved = method(name, rank=rank).solve(weight, white).dense()
        assert float((solved - plain).norm() / plain.norm()) < 0.01, name


def test_asvd_scales_inputs_by_a_power_of_their_size() -> None:
    weight, x = random(24, 40), inputs(40)
    stats = SiteStatistics.from_inputs(x)
    plain = method("factorize/svd", rank=6).solve(weight, stats).dense()
    zero = method("factorize/asvd", rank=6, alpha=0.0).solve(weight, stats).dense()
    torch.testing.assert_close(zero, plain, rtol=0, atol=0.01 * float(plain.abs().max()))
    scale = x.abs().mean(0).double()  # by hand: the SVD of W diag(s), the right factor divided by s
    u, s, v = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    by_hand = ((u[:, :6] * s[:6]) @ v[:6] / scale).float()
    one = method("factorize/asvd", rank=6, alpha=1.0).solve(weight, stats).dense()
    assert float((one - by_hand).norm() / by_hand.norm()) < 0.01
    # The card's order on inputs with large channels, at every rank.
    for rank in (2, 6, 12):
        errors = [
            lost(weight, method(f"factorize/{name}", rank=rank).solve(weight, stats).dense(), x)
            for name in ("svd_llm", "asvd", "svd")
        ]
        assert errors[0] < errors[1] < errors[2]


def test_factors_on_coarse_grids_are_fitted_to_each_other() -> None:
    """Rounding the second factor to what the first has become loses less than rounding both as they are."""
    weight, x = random(64, 96), inputs(96)
    stats = SiteStatistics.from_inputs(x)
    solved = method("factorize/svd_llm", rank=16, grid="int3:g32").solve(weight, stats)
    found = spectrum(weight, stats.gram)
    size = (found.left[:, :16].norm(dim=0) / found.right[:16].norm(dim=1)).sqrt()
    nearest = method("quantize/rtn", grid="int3:g32")
    left = nearest.solve((found.left[:, :16] / size).float().contiguous(), SiteStatistics.none()).dense()
    right = nearest.solve((found.right[:16] * size[:, None]).float().contiguous(), SiteStatistics.none()).dense()
    floor = found.loss(16)
    assert lost(weight, solved.dense(), x) - floor < 0.6 * (lost(weight, left @ right, x) - floor)


# -- a quantized weight with a correction --------------------------------------------------------------------------


def test_a_correction_takes_up_what_rounding_lost() -> None:
    weight, x = random(48, 64), inputs(64)
    stats = SiteStatistics.from_inputs(x)
    base = method("quantize/gptq", grid="int2:g32").solve(weight, stats).dense()
    errors = [lost(weight, base, x)]
    for rank in (1, 4, 16):
        value = method("factorize/corrected", rank=rank, grid="int2:g32", rounds=1).solve(weight, stats)
        assert isinstance(value, Sum) and torch.equal(value.base.dense(), base)
        # No correction of that rank does better: the best one, found by singular values of the outputs.
        outputs = x.double() @ (weight - base).double().T
        tail = float(torch.linalg.svdvals(outputs)[rank:].square().sum()) / len(x)
        errors.append(lost(weight, value.dense(), x))
        assert errors[-1] == pytest.approx(tail, rel=0.02)
        assert errors[-1] < errors[-2]
    rounds = method("factorize/corrected", rank=16, grid="int2:g32", rounds=4).solve(weight, stats).dense()
    assert lost(weight, rounds, x) < errors[-1]
    full = method("factorize/corrected", rank=48, grid="int2:g32", rounds=1).solve(weight, stats).dense()
    assert float((full - weight).norm() / weight.norm()) < 0.01


def test_a_correction_without_data_is_plain_svd_of_the_error() -> None:
    weight = random(48, 64)
    solver = method("factorize/corrected", rank=8, grid="int2:g32", solver="quantize/rtn", rounds=1)
    assert solver.needs == ()
    value = solver.solve(weight, SiteStatistics.none())
    assert isinstance(value, Sum) and isinstance(value.correction, LowRank)
    error = weight - value.base.dense()
    tail = float(torch.linalg.svdvals(error)[8:].square().sum())
    assert float((weight - value.dense()).square().sum()) == pytest.approx(tail, rel=0.01)


def test_solvers_in_writing() -> None:
    solver = solver_for("factorize/corrected,solver=quantize/gptq;damp=0.1,rounds=2", parse_form("int3:g64+lowrank:r4"))
    assert solver.spec == "factorize/corrected,solver=quantize/gptq;damp=0.1,rounds=2"
    assert solver.form.spec == "int3:g64+lowrank:r4" and solver.needs == ("gram",)
    assert solver_for("factorize/svd_llm", parse_form("lowrank:r8:int8:g64")).spec == "factorize/svd_llm"
    for spec, form in (("quantize/gptq", "lowrank:r4"), ("factorize/svd", "int4:g64"),
                       ("factorize/svd", "int4:g64+lowrank:r4"), ("factorize/corrected", "lowrank:r4")):  # fmt: skip
        with pytest.raises(InputError, match="does not give"):
            solver_for(spec, parse_form(form))
    for inner in ("factorize/svd", "merge/linear", "quantize/gpt"):
        with pytest.raises(InputError):
            parse_method(f"factorize/corrected,solver={inner}")
    with pytest.raises(InputError, match="must lie in"):
        method("factorize/svd_llm", rank=0)
    with pytest.raises(InputError, match="a rank of 30 is more than its 24 rows"):
        method("factorize/svd_llm", rank=30).solve(random(24, 40), SiteStatistics.from_inputs(inputs(40)))
