"""The functions of packed_step.cpp on tensors: new tokens of texts through all layers of a decoder, in one call."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError, SlimwrightError
from slimwright.kernels import attend
from slimwright.kernels.packed import DTYPES, Library, Matrix

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_GAINS = ("input_gain", "middle_gain", "q_gain", "k_gain")
_CACHE_FULL = 9


class _Product(ctypes.Structure):
    """``SlimwrightProduct`` of packed_step.h."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("digits", ctypes.c_int64)]


class _Layer(ctypes.Structure):
    """``SlimwrightLayer``."""

    _fields_ = [
        *((name, _Product) for name in PROJECTIONS),
        *((name, ctypes.c_void_p) for name in _GAINS),
        ("kv", ctypes.c_void_p),
    ]


class _Step(ctypes.Structure):
    """``SlimwrightStep``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "width", "layers", "caches")), ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rotary", "positions", "type", "threads")),
        ("epsilon", ctypes.c_double), ("head_epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("layer", "cosine", "sine", "hidden", "final_gain")),
        ("head", _Product), ("outputs", ctypes.c_int64), ("output", ctypes.c_void_p),
        ("logits", ctypes.c_void_p), ("parts", ctypes.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A packed matrix, its bias (float32) and how inputs are written (:meth:`Matrix.linear`)."""

    matrix: Matrix
    bias: Tensor | None
    digits: int


@dataclass(frozen=True)
class Block:
    """A decoder layer.

    Args:
        products: by name of :data:`PROJECTIONS`.
        gains: (width,) float32 of the norms before attention and before the MLP, then those of heads of queries and
            keys, (key_dim,), or None.
    """

    products: dict[str, Product]
    gains: tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Step:
    """A decoder's layers, last norm and head.

    Args:
        library: the packed kernels.
        blocks: its layers.
        dtype: of the model.
        epsilons: of the layers' norms, and of those of heads.
        final_gain: of the last norm; None: the step ends with the layers.
    """

    def __init__(
        self, library: Library, blocks: Sequence[Block], dtype: torch.dtype, epsilons: tuple[float, float],
        final_gain: Tensor | None,
    ) -> None:  # fmt: skip
        parts = attend.library()
        if parts is None:
            raise SlimwrightError(f"There are no compiled kernels: {attend.why_not()}.")
        if library.step_bytes != ctypes.sizeof(_Step) + ctypes.sizeof(_Layer):
            raise SlimwrightError("The compiled kernels are of another version.")
        self.library = library
        self.kept: tuple[object, ...] = (blocks, final_gain)
        self.layers = (_Layer * max(1, len(blocks)))()
        for layer, block in zip(self.layers, blocks):
            for name, product in block.products.items():
                setattr(layer, name, _product(product))
            for name, gain in zip(_GAINS, block.gains):
                setattr(layer, name, None if gain is None else _floats(gain).data_ptr())
        self.structure = _Step(
            layers=len(blocks), type=DTYPES[dtype], epsilon=epsilons[0], head_epsilon=epsilons[1],
            layer=ctypes.addressof(self.layers), parts=parts.slimwright_kv_parts(),
            final_gain=None if final_gain is None else _floats(final_gain).data_ptr(),
        )  # fmt: skip
        self.run = library.step

    def __call__(
        self, hidden: Tensor, cosine: Tensor, sine: Tensor, caches: Sequence[Sequence[attend.Kv]],
        tokens: Sequence[int] | None, head: Product | None,
    ) -> Tensor | None:  # fmt: skip
        """Logits float32 of every row, or of the last token of every cache, (rows, rows of the head); None without a
        head, ``hidden`` is the result then.

        Args:
            hidden: (rows, width) float32; it is changed.
            cosine, sine: (1 or rows, rotated channels) float32.
            caches: by layer, described for their new tokens; their ``length`` grows.
            tokens: rows that are the next tokens of each cache, one cache's after the other's; None: there is one cache
                of all rows, each of which has one token.
            head: the product that gives logits.

        Raises:
            InputError: a cache is full; MemoryError: there is no memory; SlimwrightError: something does not fit.
        """
        s = self.structure
        rows, s.caches = hidden.shape[0], len(caches[0]) if caches else 1
        addresses = [ctypes.addressof(kv) for own in caches for kv in own]
        if len(caches) != s.layers or len(addresses) != s.layers * s.caches or cosine.shape != sine.shape:
            raise SlimwrightError("A step was called with tensors of another shape.")
        self.table = (ctypes.c_void_p * len(addresses))(*addresses)
        first, stride = ctypes.addressof(self.table), s.caches * ctypes.sizeof(ctypes.c_void_p)
        for index, layer in enumerate(self.layers[: s.layers]):
            layer.kv = first + index * stride
        s.tokens, s.output, s.outputs, logits = None, None, rows, None
        if tokens is not None:
            if len(tokens) != s.caches:
                raise SlimwrightError("A step was called with another number of caches.")
            lasts = [last - 1 for last in itertools.accumulate(tokens)]
            self.numbers = (ctypes.c_int64 * (2 * len(tokens)))(*tokens, *lasts)
            s.tokens = ctypes.addressof(self.numbers)
            s.output, s.outputs = s.tokens + len(tokens) * ctypes.sizeof(ctypes.c_int64), len(tokens)
        s.head = _Product()
        if head is not None:
            logits = torch.empty(s.outputs, head.matrix.layout.rows)
            s.head, s.logits = _product(head), logits.data_ptr()
        s.batch, s.width, s.threads = rows, hidden.shape[1], torch.get_num_threads()
        s.positions, s.rotary = cosine.shape
        s.hidden = _floats(hidden).data_ptr()
        s.cosine, s.sine = _floats(cosine).data_ptr(), _floats(sine).data_ptr()
        code = self.run(ctypes.addressof(s))
        if code == _CACHE_FULL:
            raise InputError("The cache of keys and values is full: ask for fewer tokens, or make it larger.")
        self.library.raise_for(code)
        return logits


def _product(product: Product) -> _Product:
    bias = None if product.bias is None else _floats(product.bias).data_ptr()
    return _Product(product.matrix.address, bias, product.digits)


def _floats(tensor: Tensor) -> Tensor:
    """The tensor, if its address may be given to the kernels.

    Raises:
        TypeError: it is not contiguous float32 on the CPU: a mistake of the caller's that would corrupt memory.
    """
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise TypeError(f"A decoding step takes contiguous float32 tensors on the CPU, not {tensor.dtype}.")
    return tensor
