"""Which sites belong together: fed by the same tensor, fused by runtimes, or bound by a scale that can move."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from slimwright.model.observe import Observation, gain_offset
from slimwright.model.structure import ROLES, FoldGroup, Site

_FUSED = ({"q", "k", "v", "kv", "qkv"}, {"gate", "up"})
_EXPERT = re.compile(r"(?<=\.)(experts?)[._](\d+)(?=\.)")
_MOST_PARTS = 6
_BESIDE_ATTENTION = {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_norm", "key_norm"}
_BESIDE_ATTENTION |= {"relative_attention_bias"}  # T5's, added to the scores


def group_name(names: Iterable[str]) -> str:
    """Name of a group of weights: what their disk names share, then the parts joined by ``+``; no expert numbers."""
    plain = dict.fromkeys(_EXPERT.sub(r"\1", name).removesuffix(".weight") for name in names)
    split = [name.split(".") for name in plain]
    if len(split) == 1:
        return ".".join(split[0])
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    parts = list(dict.fromkeys(".".join(words[shared:]) for words in split))
    if len(parts) > _MOST_PARTS:
        parts = [*parts[:2], f"{len(parts) - 2} more"]
    return ".".join([*split[0][:shared], "+".join(parts)])


def assign_groups(sites: Mapping[str, Site], observation: Observation | None) -> dict[str, Site]:
    """The sites with their Gram and choice groups.

    The Gram group is seen: modules that were called with the same tensor objects. Without an observation it is taken to
    be the choice group. Choice groups are the query, key and value projections of one attention, gate and up of one
    MLP, and the gate and up, and the down matrices, of a layer's experts.
    """
    grams: dict[object, list[Site]] = {}
    choices: dict[object, list[Site]] = {}
    for site in sites.values():
        family = next((index for index, roles in enumerate(_FUSED) if site.role in roles), None)
        parent = site.module.rpartition(".")[0]
        inputs = observation.inputs(site.module) if observation else ()
        gram: object = site.name
        choice: object = site.name
        if site.kind == "experts":
            input_role = "input" if site.role in ("gate", "up", "gate_up") else site.role
            gram = (site.module, input_role, site.expert[0] if site.expert else None)
            choice = (site.module, input_role)
        elif site.kind != "embedding":
            if inputs:
                gram = inputs
            elif family is not None:
                gram = (parent, family)
            if family is not None:
                choice = (gram, parent, family)
            if _EXPERT.search(site.module + "."):  # experts that are modules of their own
                choice = (_EXPERT.sub(r"\1", parent + "."), "input" if site.role in _FUSED[1] else site.role)
        grams.setdefault(gram, []).append(site)
        choices.setdefault(choice, []).append(site)
    gram_names: dict[str, str] = {}
    for members in grams.values():
        gram_names |= dict.fromkeys((site.name for site in members), _gram_name(members))
    choice_names: dict[str, str] = {}
    for members in choices.values():
        choice_names |= dict.fromkeys((site.name for site in members), _choice_name(members))
    return {
        name: dataclasses.replace(site, gram_group=gram_names[name], choice_group=choice_names[name])
        for name, site in sites.items()
    }


def _in_role_order(members: Iterable[Site]) -> list[Site]:
    """q before k before v, gate before up, whatever their order in the file."""
    return sorted(members, key=lambda site: ROLES.index(site.role))


def _choice_name(members: list[Site]) -> str:
    return group_name(site.name for site in _in_role_order(members))


def _gram_name(members: list[Site]) -> str:
    """As :func:`group_name`, but an expert's own inputs keep its number."""
    members = _in_role_order(members)
    if len(members) == 1 or members[0].expert is not None:
        first = members[0].name.removesuffix(".weight")
        return "+".join([first, *(site.name.removesuffix(".weight").rpartition(".")[2] for site in members[1:])])
    return group_name(site.name for site in members)


def find_folds(
    model: PreTrainedModel, sites: Mapping[str, Site], on_disk: Mapping[str, str], observation: Observation | None
) -> tuple[FoldGroup, ...]:
    """Fold groups that are sound as observed; none without an observation.

    A norm's gain folds if nothing but linears reads its output (not so where it is also the residual, or feeds a
    router). v → o: the attention has q, k, v and o and nothing else with weights but norms of q and k. up → down: the
    up projection's output is a factor of one product, which only the down projection reads.
    """
    if observation is None:
        return ()
    modules = dict(model.named_modules())
    by_module = {site.module: site for site in sites.values() if site.kind in ("linear", "conv1d")}
    folds: list[FoldGroup] = []
    for path, calls in observation.calls.items():
        module = modules.get(path)
        if module is None or len(calls) != 1 or calls[0].returned is None:
            continue
        if "norm" in type(module).__name__.lower() and f"{path}.weight" in on_disk:
            consumers = observation.reaches(calls[0].returned, through_product=False)
            offset = gain_offset(module) if consumers and consumers <= by_module.keys() else None
            if consumers and offset is not None:
                names = tuple(name for name, site in sites.items() if site.module in consumers)
                folds.append(FoldGroup("norm", on_disk[f"{path}.weight"], names, offset=offset))
        elif path in by_module and by_module[path].role == "up":
            consumers = observation.reaches(calls[0].returned, through_product=True)
            if consumers and len(consumers) == 1 and consumers <= by_module.keys():
                (down,) = consumers
                if by_module[down].columns == by_module[path].rows:
                    folds.append(FoldGroup("up_down", by_module[path].name, (by_module[down].name,)))
    attentions: dict[str, dict[str, Site]] = {}
    for site in by_module.values():
        if site.role in ("q", "k", "v", "o"):
            attentions.setdefault(site.module.rpartition(".")[0], {})[site.role] = site
    for path, parts in attentions.items():
        fold = _value_fold(modules[path], parts)
        if fold is not None:
            folds.append(fold)
    return tuple(folds)


def _value_fold(attention: nn.Module, parts: Mapping[str, Site]) -> FoldGroup | None:
    if set(parts) != {"q", "k", "v", "o"}:
        return None
    own = {site.module.rpartition(".")[2] for site in parts.values()}
    others = {
        name
        for name, child in attention.named_children()
        if name not in own and next(child.parameters(), None) is not None
    }
    value, output = parts["v"], parts["o"]
    repeat, rest = divmod(output.columns, value.rows)
    groups = getattr(attention, "num_key_value_groups", 1)
    if others - _BESIDE_ATTENTION or rest or repeat != groups or list(attention.parameters(recurse=False)):
        return None
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or value.rows % head_dim:
        return None if repeat > 1 else FoldGroup("v_o", value.name, (output.name,))
    return FoldGroup("v_o", value.name, (output.name,), repeat=repeat, head_dim=head_dim)
