"""Losses from a rank of the blocks (layer-wise bits, card #245): which block matters more, not how much in nats.

An option costs the error of its weights times its block's rank among all (over the mean rank), so that of two blocks of
equal errors the less important one is lowered first, whatever solver chooses. What lies outside blocks has the mean.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimwright.job.losses import LossEstimate, Scored, Scoring
from slimwright.job.options import chosen_rows, sampling
from slimwright.job.walked import WalkedModel
from slimwright.methods.registry import knob


class RankedBlocks(LossEstimate):
    """Estimates that score whole blocks."""

    nats = False

    @abstractmethod
    def importance(self, given: Scoring) -> Mapping[str, float]:
        """How much each block matters, by module path, on a scale of its own; larger is more."""

    def score(self, given: Scoring) -> Scored:
        rank = ranks(self.importance(given))
        groups = given.structure.choice_groups()

        def weight(group: str) -> float:
            return rank.get((groups[group][0].block or "") if group in groups else "", 1.0)

        return Scored(
            {
                group: [replace(option, loss=option.loss * weight(group)) for option in options]
                for group, options in given.rounded().items()
            }
        )


def ranks(importance: Mapping[str, float]) -> dict[str, float]:
    """Place of each block from the least important on, over the mean place; of equals the earlier one matters more."""
    order = sorted(enumerate(importance), key=lambda item: (importance[item[1]], -item[0]))
    middle = (len(order) + 1) / 2
    return {block: (place + 1) / middle for place, (_, block) in enumerate(order)}


@dataclass(frozen=True)
class InputModification(RankedBlocks):
    """LIM: minus the mean cosine of what enters a block and what leaves it. A block that is the identity has -1."""

    name = "lim"
    paper = "layer-wise bits by importance (#245)"
    needs_walks = True

    def importance(self, given: Scoring) -> Mapping[str, float]:
        assert given.calibration is not None
        found = WalkedModel(given.source, given.structure, given.calibration).block_cosines()
        return {block: -similarity.block for block, similarity in found.items()}


@dataclass(frozen=True)
class ScoreDistribution(RankedBlocks):
    """ZD: the fraction of a block's weights more than one standard deviation above their mean; fewer matter more."""

    name = "zd"
    paper = "layer-wise bits by importance (#245)"
    needs_data = False
    sides: int = knob(1, choices=(1, 2), help="1: above the mean only (the paper); 2: on both sides")

    def importance(self, given: Scoring) -> Mapping[str, float]:
        how = sampling(given.structure)
        blocks: dict[str, list[Tensor]] = {}
        for site in given.structure.sites.values():
            if site.block is not None:
                blocks.setdefault(site.block, []).append(chosen_rows(given.source, site, how.rows(site)).flatten())
        return {block: -outliers(torch.cat(weights), self.sides) for block, weights in blocks.items()}


def outliers(weights: Tensor, sides: int = 1) -> float:
    """The fraction of values whose z-score is above 1 (``sides`` 2: above 1 or below -1)."""
    spread, mean = torch.std_mean(weights.double())
    z = (weights.double() - mean) / spread.clamp(min=1e-300)
    return float(((z.abs() if sides == 2 else z) > 1).double().mean())
