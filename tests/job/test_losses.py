"""Loss estimates: what they are defined as, what they declare, which combinations are refused; allocators in a job."""

import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from slimwright.errors import InputError
from slimwright.job.evaluator import Evaluator
from slimwright.job.importance import outliers, ranks
from slimwright.job.losses import Scored, Scoring, check_allocator, estimates, loss_estimate, standard_error
from slimwright.job.measured_losses import interpolated, narrowed, spread
from slimwright.job.options import option_costs
from slimwright.search import Option, search
from tests.job.conftest import fitted, tiny
from tests.job.test_evaluator import setting


def options(scope, pairs):
    return [Option(scope, f"o{i}", cost, loss) for i, (cost, loss) in enumerate(pairs)]


# -- importance --------------------------------------------------------------------------------------------------------


def test_lim_is_minus_the_mean_cosine_of_what_enters_and_leaves_a_block(tmp_path):
    source, structure, calibration = setting(tiny(), tmp_path, tokens=256, length=32)
    given = Scoring(source, structure, {}, 0, {}, lambda *_: None, calibration)
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).eval()
    cosines = {f"model.layers.{place}": [] for place in range(len(model.model.layers))}

    def seen(name):
        def hook(module, args, output):
            left = output[0] if isinstance(output, tuple) else output
            cosines[name].append(torch.cosine_similarity(args[0], left, dim=-1).flatten())

        return hook

    for name in cosines:
        model.get_submodule(name).register_forward_hook(seen(name))
    with torch.no_grad():
        for batch in calibration.samples.batches:
            model(**batch.inputs)
    expected = {name: -float(torch.cat(own).mean()) for name, own in cosines.items()}
    assert loss_estimate("lim").importance(given) == pytest.approx(expected, rel=1e-5)


def test_zd_counts_what_lies_a_standard_deviation_above():
    weights = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0])
    assert outliers(weights) == pytest.approx(0.2)
    assert outliers(-weights) == 0 and outliers(-weights, sides=2) == pytest.approx(0.2)
    generator = torch.Generator().manual_seed(0)
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    assert outliers(torch.randn(200_000, generator=generator)) == pytest.approx(tail, abs=0.003)
    assert outliers(torch.ones(5)) == 0


def test_ranked_blocks_are_lowered_as_the_card_says():
    # K = L (b_hi - mean) / (b_hi - b_lo) least important blocks go low; of equals the earlier stays high.
    rank = ranks({"a": 0.3, "b": -1.0, "c": 0.3, "d": 0.9})
    assert sorted(rank, key=rank.get) == ["b", "c", "a", "d"] and sum(rank.values()) == pytest.approx(4)
    for lowered in range(5):
        table = {block: options(block, [(2, 1.0 * weight), (4, 0.1 * weight)]) for block, weight in rank.items()}
        found = search(table, 16 - 2 * lowered)
        low = {block for block, option in found.choices.items() if option.cost == 2}
        assert low == set(["b", "c", "a", "d"][:lowered])


# -- measured ----------------------------------------------------------------------------------------------------------


def test_interpolation_meets_its_points_and_has_slope_one_beyond():
    points = {0.01: 0.002, 0.1: 0.05}
    assert interpolated(0.01, points) == pytest.approx(0.002) and interpolated(0.1, points) == pytest.approx(0.05)
    assert interpolated(math.sqrt(0.001), points) == pytest.approx(math.sqrt(0.002 * 0.05))
    assert interpolated(0.001, points) == pytest.approx(0.0002) and interpolated(1.0, points) == pytest.approx(0.5)
    assert interpolated(0.0, points) == 0 and interpolated(0.1, {}) is None


def test_spread_starts_with_the_smallest_option():
    front = options("a", [(i, 100.0 - i) for i in range(11)])
    assert [option.cost for option in spread(front, 1)] == [0]
    assert [option.cost for option in spread(front, 3)] == [0, 4, 7]
    assert len(spread(front[:2], 8)) == 2 and spread([], 3) == []


def test_narrowed_keeps_the_neighbours_of_the_choice():
    table = {"a": options("a", [(i, 100.0 - i) for i in range(9)])}
    for place, kept in ((0, [0, 1, 2]), (5, [4, 5, 6]), (8, [6, 7, 8])):
        assert [o.cost for o in narrowed(table, {"a": table["a"][place]}, 3)["a"]] == kept


def scoring(tmp_path, budget=30_000):
    source, structure, calibration = setting(tiny(), tmp_path)
    table = option_costs(source, structure, {}, "quantize/rtn", budget)
    evaluator = Evaluator(source, structure, calibration, 1 << 30)
    return Scoring(
        source, structure, table, budget, {}, lambda *_: None, calibration, None, lambda: evaluator
    ), evaluator  # fmt: skip


def test_measured_losses_are_evaluations(tmp_path):
    given, evaluator = scoring(tmp_path)
    estimate = loss_estimate("measured,levels=1,evaluated=512")
    table = estimate.score(given).table
    assert evaluator.evaluations <= estimate.evaluations(given.options)
    group = "model.layers.0.mlp.down_proj"
    front = spread([o for o in sorted(given.rounded()[group], key=lambda o: (o.cost, o.loss)) if o.loss > 0], 1)
    alone = next(option for option in table[group] if option.label == front[0].label)
    assert alone.loss == pytest.approx(evaluator({group: alone.choice}, 512).loss, rel=1e-6) and alone.loss > 0
    keep = next(option for option in table[group] if option.label == "keep")
    assert keep.loss == 0


