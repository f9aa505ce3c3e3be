"""What feedback is expected to gain: on the inputs it was made of, and on others."""

import dataclasses

import pytest
import torch

from slimwright.calibrate.site_statistics import Apart
from slimwright.calibrate.statistics import APART_SHARE, apart_documents, inputs_of
from slimwright.calibrate.walk import Batch
from slimwright.job.evaluator import Evaluator, small_batches
from slimwright.job.gains import expected_gains, tried_gain
from slimwright.job.losses import Scoring, loss_estimate
from slimwright.job.options import option_costs
from slimwright.job.walked import WalkedModel
from slimwright.methods import SiteStatistics, method
from slimwright.plan import Assignment
from slimwright.search import prune_dominated
from slimwright.weights import Int
from tests.job.conftest import tiny
from tests.job.test_evaluator import setting

INT8 = Int(8, group=None)


def drawn(tokens, columns=96, seed=0):
    """Inputs of one distribution, much correlated."""
    mixing = torch.randn(columns, columns, generator=torch.Generator().manual_seed(7))
    scale = torch.logspace(0, -2, columns)
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * scale @ mixing


def on(inputs, change):
    return float((inputs @ change.t()).square().sum())


@pytest.mark.parametrize("order", [False, True])
def test_a_gain_is_what_a_solver_leaves_on_other_inputs(order):
    """Of few inputs feedback fits the noise: it leaves more on others than on them."""
    seen, other = drawn(110), drawn(4000, seed=1)
    weight = torch.randn(400, 96, generator=torch.Generator().manual_seed(2))
    solver = method("quantize/gptq", grid=INT8, act_order=order, clip="none")
    plain = method("quantize/rtn", grid=INT8, clip="none").solve(weight, SiteStatistics.none()).dense() - weight
    solved = solver.solve(weight, SiteStatistics.from_inputs(seen)).dense() - weight

    together = torch.cat([seen, other[:2000]])
    stats = SiteStatistics.from_inputs(together)
    stats = dataclasses.replace(stats, apart=Apart(other[:2000], 2000 / len(together)))
    expected, measured = solver.expected_gain(stats), on(other[2000:], solved) / on(other[2000:], plain)
    assert expected == pytest.approx(measured, rel=0.12)
    fitted = solver.expected_gain(SiteStatistics.from_inputs(seen))
    assert fitted < 0.87 * expected and on(seen, solved) / on(seen, plain) < 0.8 * measured


@pytest.mark.parametrize("solver", ["gptq", "gptq,act_order=False,static_groups=False", "ldlq"])
def test_coarse_grids_are_tried_without_what_is_apart(solver):
    """Where feedback moves weights by more than the grid holds, a formula of errors of equal size says too little."""
    seen, other = drawn(4000), drawn(700, seed=1)
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(2))
    stats = SiteStatistics.from_inputs(torch.cat([seen, other]))
    stats = dataclasses.replace(stats, apart=Apart(other, 700 / 4700))
    coarse, fine = (Assignment(grid=f"int{bits}:row", method=f"quantize/{solver}") for bits in (2, 3))
    plain = method("quantize/rtn", grid="int2:row").solve(weight, SiteStatistics.none()).dense() - weight
    rows = torch.rand(300, generator=torch.Generator().manual_seed(3))
    found = tried_gain(coarse, weight, plain, stats, None, rows)
    solved = coarse.solver().solve(weight, SiteStatistics.from_inputs(seen)).dense() - weight
    measured = ((solved @ other.t()).square().sum(1) @ rows) / ((plain @ other.t()).square().sum(1) @ rows)
    assert found == pytest.approx(float(measured), rel=0.05)
    assert coarse.solver().expected_gain(stats) < 0.8 * found
    assert tried_gain(fine, weight, plain, stats, None, rows) is None
    assert tried_gain(Assignment(grid="int2:row", method="quantize/rtn"), weight, plain, stats, None, rows) is None


def test_what_is_apart_is_not_in_the_factor():
    seen, other = drawn(300), drawn(100, seed=1)
    stats = dataclasses.replace(SiteStatistics.from_inputs(torch.cat([seen, other])), apart=Apart(other, 0.25))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    factor, damping = stats.factor(0.01, order, rest=True)
    wanted = seen.t() @ seen / 400
    assert damping == pytest.approx(0.01 * float(wanted.diagonal().mean()), rel=1e-4)
    assert torch.allclose(factor @ factor.t(), wanted[order][:, order] + damping * torch.eye(96), atol=1e-4)
    whole, _ = stats.factor(0.01, order)
    assert not torch.allclose(whole, factor, rtol=0.01)


