"""The registered quantizer: plain ``from_pretrained`` gives packed modules, never a dense copy.

Before any weight is read, the model (on the meta device) is rebuilt as ``quantization_config`` says and every tensor of
the files is compared with it by name, shape and dtype: what transformers would fill at random, skip or reinterpret in
silence raises here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimwright.errors import InputError
from slimwright.heap import return_large_buffers
from slimwright.model.dropped import drop_module, is_dropped, restored
from slimwright.runtime.format import (
    DenseForm,
    read_activations,
    read_cache,
    read_config,
    read_dense,
    read_dropped,
    read_low_memory,
)
from slimwright.runtime.kv_format import KvFormat
from slimwright.runtime.modules import (
    DenseExpertLeaf,
    ExpertLeaf,
    ExpertStack,
    PackedConv1D,
    PackedEmbedding,
    PackedExpertLeaf,
    PackedExperts,
    PackedLinear,
    PackedModule,
    PackedSpec,
    TiedEmbedding,
    TiedHead,
    experts_class,
    packed_class,
)
from slimwright.weights import Form, Grid

_ABSENT_BUFFERS = r"rotary_emb\.inv_freq$|(^|\.)position_ids$"  # persistent in old checkpoints, computed since


@dataclass(frozen=True)
class Header:
    """Dtype and shape of a tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_headers(files: Iterable[str]) -> dict[str, Header]:
    """Headers of all tensors in safetensors files, by disk name.

    Raises:
        InputError: a file is damaged or not safetensors, or two files hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import _TYPES as TYPES

    found: dict[str, Header] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise InputError(f"'{file}' is not a safetensors file; a slimwright model has no other weight files.")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    if name in found:
                        raise InputError(f"The tensor '{name}' is in two weight files, the second is '{file}'.")
                    view = opened.get_slice(name)
                    found[name] = Header(TYPES[view.get_dtype()], tuple(view.get_shape()))  # type: ignore[arg-type]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"The weight file '{file}' is damaged ({error}): write or download it again.") from error
    return found


@register_quantization_config("slimwright")
class SlimwrightConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json, kept as it is so that it is saved again unchanged."""

    def __init__(self, **config: Any) -> None:
        self.__dict__.update(config)
        self.quant_method = "slimwright"  # type: ignore[assignment]


@dataclass
class _Stacked:
    """A fused experts parameter whose experts lie on disk one by one."""

    converter: Any
    module: str
    parameter: str
    names: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    """(expert, position among the concatenated) → (disk name, module path of the leaf)."""


class _Names:
    """Transformers' mapping from disk names to names in one model."""

    def __init__(self, model: Any) -> None:
        from slimwright.runtime import transformers_private as private

        self.model, self.state = model, model.state_dict()
        self.set_mapping(private.get_model_conversion_mapping(model))

    def set_mapping(self, mapping: list[Any]) -> None:
        from slimwright.runtime import transformers_private as private

        self.private = private
        self.renamings = [entry for entry in mapping if isinstance(entry, private.WeightRenaming)]
        self.converters = [entry for entry in mapping if isinstance(entry, private.WeightConverter)]

    def resolve(self, disk: str) -> tuple[str, Any]:
        """The name in the model (which may not exist there), and the converter on the way, if any."""
        rename, prefix = self.private.rename_source_key, self.model.base_model_prefix
        renamed, pattern = rename(disk, self.renamings, self.converters, prefix, self.state)
        if renamed not in self.state and disk in self.state:
            renamed, pattern = disk, None
        converter = next((c for c in self.converters if pattern is not None and pattern in c.source_patterns), None)
        return renamed, converter

    def leaf(self, disk: str, fused: str) -> str:
        """Where a per-expert tensor ends when no converter takes it, with the base model's prefix as in ``fused``."""
        rename, prefix = self.private.rename_source_key, self.model.base_model_prefix
        raw_fused, _ = rename(disk, self.renamings, self.converters)
        raw, _ = rename(disk, self.renamings, [])
        if fused == raw_fused:
            return raw
        return f"{prefix}.{raw}" if fused == f"{prefix}.{raw_fused}" else raw.removeprefix(f"{prefix}.")

    def in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self.private.dot_natural_key)


