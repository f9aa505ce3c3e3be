"""The functions of merge.cpp on stored weights. All need :func:`ready`; each gives None where a value is not finite."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimwright.kernels import library, pointer

PIECE, LANES, RUN, COUNTERS = 512, 64, 16384, 2
"""As in merge.cpp."""
_GROUP = 32
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HOW = {"sum": 0, "fused": 1, "mean": 2, "agreeing": 3, "max": 4}
EVERYTHING, NOTHING = 0, 0x7F800000
"""Least bits of a magnitude that stays, so that all or none do."""

_long, _int, _float = ctypes.c_int64, ctypes.c_int, ctypes.c_float
_null = ctypes.c_void_p(None)


class Source(ctypes.Structure):
    """One vector of a tile, as merge.cpp has it."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("keys", ctypes.c_void_p), ("place", ctypes.c_int64),
        ("before", ctypes.c_uint32), ("behind", ctypes.c_uint32),
        ("outlier_before", ctypes.c_uint32), ("outlier_behind", ctypes.c_uint32), ("outlier_place", ctypes.c_int64),
        ("limit", ctypes.c_uint32), ("kind", ctypes.c_int32), ("factor", ctypes.c_float), ("weight", ctypes.c_float),
    )  # fmt: skip


def ready(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: compiled here, on the CPU, contiguous, of a dtype that they know."""
    return library("merge") is not None and all(
        t.dtype in KINDS and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def sources(tensors: Sequence[Tensor]) -> Any:
    """An array of :class:`Source`, each as it is stored: nothing trimmed, nothing dropped, factor and weight 1. The
    tensors must outlive it."""
    made = (Source * len(tensors))()
    for source, tensor in zip(made, tensors):
        source.data, source.kind = tensor.data_ptr(), KINDS[tensor.dtype]
        source.factor = source.weight = 1.0
        source.outlier_before = source.outlier_behind = NOTHING
    return made


def _base(base: Tensor | None) -> tuple[Any, Any]:
    return (_null, _int(0)) if base is None else (ctypes.c_void_p(base.data_ptr()), _int(KINDS[base.dtype]))


def _call(name: str, *arguments: Any) -> int:
    loaded = library("merge")
    assert loaded is not None
    return int(getattr(loaded, f"slimwright_{name}")(*arguments))


def blend(
    given: Any, base: Tensor | None, subtract: bool, out: Tensor, *, how: str, by_count: bool = False,
    majority: float = 1.0, divisor: float = 1.0, scale: float = 1.0, base_factor: float = 1.0, add_base: bool = False,
) -> bool:  # fmt: skip
    """Write the merged elements of a tile into ``out`` (flat, in the result's dtype); False where an input or a result
    is not finite.

    Args:
        given: from :func:`sources`, with masks, factors and weights.
        base: the base's elements or None.
        subtract: vectors are differences from the base.
        how: ``sum``; ``fused`` (a sum with fused multiply-adds, as torch's ``add`` with a factor); of the elements that
            agree with the elected sign the weighted ``mean``, the sum (``agreeing``), or the ``max``.
        by_count: signs are elected by their number, not by the sum of the values.
        majority: the sign where the votes cancel.
        divisor, scale, base_factor: ``scale * merged / divisor + base_factor * base``.
        add_base: whether the base is added.
    """
    scratch = torch.empty((len(given) + 4) * PIECE)
    flags = _call(
        "blend", given, _int(len(given)), *_base(base), _int(subtract), _long(out.numel()), _int(HOW[how]),
        _int(by_count), _float(majority), _float(divisor), _float(scale), _float(base_factor), _int(add_base),
        ctypes.c_void_p(out.data_ptr()), _int(KINDS[out.dtype]), _null, pointer(scratch),
    )  # fmt: skip
    return flags == 0


def votes(given: Any, base: Tensor | None, numel: int, by_count: bool) -> int | None:
    """The elected signs (+1, 0, -1) of a tile of differences from the base, added up."""
    scratch, total = torch.empty((len(given) + 4) * PIECE), ctypes.c_int64()
    flags = _call(
        "blend", given, _int(len(given)), *_base(base), _int(base is not None), _long(numel), _int(HOW["mean"]),
        _int(by_count), _float(0), _float(1), _float(1), _float(1), _int(0), _null, _int(0), ctypes.byref(total),
        pointer(scratch),
    )  # fmt: skip
    return total.value if flags == 0 else None


def count_bits(given: Any, base: Tensor | None, numel: int, highs: Sequence[int | None]) -> list[Tensor] | None:
    """Histograms of the magnitudes' bits, int32, one a source: (32768,) of the upper 16 bits, or (65536,) of the lower
    16 bits of those whose upper are ``high``."""
    counts = [torch.zeros(COUNTERS, 1 << 15 if high is None else 1 << 16, dtype=torch.int32) for high in highs]
    wanted = (ctypes.c_int64 * len(counts))(*(-1 if high is None else high for high in highs))
    places = (ctypes.c_void_p * len(counts))(*(count.data_ptr() for count in counts))
    flags = _call("count_bits", given, _int(len(given)), *_base(base), _long(numel), wanted, places)
    return [count[0].clone() for count in counts] if flags == 0 else None


def gather(source: Any, base: Tensor | None, numel: int, high: int) -> tuple[Tensor, Tensor] | None:
    """(places, bits), int32 both, of the magnitudes of one source whose upper 16 bits are ``high``, in order."""
    room = max(1024, numel // 8)
    while True:
        places, bits = torch.empty(room, dtype=torch.int32), torch.empty(room, dtype=torch.int32)
        found = ctypes.c_int64()
        flags = _call(
            "gather", ctypes.byref(source), *_base(base), _long(numel), _long(high), _long(room),
            pointer(places, torch.int32), pointer(bits, torch.int32), ctypes.byref(found),
        )  # fmt: skip
        if flags:
            return None
        if found.value <= room - _GROUP:
            return places[: found.value].clone(), bits[: found.value].clone()
        room = found.value + _GROUP


def count_equal(source: Any, base: Tensor | None, numel: int, bits: int, block: int) -> Tensor | None:
    """(blocks,) int64: how many magnitudes of one source have exactly these bits, by block of 2**18 elements."""
    counts = torch.zeros(-(-numel // block), dtype=torch.int64)
    flags = _call(
        "count_equal", ctypes.byref(source), *_base(base), _long(numel), _long(bits), pointer(counts, torch.int64)
    )
    return counts if flags == 0 else None


def run_sums(given: Any, base: Tensor | None, numel: int, masks: bool) -> Tensor | None:
    """(runs, quantities) float32: sums over runs of 16,384 elements, in pairs.

    The quantities are the products of all pairs of sources, (0, 0), (0, 1), ..., (1, 1), ...; with ``masks`` the
    magnitudes of every source, then those of every source trimmed and dropped.
    """
    models = len(given)
    quantities = 2 * models if masks else models * (models + 1) // 2
    sums = torch.empty(-(-numel // RUN), quantities)
    scratch = torch.empty((2 * models + 1) * PIECE + quantities * 9 * LANES)
    flags = _call(
        "run_sums", given, _int(models), *_base(base), _long(numel), _int(masks), pointer(sums), pointer(scratch)
    )
    return sums if flags == 0 else None
