"""The option table without data: every grid of the ladder for every choice group, scored by rounding sampled rows; and
16-bit floats for wide tensors that are no sites, scored by casting them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from slimwright.checkpoint import Checkpoint
from slimwright.checkpoint.layout import TensorEntry, entry_cost
from slimwright.errors import InputError
from slimwright.job.aim import Aim
from slimwright.job.low_rank import form_of, low_rank_choices, low_rank_losses
from slimwright.job.parallel import in_order
from slimwright.job.weights import ErrorSum, site_rows, survey, without_data
from slimwright.methods import SiteStatistics
from slimwright.model.structure import Site, Structure
from slimwright.plan import CAST, CAST_GRIDS, KEEP, Assignment, cast_dtype, method_on
from slimwright.search.options import Option
from slimwright.weights import Form, Grid, Int, disk_shapes, parse_form

LADDER: tuple[Grid, ...] = tuple(
    Int(bits, group=group) for bits in range(2, 9) for group in (16, 32, 64, 128, None)
)  # fmt: skip
"""What the search may choose by default."""

FINE_LADDER: tuple[Grid, ...] = LADDER + tuple(
    Int(bits, group=group, symmetric=True) for bits in range(2, 9) for group in (16, 32, 64, 128, None)
)  # fmt: skip
"""The same for a model of few groups, which could not use 99 % of a size otherwise."""

FEW_GROUPS = 12

CAST_BYTES = 16 << 20
"""Bytes of a tile of the source that is cast."""

SAMPLED_WEIGHTS = 1 << 24
"""Weights over the whole model on which options are scored (smaller models are scored on every weight)."""


def weight_entries(site: Site, grid: Form, dtype: torch.dtype) -> list[TensorEntry]:
    """The tensors on disk of a site in a form (a float grid is one plain tensor in the disk's own orientation)."""
    entries = []
    for suffix, part in disk_shapes(grid, site.weight_shape).items():
        plain = grid.plain and suffix == ""
        entries.append(TensorEntry(site.name + suffix, part.dtype, site.shape if plain else part.shape))
    return entries


def kept_entry(checkpoint: Checkpoint, name: str) -> TensorEntry:
    """The tensor as it is."""
    info = checkpoint.tensors[name]
    return TensorEntry(name, info.dtype, info.shape)


def cast_entry(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> TensorEntry:
    """The tensor in another dtype."""
    return TensorEntry(name, dtype, checkpoint.tensors[name].shape)


def group_cost(checkpoint: Checkpoint, sites: Sequence[Site], grid: str, budget: int, aim: Aim | None = None) -> int:
    """Bytes of a choice group's tensors on disk, header entries included; in the files of ``aim`` where it is given."""
    if grid == KEEP:
        entries = [kept_entry(checkpoint, site.name) for site in sites]
    else:
        parsed = parse_form(grid)
        if aim is not None and isinstance(parsed, Grid) and not parsed.plain:
            return aim.packed_cost(sites, parsed, budget)
        entries = [e for site in sites for e in weight_entries(site, parsed, checkpoint.tensors[site.name].dtype)]
    if aim is not None:
        return aim.kept_cost(entries, budget)
    return sum(entry_cost(entry, budget) for entry in entries)


def ladder_for(
    checkpoint: Checkpoint, sites: Sequence[Site], solver: str, ladder: Sequence[Grid] = LADDER
) -> list[Assignment]:
    """Every legal choice for a group: the grids of the ladder, 16-bit floats for wider sources, and keeping."""
    found = [
        Assignment(grid=grid.spec, method=solver)
        for grid in ladder
        if all(grid.illegal(site.rows, site.columns) is None for site in sites)
    ]
    if any(checkpoint.tensors[site.name].dtype in (torch.float32, torch.float64) for site in sites):
        found += [Assignment(grid="bf16", method="quantize/rtn"), Assignment(grid="fp16", method="quantize/rtn")]
    return [*found, Assignment(grid=KEEP)]


@dataclass(frozen=True)
class Sampling:
    """How many weights of a site are scored: ``share`` of them, in evenly spaced rows."""

    share: float

    def rows(self, site: Site) -> torch.Tensor:
        """Indices of the scored rows."""
        return evenly_spaced(site.rows, max(int(site.rows * self.share), 8))


def sampling(structure: Structure) -> Sampling:
    """Every weight of a model up to :data:`SAMPLED_WEIGHTS`, a share of larger ones."""
    total = sum(site.numel for site in structure.sites.values())
    return Sampling(min(1.0, SAMPLED_WEIGHTS / max(1, total)))


def evenly_spaced(rows: int, wanted: int) -> torch.Tensor:
    """Indices of ``wanted`` rows out of ``rows``, or of all where there are fewer."""
    return torch.linspace(0, rows - 1, min(rows, wanted)).round().long()


def chosen_rows(checkpoint: Checkpoint, site: Site, index: torch.Tensor) -> torch.Tensor:
    """Rows of a site by ascending index, (rows, columns) float32; those that follow each other are read at once."""
    runs = _runs(index)
    return torch.cat([site_rows(checkpoint, site, slice(first, last + 1)).float() for first, last in runs])


def matrix_of(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """A site's whole logical matrix, (rows, columns) float32."""
    return site_rows(checkpoint, site, slice(0, site.rows)).float()


def _runs(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Consecutive indices as (first, last) pairs."""
    values = rows.tolist()
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return runs


def score_group(
    checkpoint: Checkpoint, sites: Sequence[Site], choices: Sequence[Assignment], how: Sampling
) -> list[float | None]:
    """Data-free loss of each choice: relative squared error × parameters, summed over the group's sites.

    None for a grid that cannot hold the values (its scales, or a float's range, overflow). A layer's many experts are
    scored on an evenly spaced few of each kind.

    Raises:
        InputError: NaN or Inf in the source, named with the tensor.
    """
    factored = [choice for choice in choices if form_of(choice) is not None]
    solvers = [None if choice.kept or choice in factored else without_data(choice.solver()) for choice in choices]
    losses = [0.0] * len(choices)
    for site, weight in _some_experts(sites):
        source = chosen_rows(checkpoint, site, how.rows(site))
        if not torch.isfinite(source).all():
            raise InputError(
                f"The tensor '{site.name}' of {checkpoint.path} holds NaN or Inf: repair or replace the checkpoint."
            )
        own = [0.0] * len(choices)
        for index, solver in enumerate(solvers):
            if solver is not None:
                total = ErrorSum()
                stats = SiteStatistics(survey=survey(checkpoint, site, solver.form))
                total.add(source, solver.solve(source, stats).dense().clone())
                own[index] = total.relative * site.numel
        if factored:  # never of experts
            norm = float(source.square().sum()) * site.rows / len(source)
            each = torch.full((site.rows,), site.numel / max(norm, 1e-30))
            solver = next(solver for solver in solvers if solver is not None)
            found = low_rank_losses(
                choices,
                own,
                solver,
                site.weight_shape,
                partial(matrix_of, checkpoint, site),
                SiteStatistics.none(),
                each,
            )
            for index, loss in found.items():
                own[index] = loss
        losses = [total + loss * weight for total, loss in zip(losses, own, strict=True)]
    return [loss if math.isfinite(loss) else None for loss in losses]


def score_casts(checkpoint: Checkpoint, name: str, choices: Sequence[Assignment]) -> list[float | None]:
    """Loss of each choice for a tensor that is no site, on the same scale; None where a value would become infinite.

    Raises:
        InputError: NaN or Inf in the source, named with the tensor.
    """
    sums = [ErrorSum() for _ in choices]
    for rows in checkpoint.tiles(name, CAST_BYTES):
        source = checkpoint.read(name, rows)
        if not torch.isfinite(source).all():
            raise InputError(
                f"The tensor '{name}' of {checkpoint.path} holds NaN or Inf: repair or replace the checkpoint."
            )
        for choice, total in zip(choices, sums, strict=True):
            if not choice.kept:
                total.add(source, source.to(cast_dtype(choice.grid)).to(source.dtype))
    losses = [total.relative * checkpoint.tensors[name].numel for total in sums]
    return [loss if math.isfinite(loss) else None for loss in losses]


def _some_experts(sites: Sequence[Site], most: int = 4) -> list[tuple[Site, float]]:
    """At most ``most`` sites of each shape and role with the factor that scales them up to all."""
    kinds: dict[tuple[str, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        kinds.setdefault((site.role, site.shape), []).append(site)
    chosen = []
    for members in kinds.values():
        count = min(most, len(members))
        picked = [members[round(i * (len(members) - 1) / max(1, count - 1))] for i in range(count)]
        chosen += [(site, len(members) / count) for site in picked]
    return chosen


def option_costs(
    checkpoint: Checkpoint,
    structure: Structure,
    bound: Mapping[str, str],
    solver: str,
    budget: int,
    memory: int = 1 << 30,
    aim: Aim | None = None,
    wider: Sequence[Aim] = (),
) -> dict[str, list[Option]]:
    """Options of every choice group and castable tensor with their costs; losses are 0 until :func:`score_options`.

    Args:
        bound: choice by group that the user's rules fix.
        solver: spec of the solver.
        budget: bytes, for the width of offsets in the header.
        memory: bytes that solving one matrix may take, for forms that need it whole; 0: none of these.
        aim: the target: its grids are the ladder, and costs are those of its files.
        wider: targets whose grids are added to the ladder.
    """
    groups = structure.choice_groups()
    ladder = FINE_LADDER if len(groups) <= FEW_GROUPS else LADDER

    def ladder_of(sites: Sequence[Site]) -> Sequence[Grid]:
        if aim is not None:
            return aim.grids(sites)
        return list(dict.fromkeys([*ladder, *(grid for other in wider for grid in other.grids(sites))]))

    choices = {
        group: [Assignment(grid=bound[group], method=method_on(bound[group], solver), reason="rule")]
        if group in bound
        else [
            *ladder_for(checkpoint, sites, solver, ladder_of(sites)),
            *(low_rank_choices(sites, solver, memory) if aim is None else ()),
        ]
        for group, sites in groups.items()
    }
    table = {
        group: [
            Option(group, choice.grid, group_cost(checkpoint, sites, choice.grid, budget, aim), 0.0, choice=choice)
            for choice in choices[group]
        ]
        for group, sites in groups.items()
    }
    for name in structure.castable:
        entries = {KEEP: kept_entry(checkpoint, name)}
        entries |= {grid: cast_entry(checkpoint, name, cast_dtype(grid)) for grid in CAST_GRIDS}
        table[name] = [
            Option(
                name,
                grid,
                entry_cost(entry, budget) if aim is None else aim.kept_cost([entry], budget),
                0.0,
                choice=Assignment(grid=grid, method=None if grid == KEEP else CAST),
            )
            for grid, entry in entries.items()
        ]
    return table


def score_options(
    checkpoint: Checkpoint,
    structure: Structure,
    table: Mapping[str, list[Option]],
    done: Mapping[str, list[float | None]],
    record: Callable[[str, list[float | None]], None],
) -> dict[str, list[Option]]:
    """The same options with their losses; a group of one option has nothing to choose and is not scored.

    Options that cannot hold the values are left out.

    Args:
        done: losses by group that an earlier, interrupted run has found; None for an option that cannot be chosen.
        record: called with each group's new losses.
    """
    how = sampling(structure)
    groups = structure.choice_groups()
    losses: dict[str, list[float | None]] = {
        group: done.get(group, [0.0]) for group in table if group in done or len(table[group]) == 1
    }

    def score(group: str) -> list[float | None]:
        choices = [option.choice for option in table[group]]
        if group not in groups:
            return score_casts(checkpoint, group, choices)
        return score_group(checkpoint, groups[group], choices, how)

    for group, found in in_order(score, [group for group in table if group not in losses]):
        losses[group] = found
        record(group, found)
    return with_losses(table, losses)


def with_losses(
    table: Mapping[str, list[Option]],
    losses: Mapping[str, Sequence[float | None]],
    errors: Mapping[str, float] | None = None,
) -> dict[str, list[Option]]:
    """The options with their losses; those that cannot hold the values are left out.

    Args:
        errors: of some groups, the standard error of their losses as a part of each.
    """
    known = errors or {}
    return {
        group: [
            replace(o, loss=loss, error=loss * known.get(group, 0.0))
            for o, loss in zip(options, losses[group], strict=True)
            if loss is not None
        ]
        for group, options in table.items()
    }