def test_documents_are_kept_apart_token_by_token():
    pieces = ((("a", 3), ("b", 2)), (("b", 1), ("c", 4)))
    joined = Batch({"input_ids": torch.zeros(2, 5, dtype=torch.int64)}, documents=("a", "b"), pieces=pieces)
    x = torch.arange(20.0).view(2, 5, 2)
    wanted = torch.cat([x[0, 3:], x[1, :1]])
    assert torch.equal(inputs_of(joined, x, {"b"}), wanted)
    assert torch.equal(inputs_of(joined, x.view(10, 2), {"b"}), wanted)
    assert not len(inputs_of(joined, x.view(1, 10, 2), {"b"})) and not len(inputs_of(joined, x.view(10, 2)[:7], {"b"}))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    padded = Batch({"input_ids": torch.zeros(2, 3)}, {(2, 3): mask}, ("a", "b"))
    y = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(inputs_of(padded, y, {"a"}), y[0, :2])


def test_few_documents_are_kept_apart_and_never_all():
    one = Batch({"input_ids": torch.zeros(8, 16)}, documents=("a",) * 8)
    assert apart_documents([one], 1000) == frozenset()
    many = [Batch({"input_ids": torch.zeros(4, 16)}, documents=tuple(f"{i}-{k}" for k in range(4))) for i in range(30)]
    chosen = apart_documents(many, 10_000)
    assert APART_SHARE * 120 <= len(chosen) <= 1.5 * APART_SHARE * 120 and chosen == apart_documents(many[::-1], 10_000)


def test_what_is_apart_is_among_what_the_reverse_walk_reads():
    many = [Batch({"input_ids": torch.zeros(4, 16)}, documents=tuple(f"{i}-{k}" for k in range(4))) for i in range(30)]
    early = {f"{i}-{k}" for i in range(10) for k in range(4)}
    chosen = apart_documents(many, 10 * 4 * 16)
    assert len(chosen) >= APART_SHARE * 120 and chosen <= early
    pieces = ((("a", 3), ("b", 2)), (("b", 1), ("c", 4)), (("c", 2), ("d", 3)))
    joined = Batch({"input_ids": torch.zeros(3, 5, dtype=torch.int64)}, documents=("a", "b", "c"), pieces=pieces)
    assert apart_documents([joined], 5) <= {"a", "b"}
    for row, small in enumerate(small_batches([joined], 1, logits=5)):
        assert torch.equal(small.tokens_of({"b", "d"}), joined.tokens_of({"b", "d"})[row : row + 1])


def test_a_gain_on_directions_is_what_a_solver_leaves_on_them():
    """Directions unlike the inputs: one that feedback cancels well, and others where it does worse than on inputs."""
    seen, other = drawn(4000), drawn(700, seed=1)
    common = seen.mean(0) + 3 * seen.std(0) * torch.randn(96, generator=torch.Generator().manual_seed(5))
    seen, other = seen + common, other + common
    weight = torch.randn(400, 96, generator=torch.Generator().manual_seed(2))
    solver = method("quantize/gptq", grid=INT8, clip="none")
    together = SiteStatistics.from_inputs(torch.cat([seen, other]))
    stats = dataclasses.replace(together, apart=Apart(other, 700 / 4700))
    plain = method("quantize/rtn", grid=INT8, clip="none").solve(weight, SiteStatistics.none()).dense() - weight
    solved = solver.solve(weight, SiteStatistics.from_inputs(seen)).dense() - weight
    gains = []
    for directions in (other.mean(0, keepdim=True).repeat(4, 1), other - other.mean(0), other):
        expected, measured = solver.expected_gain(stats, directions), on(directions, solved) / on(directions, plain)
        assert expected == pytest.approx(measured, rel=0.15)
        gains.append(expected)
    assert gains[0] < 0.3 * gains[1]


def test_measured_losses_have_the_solvers_gain(tmp_path):
    source, structure, calibration = setting(tiny(), tmp_path, tokens=1024, length=32)
    evaluator = Evaluator(source, structure, calibration, 1 << 30)
    group = "model.layers.1.mlp.down_proj"
    table = option_costs(source, structure, {}, "quantize/gptq", 30_000)
    table = {name: options if name == group else options[-1:] for name, options in table.items()}
    given = Scoring(source, structure, table, 30_000, {}, lambda *_: None, calibration, None, lambda: evaluator)
    scored = loss_estimate("measured,levels=1,evaluated=512").score(given).table[group]
    front = [option for option in prune_dominated(given.rounded()[group]) if option.loss > 0]
    coarse = next(option for option in scored if option.label == front[0].label)
    plain = evaluator({group: coarse.choice}, 512).loss
    ((_, collector),) = WalkedModel(source, structure, calibration).collected(
        lambda unit: [site for site in unit.sites if site.choice_group == group], judged=True
    )
    (site,) = structure.choice_groups()[group]
    (stats,) = collector.statistics(site)
    assert stats.apart is not None and 0 < stats.apart.share < 0.3
    (gain,) = expected_gains([coarse.choice], [stats])
    assert 0.2 < gain < 1.1 and gain != pytest.approx(1, abs=0.01)
    assert coarse.loss == pytest.approx(plain * gain, rel=1e-4)
    assert expected_gains([Assignment(grid="keep"), Assignment(grid="bf16", method="quantize/rtn")], [stats]) == [1, 1]
