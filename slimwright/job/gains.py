"""What solvers with data are expected to gain over plain rounding, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from slimwright.job.walked import WalkedModel
from slimwright.methods import SiteStatistics
from slimwright.model.structure import Site
from slimwright.plan import Assignment


def expected_gains(
    choices: Sequence[Assignment], statistics: Sequence[SiteStatistics], directions: Tensor | None = None
) -> list[float]:
    """The error expected of each choice's solver, relative to plain rounding's; 1 where it has no data.

    Args:
        statistics: of each of the site's matrices.
        directions: (n, in) on which errors are judged, of one matrix (:attr:`Sensitivity.directions`); None: on inputs.
    """
    seen = [stats for stats in statistics if stats.gram is not None]
    known: dict[str, float] = {}

    def gain(choice: Assignment) -> float:
        solver = choice.solver()
        if solver.spec not in known:  # a spec leaves out the form, of which a gain is taken to be independent
            known[solver.spec] = sum(solver.expected_gain(stats, directions) for stats in seen) / len(seen)
        return known[solver.spec]

    return [gain(choice) if seen and choice.solved else 1.0 for choice in choices]


def walked_gains(
    walked: WalkedModel, groups: Mapping[str, Sequence[Site]], choices: Mapping[str, Sequence[Assignment]]
) -> dict[str, list[float]]:
    """The gains of every choice of every group, the mean over its sites, from a walk over the model.

    Embeddings count as not gained on: feedback lowers the error of products, not that of rows looked up.

    Args:
        groups: the sites of each.
        choices: of some groups.
    """
    wanted = {
        group for group, own in choices.items() if any(choice.solved and choice.solver().needs for choice in own)
    }  # fmt: skip
    sums = {group: [0.0] * len(own) for group, own in choices.items()}
    counts = dict.fromkeys(choices, 0)
    for sites, collector in walked.collected(
        lambda unit: [s for s in unit.sites if s.choice_group in wanted and s.kind != "embedding"], judged=True
    ):
        for site in sites:
            group = site.choice_group
            found = expected_gains(choices[group], collector.statistics(site))
            sums[group] = [total + gain for total, gain in zip(sums[group], found, strict=True)]
            counts[group] += 1
    return {
        group: [
            (total + len(groups[group]) - counts[group]) / len(groups[group]) if group in groups else 1.0
            for total in own
        ]
        for group, own in sums.items()
    }
