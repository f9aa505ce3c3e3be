"""A parameter for models that have none: transformers asks the first one for a model's device and dtype.

Where every weight is packed or streamed and no norm has a scale (OLMo), ``model.device`` and with it ``generate`` would
fail. An empty parameter answers for each such model; it stands in no ``state_dict`` and so in no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NAME = "slimwright_placeholder"


def add_placeholders(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every model inside ``model``, and itself, that has no floating parameter an empty one.

    Args:
        dtype: what the model computes in.
    """
    from transformers import PreTrainedModel

    for module in reversed(list(model.modules())):  # the innermost first: its parameter is the outer's too
        if not isinstance(module, PreTrainedModel) or any(p.is_floating_point() for p in module.parameters()):
            continue
        device = next((buffer.device for buffer in module.buffers()), torch.device("cpu"))
        empty = torch.empty(0, dtype=dtype, device=device)
        module.register_parameter(NAME, nn.Parameter(empty, requires_grad=False))
        module.register_state_dict_post_hook(_leave_out)
        module.register_load_state_dict_post_hook(_not_missing)


def remove_placeholders(model: nn.Module) -> None:
    """Take them away again, from a model that has parameters of its own now."""
    for module in model.modules():
        module._parameters.pop(NAME, None)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    state.pop(prefix + NAME, None)


def _not_missing(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.rpartition(".")[2] != NAME]
