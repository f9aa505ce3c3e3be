"""KL divergence and top-1 agreement between the logits of two models."""

from __future__ import annotations

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.table import Metric

KL = Metric("kl", "kl", "tokens")
TOP1_AGREEMENT = Metric("top1_agreement", "top1_agreement", "tokens")

_CELLS = 1 << 20  # logits converted to float64 at a time: 8 MB each of a handful of buffers


def compare_logits(reference: Tensor, candidate: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Compare two models' logits token by token.

    KL(reference ‖ candidate) = Σ p (x − y) − log Z_x + log Z_y, with both logits shifted by their maximum. It is summed
    in float64 over tiles, so that nothing larger than a tile is copied; equal logits give exactly 0.

    Args:
        reference: (tokens, vocabulary) logits, any float dtype.
        candidate: the same shape.
        mask: (tokens,) true where a token counts; None: all count. What is masked may hold anything.

    Returns:
        ``kl``: (counted tokens,) float64, nats, at least 0; ``top1_agreement``: (counted tokens,) bool, whether both
        have their maximum at the same entry (of equal maxima the first).

    Raises:
        InputError: the shapes differ or are not two-dimensional, or a counted logit is NaN or Inf.
    """
    if reference.ndim != 2 or reference.shape != candidate.shape or not reference.shape[1]:
        raise InputError(
            f"Logits must be (tokens, vocabulary) and alike, but have shapes {tuple(reference.shape)} and "
            f"{tuple(candidate.shape)}."
        )
    if mask is not None and mask.shape != reference.shape[:1]:
        raise InputError(
            f"The mask must be ({reference.shape[0]},) like the logits, but has shape {tuple(mask.shape)}."
        )
    tokens, vocabulary = reference.shape
    counted = torch.arange(tokens) if mask is None else mask.bool().nonzero()[:, 0].cpu()
    columns = min(vocabulary, _CELLS)
    rows = max(1, _CELLS // columns)
    divergence = torch.empty(len(counted), dtype=torch.float64)
    agreement = torch.empty(len(counted), dtype=torch.bool)
    for first in range(0, len(counted), rows):
        index = counted[first : first + rows]
        x = reference[index.to(reference.device)]
        y = candidate[index.to(candidate.device)].to(x.device)
        x_top, y_top = x.max(1), y.max(1)  # NaN wins the maximum
        for name, tile, top in (("reference", x, x_top), ("candidate", y, y_top)):
            if not (torch.isfinite(top.values).all() and torch.isfinite(tile.amin(1)).all()):
                raise InputError(f"The logits of the {name} hold NaN or Inf: the model is broken or was built wrong.")
        z_x, z_y, moment = (torch.zeros(len(index), dtype=torch.float64, device=x.device) for _ in range(3))
        for start in range(0, vocabulary, columns):
            a = x[:, start : start + columns].double() - x_top.values[:, None].double()
            b = y[:, start : start + columns].double() - y_top.values[:, None].double()
            p = a.exp()
            z_x += p.sum(1)
            moment += p.mul_(a.sub_(b)).sum(1)
            z_y += b.exp_().sum(1)
        divergence[first : first + rows] = (moment / z_x - z_x.log() + z_y.log()).clamp(min=0).cpu()
        agreement[first : first + rows] = (x_top.indices == y_top.indices).cpu()
    return {"kl": divergence, "top1_agreement": agreement}
