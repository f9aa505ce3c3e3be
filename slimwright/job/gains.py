"""What solvers with data are expected to gain over plain rounding, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from slimwright.job.walked import WalkedModel
from slimwright.methods import SiteStatistics
from slimwright.model.structure import Site
from slimwright.plan import Assignment
from slimwright.weights import Int

COARSE_BITS = 2
"""Integer grids up to so many bits are tried."""


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


def tried_gain(
    choice: Assignment, weight: Tensor, change: Tensor, stats: SiteStatistics, directions: Tensor | None, rows: Tensor
) -> float | None:
    """What a choice's solver leaves of plain rounding's error, found by solving some rows: on a coarse grid what
    feedback adds to a weight is as large as the weight, and falls outside of the grid's range. None on finer grids, and
    of solvers that say themselves what they gain.

    Args:
        weight, change: (n, in) float32, the rows and what plain rounding does to them.
        directions: as of :func:`expected_gains`; None: the inputs that are apart, if there are any.
        rows: (n,) how they count.
    """
    grid = choice.parsed_grid() if choice.solved else None
    if stats.gram is None or not isinstance(grid, Int) or grid.bits > COARSE_BITS:
        return None
    solved = choice.solver().solve_apart(weight, stats)
    if solved is None:
        return None
    gram = stats.gram
    if directions is None and stats.apart is not None:
        directions = stats.apart.inputs.float()

    def cost(error: Tensor) -> float:
        moved = (error @ gram) * error if directions is None else (error @ directions.t()).square()
        return float(moved.sum(1) @ rows)

    plain = cost(change)
    return cost(solved.dense() - weight) / plain if plain > 0 else None


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
