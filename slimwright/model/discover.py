"""Find a model's structure: from the module tree on the meta device, one observed forward, and the names on disk."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.model.groups import assign_groups, find_folds
from slimwright.model.inputs import dummy_inputs
from slimwright.model.names import NameMap, name_map
from slimwright.model.observe import Observation, behaves_as_linear, gain_offset, observe, turns_with_its_input
from slimwright.model.roles import role_of
from slimwright.model.skeleton import skeleton
from slimwright.model.stacks import find_stacks
from slimwright.model.structure import Kind, Site, Structure
from slimwright.runtime.transformers_private import Conv1D

SMALLEST_SITE = 1024
"""Values; a smaller matrix is kept: its scales and headers would eat what packing saves."""

_WIDE = (torch.float32, torch.float64)
"""What a cast to 16 bits makes smaller."""

_TILE_BYTES = 64 << 20
_UNUSED = "not used in the observed forward"


def discover(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Structure:
    """The structure of a checkpoint. Weights are read only to compare tied tensors that are stored twice.

    Raises:
        InputError: the config is malformed or unknown, or the tensors do not fill the model that it describes.
    """
    model = skeleton(checkpoint.config, checkpoint.model_path, checkpoint.tensors, trust_remote_code)
    names = name_map(model, checkpoint.tensors)
    names.check()
    names = _untie_different(checkpoint, names)
    observation, note = _observed(model)
    return _Discovery(model, checkpoint.tensors, names, observation, note).structure()


def _untie_different(checkpoint: Checkpoint, names: NameMap) -> NameMap:
    """Ties whose two stored tensors differ are none, as transformers decides too."""
    on_disk = {target.name: name for name, target in names.targets.items()}
    ties = dict(names.ties)
    same: list[str] = []
    for copy in names.stored_twice:
        if _equal(checkpoint, on_disk[copy], on_disk[ties[copy]]):
            same.append(copy)
        else:
            del ties[copy]
    return dataclasses.replace(names, ties=ties, stored_twice=tuple(same))


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    info = checkpoint.tensors[first]
    if tuple(info.shape) != tuple(checkpoint.tensors[second].shape) or info.dtype != checkpoint.tensors[second].dtype:
        return False
    rows = info.shape[0] if info.shape else 1
    step = max(1, _TILE_BYTES * rows // max(1, info.nbytes))
    return all(
        torch.equal(checkpoint.read(first, rows=tile), checkpoint.read(second, rows=tile))
        for tile in (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))
    )


def _observed(model: PreTrainedModel) -> tuple[Observation | None, str]:
    # In float32 the fused experts of some families take a path that has no meta implementation.
    nn.Module.to(model, torch.bfloat16)
    try:
        return observe(model, dummy_inputs(model, device="meta")), ""
    except InputError as error:
        return None, f"Uses and groups are guessed from module classes and names: {error}"
    except Exception as error:  # a forward may need values, which do not exist here
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        return None, (
            "Uses and groups are guessed from module classes and names: a forward without values fails "
            f"({type(error).__name__}: {reason})."
        )


class _Discovery:
    """One run of discovery over one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: Mapping[str, Any],
        names: NameMap,
        observation: Observation | None,
        note: str,
    ) -> None:
        self.model, self.tensors, self.names, self.observation, self.note = model, tensors, names, observation, note
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.tied_names: dict[str, list[str]] = {}  # owner → its tied names
        for name, owner in names.ties.items():
            self.tied_names.setdefault(owner, []).append(name)
        head = model.get_output_embeddings()
        self.heads = {path for path, module in self.modules.items() if module is head}
        self.regular_kin = self._regular_kin()

    def structure(self) -> Structure:
        sites: dict[str, Site] = {}
        kept: dict[str, str] = {}
        roles: dict[str, str] = {}
        on_disk = {target.name: name for name, target in reversed(self.names.targets.items())}
        for name in self.tensors:
            roles[name] = self._role(name)
            found = self._classify(name, roles[name], on_disk)
            if isinstance(found, Site):
                sites[name] = found
            else:
                kept[name] = found
        owners = {site.module for site in sites.values()}
        observation = self.observation or Observation()
        runs = {path: len(calls) for path, calls in observation.calls.items()}
        stacks = find_stacks(self.model, owners, observation.order, runs)
        blocks = [block.module for stack in stacks for block in stack.blocks]
        sites = {
            name: dataclasses.replace(
                site, block=next((block for block in blocks if site.module.startswith(block + ".")), None)
            )
            for name, site in sites.items()
        }
        sites = assign_groups(sites, self.observation)
        ties = {on_disk.get(name, name): on_disk[owner] for name, owner in self.names.ties.items()}
        return Structure(
            family=self.model.config.model_type,
            architecture=type(self.model).__name__,
            stacks=stacks,
            sites=sites,
            kept=kept,
            roles=roles,
            ties=ties,
            folds=find_folds(self.model, sites, on_disk, self.observation),
            to_module=self.names.to_module,
            parameters=sum(p.numel() for name, p in self.parameters.items() if name not in self.names.ties),
            observed=self.observation is not None,
            note=self.note or self._unused_note(kept),
            bytes={name: info.nbytes for name, info in self.tensors.items()},
            castable=self._castable(kept, roles, {site.choice_group for site in sites.values()} | ties.keys()),
            rms_norms=self._rms_norms(on_disk),
        )

    def _rms_norms(self, on_disk: Mapping[str, str]) -> dict[str, float]:
        """Disk names of RMS norms' gains, and what the model adds to them."""
        found = {}
        for path, module in self.modules.items():
            name = on_disk.get(f"{path}.weight")
            if name is not None and "norm" in type(module).__name__.lower() and turns_with_its_input(module):
                found[name] = gain_offset(module) or 0.0
        return found

    def _castable(self, kept: Mapping[str, str], roles: Mapping[str, str], others: set[str]) -> tuple[str, ...]:
        """Kept tensors that may be stored in 16 bits; ``others`` are tied, or share their name with a choice group."""
        return tuple(
            name
            for name in kept
            if self.tensors[name].dtype in _WIDE
            and self.tensors[name].numel >= SMALLEST_SITE
            and roles[name] not in ("router", "norm")
            and name not in others
        )

    def _unused_note(self, kept: Mapping[str, str]) -> str:
        unused = [name for name, reason in kept.items() if reason == _UNUSED]
        if not unused:
            return ""
        size = sum(self.tensors[name].nbytes for name in unused)
        return (
            f"{len(unused)} weights ({size / 1e6:.1f} MB, '{unused[0]}' first) took no part in a forward on random "
            "inputs and are kept as they are."
        )

    def _owner(self, module_name: str) -> tuple[str, str, nn.Module]:
        """Path of the owner, name of the attribute, the owner."""
        path, _, attribute = module_name.rpartition(".")
        return path, attribute, self.modules[path]

    def _role(self, name: str) -> str:
        target = self.names.targets.get(name)
        if target is None:
            return "other"
        if target.how == "converted":
            return role_of(name.rpartition(".")[0])
        path, attribute, owner = self._owner(target.name)
        if _is_norm(owner):
            return "norm"
        if _is_experts(owner):
            if target.expert is not None and target.expert[2] == 2:
                return ("gate", "up")[target.expert[1]]
            found = role_of(attribute.removesuffix("_bias"))
            return found if found in ("gate", "up", "gate_up", "down") else "experts"
        if _is_router(path, self.modules):
            return "router"
        if path in self.heads:
            return "head"
        found = role_of(path)
        if found == "other" and isinstance(owner, nn.Embedding) and "bias" not in path.rpartition(".")[2]:
            return "embed"
        return found

    def _classify(self, name: str, role: str, on_disk: Mapping[str, str]) -> Site | str:
        """The site, or why the tensor is kept."""
        target = self.names.targets.get(name)
        if target is None:
            return "not used by the architecture"
        if target.name in self.names.stored_twice:
            return f"tied to {on_disk[self.names.ties[target.name]]}"
        path, attribute, owner = self._owner(target.name)
        parameter = self.parameters.get(target.name)
        shape = tuple(self.tensors[name].shape)
        if target.how == "converted":
            return "converted by transformers on load"
        if role == "router":
            return "router: decides which experts run"
        if parameter is None:
            return "buffer"
        if not self.tensors[name].dtype.is_floating_point:
            return "not floating point"
        if role == "norm":
            return "norm"
        if attribute.endswith("bias"):
            return "bias"
        if len(shape) < 2:
            return "vector"
        if isinstance(owner, nn.modules.conv._ConvNd):
            return "convolution"
        if self.parameters[target.name].numel() < SMALLEST_SITE:
            return f"small: {self.parameters[target.name].numel()} values"
        kind: Kind
        transposed = False
        if _is_experts(owner) and parameter.ndim == 3:
            kind, transposed = "experts", bool(owner.is_transposed) and target.how == "plain"
        else:
            found = self._use(target.name, path, owner)
            if isinstance(found, str) and found not in ("linear", "conv1d", "embedding"):
                return found
            kind, transposed = found, found == "conv1d"  # type: ignore[assignment]
        reads = self.observation.dtype_reads if self.observation else set()
        return Site(
            name=name,
            module=path,
            parameter=attribute,
            role=role,
            kind=kind,
            shape=shape,
            transposed=transposed,
            expert=target.expert,
            dtype_read=any(alias in reads for alias in (target.name, *self.tied_names.get(target.name, ()))),
        )

    def _use(self, module_name: str, path: str, owner: nn.Module) -> str:
        """``linear``, ``conv1d`` or ``embedding``; or why the parameter is kept."""
        kind = _class_kind(owner)
        if self.observation is None:
            return kind or f"functional use: {type(owner).__name__} is no linear or embedding"
        uses: list[tuple[str, str]] = []
        for alias in (module_name, *self.tied_names.get(module_name, ())):
            uses += self.observation.uses.get(alias, ())
        for use, at in uses:
            if use == "functional":
                return f"functional use: read by {type(self.modules[at]).__name__}"
        if uses and kind is not None:
            return kind
        if uses:
            return f"functional use: {type(owner).__name__} is no linear or embedding"
        if kind is not None and _kin(path, self.modules) in self.regular_kin:
            return kind
        return _UNUSED

    def _regular_kin(self) -> set[tuple[str, str, str]]:
        """Kin of modules that were seen to use their weight in the regular way: experts that no token went to."""
        if self.observation is None:
            return set()
        return {
            _kin(name.rpartition(".")[0], self.modules)
            for name, uses in self.observation.uses.items()
            if all(use != "functional" for use, _ in uses)
        }


def _kin(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str, str]:
    """Parent's class, own name and own class: equal for the same place in another block or expert."""
    parent, _, leaf = path.rpartition(".")
    return type(modules[parent]).__name__, leaf, type(modules[path]).__name__


def _class_kind(owner: nn.Module) -> Kind | None:
    if isinstance(owner, nn.Linear) and behaves_as_linear(owner):
        return "linear"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "conv1d" if isinstance(owner, Conv1D) else None


def _is_norm(owner: nn.Module) -> bool:
    return bool(re.search(r"norm", type(owner).__name__, re.IGNORECASE)) and not list(owner.children())


def _is_experts(owner: nn.Module) -> bool:
    """Whether it is a class of fused experts that follows transformers' experts interface."""
    return hasattr(owner, "is_transposed") and hasattr(owner, "has_gate")


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, leaf = path.rpartition(".")
    if leaf == "gate":
        return any("expert" in name for name, _ in modules[parent].named_children())
    return role_of(path) == "router" or parent.rpartition(".")[2] == "router"
