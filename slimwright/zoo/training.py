"""The loop that trains the bundled LM and the zoo: Muon and AdamW, one schedule, resumed where it stopped.

A step's batch depends on the step alone and no model here has dropout, so that a run which is stopped and goes on from
its last saved state ends with the bytes of one that was not (same threads, instruction set and torch version).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SEED = 0
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: linear warm-up to the peak rate, a plateau, a linear fall to zero at the end."""

    steps: int
    peak_rate: float
    warmup_steps: int = 100
    decay_share: float = 0.4  # of the steps
    muon_factor: float = 1.0  # Muon's rate in AdamW's

    def of(self, steps: int) -> "Schedule":
        """The same for another number of steps."""
        return replace(self, steps=steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from zero."""
        decay_steps = max(1, round(self.decay_share * self.steps))
        return self.peak_rate * min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / decay_steps)


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, seconds and processor seconds (of all threads) spent, over all its starts."""

    step: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0


def train(
    model: PreTrainedModel,
    batch: Callable[[int], Batch],
    loss: Callable[[Batch], Tensor],
    schedule: Schedule,
    *,
    state_file: Path,
    save_every: int,
    began: Callable[[Progress], None] = lambda progress: None,
    after_step: Callable[[Progress, float], None] = lambda progress, loss: None,
) -> Progress:
    """Train `model` in place to the end of the schedule, from `state_file` on if an earlier run of it left one.

    `batch(step)` gives what a step sees, `loss` its mean loss in nats. `began` hears where the run starts, `after_step`
    of every step and its loss, before the state is written. A state that was made with other threads, another
    instruction set or another torch is not used: the run starts over.
    """
    optimizers = optimizers_for(model, schedule.peak_rate)
    progress = _resume(state_file, model, optimizers)
    began(progress)
    start, processor_start = perf_counter() - progress.seconds, process_time() - progress.processor_seconds
    model.train()
    while progress.step < schedule.steps:
        for optimizer, factor in zip(optimizers, (schedule.muon_factor, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = factor * schedule.rate(progress.step)
        value = loss(batch(progress.step))
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress = Progress(progress.step + 1, perf_counter() - start, process_time() - processor_start)
        after_step(progress, value.item())
        if progress.step % save_every == 0 or progress.step == schedule.steps:
            _keep(state_file, model, optimizers, progress)
    return progress


def optimizers_for(model: PreTrainedModel, rate: float) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the blocks' matrices (Jordan 2024; updates scaled to AdamW's size), AdamW for all else.

    Muon takes matrices only: fused experts, three-dimensional, go to AdamW with the embeddings, gains and biases.
    """
    matrices = [module.weight for module in _inside_blocks(model) if isinstance(module, nn.Linear | Conv1D)]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def bfloat16_products() -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where the processor multiplies them; elsewhere nothing changes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def environment() -> dict[str, Any]:
    """What makes the same training on the same text give other bytes."""
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def _inside_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules inside a ModuleList, outermost lists first, each once."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            found |= {id(inner): inner for inner in module.modules()}
    return list(found.values())


def _keep(file: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], progress: Progress) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
        "environment": environment(),
    }
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _resume(file: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]) -> Progress:
    if not file.exists():
        return Progress()
    state = torch.load(file, weights_only=True)
    if state["environment"] != environment():
        return Progress()
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return Progress(**state["progress"])
