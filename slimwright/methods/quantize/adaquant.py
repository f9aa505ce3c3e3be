"""AdaQuant: weights, ranges and zero points of one layer by gradient steps (card: adaquant_ip, step 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import SiteStatistics, WeightSolver, knob, register
from slimwright.weights import Grid, Int, Quantized
from slimwright.weights.grid import Params
from slimwright.weights.ranges import fit_params

_TILE_ELEMENTS = 1 << 22
"""Elements of the rows that are solved together: a handful of temporaries of this size."""


@register(
    "quantize/adaquant", paper="Hubara et al. 2020, Improving Post Training Neural Quantization (arXiv:2006.10518)"
)
@dataclass(frozen=True)
class AdaQuant(WeightSolver):
    """Minimise the layer's squared output error over weights, scales and zero points by Adam, straight through the
    rounding; a clipped weight has no gradient.

    On the layer's Gram, where the card's stage 3 draws minibatches of cached inputs: without quantized inputs
    ``‖(Q(W + V) - W) X‖²`` is ``tr(Δ H Δᵀ)``, so every step has the exact gradient of the whole calibration set.
    Further differences: the learning rates are in steps of the grid (the card's, 1e-5, moves a weight by at most 1e-3
    in its 100 iterations, whatever the step), they fall to 0 along a cosine, and each row keeps the best of what it
    met, computed as it is stored, the start included. Input ranges are not learned here: activations have their own
    scales (slimwright/weights/activations.py).
    The bias is not learned but solved: with ``bias`` the loss is that of a layer whose bias is corrected afterwards,
    ``tr(Δ (H - μ μᵀ) Δᵀ)``, and :func:`slimwright.methods.correction.bias_shift` is that correction.

    ``iters=0`` is rounding to nearest in the starting ranges.
    """

    grid: Grid = knob(Int(4, group=128), help="an int grid")
    iters: int = knob(200, low=0, high=100000, help="gradient steps")
    lr: float = knob(0.02, low=0.0, high=10.0, help="learning rate of the weights, in steps of the grid")
    lr_scale: float = knob(0.01, low=0.0, high=1.0, help="learning rate of scales, as a fraction of the scale")
    lr_zero: float = knob(0.03, low=0.0, high=10.0, help="learning rate of zero points, in codes")
    damp: float = knob(0.01, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")
    clip: str = knob(
        "weighted", choices=("none", "mse", "weighted"), help="range of a group at the start (weighted: by diag H)"
    )
    bias: bool = knob(False, help="minimise what is left after the bias is corrected by the mean error")
    needs = ("gram",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, Int):
            raise InputError(f"{self.name} learns scales and zero points; give an int grid, not {self.grid}.")

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, survey = self.checked(weight, stats)
        grid = self.grid
        assert isinstance(grid, Int) and stats.gram is not None
        gram = stats.centred_gram() if self.bias else stats.gram.clone()
        mean = float(gram.diagonal().mean())
        gram /= mean if mean > 0 else 1.0
        gram.diagonal().add_(self.damp)
        codes, params = [], []
        step = max(1, _TILE_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            begin = fit_params(grid, rows, self.clip, stats.importance, survey)
            found = _Descent(grid, rows, gram, begin).run(self)
            codes.append(found[0])
            params.append(found[1])
        joined = {name: torch.cat([part[name] for part in params]) for name in params[0]}
        return Quantized(grid, torch.cat(codes), joined)


class _Descent:
    """Adam on some rows: the weights' displacement in steps, the logarithm of the scale, the zero point."""

    def __init__(self, grid: Int, weight: Tensor, gram: Tensor, params: Params) -> None:
        self.grid, self.weight, self.gram = grid, weight, gram
        self.scale, self.zero = params["scale"], params.get("zero")
        self.group = grid.fit_block(weight.shape[1])

    def _params(self, log_scale: Tensor, shift: Tensor) -> Params:
        """As they are stored."""
        params = {"scale": self.grid.stored_scale(self.scale * log_scale.exp())}
        if self.zero is not None:
            zero = self.zero + shift
            top = 2**self.grid.bits - 1
            params["zero"] = zero.half().float() if self.grid.zero == "real" else zero.round().clamp_(0, top)
        return params

    def _by_group(self, product: Tensor) -> Tensor:
        """Sums over the columns of each group: (rows, columns) → (rows, groups)."""
        short = -product.shape[1] % self.group
        return torch.nn.functional.pad(product, (0, short)).unflatten(1, (-1, self.group)).sum(2)

    def _spread(self, values: Tensor) -> Tensor:
        """Each group's value for each of its columns: (rows, groups) → (rows, columns)."""
        return values.repeat_interleave(self.group, dim=1)[:, : self.weight.shape[1]]

    def run(self, knobs: AdaQuant) -> tuple[Tensor, Params]:
        """The best codes and parameters of each row."""
        grid, weight = self.grid, self.weight
        moved = [torch.zeros_like(weight), torch.zeros_like(self.scale), torch.zeros_like(self.scale)]
        first = [torch.zeros_like(value) for value in moved]
        second = [torch.zeros_like(value) for value in moved]
        rates = (knobs.lr, knobs.lr_scale, 0.0 if self.zero is None else knobs.lr_zero)
        start_scale = self._spread(self.scale)
        middle = float(2 ** (grid.bits - 1))
        best_loss = torch.full((weight.shape[0],), torch.inf)
        best_codes, best = torch.zeros(weight.shape, dtype=torch.uint8), self._params(moved[1], moved[2])
        for iteration in range(knobs.iters + 1):  # the last only judges
            params = self._params(moved[1], moved[2])
            target = weight + moved[0] * start_scale
            codes = grid.encode(target, params)
            delta = grid.decode(codes, params) - weight
            slope = delta @ self.gram
            loss = (slope * delta).sum(1)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            best_codes = torch.where(better[:, None], codes, best_codes)
            best = {name: torch.where(better[:, None], value, best[name]) for name, value in params.items()}
            if iteration == knobs.iters:
                break
            scale = self._spread(params["scale"])
            zero = self._spread(params["zero"]) if "zero" in params else middle
            unit = target / scale
            level = codes.float() - zero
            inside = ((unit - level).abs() <= 0.5 + 1e-3).float()  # beyond half a step: clipped
            gradients = (
                slope * start_scale * inside,
                self._by_group(slope * (level - unit * inside)) * params["scale"],
                self._by_group(slope * (inside - 1)) * params["scale"],
            )
            decay = 0.5 * (1 + math.cos(math.pi * iteration / knobs.iters))
            for value, gradient, mean, square, rate in zip(moved, gradients, first, second, rates, strict=True):
                mean.mul_(0.9).add_(gradient, alpha=0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                unbiased = (square / (1 - 0.999 ** (iteration + 1))).sqrt_()
                update = mean / (1 - 0.9 ** (iteration + 1)) / unbiased.clamp_(min=1e-30)
                value.sub_(update, alpha=rate * decay)
        return best_codes, best
