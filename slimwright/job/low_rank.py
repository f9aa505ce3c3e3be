"""Low-rank options of the search: which forms may compete, what they are expected to lose, and what solving them takes.

Factors alone are scored exactly but for the rounding of the factors: one eigenproblem of the weight under its Gram says
what every rank loses. What a correction gains depends on what the solver leaves, which only solving tells. But error
feedback leaves rounding noise of known size, input by input (the diagonal of the Gram's factor), and how much of such
noise the best factors of a rank hold is the spectrum of a random matrix with that profile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.methods.factorizing import spectrum
from slimwright.methods.feedback import FeedbackSolver
from slimwright.model.structure import Site, Structure
from slimwright.plan import Assignment, Plan, cannot_hold, method_on
from slimwright.search.options import Option
from slimwright.weights import Int, LowRankForm

FACTORS = Int(4, group=64)
"""Grid of the factors that the search may choose: at equal bytes it loses least (docs/solvers.md)."""

BASES = (Int(2, group=64), Int(3, group=64))
"""Grids whose errors it may correct. Above, a bit more a weight costs little more and gains far more."""

SHARES = (1 / 32, 1 / 16, 1 / 8)
"""Ranks of corrections, as shares of the shorter side."""

BITS = (2.25, 2.75, 3.5)
"""Bits a weight of factors alone."""

LONGEST_SIDE = 1024
"""Shorter side of a matrix up to which factors alone are scored: the eigenproblem grows with its cube."""

NOISE_SIDE = 384
"""Sides of the random matrix that stands for rounding noise, at most: its spectrum depends on their ratio."""

ROUNDS_GAIN = 1.5
"""How much more, in logarithms, the rounds of ``factorize/corrected`` gain than its first (docs/solvers.md)."""

FACTOR_ERROR = 0.002
"""Relative squared error that rounding both factors to :data:`FACTORS` leaves of what they hold."""

MULTIPLE = 8
"""Ranks are multiples of it."""


def low_rank_choices(sites: Sequence[Site], solver: str, memory: int) -> list[Assignment]:
    """Low-rank options of a choice group that may compete: factors alone of about :data:`BITS`, and corrections of
    coarse grids that take fewer bytes than the next finer grid.

    Args:
        solver: spec of what puts weights on grids.
        memory: bytes that solving one matrix may take.
    """
    if any(site.kind not in ("linear", "conv1d") or solving_memory(site) > memory for site in sites):
        return []
    shapes = [site.weight_shape for site in sites]
    side = min(min(shape[-2:]) for shape in shapes)
    forms = []
    for base in BASES:
        finer = sum(Int(base.bits + 1, group=base.group).nbytes_of(shape) for shape in shapes)
        for share in SHARES:
            rank = round(side * share / MULTIPLE) * MULTIPLE
            form = LowRankForm(rank, FACTORS, base) if rank else None
            if form is not None and sum(form.nbytes_of(shape) for shape in shapes) < finer:
                forms.append(form)
    if max(min(shape[-2:]) for shape in shapes) <= LONGEST_SIDE:
        per_rank = sum(LowRankForm(64, FACTORS).nbytes_of(shape) for shape in shapes) / 64
        for bits in BITS:
            rank = int(bits / 8 * sum(site.numel for site in sites) / per_rank / MULTIPLE) * MULTIPLE
            if rank:
                forms.append(LowRankForm(rank, FACTORS))
    legal = dict.fromkeys(form for form in forms if all(cannot_hold(form, site) is None for site in sites))
    return [Assignment(grid=form.spec, method=method_on(form.spec, solver)) for form in legal]


def form_of(choice: Assignment) -> LowRankForm | None:
    """The choice's low-rank form; None where it has none."""
    form = choice.parsed_grid() if choice.solved else None
    return form if isinstance(form, LowRankForm) else None


