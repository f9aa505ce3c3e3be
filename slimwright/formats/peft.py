"""LoRA adapters as PEFT writes them (adapter_config.json and adapter_model.safetensors), read without PEFT.

The change of a weight is ``scale * B @ A`` with ``scale = lora_alpha / r`` (``/ sqrt(r)`` with rsLoRA), by module where
``rank_pattern`` or ``alpha_pattern`` says so. Names of the base model's tensors follow from the adapter's: without
``base_model.model.``, and with what stood before ``lora_A``.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimwright.checkpoint.files import exists, read_json_object, regular, shown
from slimwright.checkpoint.header import TensorInfo, read_header
from slimwright.checkpoint.reader import Checkpoint, natural_key
from slimwright.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FINGERPRINT = "slimwright.base_fingerprint"
"""Key of the weight file's metadata."""
_PREFIX = "base_model.model."
_MAX_CONFIG_BYTES = 8 << 20
_UNSUPPORTED = ("use_qalora", "alora_invocation_tokens", "layer_replication", "megatron_config", "velora_config")


@dataclass(frozen=True)
class LowRankChange:
    """The change of one weight: ``scale * up @ down``, transposed where the weight is stored (in, out).

    Attributes:
        down: (r, in) float32.
        up: (out, r) float32.
        scale: factor.
        transposed: whether the weight on disk is the transposed of (out, in).
        magnitude: DoRA's (out,) lengths of the rows of the changed weight, or None.
    """

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight on disk."""
        out, into = self.up.shape[0], self.down.shape[1]
        return (into, out) if self.transposed else (out, into)

    def applied(self, weight: Tensor, rows: slice) -> Tensor:
        """Rows of the changed weight in float32. The product is taken in float64, so that a row does not depend on
        which rows are asked for together.

        Args:
            weight: these rows of the weight, in the orientation of the disk, float32.
            rows: which rows they are.
        """
        down, up = self.down.double(), self.up.double()
        product = down[:, rows].T @ up.T if self.transposed else up[rows] @ down
        changed = weight.double() + product * self.scale
        if self.magnitude is not None:
            changed *= (self.magnitude[rows].double() / changed.norm(dim=1)).unsqueeze(1)
        return changed.float()


@dataclass(frozen=True)
class Adapter:
    """An adapter: its changes by name of the base model's tensor, and the tensors that it replaces as a whole."""

    path: Path
    changes: dict[str, LowRankChange]
    replaced: dict[str, Tensor]
    base_model: str | None


def is_adapter(path: str | Path) -> bool:
    """Whether a directory holds an adapter and no model of its own."""
    directory = Path(path)
    return os.path.isdir(directory) and exists(directory / CONFIG_FILE) and not exists(directory / "config.json")


def read_adapter(path: str | Path) -> Adapter:
    """Read a LoRA adapter's directory.

    Raises:
        InputError: no adapter, damaged, a pickle, another kind than LoRA, or a use of it that is not read here.
    """
    directory = Path(path).expanduser()
    if not os.path.isdir(directory) or not exists(directory / CONFIG_FILE):
        raise InputError(f"{shown(directory)} is no adapter (no {CONFIG_FILE}): name the directory that PEFT wrote.")
    config = read_json_object(directory, directory / CONFIG_FILE, _MAX_CONFIG_BYTES)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{shown(directory)} is an adapter of type {shown(kind)}; only LORA is read here.")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{shown(directory)} uses '{key}', which is not read here: merge it with PEFT first.")
    if not exists(directory / WEIGHTS_FILE):
        raise InputError(f"{shown(directory)} has no {WEIGHTS_FILE}: save the adapter with safetensors.")
    tensors = _tensors(directory)
    changes: dict[str, LowRankChange] = {}
    replaced: dict[str, Tensor] = {}
    for name in sorted(tensors, key=natural_key):
        plain = name.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_(A|embedding_A)(?:\.default)?(?:\.weight)?", plain):
            module, embedding = match[1], match[2] == "embedding_A"
            changes[f"{module}.weight"] = _change(tensors, name, module, embedding, config, directory)
        elif ".lora_" not in plain:
            replaced[plain.replace(".modules_to_save.default", "").replace(".base_layer", "")] = tensors[name]
        elif not re.search(r"\.lora_(B|embedding_B|magnitude_vector)\b", plain):
            raise InputError(f"{shown(directory)}: the tensor {shown(name)!r} is not understood.")
        elif (other := re.sub(r"\.lora_(embedding_)?B\b", r".lora_\1A", name)) not in tensors and other != name:
            raise InputError(f"{shown(directory)}: {shown(other)!r} is missing: save the adapter again.")
    if not changes and not replaced:
        raise InputError(f"{shown(directory)} changes nothing: it holds no LoRA tensors.")
    base = config.get("base_model_name_or_path")
    return Adapter(directory, changes, replaced, base if isinstance(base, str) else None)


def base_fingerprint(directory: str | Path) -> str | None:
    """The fingerprint of the model that an adapter was trained on, where its weight file tells it
    (:data:`BASE_FINGERPRINT` in the file's metadata, which PEFT does not read).

    Raises:
        InputError: the file is missing or damaged.
    """
    file = Path(directory) / WEIGHTS_FILE
    real, _ = regular(Path(directory), file)
    descriptor = os.open(real, os.O_RDONLY)
    try:
        return read_header(descriptor, file)[1].get(BASE_FINGERPRINT)
    finally:
        os.close(descriptor)


def _tensors(directory: Path) -> dict[str, Tensor]:
    file = directory / WEIGHTS_FILE
    real, _ = regular(directory, file)
    descriptor = os.open(real, os.O_RDONLY)
    try:
        infos: dict[str, TensorInfo] = read_header(descriptor, file)[0]
    finally:
        os.close(descriptor)
    found = Checkpoint(directory, directory, {}, tensors=infos, files=[file], hub_id=None)
    tensors = {}
    for name in infos:
        tensor = found.read(name)
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise InputError(f"{shown(file)}: the tensor {shown(name)!r} holds NaN or Inf, or no floats.")
        tensors[name] = tensor.float().clone()
    return tensors


def _change(
    tensors: dict[str, Tensor], name: str, module: str, embedding: bool, config: dict[str, Any], directory: Path
) -> LowRankChange:
    """The change whose ``A`` is the tensor ``name``."""
    down = tensors[name]
    other = name.replace("lora_embedding_A", "lora_embedding_B") if embedding else name.replace("lora_A", "lora_B")
    up = tensors.get(other)
    if up is None or down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        shape = None if up is None else tuple(up.shape)
        raise InputError(
            f"{shown(directory)}: {shown(other)!r} is missing or does not fit {shown(name)!r} "
            f"({shape} and {tuple(down.shape)}): save the adapter again."
        )
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r", down.shape[0]))
    if rank != down.shape[0]:
        raise InputError(f"{shown(directory)}: {shown(name)!r} has rank {down.shape[0]}, but the config says {rank}.")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"{shown(directory)}: lora_alpha is {shown(alpha)}, which is no number.")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    magnitude = None
    for suffix in ("lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "lora_magnitude_vector"):
        vector = tensors.get(f"{_PREFIX}{module}.{suffix}")
        magnitude = vector.reshape(-1) if vector is not None else magnitude
    # An embedding's A is (r, vocabulary) and its B (width, r), of a table (vocabulary, width).
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    if magnitude is not None and transposed:
        raise InputError(f"{shown(directory)}: DoRA on the transposed weight of {shown(module)!r} is not read here.")
    return LowRankChange(down, up, float(scale), transposed, magnitude)


def _by_pattern(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as PEFT matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
