"""Low-rank forms: two factors, alone or as the correction of a weight on a grid. And the parser of all forms."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from slimwright.errors import InputError
from slimwright.weights.cast import Float
from slimwright.weights.form import Component, Form
from slimwright.weights.grid import Grid, parse_grid

KEYWORD = "lowrank"
_WRITTEN = re.compile(rf"{KEYWORD}:r(\d{{1,7}})(?::(.+))?")


@dataclass(frozen=True)
class LowRankForm(Form):
    """``W = L R``, or ``W = B + L R``: L (out, rank) and R (rank, in), each on a grid; B on a grid of its own.

    Of stacked experts each has its own factors. ``lowrank:r64`` has factors in bf16; ``lowrank:r64:int8:g64`` packed
    ones; ``int3:g64+lowrank:r16`` is a quantized weight with a correction.

    On disk the weight's own name is L's payload, or B's where there is one; then L's tensors begin with ``_left``. R's
    begin with ``_right``.

    Args:
        rank: columns of L, at least 1.
        factors: the grid of both factors.
        base: B's grid; None: there is none.
    """

    rank: int
    factors: Grid = Float("bf16")
    base: Grid | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise InputError(f"A low-rank form has a rank of at least 1, not {self.rank!r}.")
        if self.base is not None and self.base.plain:
            raise InputError(f"{self.base} keeps what 16 bits keep: it takes no low-rank correction.")

    @property
    def spec(self) -> str:
        factors = "" if self.factors == Float("bf16") else f":{self.factors.spec}"
        return ("" if self.base is None else f"{self.base.spec}+") + f"{KEYWORD}:r{self.rank}{factors}"

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        left, right = (*shape[:-1], self.rank), (*shape[:-2], self.rank, shape[-1])
        pair = (
            Component("" if self.base is None else "_left", self.factors, left, widened=True),
            Component("_right", self.factors, right, shared=True),
        )
        return pair if self.base is None else (Component("", self.base, shape), *pair)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if self.rank > min(shape[-2:]):
            return f"a rank of {self.rank} is more than its {shape[-2]} rows or {shape[-1]} columns"
        for own in self.components(shape):
            spans = type(own.grid).survey is not Grid.survey or own.grid.row_multiple(own.shape[-1]) > 1
            if spans and len(shape) == 3:
                return f"{own.grid} has parameters that span experts, which are solved one by one"
            reason = own.grid.illegal(*own.matrix_shape)
            if reason:
                return f"{own.grid}: {reason}" if own.prefix or self.base is None else reason
        return None

    def row_multiple(self, columns: int) -> int:
        multiple = self.factors.row_multiple(self.rank)
        return multiple if self.base is None else math.lcm(multiple, self.base.row_multiple(columns))


def parse_form(spec: str) -> Form:
    """Read a form: a grid such as ``int4:g128``, ``lowrank:r64[:GRID]`` or ``GRID+lowrank:r64[:GRID]``.

    Raises:
        InputError: unknown or out of range.
    """
    text = spec.strip().lower() if isinstance(spec, str) else ""
    if KEYWORD not in text and "+" not in text:
        return parse_grid(spec)
    base, plus, rest = text.partition("+") if "+" in text else ("", "", text)
    match = _WRITTEN.fullmatch(rest.strip())
    if match is None or (plus and not base.strip()):
        raise InputError(
            f"'{spec}' is no low-rank form: write {KEYWORD}:rR[:GRID] or GRID+{KEYWORD}:rR[:GRID], for instance "
            f"{KEYWORD}:r64, {KEYWORD}:r64:int8:g64 or int3:g64+{KEYWORD}:r16."
        )
    factors = parse_grid(match[2]) if match[2] else Float("bf16")
    return LowRankForm(int(match[1]), factors, parse_grid(base) if plus else None)
