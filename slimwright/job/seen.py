"""What a search saw, for the report: the best that one family alone could do, and how sensitive every group is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimwright.errors import InputError
from slimwright.job.drops import kept_bytes
from slimwright.search import Option, Table, search
from slimwright.search.curve import everywhere
from slimwright.search.tree import Node, search_tree
from slimwright.weights import LowRankForm

NATS = "nats per token"
"""Unit of losses that predict a KL divergence (of vectors, one minus their cosine)."""

QUANTIZATION, LOW_RANK, DROPS = "quantization alone", "low rank alone", "drops alone"


def single_families(table: Table, nodes: Sequence[Node], budget: int, rest: int = 0) -> list[tuple[str, int, float]]:
    """(family, bytes, loss) of the best allocation within the budget that has options of one family only, beside what
    stays as it is; of its smallest where none fits. Empty where the table has one family.

    Args:
        nodes: what may be dropped.
        budget: bytes of the options.
        rest: bytes that every allocation takes beside its options.
    """
    ranked = any(_low_rank(option) for options in table.values() for option in options)
    if not ranked and not nodes:
        return []
    whole = kept_bytes(nodes)
    families = {QUANTIZATION: _only(table, False)} | ({LOW_RANK: _only(table, True)} if ranked else {})
    found = []
    for name, some in families.items():
        cost, loss = _best(some, budget - whole)
        found.append((name, cost + whole + rest, loss))
    if nodes:
        kept = {scope: [o for o in options if o.choice.kept] or options for scope, options in table.items()}
        try:
            best = search_tree(kept, nodes, budget, search)
            found.append((DROPS, best.cost + rest, best.loss))
        except InputError:  # with every drop it is still too large: there is no such point
            pass
    return found


def scale(searched: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, float] | None:
    """What was measured of the chosen plan, over what was predicted, with the interval of the measurement: the factor
    that brings the search's other predictions to the measured scale. None where the loss is in another unit, nothing is
    predicted to be lost, or what was measured is no such loss.

    Args:
        searched: facts of the search.
        quality: of the result, each figure with ``value``, ``low`` and ``high``.
    """
    predicted = searched.get("predicted") or 0.0
    if searched.get("unit") != NATS or predicted <= 0:
        return None
    if "kl" in quality:
        found = {key: quality["kl"][key] for key in ("value", "low", "high")}
    elif "cosine_mean" in quality:
        cosine = quality["cosine_mean"]
        found = {key: 1 - cosine[other] for key, other in (("value", "value"), ("low", "high"), ("high", "low"))}
    else:
        return None
    return {key: measured / predicted for key, measured in found.items()}


def _low_rank(option: Option) -> bool:
    return not option.choice.kept and isinstance(option.choice.parsed_grid(), LowRankForm)


def _only(table: Table, low_rank: bool) -> dict[str, list[Option]]:
    """The table with one family, and what stays as it is; where nothing else is left, everything."""
    return {
        scope: [o for o in options if o.choice.kept or _low_rank(o) == low_rank] or list(options)
        for scope, options in table.items()
    }


def _best(table: Table, budget: int) -> tuple[int, float]:
    """Cost and loss of the best allocation within the budget, else of the smallest."""
    try:
        best = search(table, budget)
        return best.cost, best.loss
    except InputError:
        least = [min(options, key=lambda option: (option.cost, option.loss)) for options in table.values()]
        return sum(option.cost for option in least), sum(option.loss for option in least)


def sensitivity(table: Table, budget: int) -> dict[str, Any]:
    """What every group alone would lose on one and the same option: of those that have, everywhere, no smaller and
    better one, that whose size is nearest to the budget. ``option`` (its label) and ``loss`` (by group, in the table's
    unit); empty where no option is everywhere.
    """
    kept = {option.label for options in table.values() for option in options if option.choice.kept}
    common = [point for point in everywhere(table) if point[0] not in kept]
    best = [one for one in common if not any(cost <= one[1] and loss < one[2] for _, cost, loss in common)]
    if not best:
        return {}
    label = min(best, key=lambda point: abs(point[1] - budget))[0]
    return {
        "option": label,
        "loss": {scope: o.loss for scope, options in table.items() for o in options if o.label == label},
    }
