"""Finding the scales of activations that have one for all tokens, on the data, before weights are put on grids."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
    """The plan's ``activations`` with their scales, each found as its spec says on everything that enters the group's
    weights. Groups that no token reached, or nothing but zeros, are left out: what enters them is not rounded.

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
    rounding = {group: Activations.parse(spec) for group, spec in plan.activations.items()}
    largest: dict[str, float] = {}
    counts: dict[str, Tensor] = {}
    seen: set[tuple[str, str]] = set()
    walked = WalkedModel(source, structure, calibration)
    counted = any(rounding[group].how != "absmax" for group in wanted.values())
    here = walked.collected(lambda unit: [s for s in unit.sites if s.name in wanted], grams=False, magnitudes=counted)
    for sites, collector in here:
        for site, magnitudes in [(site, collector.magnitudes(site)) for site in sites]:
            group, fed = wanted[site.name], site.gram_group or site.name
            absmax = collector.statistics(site)[0].absmax
            if absmax is not None:
                largest[group] = max(largest.get(group, 0.0), float(absmax.max()))
            if magnitudes is not None and (group, fed) not in seen:
                counts[group] = counts[group] + magnitudes if group in counts else magnitudes
            seen.add((group, fed))
        step(len(largest), len(set(wanted.values())))
    if wanted and not largest:
        raise InputError("The data reached none of the weights whose activations need a scale: use a scale per token.")
    found = {}
    for group, own in rounding.items():
        if own.ready:
            found[group] = own.spec
        elif group in counts:
            found[group] = own.of_magnitudes(counts[group], largest[group]).spec
        elif group in largest:
            found[group] = own.with_largest(largest[group]).spec
    return found
