"""decoupleQ's layer stage: integers and floats in turn (card: decoupleq; Guo et al. 2024, arXiv:2404.12759)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.feedback import FeedbackSolver, importance_order
from slimwright.methods.registry import SiteStatistics, knob, register
from slimwright.weights import Grid, Int, Quantized
from slimwright.weights.feedback import round_with_feedback
from slimwright.weights.grid import Params
from slimwright.weights.ranges import fit_params

_TILE_ELEMENTS = 1 << 22
"""Float64 elements of the largest temporary."""
_LARGEST_ZERO = 1024.0  # up to here float16 holds a zero point to a step


@register("quantize/decoupleq", paper="Guo et al. 2024, decoupleQ (arXiv:2404.12759), section 3")
@dataclass(frozen=True)
class DecoupleQ(FeedbackSolver):
    """Alternate between the codes given scales and zero points, and scales and zero points given the codes.

    The loss of a row is ``(w - q) (H + λI) (w - q)ᵀ``. Codes given floats: GPTQ's column-by-column rounding. Floats
    given codes: exact least squares over all groups of a row at once. Either is taken, row by row, only if the loss of
    what would be stored falls, so it never rises; computed in float64. ``iterations=0`` is the better of GPTQ and
    rounding to nearest, per row, with a real zero point.

    Differences from the card: the start's ranges come from the shared search (``clip=weighted``: by H's diagonal) in
    place of a shrink search with the whole of H, and the relaxed gradient steps before rounding are left out. The
    figures of docs/solvers.md need neither.
    """

    grid: Grid = knob(Int(2, group=64, zero="real"), help="an int grid, symmetric or with a real zero point")
    damp: float = knob(0.01, low=0.0, high=10.0, help="damping, as a fraction of the mean of H's diagonal")
    iterations: int = knob(4, low=0, high=100, help="alternations at most")
    act_order: bool = knob(True, help="columns by falling mean squared input instead of from left to right")
    clip: str = knob(
        "weighted", choices=("none", "mse", "weighted"), help="range of a group at the start (weighted: by diag H)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, Int) or not (self.grid.symmetric or self.grid.zero == "real"):
            raise InputError(
                f"{self.name} solves for scales and real zero points; give an int grid that is symmetric or has them, "
                f"such as int2:g64:real, not {self.grid}."
            )

    def solve(self, weight: Tensor, stats: SiteStatistics) -> Quantized:
        weight, survey = self.checked(weight, stats)
        grid, importance = self.grid, stats.importance
        assert isinstance(grid, Int) and stats.gram is not None and importance is not None
        order = self.column_order(stats)
        factor, damping = stats.factor(self.damp, order)
        gram = stats.gram.double()
        gram.diagonal().add_(damping)

        def round_codes(rows: Tensor, params: Params) -> Tensor:
            return grid.encode(round_with_feedback(grid, rows, factor, params, order=order)[0], params)

        params = fit_params(grid, weight, self.clip, importance, survey)
        state = _State(grid, weight, gram, grid.encode(weight, params), params)
        state.offer(slice(None), round_codes(weight, params), params)
        active = torch.arange(weight.shape[0])
        for _ in range(self.iterations):
            if not len(active):
                break
            codes, params = state.codes[active], state.params_of(active)
            refitted = _least_squares(grid, weight[active], codes, gram)
            moved = state.offer(active, codes, refitted)
            params = state.params_of(active)
            moved |= state.offer(active, round_codes(weight[active], params), params)
            active = active[moved]  # for the other rows both halves would find what they found
        return Quantized(grid, state.codes, state.params)

    def column_order(self, stats: SiteStatistics) -> Tensor | None:
        return importance_order(stats) if self.act_order else None


class _State:
    """The best codes and parameters of each row so far, and their losses."""

    def __init__(self, grid: Int, weight: Tensor, gram: Tensor, codes: Tensor, params: Params) -> None:
        self.grid, self.weight, self.gram = grid, weight, gram
        self.codes, self.params = codes, {name: value.clone() for name, value in params.items()}
        self.losses = self._losses(weight, codes, params)

    def params_of(self, rows: Tensor) -> Params:
        return {name: value[rows] for name, value in self.params.items()}

    def offer(self, rows: Tensor | slice, codes: Tensor, params: Params) -> Tensor:
        """Take codes and parameters for those ``rows`` whose loss they lower: which did, a mask over ``rows``."""
        losses = self._losses(self.weight[rows], codes, params)
        better = losses < self.losses[rows]
        taken = torch.arange(self.codes.shape[0])[rows][better]
        self.codes[taken], self.losses[taken] = codes[better], losses[better]
        for name, value in params.items():
            self.params[name][taken] = value[better]
        return better

    def _losses(self, weight: Tensor, codes: Tensor, params: Params) -> Tensor:
        """(rows,) float64."""
        losses = torch.empty(weight.shape[0], dtype=torch.float64)
        step = max(1, _TILE_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            tile = slice(start, start + step)
            values = self.grid.decode(codes[tile], {name: value[tile] for name, value in params.items()})
            delta = weight[tile].double().sub_(values)
            losses[tile] = ((delta @ self.gram) * delta).sum(1)
        return losses


def _least_squares(grid: Int, weight: Tensor, codes: Tensor, gram: Tensor) -> Params:
    """The scales, and zero points unless symmetric, with the least ``(w - q) H (w - q)ᵀ`` of each row for its codes,
    rounded as they are stored.

    With a the codes less the middle of their range, ``q = s_g a + t_g`` in group g: two unknowns per group, one system
    per row. A scale that comes out negative cannot be stored; its row's loss then rises and the caller keeps the old.
    """
    rows, columns = weight.shape
    groups, size = grid.groups(columns), grid.fit_block(columns)
    short = groups * size - columns  # a short last group is filled up with columns of which H knows nothing
    gram = torch.nn.functional.pad(gram, (0, short, 0, short))
    unknowns = groups if grid.symmetric else 2 * groups
    middle = 2.0 ** (grid.bits - 1)
    scale, shift = torch.empty(rows, groups), torch.zeros(rows, groups)
    ones = gram.view(groups, size, groups, size).sum((1, 3))

    def by_group(product: Tensor) -> Tensor:
        return product.view(-1, groups, size).sum(2)

    step = max(1, _TILE_ELEMENTS // max(columns, unknowns**2))
    for start in range(0, rows, step):
        tile = slice(start, min(start + step, rows))
        a = torch.nn.functional.pad(codes[tile].double() - middle, (0, short))
        target = torch.nn.functional.pad(weight[tile].double(), (0, short)) @ gram
        system = torch.empty(a.shape[0], unknowns, unknowns, dtype=torch.float64)
        right = by_group(target * a)
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            product = a[:, own] @ gram[own]
            system[:, group, :groups] = by_group(product * a)
            if not grid.symmetric:
                system[:, group, groups:] = system[:, groups:, group] = by_group(product)
        if not grid.symmetric:
            system[:, groups:, groups:] = ones
            right = torch.cat([right, by_group(target)], dim=1)
        solution = _solve_positive(system, right)
        scale[tile] = solution[:, :groups].float()
        if not grid.symmetric:
            shift[tile] = solution[:, groups:].float()
    stored = grid.stored_scale(scale)
    if grid.symmetric:
        return {"scale": stored}
    zero = (middle - shift / stored).clamp_(-_LARGEST_ZERO, _LARGEST_ZERO)
    return {"scale": stored, "zero": zero.half().float()}


def _solve_positive(system: Tensor, right: Tensor) -> Tensor:
    """Solutions (n, unknowns) of positive semidefinite systems; one that is singular gets 1 % on its diagonal."""
    lower, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        again = failed > 0
        diagonal = system[again].diagonal(dim1=1, dim2=2)
        ridge = 0.01 * diagonal + 1e-12 * diagonal.amax(1, keepdim=True).clamp(min=1e-300)
        lower[again] = torch.linalg.cholesky_ex(system[again] + torch.diag_embed(ridge))[0]
    return torch.cholesky_solve(right.unsqueeze(2), lower).squeeze(2)
