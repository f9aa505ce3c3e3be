"""What of a model can be dropped, found by running it hollow (:mod:`slimwright.model.hollow`): attention and MLP
sublayers by their output projections, and whole blocks that are then the identity.

A dropped sublayer means: its output projection is zero, weight and bias. The highest module around the projection that
then gives zeros is replaced by one that holds nothing; so are modules before it whose every weight no longer matters
(its norm, BERT's ``attention.self``, OPT's ``fc1``). What cannot be rebuilt so is refused with a reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, did_you_mean
from slimwright.model.dropped import DroppedForm, keeps_state
from slimwright.model.hollow import dropped, float_tensors, hollow_model, reached, replaced
from slimwright.model.inputs import dummy_inputs
from slimwright.model.skeleton import skeleton
from slimwright.model.structure import Structure

_TOKENS = 6


@dataclass(frozen=True)
class Drop:
    """One sublayer or block that can be dropped.

    Attributes:
        name: as plans call it, in disk names: ``model.layers.3.self_attn``, ``model.layers.7``.
        block: module path of its block.
        attention: whether it attends.
        outputs: disk names of the weights and biases that are zero when it is dropped.
        tensors: disk names of all that is not written then: these, and what no longer matters.
        forms: what stands in the rebuilt model, by module path; empty for a block, which is not there.
        sublayers: names of a block's sublayers; empty for a sublayer.
        mark: the disk name that stays in the files as one byte, so that transformers alone stops at it.
    """

    name: str
    block: str
    attention: bool
    outputs: tuple[str, ...]
    tensors: tuple[str, ...]
    forms: Mapping[str, DroppedForm] = field(default_factory=dict, hash=False)
    sublayers: tuple[str, ...] = ()
    mark: str = ""

    @property
    def whole_block(self) -> bool:
        return not self.forms


@dataclass(frozen=True)
class Droppable:
    """What can be dropped, by name, and why other things cannot, by the name of a block or an output projection."""

    drops: dict[str, Drop]
    refused: dict[str, str]

    def named(self, name: str) -> Drop:
        """The drop of a name.

        Raises:
            InputError: there is no such thing in the model (with the nearest name), or it cannot be dropped.
        """
        if name in self.drops:
            return self.drops[name]
        reason = next((why for other, why in self.refused.items() if other == name or other.startswith(name + ".")), "")
        if reason:
            raise InputError(f"'{name}' cannot be dropped: {reason}.")
        raise InputError(
            f"'{name}' is no block and no attention or MLP sublayer of this model{did_you_mean(name, self.drops)}"
        )


def droppable(checkpoint: Checkpoint, structure: Structure, trust_remote_code: bool = False) -> Droppable:
    """Find them.

    Raises:
        InputError: the model cannot be run without weights.
    """
    model = skeleton(checkpoint.config, checkpoint.model_path, checkpoint.tensors, trust_remote_code)
    return _Surgery(model, structure).found()


@dataclass
class _Seen:
    """What one forward showed of a module: whether its first output was always zeros, and what form its outputs had."""

    zero: bool = True
    form: DroppedForm | None = None


class _Surgery:
    """One search over one hollow model."""

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        self.structure = structure
        self.on_disk: dict[str, list[str]] = {}
        for disk, name in structure.to_module.items():
            self.on_disk.setdefault(name, []).append(disk)
        self.blocks = {block.module: block for stack in structure.stacks for block in stack.blocks}
        self.in_block = self._in_block()
        self.outputs = self._outputs(model)
        self.model = hollow_model(model, structure, self.outputs)
        self.inputs = self._inputs()
        self.refused: dict[str, str] = {}

    def _in_block(self) -> dict[str, list[tuple[str, str]]]:
        """(disk name, module name) of a block's tensors, in checkpoint order."""
        found: dict[str, list[tuple[str, str]]] = {block: [] for block in self.blocks}
        for disk in self.structure.roles:
            name = self.structure.to_module.get(disk, "")
            path = name
            while path and path not in found:
                path = path.rpartition(".")[0]
            if path:
                found[path].append((disk, name))
        return found

    # -- output projections ----------------------------------------------------------------------------------------

    def _outputs(self, model: PreTrainedModel) -> dict[str, str]:
        """Module names of the parameters that are zero when everything is dropped → role; biases among them."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        inside = {
            disk: (name, block)
            for block, members in self.in_block.items()
            for disk, name in members
            if name in parameters
        }
        embedded = {site.columns for site in self.structure.sites.values() if site.kind == "embedding"}
        norms: dict[str, list[int]] = {}  # sizes by block: an embedding's, or most often the stream's width
        for disk, (name, block) in inside.items():
            if self.structure.roles[disk] == "norm":
                norms.setdefault(block, []).append(parameters[name].numel())
        widths = {block: max(sizes, key=lambda s: (s in embedded, sizes.count(s), s)) for block, sizes in norms.items()}
        found: dict[str, str] = {}
        for disk, (name, block) in inside.items():
            role, site = self.structure.roles[disk], self.structure.sites.get(disk)
            unknown = site is not None and role == "other" and site.kind in ("linear", "conv1d")
            if role not in ("o", "down") and not (unknown and site is not None and site.rows == widths.get(block)):
                continue
            found[name] = role
            path, _, attribute = name.rpartition(".")
            bias = f"{path}.bias" if attribute == "weight" else f"{name}_bias"
            if bias in parameters:
                found[bias] = role
        return found

    def _inputs(self) -> dict[str, Tensor]:
        inputs = dummy_inputs(self.model, length=_TOKENS)
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}

    # -- running ---------------------------------------------------------------------------------------------------

    def _run(self, **more: Any) -> Any:
        return self.model(**self.inputs, **more)

    def _observed(self) -> tuple[dict[str, _Seen], set[str], list[Tensor]]:
        """What every module inside blocks gave; the blocks that gave their input; the outputs."""
        seen: dict[str, _Seen] = {}
        same: dict[str, bool] = {}
        handles = []

        def watch(path: str, module: nn.Module) -> None:
            def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, (tuple, list)) and len(output) else output
                own = seen.setdefault(path, _Seen())
                if not isinstance(first, Tensor):
                    own.zero, own.form = False, None
                    return
                own.zero = own.zero and not bool(first.detach().any())
                own.form = DroppedForm(first.shape[-1], len(output) if isinstance(output, (tuple, list)) else 0)
                if path in self.blocks:
                    given = args[0] if args else next(iter(kwargs.values()))
                    equal = isinstance(given, Tensor) and given.shape == first.shape and torch.equal(given, first)
                    same[path] = same.get(path, True) and equal

            handles.append(module.register_forward_hook(after, with_kwargs=True))

        for path, module in self.model.named_modules():
            if path in self.blocks or any(path.startswith(f"{block}.") for block in self.blocks):
                watch(path, module)
        try:
            with torch.no_grad():
                outputs = list(float_tensors(self._run()))
        finally:
            for handle in handles:
                handle.remove()
        return seen, {block for block, equal in same.items() if equal}, outputs

    def found(self) -> Droppable:
        """Everything that can be dropped."""
        try:
            seen, identities, outputs = self._observed()
        except Exception as error:  # a forward may need what random inputs do not give
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".")
            raise InputError(
                f"What can be dropped of {type(self.model).__name__} cannot be found: it does not run on made inputs "
                f"({reason})."
            ) from None
        drops: dict[str, Drop] = {}
        kinds: dict[tuple[Any, ...], tuple[str, dict[str, dict[str, DroppedForm] | str]]] = {}
        for block in self.blocks:
            kind = self._kind(block)
            if kind not in kinds:
                kinds[kind] = block, self._sublayers(block, seen, outputs)
            first, sublayers = kinds[kind]
            own: list[Drop] = []
            for relative, forms in sublayers.items():
                path = f"{block}.{relative}"
                if isinstance(forms, str):
                    self.refused[self._disk_prefix(path) or path] = forms
                    continue
                moved = {block + other.removeprefix(first): form for other, form in forms.items()}
                own.append(self._drop(path, block, moved))
            drops |= {drop.name: drop for drop in own}
            self._block(block, own, block in identities, drops)
        return Droppable(drops, self.refused)

    def _kind(self, block: str) -> tuple[Any, ...]:
        """Equal for blocks of the same classes and shapes."""
        module = self.model.get_submodule(block)
        return (
            type(module).__name__,
            tuple((path, type(inner).__name__) for path, inner in module.named_modules()),
            tuple((name, parameter.shape) for name, parameter in module.named_parameters()),
        )

    # -- sublayers -------------------------------------------------------------------------------------------------

    def _sublayers(
        self, block: str, seen: Mapping[str, _Seen], outputs: Sequence[Tensor]
    ) -> dict[str, dict[str, DroppedForm] | str]:
        """By path within the block: what stands for it when it is dropped, by module path; or why it cannot be."""
        found: dict[str, dict[str, DroppedForm] | str] = {}
        for name in self.outputs:
            path, _, attribute = name.rpartition(".")
            if not name.startswith(f"{block}.") or attribute.endswith("bias"):
                continue
            top = ""
            while path != block:
                if path in seen and seen[path].zero and seen[path].form is not None:
                    top = path
                elif path in seen or top:
                    break
                path = path.rpartition(".")[0]
            if not top:
                found[name.removeprefix(f"{block}.").rpartition(".")[0]] = (
                    "its block adds more than its output projection gives"
                )
            elif top.removeprefix(f"{block}.") not in found:
                found[top.removeprefix(f"{block}.")] = self._forms(block, top, seen, outputs)
        return found

    def _forms(
        self, block: str, top: str, seen: Mapping[str, _Seen], outputs: Sequence[Tensor]
    ) -> dict[str, DroppedForm] | str:
        """What stands for one sublayer, the module ``top``; or why it cannot be dropped."""
        form = seen[top].form
        assert form is not None
        text = self.model.config.get_text_config()
        role = next(role for name, role in self.outputs.items() if name.startswith(f"{top}."))
        if role == "other" and keeps_state(self.model.get_submodule(top)):
            return "it keeps a state of its own from token to token"
        names = top.rpartition(".")[2].lower(), type(self.model.get_submodule(top)).__name__.lower()
        attends = "attn" in names[0] or "attention" in names[1]
        if attends and getattr(text, "num_kv_shared_layers", None):
            return "layers of this model share its keys and values"
        if form.outputs > 1:
            used = self._others_used(top, form)
            if used:
                return used
        forms = {top: form}
        try:
            problem = self._unlike(forms, outputs)
            if problem:
                return problem
            extra = self._idle(block, top, form, seen)
        except Exception as error:  # whatever model code raises where a part of it is missing
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100].rstrip(".")
            return f"the model does not run without it ({reason})"
        for path, idle in extra.items():  # one that others read (its weight's dtype) stays
            with suppress(Exception):
                if not self._unlike({**forms, path: idle}, outputs):
                    forms[path] = idle
        return forms

    def _others_used(self, top: str, form: DroppedForm) -> str:
        """Whether anything reads what the module gives beside its first output; empty if not."""
        module, touched = self.model.get_submodule(top), list[Any]()
        own = module.forward

        class _Watched(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                touched.append(func)
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))

        def forward(*args: Any, **kwargs: Any) -> Any:
            first, *others = own(*args, **kwargs)
            if any(other is not None and not isinstance(other, Tensor) for other in others):
                touched.append(None)
            return first, *[o.detach().as_subclass(_Watched) if isinstance(o, Tensor) else o for o in others]

        with replaced(module, forward), torch.no_grad():
            self._run()
        return "it gives its neighbours more than its output" if touched else ""

    def _idle(self, block: str, top: str, form: DroppedForm, seen: Mapping[str, _Seen]) -> dict[str, DroppedForm]:
        """Modules of the block that nothing depends on once ``top`` is dropped, by path."""
        inside = {id(p) for p in self.model.get_submodule(block).parameters()}
        before = reached(self._run()) & inside
        own = {id(p) for p in self.model.get_submodule(top).parameters()}
        with dropped(self.model, {top: form}):
            after = reached(self._run())
        idle = inside - after - own
        found: dict[str, DroppedForm] = {}
        for path, module in self.model.get_submodule(block).named_modules():
            whole = f"{block}.{path}"
            parameters = {id(p) for p in module.parameters()}
            shown = seen[whole].form if whole in seen else None
            if not path or not parameters & before or not parameters <= idle or shown is None:
                continue
            if any(whole.startswith(f"{other}.") for other in found) or top.startswith(f"{whole}."):
                continue
            norm = "norm" in type(module).__name__.lower() and not list(module.children())
            found[whole] = DroppedForm() if norm else shown
        return found

    @torch.no_grad()
    def _unlike(self, forms: Mapping[str, DroppedForm], outputs: Sequence[Tensor]) -> str:
        """How the model without these modules differs, in its outputs or the tokens that its cache counts."""
        lengths = self._lengths()
        with dropped(self.model, forms):
            found = list(float_tensors(self._run()))
            if len(found) != len(outputs) or not all(
                a.shape == b.shape and torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(found, outputs)
            ):
                return "the model's outputs differ without it"
            return "" if self._lengths() == lengths else "the model's cache counts other tokens without it"

    def _lengths(self) -> list[int]:
        """Tokens that the cache counts after one forward and after one token more; none where nothing is cached."""
        first = self._run(use_cache=True) if "past_key_values" in self._accepted else None
        cache = getattr(first, "past_key_values", None)
        if cache is None or not hasattr(cache, "get_seq_length"):
            return []
        counts = [cache.get_seq_length()]
        name = "decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"
        more = {key: value for key, value in self.inputs.items() if key not in ("pixel_values",)}
        self.model(**{**more, name: self.inputs[name][:, -1:]}, past_key_values=cache, use_cache=True)
        return [*counts, cache.get_seq_length()]

    @property
    def _accepted(self) -> Sequence[str]:
        return list(inspect.signature(self.model.forward).parameters)

    # -- what is written of it -------------------------------------------------------------------------------------

    def _disk(self, prefix: str) -> list[str]:
        """Disk names of the tensors of a module."""
        block = next(block for block in self.blocks if f"{prefix}.".startswith(f"{block}."))
        return [disk for disk, name in self.in_block[block] if name.startswith(f"{prefix}.")]

    def _disk_prefix(self, module: str) -> str:
        return common_prefix(self._disk(module))

    def _block_name(self, block: str) -> str:
        """The block's prefix in disk names: up to its number."""
        parts = common_prefix(self._disk(block)).split(".")
        number = block.rpartition(".")[2]
        while parts and parts[-1] != number:
            parts.pop()
        return ".".join(parts)

    def _drop(self, path: str, block: str, forms: dict[str, DroppedForm]) -> Drop:
        tensors = [name for module in forms for name in self._disk(module)]
        outputs = [
            disk
            for name in self.outputs
            if name.startswith(f"{path}.") and name.startswith(f"{block}.")
            for disk in self.on_disk.get(name, ())
        ]
        attention = any(role == "o" for name, role in self.outputs.items() if name.startswith(f"{path}."))
        name = self._disk_prefix(path)
        if name == self._block_name(block):  # ViT's MLP is a module, but its tensors lie beside the attention's
            name = common_prefix(outputs)
        plain = [
            tensor
            for tensor in (*outputs, *self._disk(path), *tensors)
            if ((site := self.structure.sites.get(tensor)) is None or site.expert is None)
            and "converted" not in self.structure.kept.get(tensor, "")
        ]
        mark = plain[0] if plain else ""
        return Drop(name, block, attention, tuple(outputs), tuple(tensors), forms, mark=mark)

    def _block(self, block: str, own: Sequence[Drop], identity: bool, drops: dict[str, Drop]) -> None:
        """Add the block itself, or why it cannot be dropped."""
        tensors, name = self._disk(block), self._block_name(block)
        if not identity:
            self.refused[name or block] = "without its sublayers the block does not give back what it is given"
            return
        if self.blocks[block].runs > 1:
            self.refused[name or block] = f"one forward runs it {self.blocks[block].runs} times"
            return
        outputs = [d for n in self.outputs if n.startswith(f"{block}.") for d in self.on_disk.get(n, ())]
        drops[name] = Drop(
            name, block, any(d.attention for d in own), tuple(outputs), tuple(tensors), {}, tuple(d.name for d in own)
        )


def common_prefix(names: Sequence[str]) -> str:
    """The dotted path that all names begin with; of one name, its owner's."""
    if not names:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for segments in zip(*parts):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return ".".join(shared)