def low_rank_losses(
    choices: Sequence[Assignment],
    losses: Sequence[float],
    solver: WeightSolver,
    shape: Sequence[int],
    read: Callable[[], Tensor],
    stats: SiteStatistics,
    outputs: Tensor,
    directions: Tensor | None = None,
) -> dict[int, float]:
    """Losses of the low-rank ones among the choices for a site, by their place; those not scored are left out.

    Args:
        losses: of the choices that are grids, as they are scored.
        solver: what puts the site on a grid.
        shape: (out, in) of its weight.
        read: gives the weight, float32; called only where a spectrum is needed.
        stats: of its inputs; without data the squares of all inputs count alike.
        outputs: (out,) what an output's squared error costs, in the unit of ``losses``.
        directions: (n, in) what errors of the weight are multiplied with to tell their cost; None: the inputs.
    """
    forms = {place: form for place, choice in enumerate(choices) if (form := form_of(choice)) is not None}
    found = {}
    alone = {place: form.rank for place, form in forms.items() if form.base is None}
    if alone:
        weight, outputs = read(), outputs.float()
        factors = spectrum(weight, stats.gram if directions is None else stats.gram_of_rest(), torch.float32)
        energy = outputs @ factors.outputs
        total, held = float(energy.sum()), energy.cumsum(0)
        for place, rank in alone.items():
            kept = float(held[min(rank, len(held)) - 1])
            if stats.gram is None or directions is None:
                left = max(0.0, total - kept)
            else:
                moved = weight @ directions.t() - factors.left[:, :rank] @ (factors.right[:rank] @ directions.t())
                cost = float(outputs @ moved.square().sum(1)) / float(directions.square().sum())
                left = cost * float(stats.gram.diagonal().sum())
            found[place] = left + FACTOR_ERROR * kept
    by_grid = {choice.grid: loss for choice, loss in zip(choices, losses, strict=True)}
    corrected = {place: form for place, form in forms.items() if form.base is not None and form.base.spec in by_grid}
    if corrected:
        held = noise_held(shape, noise_profile(solver, stats, shape[1]))
        for place, form in corrected.items():
            at = round(form.rank / min(shape) * (len(held) - 1))
            left = (1 - float(held[min(at, len(held) - 1)])) ** ROUNDS_GAIN
            found[place] = by_grid[str(form.base)] * (left + FACTOR_ERROR * (1 - left))
    return found


def noise_profile(solver: WeightSolver, stats: SiteStatistics, columns: int) -> Tensor:
    """(columns,) the relative size of what the solver leaves of each input's error, as the outputs feel it."""
    if isinstance(solver, FeedbackSolver) and stats.gram is not None:
        return stats.factor(solver.damp, solver.column_order(stats), rest=True)[0].diagonal()
    return torch.ones(columns)


def noise_held(shape: Sequence[int], profile: Tensor) -> Tensor:
    """What share of the energy of noise with this profile over its columns the best factors hold, by rank: float32 of
    evenly spaced ranks from 0 to the shorter side.

    Args:
        shape: (rows, columns) of the noise.
        profile: (columns,) its size in each column.
    """
    scale = min(1.0, NOISE_SIDE / max(shape))
    rows, columns = (max(2, round(side * scale)) for side in shape)
    places = torch.linspace(0, shape[1] - 1, columns).round().long()
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * profile.sort().values[places]
    energy = torch.linalg.eigvalsh(noise @ noise.t() if rows <= columns else noise.t() @ noise).flip(0).clamp(min=0)
    return torch.cat([torch.zeros(1), energy.cumsum(0) / energy.sum().clamp_min(1e-30)])


def solving_memory(site: Site) -> int:
    """Bytes that solving one matrix of a site takes at its peak: in float32 the weight, what it became and their
    differences, in float64 the weight, its product with the Gram, the eigenvectors and the Gram."""
    out, columns = site.weight_shape[-2:]
    side = min(out, columns)
    return 4 * 5 * out * columns + 8 * (2 * out * columns + 3 * side * side + columns * columns)


@dataclass(frozen=True)
class Work:
    """What low-rank forms take.

    Attributes:
        products: multiply-adds.
        memory: bytes of one solve at its peak; each worker thread may be at one.
    """

    products: float = 0.0
    memory: int = 0


EIGEN_PRODUCTS = 25.0
"""An eigenproblem of side k in float64 takes as long as so many k³ multiply-adds in float32 (measured)."""


def solving_work(structure: Structure, plan: Plan) -> Work:
    """What solving a plan's low-rank sites takes: products in float64, which count twice, and eigenproblems."""
    products, memory = 0.0, 0
    for name, assignment in plan.by_site(structure).items():
        form = form_of(assignment)
        if form is None:
            continue
        site, rounds = structure.sites[name], getattr(assignment.solver(), "rounds", 1)
        out, columns = site.weight_shape[-2:]
        side = min(out, columns)
        matrices = site.rows // out
        once = EIGEN_PRODUCTS * side**3 + 2 * (2 * out * columns * side + out * columns * columns)
        products += matrices * rounds * once
        memory = max(memory, solving_memory(site))
    return Work(products, memory)


def scoring_work(structure: Structure, options: Mapping[str, Sequence[Option]]) -> Work:
    """What scoring the low-rank ones of the options takes."""
    products, memory = 0.0, 0
    groups = structure.choice_groups()
    for group, own in options.items():
        forms = [form for option in own if (form := form_of(option.choice)) is not None] if group in groups else []
        for site in groups[group] if forms and len(own) > 1 else ():
            out, columns = site.weight_shape
            side = min(out, columns)
            products += EIGEN_PRODUCTS / 2 * min(NOISE_SIDE, side) ** 3
            if any(form.base is None for form in forms):
                products += EIGEN_PRODUCTS / 2 * side**3 + 2 * out * columns * side + out * columns * columns
                memory = max(memory, 4 * (4 * out * columns + 3 * side * side + columns * columns))
    return Work(products, memory)
