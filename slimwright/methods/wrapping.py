"""Merge methods around another: the inner one merges, the outer one works on what it merged."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.registry import parse_method


class WrappingMethod(MergeMethod):
    """Base of methods with a knob ``inner``: another method in writing, such as ``ties;density=0.3``.

    Surveys are the inner method's. A semicolon stands for the comma inside an inner method's writing, so that the outer
    one can be written with commas.
    """

    inner: str

    @cached_property
    def merger(self) -> MergeMethod:
        """The inner method.

        Raises:
            InputError: not a merge method with a base, or one that wraps another itself.
        """
        spec = self.inner.replace(";", ",")
        found = parse_method(spec if spec.startswith("merge/") else f"merge/{spec}")
        if not isinstance(found, MergeMethod) or isinstance(found, WrappingMethod) or found.base_model != "required":
            raise InputError(
                f"{self.name}: the inner method must merge task vectors with a base, unlike '{self.inner}'."
            )
        return found

    def check_inputs(self, models: int, base: bool) -> None:
        super().check_inputs(models, base)
        self.merger.check_inputs(models, base)

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        return self.merger.extent

    @property
    def scope(self) -> Literal["tensor", "model"]:
        return self.merger.scope

    @property
    def rounds(self) -> int:
        return self.merger.rounds

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        return self.merger.begin(models, sites)

    def survey(self, tile: Tile, state: State) -> Sums:
        return self.merger.survey(tile, state)

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        return self.merger.settle(sums, state)

    def merged_vector(self, tile: Tile, state: State) -> Tensor:
        """What the inner method adds to the base; the tile's tensors are left alone."""
        assert tile.base is not None
        copy = Tile(tile.site, tile.start, tuple(t.clone() for t in tile.tensors), tile.base, tile.seed)
        return self.merger.combine(copy, state).sub_(tile.base)
