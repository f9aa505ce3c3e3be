"""Corrections of what a solver leaves behind, for any compressed weight."""

from __future__ import annotations

from torch import Tensor

from slimwright.calibrate.site_statistics import SiteStatistics
from slimwright.errors import InputError
from slimwright.weights import Compressed


def bias_shift(weight: Tensor, value: Compressed, stats: SiteStatistics) -> Tensor:
    """What to add to the layer's bias so that its mean output is the original's (card: adaquant_ip; Nagel et al. 2019,
    arXiv:1906.04721, section 4.2): ``(W - Q) μ``.

    It leaves ``tr(Δ (H - μ μᵀ) Δᵀ)`` of the squared error ``tr(Δ H Δᵀ)``, the least that any bias can.

    Args:
        weight: (out, in) as it was.
        value: what stands for it.
        stats: with the mean input.

    Returns:
        (out,) float32.

    Raises:
        InputError: the mean input is not known.
    """
    if stats.mean is None:
        raise InputError("Correcting a bias needs the statistic 'mean': give data.")
    return (weight.float() - value.dense()) @ stats.mean
