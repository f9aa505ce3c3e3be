"""Which format of others a checkpoint is in."""

from __future__ import annotations

from collections.abc import Callable

from slimwright.checkpoint import Checkpoint
from slimwright.checkpoint.files import shown
from slimwright.errors import InputError
from slimwright.formats.quantized.awq import awq_weights
from slimwright.formats.quantized.bitsandbytes import bitsandbytes_weights
from slimwright.formats.quantized.compressed_tensors import compressed_tensors_weights
from slimwright.formats.quantized.float8 import float8_weights
from slimwright.formats.quantized.gptq import gptq_weights
from slimwright.formats.quantized.mxfp4 import mxfp4_weights
from slimwright.formats.quantized.weight import ForeignWeight, Settings

_READERS: dict[str, Callable[[Checkpoint, Settings], dict[str, ForeignWeight]]] = {
    "compressed-tensors": compressed_tensors_weights,
    "fp8": float8_weights,
    "mxfp4": mxfp4_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
    "bitsandbytes": bitsandbytes_weights,
}
KNOWN_METHODS = tuple(_READERS)
"""``quant_method`` of the formats that are read."""

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Families whose dense weights are stored (in, out), of which quantized files do not say which these are."""


def foreign_weights(checkpoint: Checkpoint) -> dict[str, ForeignWeight]:
    """The quantized weights of a checkpoint by the name that the dense tensor has.

    Raises:
        InputError: its ``quantization_config`` names a format that is not read, or the tensors do not fit the format.
    """
    settings = checkpoint.quantization or {}
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        named = f"by {shown(method)!r}" if isinstance(method, str) else "by a method it does not name"
        raise InputError(
            f"{shown(checkpoint.path)} is already quantized {named} (quantization_config in config.json), which cannot "
            f"be read here ({', '.join(KNOWN_METHODS)} can): start from the model before quantization."
        )
    family = checkpoint.config.get("model_type")
    if family in _CONV1D:
        raise InputError(
            f"{shown(checkpoint.path)} is a {family} quantized by {method}, whose files do not say which weights are "
            "stored transposed: start from the model before quantization."
        )
    found = reader(checkpoint, settings)
    if not found:
        raise InputError(
            f"{shown(checkpoint.path)} says that it is quantized by {method}, but none of its tensors is: remove "
            "quantization_config from config.json if its weights are plain numbers."
        )
    for name, weight in found.items():
        if name in checkpoint.tensors and name not in weight.parts:
            raise InputError(f"{shown(checkpoint.path)} holds '{name}' twice, plain and quantized: repair it.")
    return found