def test_pairs_say_what_two_groups_cost_together(tmp_path):
    """Beyond what each was measured to cost alone at those very options, which are not those of its curve."""
    given, evaluator = scoring(tmp_path, budget=60_000)
    estimate = loss_estimate("pairs,levels=1,evaluated=512,options_kept=2")
    scored = estimate.score(given)
    assert evaluator.evaluations <= estimate.evaluations(given.options)
    assert scored.pairs and all(len(own) <= 2 for own in scored.table.values())
    (a, b), value = max(scored.pairs.items(), key=lambda item: abs(item[1]))
    by_key = {option.key: option for own in scored.table.values() for option in own}
    first, second = by_key[a], by_key[b]
    groups = {first.scope: first, second.scope: second}
    coarse = {scope: next(o for o in scored.table[scope] if o.loss > 0) for scope in groups}
    both = evaluator({scope: option.choice for scope, option in coarse.items()}, 512).loss
    apart = [evaluator({scope: option.choice}, 512).loss for scope, option in coarse.items()]
    assert any(
        option.loss != pytest.approx(loss, rel=1e-3) for option, loss in zip(coarse.values(), apart, strict=True)
    )
    ratio = math.sqrt(first.loss * second.loss / (apart[0] * apart[1]))
    assert value == pytest.approx((both - sum(apart)) * ratio, rel=1e-6)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_errors_of_groups_seen_on_the_same_batches_go_together():
    both = [Option("a", "x", 1, 2.0, error=0.3), Option("b", "x", 1, 4.0, error=0.5)]
    alike = {"a": [-0.25, 0.25], "b": [-0.125, 0.125]}  # batches of half and one and a half, three and five quarters
    assert Scored({}, by_batch=alike).error(both) == pytest.approx(2.0 * 0.5 + 4.0 * 0.25)  # half the distance of two
    against = {"a": [-0.25, 0.25], "b": [0.125, -0.125]}
    assert Scored({}, by_batch=against).error(both) == pytest.approx(0)
    assert Scored({}, by_batch={"a": [-0.25, 0.25]}).error(both) == pytest.approx(2.0 * 0.5 + 0.5)
    assert Scored({}).error(both) == pytest.approx(0.8)
    values = [1.0, 2.0, 6.0]
    assert standard_error([(value - 3) / 3 for value in values]) == pytest.approx(
        statistics.stdev(values) / math.sqrt(3)
    )
    assert standard_error([0.5]) == 0


def test_measured_losses_have_the_error_of_their_evaluations(tmp_path):
    given, evaluator = scoring(tmp_path)
    table = loss_estimate("measured,levels=1,evaluated=512").score(given).table
    group = "model.layers.0.mlp.down_proj"
    front = spread([o for o in sorted(given.rounded()[group], key=lambda o: (o.cost, o.loss)) if o.loss > 0], 1)
    alone = next(option for option in table[group] if option.label == front[0].label)
    measured = evaluator({group: alone.choice}, 512)
    assert measured.error > 0 and alone.error == pytest.approx(measured.error, rel=1e-6)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "loss", "data", "message"),
    [
        ("dp", "sensitivities", None, "did you mean 'sensitivity'"),
        ("dp", "measured,level=2", None, "did you mean 'levels'"),
        ("evolution", None, None, "did you mean 'evolutionary'"),
        ("evolutionary", None, "none", "evaluates candidates on data"),
        ("dp", "measured", "none", "needs data: give --data"),
        ("dp", "pairs", None, "use milp"),
        ("evolutionary", "pairs", None, "use milp"),
    ],
)
def test_refused_before_work(search, loss, data, message):
    with pytest.raises(InputError, match=message):
        check_allocator(search, loss, data)


def test_a_fixed_plan_leaves_nothing_to_choose(tmp_path):
    with pytest.raises(InputError, match="--grid leaves nothing to choose"):
        fitted(tiny(), tmp_path / "out", grid="int4:row", loss="zd")


def test_every_estimate_says_what_it_is():
    for name, cls in estimates().items():
        assert cls.name == name and cls.paper and cls.__doc__
        assert cls().spec == name


# -- jobs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "loss"),
    [
        ("closed-form", "lim"),
        ("milp", "pairs,levels=1,window=1,evaluated=128,options_kept=2"),
        ("evolutionary,generations=1,offspring=3,survivors=1,tokens_first=128,tokens_last=128", "zd"),
    ],
)
def test_jobs_count_and_declare_their_evaluations(search, loss, tmp_path):
    asked = {
        "size": "40%", "search": search, "loss": loss, "method": "quantize/gptq", "calibration_tokens": 512,
        "calibration_length": 64,
    }  # fmt: skip
    dry = fitted(tiny(), tmp_path / "dry", dry_run=True, **asked)
    report = fitted(tiny(), tmp_path / "out", **asked)
    found = report["search"]
    assert found["solver"] == search and found["loss"] == loss
    assert found["evaluations"] <= dry["forecast"]["evaluations"]
    assert report["job"]["evaluations"] == found["evaluations"] + 2
    assert (found["evaluations"] > 0) == (dry["forecast"]["evaluations"] > 0)
    assert (found["unit"] == "nats per token") == loss.startswith("pairs")
    assert report["size"]["after"] <= report["budget"]["bytes"]
    assert f"--search {search}" in report["reproduce"] and f"--loss {loss}" in report["reproduce"]


def test_without_data_zd_still_works(tmp_path):
    report = fitted(tiny(), tmp_path / "out", size="40%", data="none", loss="zd,sides=2")
    found = report["search"]
    assert (found["loss"], found["evaluations"], found["exact"]) == ("zd,sides=2", 0, True)
    assert found["unit"] != "nats per token"


def test_candidates_of_a_floor_do_not_evaluate_within(tmp_path):
    with pytest.raises(InputError, match="for every candidate of --memory or --keep"):
        fitted(tiny(), tmp_path / "out", keep=("kl:0.1",), search="evolutionary", method="quantize/gptq")
