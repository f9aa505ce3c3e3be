"""For models whose blocks cannot be run apart: the guard that finds it, and steps made of whole forwards instead.

A block that keeps something from call to call (a memory, a counter, a cache of its own) gives other outputs when a walk
runs it twice, or runs it for one batch while another is suspended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimwright.calibrate.walk import Batch, Unit, Walk, run_forward, walk_units, without_caches
from slimwright.errors import InputError, SlimwrightError
from slimwright.model.structure import Structure


def runs_apart(
    model: PreTrainedModel,
    structure: Structure,
    batch: Batch,
) -> bool:
    """Whether a walk in which every block runs twice gives what a plain forward gives, bit for bit.

    Args:
        model: both read its weights in the same way, whatever that is.
        batch: of whose first sample this is asked, where samples can be told apart; of a text, of its beginning.
    """
    batch = _first_sample(batch)
    with torch.no_grad(), without_caches(model):
        expected = _tensors(run_forward(model, batch))
    found: list[dict[str, Tensor]] = []
    try:
        for step in Walk(model, structure, [batch], finish=lambda _, output: found.append(_tensors(output))):
            step.output(0)
            step.advance(0, step.output(0))
    except SlimwrightError:
        raise
    except Exception:  # the plain forward ran: what a block kept from its first run does not suit the second (XLM's)
        return False
    return found[0].keys() == expected.keys() and all(_same(v, expected[name]) for name, v in found[0].items())


def _same(first: Tensor, second: Tensor) -> bool:
    """Equal, NaN equal to NaN: what is not finite is found later, by name."""
    if first.shape != second.shape or not first.is_floating_point():
        return torch.equal(first, second)
    nan = first.isnan()
    return torch.equal(nan, second.isnan()) and torch.equal(first.masked_fill(nan, 0), second.masked_fill(nan, 0))


GUARDED_TOKENS = 128
"""Of a text, how many tokens the guard runs on: what a block remembers shows on few."""


def _first_sample(batch: Batch) -> Batch:
    """The beginning of the batch's first row where all that it holds are token ids and masks."""
    tensors = batch.inputs.values()
    if any(t.ndim != 2 or t.is_floating_point() for t in tensors) or len({t.shape[0] for t in tensors}) != 1:
        return batch
    return Batch({name: t[:1, :GUARDED_TOKENS] for name, t in batch.inputs.items()}, documents=batch.documents[:1])


def _tensors(output: Any) -> dict[str, Tensor]:
    found = output.items() if isinstance(output, Mapping) else {"output": output}.items()
    return {name: value for name, value in found if isinstance(value, Tensor)}


class ReplayStep:
    """One unit, as :class:`slimwright.calibrate.walk.Step`: whoever watches sees its inputs in :meth:`show`, which runs
    a forward of the whole model up to there. There are no outputs to go on with."""

    final = True

    def __init__(self, replay: Replay, unit: Unit) -> None:
        self._replay = replay
        self.unit = unit
        self.indices = list(range(len(replay.batches)))

    @property
    def batches(self) -> list[Batch]:
        return self._replay.batches

    def batch(self, index: int) -> Batch:
        return self._replay.batches[index]

    def show(self, index: int) -> None:
        self._replay.run(index, self.unit)

    def output(self, index: int) -> Any:
        return None

    def advance(self, index: int, output: Any) -> None:
        return

    def hidden(self, index: int) -> Tensor:
        """
        Raises:
            InputError: always: what a block is given is not kept.
        """
        raise InputError(
            f"The blocks of this model cannot be run apart, so the tokens that {self.unit.module} is given cannot be "
            "weighed: use a solver that counts all tokens alike."
        )


class Replay:
    """The steps of a walk, each made of forwards of the whole model: as many forwards of every batch as there are
    units, for models whose blocks cannot be run apart.

    Args:
        model: its units' modules are patched while it lasts.
        structure: of the model.
        batches: inputs.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure, batches: Sequence[Batch]) -> None:
        self.model = model
        self.units = walk_units(structure)
        self.batches = list(batches)

    def __iter__(self) -> Iterator[ReplayStep]:
        """One step for each unit that the first forward reaches, in its order."""
        for path in self._order():
            yield ReplayStep(self, self.units[path])

    def run(self, index: int, unit: Unit) -> None:
        """Run a forward until the unit has run for the last time."""
        module, left = self.model.get_submodule(unit.module), unit.runs
        own, original = module.__dict__.get("forward"), module.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            output = original(*args, **kwargs)
            left -= 1
            if not left:
                raise _ReachedError
            return output

        module.__dict__["forward"] = counted
        try:
            with torch.no_grad(), without_caches(self.model):
                run_forward(self.model, self.batches[index])
        except _ReachedError:
            pass
        finally:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own

    def _order(self) -> list[str]:
        """Paths of the units in the order in which a forward reaches them."""
        seen: list[str] = []
        hooks = [
            self.model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: seen.append(path))
            for path in self.units
        ]
        try:
            with torch.no_grad(), without_caches(self.model):
                run_forward(self.model, _first_sample(self.batches[0]))
        finally:
            for hook in hooks:
                hook.remove()
        return list(dict.fromkeys(seen))


class _ReachedError(Exception):
    """A forward has gone as far as it should."""
