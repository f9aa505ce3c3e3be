"""Plain 16-bit floats as a grid, so that leaving a weight in half precision is a choice like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.weights.grid import Grid, Params, Part, register_grid

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@register_grid
@dataclass(frozen=True)
class Float(Grid):
    """A cast. The payload is the dense tensor in ``dtype`` and its own shape: not packed, no parameters.

    Values beyond the dtype's range become its largest finite value.

    Args:
        name: ``bf16`` or ``fp16``.
    """

    key: ClassVar[str] = "float"
    examples: ClassVar[tuple[str, ...]] = ("bf16", "fp16")
    plain: ClassVar[bool] = True
    name: str = "bf16"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _DTYPES:
            raise InputError(f"Float grid: the name must be bf16 or fp16, not {self.name!r}.")

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.name]

    @property
    def spec(self) -> str:
        return self.name

    @classmethod
    def parse(cls, spec: str) -> Float | None:
        return cls(spec) if spec in _DTYPES else None

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (Part("", self.dtype, (rows, columns)),)

    def fit(self, w: Tensor, importance: Tensor | None = None, survey: Any = None) -> Params:
        return {}

    def levels(self, params: Params, columns: int) -> None:
        return None

    def encode(self, w: Tensor, params: Params) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return w.clamp(-largest, largest).to(self.dtype)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return codes.float()

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"": codes}

    def unpack(self, parts: Mapping[str, Tensor], columns: int) -> tuple[Tensor, Params]:
        return parts[""], {}
