"""The base of merge methods that drop entries of the task vectors at random: DARE and DELLA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from slimwright.methods.blending import Blend
from slimwright.methods.consensus import add_to_base, combined
from slimwright.methods.merging import MergeMethod, State, Sums, Tile
from slimwright.methods.rescaling import restoring, survey_norms


class DroppingMethod(MergeMethod):
    """Subclasses have the knobs ``rescale`` (``exact``, ``l1`` or ``none``), ``consensus``, ``lambda_``, ``weight`` and
    ``normalize``, and say what is dropped; ``l1`` restores each tensor's sum of magnitudes (not where one of the two is
    below 1e-7)."""

    rescale: str
    consensus: str
    lambda_: float
    normalize: bool

    @abstractmethod
    def dropped(self, deltas: list[Tensor], tile: Tile) -> list[Tensor]:
        """The task vectors with their dropped entries at 0; perhaps in their memory."""

    def factors(self, models: int) -> Sequence[float]:
        """What each task vector is multiplied by after dropping, where the norms are not restored."""
        return [1.0] * models

    @property
    def rounds(self) -> int:
        return int(self.rescale == "l1")

    def entries(self, models: int) -> Blend | None:
        """Which entries stay, for a compiled loop; None where there is none."""
        return None

    def survey(self, tile: Tile, state: State) -> Sums:
        return survey_norms(tile, self.entries(len(tile.deltas())), lambda deltas: self.dropped(deltas, tile))

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        return {"factors": restoring(sums)}

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        models = len(tile.tensors)
        weights = self.each("weight", models)
        deltas = self.dropped([tensor.sub_(tile.base) for tensor in tile.tensors], tile)
        for delta, factor, weight in zip(deltas, state.get("factors") or self.factors(models), weights):
            if factor * weight != 1:
                delta.mul_(factor * weight)
        return add_to_base(tile.base, combined(deltas, weights, self.consensus, self.normalize), self.lambda_)
