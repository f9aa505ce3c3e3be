"""Finding the scales of activations that have one for all tokens, on the data, before weights are put on grids."""

from __future__ import annotations

from collections.abc import Callable

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.walked import WalkedModel
from slimwright.model.structure import Structure
from slimwright.plan import Plan
from slimwright.weights.activations import Activations


def found_scales(
    source: Checkpoint,
    structure: Structure,
    calibration: Calibration,
    plan: Plan,
    step: Callable[[int, int], None],
) -> dict[str, str]:
    """The plan's ``activations`` with their scales: the largest magnitude that enters a group's weights falls on the
    largest code. Groups that no token reached are left out: what enters them is not rounded.

    Args:
        step: called with groups done and in all.

    Raises:
        InputError: no group was reached.
    """
    groups = structure.choice_groups()
    wanted = {
        site.name: group
        for group, spec in plan.activations.items()
        for site in groups[group]
        if not Activations.parse(spec).ready
    }
    largest: dict[str, float] = {}
    walked = WalkedModel(source, structure, calibration)
    for sites, collector in walked.collected(lambda unit: [s for s in unit.sites if s.name in wanted], grams=False):
        for site in sites:
            absmax = collector.statistics(site)[0].absmax
            if absmax is not None:
                group = wanted[site.name]
                largest[group] = max(largest.get(group, 0.0), float(absmax.max()))
        step(len(largest), len(set(wanted.values())))
    if wanted and not largest:
        raise InputError("The data reached none of the weights whose activations need a scale: use a scale per token.")
    found = {}
    for group, spec in plan.activations.items():
        rounding = Activations.parse(spec)
        if rounding.ready:
            found[group] = spec
        elif group in largest:
            found[group] = rounding.with_largest(largest[group]).spec
    return found
