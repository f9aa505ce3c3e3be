"""Plans that leave nothing to search: one that is given, or one grid everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from slimwright.errors import InputError
from slimwright.job.aim import Aim, substitute
from slimwright.job.request import OWN, FitOptions
from slimwright.model.structure import Structure
from slimwright.plan import KEEP, Assignment, Plan, cannot_hold, method_on, rounded_groups
from slimwright.rules import Rule, bind
from slimwright.weights import Grid, parse_form


def fixed_plan(
    asked: FitOptions, structure: Structure, rules: list[Rule], aim: Aim | None, aims: Sequence[Aim]
) -> Plan | None:
    """The plan where nothing is left to search.

    Args:
        aim: the target that was asked for.
        aims: the targets of ``auto``.

    Raises:
        InputError: it is not legal in the target; says which sites, and what would be.
    """
    if asked.given_plan is not None:
        plan = asked.given_plan.without_dropped(structure)
        plan.check(structure)
        plan.target = _target_of(plan, structure, aim, aims)
        return plan
    if asked.grid is None:
        return None
    grid = parse_form(asked.grid)
    bound = bind(rules, structure) if rules else {}
    assignments = {}
    for group, sites in structure.choice_groups().items():
        illegal = next((r for s in sites if (r := cannot_hold(grid, s))), None)
        other = substitute(aim, sites, grid) if isinstance(grid, Grid) else None
        if group not in bound and other is not None:
            assignments[group] = Assignment(
                grid=other.spec, method=method_on(other.spec, asked.solver),
                reason=f"{aim.profile.name if aim else ''} has it for {grid}, which cannot hold it",
            )  # fmt: skip
        elif (
            group not in bound and illegal is None and aim is not None and isinstance(grid, Grid)
            and aim.outside(sites, grid)
        ):  # fmt: skip
            assignments[group] = Assignment(grid=KEEP, reason=f"dense in {aim.profile.name}")
        elif group in bound:
            assignments[group] = Assignment(
                grid=bound[group], method=method_on(bound[group], asked.solver), reason="rule"
            )  # fmt: skip
        elif illegal:
            assignments[group] = Assignment(grid=KEEP, reason=f"{grid} cannot hold it: {illegal}")
        else:
            assignments[group] = Assignment(grid=grid.spec, method=method_on(grid.spec, asked.solver))
    plan = Plan(assignments=assignments, edits=asked.edits())
    if asked.activations is not None:
        plan.activations = rounded_groups(asked.activations, plan, structure)
    plan.target = _target_of(plan, structure, aim, aims)
    return plan


def _target_of(plan: Plan, structure: Structure, aim: Aim | None, aims: Sequence[Aim]) -> str:
    """In whose form a fixed plan is written: the target asked, else the first of ``auto``'s that takes it."""
    grids = {name: assignment.grid for name, assignment in plan.by_site(structure).items()}
    sites, rounded = list(structure.sites.values()), plan.roundings(structure)
    if aim is not None:
        aim.profile.check(grids, sites, rounded)
        return aim.profile.name
    for other in aims:
        try:
            other.profile.check(grids, sites, rounded)
        except InputError:
            continue
        if any(grid != KEEP for grid in grids.values()):
            return other.profile.name
    return OWN
