"""compressed-tensors as a target: what plain transformers with that package loads, and what vLLM runs.

Weights only: 4 or 8 bits with groups of 32, 64 or 128 or a scale per row, symmetric (``pack-quantized``), or FP8 with a
scale per row (``naive-quantized``). With inputs in INT8: INT8 with a scale per row, symmetric (``int-quantized``). With
inputs in FP8: FP8 with a scale per row or one for all (``float-quantized``). Only linear layers: the embedding and the
head stay dense, as llm-compressor leaves them. Zero points are in the format and in vLLM, but compressed-tensors 0.19
and 0.20 do not pack them when they lay out an empty model, so plain transformers refuses such files: not legal here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.checkpoint import TensorEntry
from slimwright.formats.target import TargetProfile, Weight, pack_words
from slimwright.weights import FP8, Grid, Int
from slimwright.weights.activations import Activations
from slimwright.weights.grid import Params

_GROUPS = (32, 64, 128, None)
_WEIGHTS_ONLY: tuple[Grid, ...] = (
    *(Int(bits, group, symmetric=True) for bits in (4, 8) for group in _GROUPS),
    FP8(),
)
_ROUNDED: Mapping[str, tuple[Grid, ...]] = {"int8": (Int(8, None, symmetric=True),), "fp8": (FP8(), FP8(True))}


class CompressedTensors(TargetProfile):
    """See the module."""

    name: ClassVar[str] = "compressed-tensors"

    def grids(self, site: Weight, rounding: Activations | None = None) -> tuple[Grid, ...]:
        outside = site.kind != "linear" or site.role in ("embed", "head") or len(site.shape) != 2
        if outside or site.transposed or not site.name.endswith(".weight"):
            return ()
        legal = _WEIGHTS_ONLY if rounding is None else _ROUNDED[rounding.kind]
        return tuple(grid for grid in legal if _holds(grid, site.columns))

    def entries(self, site: Weight, grid: Grid, rounding: Activations | None = None) -> list[TensorEntry]:
        base, (rows, columns) = site.name.removesuffix(".weight"), (site.rows, site.columns)
        if isinstance(grid, FP8):
            scale = (1,) if grid.per_tensor else (rows, 1)
            found = [
                TensorEntry(f"{base}.weight", torch.float8_e4m3fn, (rows, columns)),
                TensorEntry(f"{base}.weight_scale", torch.float32, scale),
            ]
        else:
            assert isinstance(grid, Int)
            found = [TensorEntry(f"{base}.weight_scale", torch.float16, (rows, grid.groups(columns)))]
            if rounding is not None:
                found.insert(0, TensorEntry(f"{base}.weight", torch.int8, (rows, columns)))
            else:
                found += [
                    TensorEntry(f"{base}.weight_packed", torch.int32, (rows, columns * grid.bits // 32)),
                    TensorEntry(f"{base}.weight_shape", torch.int64, (2,)),
                ]
        if rounding is not None and not rounding.per_token:
            found.append(TensorEntry(f"{base}.input_scale", torch.float32, (1,)))
        return found

    def tensors(
        self, site: Weight, grid: Grid, codes: Tensor, params: Params, rounding: Activations | None = None
    ) -> dict[str, Tensor]:
        """The tensors of :meth:`entries`, from a weight's codes (rows, columns) and parameters. Of some of its rows
        those of two dimensions are cut likewise; the others are whole."""
        base = site.name.removesuffix(".weight")
        if isinstance(grid, FP8):
            scale = params["scale"][:1].reshape(1) if grid.per_tensor else params["scale"]
            found = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        else:
            assert isinstance(grid, Int)
            found = {"weight_scale": params["scale"].half()}
            if rounding is not None:
                found["weight"] = (codes ^ 128).view(torch.int8)
            else:
                found["weight_packed"] = pack_words(codes, grid.bits)
                found["weight_shape"] = torch.tensor([site.rows, site.columns])
        if rounding is not None and not rounding.per_token:
            found["input_scale"] = torch.tensor([rounding.scale])
        return {f"{base}.{part}": tensor.contiguous() for part, tensor in found.items()}


def _holds(grid: Grid, columns: int) -> bool:
    """Whether groups and words divide the rows."""
    if not isinstance(grid, Int):
        return True
    return columns % (grid.group or 1) == 0 and columns % (32 // grid.bits) == 0


def quantization_config(
    packed: Mapping[str, tuple[Grid, Activations | None]], ignored: Iterable[str], version: str
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        packed: grid, and how inputs are rounded, by module.
        ignored: the other modules that have a matrix.
        version: of the package that reads it.
    """
    schemes: dict[tuple[str, Any], list[str]] = {}
    for module, (grid, rounding) in packed.items():
        inputs = None if rounding is None else (rounding.kind, rounding.per_token)
        schemes.setdefault((grid.spec, inputs), []).append(module)
    groups, formats = {}, set()
    for index, modules in enumerate(schemes.values()):
        grid, rounding = packed[modules[0]]
        kind = _format(grid, rounding)
        formats.add(kind)
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else modules,
            "weights": _weights(grid),
            "input_activations": None if rounding is None else _inputs(rounding),
            "output_activations": None,
            "format": kind,
        }
    return {
        "quant_method": "compressed-tensors",
        "version": version,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _format(grid: Grid, rounding: Activations | None) -> str:
    if isinstance(grid, FP8):
        return "naive-quantized" if rounding is None else "float-quantized"
    return "pack-quantized" if rounding is None else "int-quantized"


def _weights(grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {"dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"}
    if isinstance(grid, FP8):
        strategy = "tensor" if grid.per_tensor else "channel"
        return {**found, "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "group_size": None}
    assert isinstance(grid, Int)
    return {
        **found, "num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group is None else "group", "group_size": grid.group,
    }  # fmt: skip


def _inputs(rounding: Activations) -> dict[str, Any]:
    return {
        "num_bits": 8, "type": "int" if rounding.kind == "int8" else "float", "symmetric": True,
        "strategy": "token" if rounding.per_token else "tensor", "dynamic": rounding.per_token, "group_size": None,
        "actorder": None, "block_structure": None, "observer": None if rounding.per_token else "minmax",
    }  # fmt: skip
