"""Evaluations against a dense model with the same weights, what is kept and journaled, and the split of the data."""

import math

import pytest
import torch
import transformers

from slimwright.calibrate.walk import run_forward
from slimwright.checkpoint import Checkpoint, Journal
from slimwright.errors import InputError
from slimwright.job.calibration import calibrate, with_data
from slimwright.job.evaluator import Evaluator, divergences, judged
from slimwright.job.open import open_source
from slimwright.job.request import FitOptions
from slimwright.methods import SiteStatistics, method
from slimwright.model.discover import discover
from slimwright.plan import Assignment
from slimwright.weights import parse_grid
from tests.job.conftest import tiny

GROUP = "model.layers.1.mlp.down_proj"
INT3 = Assignment(grid="int3:row", method="quantize/gptq")


def setting(path, tmp_path, tokens=4096, length=64):
    asked = FitOptions(
        model=str(path), size="4bit", calibration_tokens=tokens, calibration_length=length, method="quantize/gptq"
    )
    source = open_source(str(path))
    structure = discover(source)
    asked, found = with_data(asked, source, structure, print)
    calibration, _ = calibrate(asked, source, structure, found, 1 << 30, tmp_path, lambda sentence: None)
    return source, structure, calibration


def changed(path, source, structure, groups, dtype=torch.float32):
    """The dense model with some groups rounded, by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    for group, grid in groups.items():
        for site in structure.choice_groups()[group]:
            weight = model.get_submodule(site.module).weight
            solver = method("quantize/rtn", grid=parse_grid(grid))
            weight.data = solver.solve(weight.data.float(), SiteStatistics.none()).dense()
    return model


def expected_kl(original, other, batches):
    total = tokens = 0.0
    for batch in batches:
        with torch.no_grad():
            p, q = (torch.log_softmax(run_forward(m, batch).logits.double(), -1) for m in (original, other))
        total += float((p.exp() * (p - q)).sum())
        tokens += p.shape[0] * p.shape[1]
    return total / tokens


@pytest.mark.parametrize("cap", [1 << 30, 1 << 17], ids=["weights kept", "weights streamed"])
def test_equals_a_dense_model(cap, tmp_path):
    """Data in one batch cannot be parted, so that even small models are rounded plainly."""
    path = tiny()
    source, structure, calibration = setting(path, tmp_path, 2048 if cap > 1 << 20 else 4096)
    evaluator = Evaluator(source, structure, calibration, cap)
    assert not evaluator.solves
    groups = {GROUP: "int3:row", "model.embed_tokens": "int4:row"}
    found = evaluator({group: Assignment(grid=grid, method="quantize/gptq") for group, grid in groups.items()})
    original = changed(path, source, structure, {})
    wanted = expected_kl(original, changed(path, source, structure, groups), calibration.samples.batches)
    assert found.loss == pytest.approx(wanted, rel=1e-4)
    assert found.tokens == calibration.samples.tokens and 0 < found.error < found.loss
    assert evaluator({}).loss == 0 == evaluator({GROUP: Assignment(grid="keep")}).loss


def test_small_models_are_solved_on_one_half_and_judged_on_the_other(tmp_path):
    path = tiny()
    source, structure, calibration = setting(path, tmp_path, 16_384)
    evaluator = Evaluator(source, structure, calibration, 1 << 30)
    found = evaluator({GROUP: INT3})
    batches = calibration.samples.batches
    assert evaluator.solves and len(batches) >= 4

    model, original = (changed(path, source, structure, {}) for _ in range(2))
    (site,) = structure.choice_groups()[GROUP]
    module, seen = model.get_submodule(site.module), []
    hook = module.register_forward_hook(lambda m, args, out: seen.append(args[0].reshape(-1, site.columns)))
    with torch.no_grad():
        for batch in batches[::2]:
            run_forward(model, batch)
    hook.remove()
    stats = SiteStatistics.from_inputs(torch.cat(seen))
    module.weight.data = INT3.solver().solve(module.weight.data.float(), stats).dense()
    assert found.loss == pytest.approx(expected_kl(original, model, batches[1::2]), rel=0.01)
    assert found.tokens == sum(batch.inputs["input_ids"].numel() for batch in batches[1::2])
    plain = Assignment(grid="int3:row", method="quantize/rtn")
    assert evaluator({GROUP: plain}).loss == pytest.approx(
        expected_kl(original, changed(path, source, structure, {GROUP: "int3:row"}), batches[1::2]), rel=1e-4
    )
    looked_up = Assignment(grid="int4:row", method="quantize/gptq")
    assert 0 < evaluator({"model.embed_tokens": looked_up}).loss < math.inf


def test_counts_and_journals(tmp_path):
    source, structure, calibration = setting(tiny(), tmp_path)
    with Journal.open(tmp_path / "journal", "key") as journal:
        evaluator = Evaluator(source, structure, calibration, 1 << 30, journal)
        first = evaluator({GROUP: INT3})
        assert evaluator({GROUP: INT3}) == first and evaluator.evaluations == 1
        drawn = [evaluator({GROUP: INT3}, tokens=128, draw=draw) for draw in (1, 2, 1)]
        assert drawn[0] == drawn[2] != drawn[1] and evaluator.evaluations == 3
        assert all(128 <= found.tokens < first.tokens for found in drawn)
        journal.commit()
    with Journal.open(tmp_path / "journal", "key") as journal:
        again = Evaluator(source, structure, calibration, 1 << 30, journal)
        again._run = None  # nothing is run again
        assert again({GROUP: INT3}) == first and again({GROUP: INT3}, 128, 2) == drawn[1]
        assert again.evaluations == 2


def test_what_overflows_is_infinite(tmp_path):
    source, structure, calibration = setting(tiny(), tmp_path)
    with Journal.open(tmp_path / "journal", "key") as journal:
        evaluator = Evaluator(source, structure, calibration, 1 << 30, journal)
        evaluator._weights = lambda site, choice: torch.full((site.rows, site.columns), math.nan if choice else 1.0)
        assert evaluator({GROUP: INT3}).loss == math.inf
        journal.commit()
        assert Evaluator(source, structure, calibration, 1 << 30, journal)({GROUP: INT3}).loss == math.inf


def test_unknown_group(tmp_path):
    source, structure, calibration = setting(tiny(), tmp_path)
    with pytest.raises(InputError, match="'nothing' is no group"):
        Evaluator(source, structure, calibration, 1 << 30)({"nothing": INT3})


def test_vectors_are_judged_by_their_cosine():
    from slimwright.calibrate.walk import Batch

    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    batch = Batch({"input_ids": torch.zeros(2, 5)}, {(2, 5): mask})
    rows = divergences(batch, judged({"last_hidden_state": old}), judged({"last_hidden_state": new}))
    lost = 1 - torch.nn.functional.cosine_similarity(old, new, dim=-1)
    assert [tokens for _, tokens in rows] == [5, 3]
    assert [total for total, _ in rows] == pytest.approx([float(lost[0].sum()), float(lost[1, :3].sum())], rel=1e-5)


def test_checkpoint_is_not_touched(tmp_path):
    source, structure, calibration = setting(tiny(), tmp_path)
    Evaluator(source, structure, calibration, 1 << 30)({GROUP: INT3})
    name = structure.choice_groups()[GROUP][0].name
    assert torch.equal(source.read(name), Checkpoint.open(tiny()).read(name))
