"""The training loop: its schedule, what each optimizer gets, and that a stopped run ends with the same weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from slimwright.zoo import training
from slimwright.zoo.recipes import RECIPES
from slimwright.zoo.training import Progress, Schedule, optimizers_for, train

STEPS = 6


def test_the_rate_rises_stays_and_falls_to_nearly_nothing() -> None:
    schedule = Schedule(1000, 3e-3)
    rates = [schedule.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-5) and rates[100:600] == [3e-3] * 500
    assert rates[600:] == sorted(rates[600:], reverse=True) and 0 < rates[-1] < 3e-5


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_parameter_is_trained_by_one_optimizer_and_block_matrices_by_muon(name: str) -> None:
    model = RECIPES[name].model()
    muon, adam = optimizers_for(model, 1e-3)
    held = [[id(weight) for group in one.param_groups for weight in group["params"]] for one in (muon, adam)]
    assert isinstance(muon, torch.optim.Muon) and not set(held[0]) & set(held[1])
    assert sorted(held[0] + held[1]) == sorted(id(weight) for weight in model.parameters())
    for path, weight in model.named_parameters():
        words = path.split(".")
        inside = any(word.isdigit() for word in words)
        kind = "norm" in path.lower() or "ln_" in path or "relative_attention_bias" in path or words[-2:-1] == ["gate"]
        assert (id(weight) in held[0]) == (inside and weight.dim() == 2 and not kind), path


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def run(state_file: Path, stop_after: int | None = None) -> tuple[LlamaForCausalLM, list[int]]:
    """Train to the end, or until an error that comes after a step; the model and the steps that were seen."""
    model, seen = tiny(), []

    def batch(step: int) -> Tensor:
        seen.append(step)
        return torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(step))

    def loss(rows: Tensor) -> Tensor:
        return cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    def after_step(progress: Progress, value: float) -> None:
        if progress.step == stop_after:
            raise RuntimeError("stopped")

    train(model, batch, loss, Schedule(STEPS, 1e-2, 2), state_file=state_file, save_every=2, after_step=after_step)
    return model, seen


def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, seen = run(tmp_path / "whole.pt")
    assert seen == list(range(STEPS))
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "state.pt", stop_after=5)
    resumed, seen = run(tmp_path / "state.pt")
    assert seen == [4, 5]  # what was saved after step 4 counts, step 5 does not
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert name.endswith("norm.weight") or not torch.equal(one, dict(tiny().named_parameters())[name]), name


def test_a_state_of_another_environment_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "state.pt", stop_after=5)
    here = training.environment()
    monkeypatch.setattr(training, "environment", lambda: here | {"threads": here["threads"] + 1})
    assert run(tmp_path / "state.pt")[1] == list(range(STEPS))


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    model, losses = tiny(), []
    rows = torch.arange(9).expand(4, 9)

    def loss(_: int) -> Tensor:
        return cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    train(
        model,
        lambda step: step,
        loss,
        Schedule(30, 1e-2, 2),
        state_file=tmp_path / "state.pt",
        save_every=30,
        after_step=lambda progress, value: losses.append(value),
    )
    assert losses[-1] < 0.2 * losses[0]
    assert isinstance(model.lm_head, nn.Linear)
