"""Parameter competition balancing (card: pcb-merging, #84)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimwright.methods.consensus import add_to_base
from slimwright.methods.merging import MergeMethod, MergeSite, State, Sums, Tile
from slimwright.methods.registry import knob, register
from slimwright.methods.selection import (
    ROUNDS,
    Selection,
    is_settled,
    settle_magnitudes,
    survey_magnitudes,
    threshold_of,
)


@register("merge/pcb", paper="Parameter Competition Balancing, arXiv:2410.02396")
@dataclass(frozen=True)
class ParameterCompetitionBalancing(MergeMethod):
    """Give every entry of every task vector its own weight: large within its task, and in agreement with the others.

    Magnitudes are clipped to their ``clamp`` and ``1 - clamp`` quantiles; ``b = exp(n * norm(|tau|) ** 2)`` times the
    agreement, which is ``tanh(tau * sum of all tau)`` (variant A) or the sum over tasks of ``tanh(s * s_j)`` with
    ``s = sign(tau) * norm(|tau|)`` (variant B); of these the ``density`` largest share counts, mapped to 0 .. 1. norm
    is min to max over the whole model (or each tensor). A vector whose magnitudes are all equal has norm 1 everywhere.
    """

    density: float = knob(0.1, low=0.0, high=1.0, help="share of entries that count")
    clamp: float = knob(0.01, low=0.0, high=0.49, help="quantile to which magnitudes are clipped at both ends")
    variant: str = knob("A", choices=("A", "B"), help="which of the authors' agreements")
    lambda_: float = knob(1.0, low=-100.0, high=100.0, help="scale of the merged task vector")
    granularity: str = knob("model", choices=("model", "tensor"), help="quantiles over the whole model or each tensor")

    @property
    def scope(self) -> Literal["tensor", "model"]:
        return "model" if self.granularity == "model" else "tensor"

    @property
    def rounds(self) -> int:
        return 2 * ROUNDS + 1

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        numel = sum(site.numel for site in sites.values())
        low, high = int(numel * self.clamp), max(0, int(numel * (1 - self.clamp)) - 1)
        place = min(numel - 1, int(numel * (1 - self.density)))
        return {
            "clip": [[_value_at(low, numel), _value_at(high, numel)] for _ in range(models)],
            "quantile": [[_value_at(place, numel)] for _ in range(models)],
        }

    def survey(self, tile: Tile, state: State) -> Sums:
        if not is_settled(state["clip"]):
            return survey_magnitudes(tile.deltas(), state["clip"], tile)
        deltas = list(tile.deltas())
        scores = self._scores(self._clipped(deltas, state), deltas, state)
        if "range" not in state:
            lows = torch.stack([score.min() for score in scores]).double()
            highs = torch.stack([score.max() for score in scores]).double()
            return {"extremes": _Extremes(lows, highs)}
        # Scores have a sign, and the histograms are of magnitudes: counted from the lowest, they have none.
        shifted = [score - low for score, (low, _) in zip(scores, state["range"])]
        return survey_magnitudes(shifted, state["quantile"], tile)

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        if not is_settled(state["clip"]):
            clip = settle_magnitudes(sums, state["clip"])
            return {**state, "clip": clip}
        if "range" not in state:
            found = [part["extremes"] for part in sums.values()]
            low = torch.stack([extremes.low for extremes in found]).amin(0)
            high = torch.stack([extremes.high for extremes in found]).amax(0)
            return {**state, "range": torch.stack([low, high], 1).tolist()}
        quantile = settle_magnitudes(sums, state["quantile"])
        return {**state, "quantile": quantile, "done": is_settled(quantile)}

    def _clipped(self, deltas: list[Tensor], state: State) -> list[Tensor]:
        """Task vectors with their magnitudes clipped."""
        clipped = []
        for delta, (low, high) in zip(deltas, state["clip"]):
            clipped.append(
                delta.abs().clamp_(threshold_of(low), threshold_of(high)).copysign_(delta).mul_(delta.sign().abs_())
            )
        return clipped

    def _scores(self, clipped: list[Tensor], deltas: list[Tensor], state: State) -> list[Tensor]:
        """b of the card, one a model."""
        models = len(clipped)
        norms = []
        for vector, (low, high) in zip(clipped, state["clip"]):
            least, most = threshold_of(low), threshold_of(high)
            span = most - least
            norms.append((vector.abs() - least).clamp_(min=0).div_(span) if span > 0 else torch.ones_like(vector))
        intra = [norm.square().mul_(models).exp_() for norm in norms]
        if self.variant == "A":
            total = sum(clipped[1:], clipped[0])
            return [own.mul_((vector * total).tanh_()) for own, vector in zip(intra, clipped)]
        signed = [norm * vector.sign() for norm, vector in zip(norms, clipped)]
        return [own.mul_(sum((mine * other).tanh() for other in signed)) for own, mine in zip(intra, signed)]

    def combine(self, tile: Tile, state: State) -> Tensor:
        assert tile.base is not None
        deltas = [tensor.sub_(tile.base) for tensor in tile.tensors]
        clipped = self._clipped(deltas, state)
        total, divisor = torch.zeros_like(tile.base), torch.zeros_like(tile.base)
        for vector, score, (low, high), (quantile,) in zip(
            clipped, self._scores(clipped, deltas, state), state["range"], state["quantile"]
        ):
            cut = threshold_of(quantile)
            span = high - low - cut
            scale = (score - low - cut).clamp_(min=0).div_(span) if span > 0 else torch.ones_like(score)
            total.addcmul_(vector, scale)
            divisor.add_(scale)
        return add_to_base(tile.base, total.div_(divisor.clamp_(min=1e-12)), self.lambda_)


def _value_at(place: int, numel: int) -> Selection:
    """The magnitude at a place of the ascending order."""
    return {"keep": numel - place, "value_only": True}


class _Extremes:
    """Least and greatest values; adding two takes the lesser and the greater."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def __iadd__(self, other: _Extremes) -> _Extremes:
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return self