def _first(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    ordered = sorted(names)
    return ", ".join(f"'{name}'" for name in ordered[:3]) + (
        f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    )


@register_quantizer("slimwright")
class SlimwrightQuantizer(HfQuantizer):
    """Builds the packed model and checks the files against it."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise InputError(
                "slimwright does not compress while loading: run `slimwright fit MODEL --out DIR` and load DIR."
            )
        super().__init__(quantization_config, **kwargs)
        self.grids: dict[str, Form] = read_config(quantization_config.to_dict())
        self.forms: dict[str, DenseForm] = read_dense(quantization_config.to_dict())
        self.activations = read_activations(quantization_config.to_dict())
        self.cache: dict[int, KvFormat] = read_cache(quantization_config.to_dict())
        self.gone = read_dropped(quantization_config.to_dict())
        self.low_memory = read_low_memory(quantization_config.to_dict())
        self.part_names: set[str] = set()
        self.dropped: list[tuple[list[str], list[str]]] = []
        self.tied: dict[str, str] = {}
        self.stacked: dict[str, _Stacked] = {}

    # -- what transformers asks ----------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed parts keep their dtype, whatever the model's."""
        if any(target in self.part_names for target in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Leave out the converters of packed experts, which keep their names; rename parts as their payloads."""
        kept = [
            entry
            for entry in weight_conversions
            if (getattr(entry, "source_patterns", None), getattr(entry, "target_patterns", None)) not in self.dropped
        ]
        return self._with_part_renamings(kept)

    def _with_part_renamings(self, conversions: list[Any]) -> list[Any]:
        """A pattern that ends with a whole name renames a payload, but not the parts beside it: the same for these, and
        just before, because what follows may depend on it."""
        from slimwright.runtime.transformers_private import WeightRenaming

        names = {disk: disk for disk in self.grids}
        found = []
        for entry in conversions:
            if isinstance(entry, WeightRenaming):
                source, target = entry._original_source_patterns[0], entry._original_target_patterns[0]
                suffixes = {
                    part
                    for disk, form in self.grids.items()
                    if (match := entry.compiled_sources.search(names[disk])) and match.end() == len(names[disk])
                    for part in form.parts_of((256, 256))
                    if part and not entry.compiled_sources.search(names[disk] + part)
                }
                for part in sorted(suffixes) if source[-1:].isalnum() and target[-1:].isalnum() else ():
                    renaming = WeightRenaming([source + part], [target + part])
                    renaming.scope_prefix, renaming.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
                    found.append(renaming)
                tried = copy.deepcopy(entry)  # renaming leaves marks
                names = {disk: tried.rename_source_key(name)[0] for disk, name in names.items()}
            found.append(entry)
        return found

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise InputError(
                "A slimwright model loads from its directory; a state_dict cannot be checked against its plan."
            )
        headers = read_headers(files)
        lacking = [name for name in self.grids if name not in headers]
        if lacking:
            raise InputError(
                f"config.json says that {_first(lacking)} {'is' if len(lacking) == 1 else 'are'} packed, but no weight "
                "file holds it: a file is missing or of another model."
            )
        if self.low_memory:
            return_large_buffers()
        dtypes = _Dtypes(model, kwargs.get("dtype"))
        ties = {
            prefix: module.get_expanded_tied_weights_keys(all_submodels=False)
            for prefix, module in model.named_modules()
            if hasattr(module, "get_expanded_tied_weights_keys")
        }
        with torch.device("meta"):
            self._drop(model)
            self._pack(model, headers, dtypes)
        self._rewrite_ties(model, ties)
        self._check(model, headers)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Let the model generate without rebuilding anything per token, with the cache that the plan says."""
        # imported late: this module is loaded while transformers' models are
        from slimwright.runtime.generate import Generation
        from slimwright.runtime.kv_cache import attention_layers, refusal
        from slimwright.runtime.placeholder import add_placeholders

        packed = next((module for module in model.modules() if isinstance(module, PackedModule)), None)
        if packed is not None:
            add_placeholders(model, packed.compute_dtype)
        if model.can_generate():
            packable = attention_layers(model.config)
            for index in self.cache:
                if packable.get(index) != 0:
                    raise InputError(refusal(model.config, index))
            model.generate = Generation(model, self.cache)
        return model

    # -- rebuilding ----------------------------------------------------------------------------------------------

    def _drop(self, model: Any) -> None:
        """Let what was dropped hold and compute nothing, but for the marks."""
        if not self.gone.forms:
            return
        names, modules = _Names(model), dict(model.named_modules())
        marks = [target for target, _ in map(names.resolve, self.gone.marks) if target in names.state]
        lacking = []
        for path, form in self.gone.forms.items():
            own = next((name for name in _spellings(path, [model.base_model_prefix]) if name in modules), None)
            if own is None:
                lacking.append(path)
            else:
                drop_module(modules[own], form)
        if lacking:
            whole = _checkpoint_model(model)
            known = {} if whole is None else dict(whole.named_modules())
            unknown = [path for path in lacking if path not in known]
            if unknown:
                raise InputError(
                    f"config.json says that {_first(unknown)} was dropped, which {type(model).__name__} does not have: "
                    "the file is damaged or of another version of transformers."
                )
        for target in marks:
            path, _, parameter = target.rpartition(".")
            holder = _made(model, path)
            holder.register_parameter(parameter, nn.Parameter(torch.empty(1, dtype=torch.uint8), requires_grad=False))
            self.part_names.add(target)

    def _pack(self, model: Any, headers: Mapping[str, Header], dtypes: _Dtypes) -> None:
        names = _Names(model)
        direct: dict[str, str] = {}
        stacked_converters: list[Any] = []
        for disk in names.in_order(self.grids):
            target, converter = names.resolve(disk)
            if target not in names.state:
                continue  # a head that this class has not: _check decides
            if converter is None:
                direct[target] = disk
            elif converter not in stacked_converters:
                stacked_converters.append(converter)
        for disk in names.in_order(headers):
            target, converter = names.resolve(disk)
            if converter in stacked_converters and target in names.state:
                self._stack(names, disk, target, converter)
        self.dropped = [(entry.source_patterns, entry.target_patterns) for entry in stacked_converters]

        ties = dict(model.all_tied_weights_keys)
        groups: dict[str, list[str]] = {}
        for target, source in ties.items():
            groups.setdefault(source, [source]).append(target)
        for target, disk in direct.items():
            module_name, _, parameter = target.rpartition(".")
            self._pack_direct(model.get_submodule(module_name), parameter, disk, headers, dtypes(target))
        present = {names.resolve(disk)[0] for disk in headers}
        for members in groups.values():
            packed = [name for name in members if name in direct]
            if not packed:
                continue
            for name in members:
                if name not in direct and name not in present:
                    self._tie(model, name, packed[0])
                if name in ties or len(packed) > 1 or packed[0] != members[0]:
                    self.tied[name] = packed[0]
        for stacked in self.stacked.values():
            self._pack_stacked(model, stacked, headers, dtypes(f"{stacked.module}.{stacked.parameter}"))
        for module_name, module in model.named_modules():
            if isinstance(module, PackedModule):
                self.part_names.update(f"{module_name}.{part}" for part in module.part_names())

    def _pack_direct(
        self, module: nn.Module, parameter: str, disk: str, headers: Mapping[str, Header], dtype: torch.dtype
    ) -> None:
        from slimwright.runtime.transformers_private import Conv1D

        grid, own = self.grids[disk], type(module)
        dense = getattr(module, parameter)
        shape, flipped = tuple(dense.shape), (*dense.shape[:-2], *dense.shape[:-3:-1])
        if grid.plain and headers[disk].dtype == dtype:
            return  # an ordinary tensor in the model's own dtype
        if parameter == "weight" and isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            transposed = isinstance(module, Conv1D)
            base: type[PackedModule] = (
                PackedConv1D if transposed else PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
            )
            if base is PackedEmbedding:
                _check_lookup(disk, grid)
            if transposed:
                module.in_features, module.out_features = shape  # type: ignore[assignment]
            module.__class__ = packed_class(base, own)  # type: ignore[arg-type, assignment]
        elif dense.ndim == 3:
            transposed = self.forms[disk].transposed
            fused = tuple(sorted({*getattr(own, "fused_names", ()), parameter}))
            module.__class__ = experts_class(getattr(own, "own_class", own), fused)  # type: ignore[arg-type, assignment]
        else:
            raise InputError(
                f"config.json says that '{disk}' is packed, but in {own.__name__} it is not the weight of a linear "
                "layer, an embedding or experts: the file is damaged or of another version of transformers."
            )
        assert isinstance(module, PackedModule)
        if self.forms[disk].shape != shape:
            raise InputError(
                f"quantization_config says that '{disk}' was {list(self.forms[disk].shape)}, but {own.__name__} has "
                f"{list(shape)}: config.json is damaged."
            )
        module.compute_dtype = dtype
        # Gemma's embed_scale is made by the model's initialization, which must then see the module
        module._is_hf_initialized = not module._non_persistent_buffers_set  # type: ignore[assignment]
        module.pack_parameter(parameter, PackedSpec(grid, flipped if transposed else shape, transposed))
        if disk in self.activations:
            if not isinstance(module, (PackedLinear, PackedConv1D)):
                raise InputError(f"config.json rounds what enters '{disk}', which is no linear layer's: it is damaged.")
            module.activations = self.activations[disk]

    def _stack(self, names: _Names, disk: str, target: str, converter: Any) -> None:
        """Note one tensor of experts that are stored one by one and packed somewhere in the model."""
        private = names.private
        operations = [type(operation) for operation in converter.operations]
        count = len(converter.source_patterns)
        if operations != [private.MergeModulelist, private.Concatenate][: 1 + (count > 1)] or (
            converter.operations[0].dim != 0 or (count > 1 and converter.operations[1].dim != 1)
        ):
            raise InputError(f"'{disk}' is packed, but transformers rearranges it while loading: it must stay dense.")
        leaf = names.leaf(disk, target)
        raw, _ = private.rename_source_key(disk, names.renamings, [])
        for position, pattern in enumerate(converter.source_patterns):
            expression = pattern.replace("*.", r"(\d+)\.")
            match = re.search(expression + r"(?!\w)", raw) if pattern.count("*.") == 1 else None
            if match:
                module, _, parameter = target.rpartition(".")
                stacked = self.stacked.setdefault(target, _Stacked(converter, module, parameter))
                stacked.names[int(match[1]), position] = (disk, leaf.removesuffix(".weight"))
                return
        # a part beside the payload (…weight_scale) matches no pattern as a whole; its payload has been noted

    def _pack_stacked(self, model: Any, stacked: _Stacked, headers: Mapping[str, Header], dtype: torch.dtype) -> None:
        module = model.get_submodule(stacked.module)
        own = getattr(type(module), "own_class", type(module))
        fused = getattr(module, stacked.parameter)
        experts, rows, columns = fused.shape
        count = len(stacked.converter.source_patterns)
        wanted = {(expert, position) for expert in range(experts) for position in range(count)}
        if set(stacked.names) != wanted or rows % count:
            known = next(iter(stacked.names.values()))[0]
            raise InputError(
                f"{len(stacked.names)} expert weights such as '{known}' are there, but '{stacked.module}' has "
                f"{experts} experts of {count}: a weight file is missing or of another model."
            )
        shape = (rows // count, columns)
        leaves: list[list[ExpertLeaf]] = [[] for _ in range(experts)]
        for expert, position in sorted(wanted):
            disk, path = stacked.names[expert, position]
            grid = self.grids.get(disk)
            leaf: ExpertLeaf = (
                DenseExpertLeaf(shape, dtype)
                if grid is None or (grid.plain and headers[disk].dtype == dtype)
                else PackedExpertLeaf(PackedSpec(grid, shape), dtype)
            )
            _attach(model, path, leaf)
            leaves[expert].append(leaf)
        if not isinstance(module, PackedExperts):
            module.__class__ = experts_class(own, ())  # type: ignore[arg-type]
            module.packed, module.compute_dtype = {}, dtype
            module._is_hf_initialized = not module._non_persistent_buffers_set
        module.__dict__.setdefault("stacks", {})[stacked.parameter] = ExpertStack(leaves, tuple(fused.shape))
        module.__dict__.setdefault("stack_paths", {})[stacked.parameter] = sorted(
            path for _, path in stacked.names.values()
        )
        del module._parameters[stacked.parameter]

    def _tie(self, model: Any, name: str, source: str) -> None:
        module_name, _, parameter = name.rpartition(".")
        module, owner = model.get_submodule(module_name), model.get_submodule(source.rpartition(".")[0])
        if module is owner:
            return
        if parameter != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)) or "packed" not in owner.__dict__:
            if "packed" not in owner.__dict__:  # a plain grid in the model's dtype: transformers ties it as ever
                return
            raise InputError(
                f"'{name}' is tied to the packed '{source}', but is not the weight of a linear or embedding."
            )
        base: type[PackedModule] = TiedHead if isinstance(module, nn.Linear) else TiedEmbedding
        if base is TiedEmbedding:
            _check_lookup(name, owner.packed["weight"].grid)
        module.__class__ = packed_class(base, type(module))  # type: ignore[arg-type, assignment]
        module.__dict__.update(
            packed={},
            source_module=owner,
            compute_dtype=owner.compute_dtype,
            _is_hf_initialized=not module._non_persistent_buffers_set,
        )
        del module._parameters["weight"]

    def _rewrite_ties(self, model: Any, ties: Mapping[str, dict[str, str]]) -> None:
        """Take the packed ones out of every mapping of ties, the instance's ``_tied_weights_keys`` included.

        Args:
            ties: what each sub-model declared before it was rebuilt, by module path.
        """
        gone = {name for name, source in self.tied.items() if self._is_packed(model, source)}
        for prefix, expanded in ties.items():
            module, start = model.get_submodule(prefix), f"{prefix}." if prefix else ""
            if any(start + name in gone for name in expanded):
                module._tied_weights_keys = {key: value for key, value in expanded.items() if start + key not in gone}
            keys = getattr(module, "all_tied_weights_keys", {})
            if any(start + name in gone for name in keys):
                module.all_tied_weights_keys = {key: value for key, value in keys.items() if start + key not in gone}

    @staticmethod
    def _is_packed(model: Any, name: str) -> bool:
        module = model.get_submodule(name.rpartition(".")[0])
        return isinstance(module, PackedModule) and "weight" in module.packed

    # -- checking ------------------------------------------------------------------------------------------------

    def _check(self, model: Any, headers: Mapping[str, Header]) -> None:
        """Compare the files with the rebuilt model.

        Raises:
            InputError: a tensor is missing, unknown, or of another shape or dtype.
        """
        names = _Names(model)
        names.set_mapping(self.update_weight_conversions(names.private.get_model_conversion_mapping(model), model))
        filled: dict[str, list[str]] = {}
        unknown: list[str] = []
        for disk in names.in_order(headers):
            target, converter = names.resolve(disk)
            if target not in names.state:
                unknown.append(disk)
                continue
            filled.setdefault(target, []).append(disk)
            if converter is None:
                self._check_tensor(disk, headers[disk], target, names.state[target])
                continue
            first, *others = converter.target_patterns  # one tensor may become several parameters
            for other in others:
                filled.setdefault(target.replace(first, other), []).append(disk)
        ties = model.all_tied_weights_keys
        for target, source in ties.items():
            if target in filled or source in filled:
                filled.setdefault(target, [])
                filled.setdefault(source, [])
        excused = re.compile("|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ["$^"]))
        missing = [name for name in names.state if name not in filled and not excused.search(name)]
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), _ABSENT_BUFFERS]
        unknown = [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]
        if missing or unknown:
            self._check_other_head(model, missing, unknown)

    def _check_tensor(self, disk: str, header: Header, target: str, wanted: torch.Tensor) -> None:
        if header.shape == tuple(wanted.shape) and (
            header.dtype == wanted.dtype
            if target in self.part_names
            else header.dtype.is_floating_point == wanted.dtype.is_floating_point
        ):
            return
        found, expected = (str(dtype).removeprefix("torch.") for dtype in (header.dtype, wanted.dtype))
        raise InputError(
            f"'{disk}' is {found} {list(header.shape)}, but config.json says that it is {expected} "
            f"{list(wanted.shape)}: the files do not belong together."
        )

    def _check_other_head(self, model: Any, missing: list[str], unknown: list[str]) -> None:
        """A model of another class than the checkpoint's may lack its head or bring its own; nothing else."""
        whole = _checkpoint_model(model)
        if whole is not None:
            names = _Names(whole)
            prefixes = {model.base_model_prefix, whole.base_model_prefix}
            missing = [name for name in missing if any(n in names.state for n in _spellings(name, prefixes))]
            owners = {disk + suffix: disk for disk, grid in self.grids.items() for suffix in grid.parts_of((256, 256))}
            unknown = [disk for disk in unknown if names.resolve(owners.get(disk, disk))[0] not in names.state]
        if missing:
            raise InputError(
                f"No weight file holds {_first(missing)}, which {type(model).__name__} needs: a file is missing or "
                "of another model."
            )
        if unknown:
            raise InputError(
                f"The weight files hold {_first(unknown)}, which neither config.json nor {type(model).__name__} knows: "
                "the files do not belong together."
            )

    # -- back to dense -------------------------------------------------------------------------------------------

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Put dense parameters back, and what belongs to them: classes, ties, converters."""
        from slimwright.runtime.placeholder import remove_placeholders

        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if any(is_dropped(module) for module in model.modules()):
            with torch.device("meta"):
                restored(model, type(model)(model.config), dtype)
        for module in list(model.modules()):
            if not isinstance(module, PackedModule) or isinstance(module, (PackedExpertLeaf, TiedHead, TiedEmbedding)):
                continue
            for name in list(module.packed):
                module.unpack_parameter(name, dtype or module.compute_dtype)
            if isinstance(module, PackedExperts):
                for name, stack in module.__dict__.pop("stacks", {}).items():
                    dense = torch.stack([stack[index].dense() for index in range(len(stack))])
                    module._parameters[name] = nn.Parameter(dense.to(dtype or dense.dtype))
                for paths in module.__dict__.pop("stack_paths", {}).values():
                    _detach(model, paths)
        for module in list(model.modules()):
            if isinstance(module, (TiedHead, TiedEmbedding)):
                module._parameters["weight"] = module.__dict__.pop("source_module")._parameters["weight"]
        for module in list(model.modules()):
            if isinstance(module, PackedModule) and not isinstance(module, PackedExpertLeaf):
                for key in ("packed", "compute_dtype", "views"):
                    module.__dict__.pop(key, None)
                module.__dict__["_parameters"] = dict(module._parameters)
                module.__class__ = type(module).own_class  # type: ignore[assignment]
        remove_placeholders(model)
        for module in model.modules():
            module.__dict__.pop("_tied_weights_keys", None)
        for module in model.modules():
            if hasattr(module, "get_expanded_tied_weights_keys"):
                module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
        if self.dropped:
            from slimwright.runtime.transformers_private import get_model_conversion_mapping

            model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
        return model


def _check_lookup(name: str, form: Form) -> None:
    """Only a weight on a grid has rows to look up.

    Raises:
        InputError: it is a low-rank form.
    """
    if not isinstance(form, Grid):
        raise InputError(f"config.json holds '{name}' as {form}, whose rows cannot be looked up: it is damaged.")


class _Dtypes:
    """The dtype that a dense parameter would be loaded in, by its name in the model."""

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self.dtype = dtype or torch.get_default_dtype()
        self.exceptions = model._get_dtype_plan(self.dtype)

    def __call__(self, name: str) -> torch.dtype:
        for pattern, dtype in self.exceptions.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return self.dtype


def _spellings(name: str, prefixes: Iterable[str]) -> list[str]:
    """A name with and without the base model's prefix."""
    return [name, *(f"{p}.{name}" for p in prefixes if p), *(name.removeprefix(f"{p}.") for p in prefixes if p)]


def _checkpoint_model(model: Any) -> Any:
    """The model of the checkpoint's own architecture on the meta device; None if that is this one's, or unknown."""
    from slimwright.model.skeleton import skeleton

    try:
        whole = skeleton(model.config.to_dict())
    except InputError:  # code of the checkpoint's own: it is then held to be this model's class
        return None
    return None if type(whole) is type(model) else whole


def _attach(model: nn.Module, path: str, leaf: nn.Module) -> None:
    """Set a submodule, making the plain modules that lead to it."""
    parents, _, last = path.rpartition(".")
    _made(model, parents).add_module(last, leaf)


def _made(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; plain modules are made where there is none."""
    for part in path.split(".") if path else ():
        child = model._modules.get(part)
        if child is None:
            child = nn.Module()
            child._is_hf_initialized = True  # type: ignore[assignment]
            model.add_module(part, child)
        model = child
    return model


def _detach(model: nn.Module, paths: Iterable[str]) -> None:
    """Remove submodules and the plain modules that they leave empty."""
    for path in paths:
        while path:
            parent, _, last = path.rpartition(".")
            holder = model.get_submodule(parent)
            holder._modules.pop(last, None)
            if type(holder) is not nn.Module or holder._modules:
                break
            path = parent
