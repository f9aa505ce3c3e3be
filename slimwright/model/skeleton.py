"""A checkpoint's transformers model on the meta device: modules and shapes, no weights, no memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from slimwright.errors import InputError
from slimwright.model.names import name_map
from slimwright.runtime.transformers_private import (
    CONFIG_MAPPING,
    BaseAutoModel,
    decode_special_floats,
    modeling_auto,
)

# Keys of config.json that transformers loops over in Python while it makes a config or a model.
_COUNT = re.compile(
    r"^(?!.*theta$).*(layer|block|depth|stage|experts|n_head|num_heads|_heads|num_labels|num_classes|codebooks|levels)"
)
_LAYERS = re.compile(r"layers?$|depths?$|(hidden|code)_groups$")  # other groups are of convolutions
_POSITIONS = re.compile(r"position|n_ctx|max_seq_len|max_source|max_target")
_MOST_POSITIONS = 1 << 27
_LARGEST = 1 << 62
_MOST_NESTED = 32
_MODULES_PER_TENSOR = 64  # real models have fewer than five
_MOST_MODULES = 1 << 20
# In this order, because encoders and encoder-decoders can be wrapped as causal models too.
_TASKS = ("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


def skeleton(
    config: Mapping[str, Any],
    directory: Path | None = None,
    tensors: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of a config.json on the meta device, in evaluation mode.

    The class is ``architectures[0]``: of transformers, or registered in this process (``AutoModelForX.register``), or,
    with ``trust_remote_code``, of the checkpoint's own code. Without ``architectures`` it is the first of the seq2seq,
    masked and causal language models and the base model of the ``model_type`` that the tensors fill.

    Args:
        config: the contents of config.json: not trusted.
        directory: where the checkpoint's own code is.
        tensors: by disk name, with ``shape``: bounds how many layers and labels a config may claim.
        trust_remote_code: whether code of the checkpoint may run.

    Raises:
        InputError: the config is malformed, claims more than the checkpoint can hold, is of an unknown model type or
            architecture, or needs code of its own.
    """
    _check_sizes(config, tensors or {})
    raw = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("config.json: `architectures` must be a list of class names.")
    try:
        made = _config(raw, directory, trust_remote_code)
        if names:
            model = _build(_model_class(made, names[0], raw, directory, trust_remote_code), made, tensors or {})
        else:
            model = _fitting(made, tensors or {})
    except InputError:
        raise
    except Exception as error:  # a config can be wrong in as many ways as there are model classes
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"transformers cannot build a model of config.json ({type(error).__name__}: {reason})."
        ) from error
    return model.eval()


def _leaves(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Numbers of a nested config with the key nearest to them."""
    if depth > _MOST_NESTED:
        raise InputError("config.json is nested too deeply.")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, str(name), depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner, key, depth + 1)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Refuse numbers that would make transformers loop or allocate without end."""
    widest = max((max(info.shape, default=1) for info in tensors.values()), default=0)
    most = max(4096, len(tensors), min(widest, 1 << 20))
    # A layer has a tensor of its own, except where one block runs many times.
    layers = max(256, len(tensors)) if tensors else most
    positions = widest if config.get("sinusoidal_pos_embds") and widest else _MOST_POSITIONS
    limits = ((_LAYERS, layers), (_COUNT, most), (_POSITIONS, positions))
    for key, value in _leaves(config):
        limit = next((limit for pattern, limit in limits if pattern.search(key)), _LARGEST)
        if abs(value) > limit and not (isinstance(value, float) and (limit == _LARGEST or math.isinf(value))):
            raise InputError(f"config.json: {key} is {value}, more than this checkpoint can hold.")


def _config(raw: dict[str, Any], directory: Path | None, trust_remote_code: bool) -> PretrainedConfig:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("config.json has no model_type: it is not the config of a transformers model.")
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type].from_dict(decode_special_floats(raw))
    remote = isinstance(raw.get("auto_map"), Mapping) and "AutoConfig" in raw["auto_map"]
    if remote and trust_remote_code and directory is not None:
        return AutoConfig.from_pretrained(directory, trust_remote_code=True)
    if remote:
        raise InputError(
            f"The model type '{model_type[:80]}' needs code that comes with the checkpoint: if you trust it, say "
            "--trust-remote-code."
        )
    raise InputError(
        f"transformers {transformers.__version__} does not know the model type '{model_type[:80]}': register it in "
        "this process (AutoConfig.register) or use a version that knows it."
    )


def _auto_classes() -> Iterator[Any]:
    for name, value in vars(modeling_auto).items():
        if name.startswith("AutoModel") and isinstance(value, type) and issubclass(value, BaseAutoModel):
            yield value


def _mapped(auto: Any, config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    """Classes that an auto class would take for this config."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        return []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _build(model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, Any]) -> PreTrainedModel:
    """Build on the meta device; stop when there are far more modules than the tensors could be for."""
    most = _MODULES_PER_TENSOR * len(tensors) + 4096 if tensors else _MOST_MODULES
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise InputError(
                f"config.json describes more than {most} modules for a checkpoint of {len(tensors)} tensors."
            )

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        hook.remove()


def _fitting(config: PretrainedConfig, tensors: Mapping[str, Any]) -> PreTrainedModel:
    """The first of the usual models of this config that has no parameter beyond the tensors."""
    classes = dict.fromkeys(found for task in _TASKS for found in _mapped(getattr(modeling_auto, task), config)[:1])
    models = (_build(model_class, config, tensors) for model_class in classes)
    fitting = next((model for model in models if not tensors or not name_map(model, tensors).missing), None)
    if fitting is None:
        raise InputError(
            f"config.json names no architecture, and the tensors fill no usual model of '{config.model_type}': add "
            "`architectures` to it."
        )
    return fitting


def _model_class(
    config: PretrainedConfig,
    name: str,
    raw: Mapping[str, Any],
    directory: Path | None,
    trust_remote_code: bool,
) -> type[PreTrainedModel]:
    auto_map = raw.get("auto_map")
    for auto in _auto_classes():
        for candidate in _mapped(auto, config):
            if candidate.__name__ == name:
                return candidate
    known = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(known, type) and issubclass(known, PreTrainedModel) and known.config_class is not None:
        if isinstance(config, known.config_class):
            return known
        raise InputError(
            f"config.json: the architecture '{name}' does not belong to the model type '{config.model_type}'."
        )
    if isinstance(auto_map, Mapping) and not trust_remote_code:
        raise InputError(
            f"The architecture '{name[:80]}' needs code that comes with the checkpoint: if you trust it, say "
            "--trust-remote-code."
        )
    if isinstance(auto_map, Mapping) and directory is not None:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for reference in auto_map.values():
            if isinstance(reference, str) and reference.rpartition(".")[2] == name:
                return get_class_from_dynamic_module(reference, str(directory))
    raise InputError(
        f"transformers {transformers.__version__} does not know the architecture '{name[:80]}': register it in this "
        "process or use a version that knows it."
    )
