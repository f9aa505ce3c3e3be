"""Reading a site's logical matrix from a checkpoint and solving it tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimwright import kernels
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.open import DerivedCheckpoint
from slimwright.kernels import solve
from slimwright.methods import SiteStatistics, WeightSolver, method, solver_for
from slimwright.model.structure import Site
from slimwright.plan import DEFAULT_METHOD, method_on
from slimwright.weights import Compressed, Form, Grid, LowRankForm

TILE_ELEMENTS = 1 << 19
"""Elements of a tile: 2 MB in float32, so that a solver's temporaries stay in a core's cache. What a job writes does
not depend on it: rows are independent, and a solver whose rows are not gets the whole matrix."""


def site_rows(checkpoint: Checkpoint, site: Site, rows: slice) -> Tensor:
    """Rows of a site's logical matrix (experts stacked along the rows), in the stored dtype.

    Args:
        rows: start and stop.

    Returns:
        (rows, columns), a view of the mapped file where the layout allows it.
    """
    if isinstance(checkpoint, DerivedCheckpoint) and checkpoint.is_derived(site.name):
        return checkpoint.weight_rows(site.name, rows)
    stored = checkpoint.read(site.name)
    if not site.transposed:
        return stored.reshape(-1, site.columns)[rows]
    if stored.ndim == 2:
        return stored[:, rows].t()
    out, pieces = site.weight_shape[-2], []
    for expert in range(rows.start // out, -(-rows.stop // out)):
        first, last = max(rows.start - expert * out, 0), min(rows.stop - expert * out, out)
        pieces.append(stored[expert][:, first:last].t())
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def site_tiles(site: Site, grid: Form | None, elements: int = TILE_ELEMENTS) -> Iterator[slice]:
    """Row ranges that cover a site, each of about ``elements`` weights and starting where the grid allows."""
    multiple = grid.row_multiple(site.columns) if grid is not None else 1
    step = max(1, elements // max(1, site.columns) // multiple) * multiple
    for start in range(0, site.rows, step):
        yield slice(start, min(start + step, site.rows))


def survey(checkpoint: Checkpoint, site: Site, grid: Form) -> Any:
    """What the grid must know of the whole matrix, gathered tile by tile (None for most grids, and for other forms)."""
    if not isinstance(grid, Grid) or type(grid).survey is Grid.survey:
        return None
    state = None
    for rows in site_tiles(site, grid):
        state = grid.survey(site_rows(checkpoint, site, rows).float(), state)
    return state


@dataclass
class ErrorSum:
    """Relative squared error, summed over tiles."""

    error: float = 0.0
    norm: float = 0.0

    def add(self, source: Tensor, written: Tensor) -> None:
        """Both (rows, columns) float32; ``written`` is used up as workspace."""
        if kernels.available(source, written) and source.dtype == written.dtype == torch.float32:
            error, norm = solve.squared_error(source, written)
            self.error, self.norm = self.error + error, self.norm + norm
            return
        self.error += float(written.sub_(source).square_().sum(dtype=torch.float64))
        self.norm += float(torch.linalg.vector_norm(source, dtype=torch.float64)) ** 2

    def merge(self, other: ErrorSum) -> None:
        """Add another sum to this one."""
        self.error += other.error
        self.norm += other.norm

    @property
    def relative(self) -> float:
        """||W - Q||² / ||W||², 0 for a zero weight that is met exactly."""
        return self.error / self.norm if self.norm else (0.0 if self.error == 0 else float("inf"))


def output_errors(gram: Tensor, source: Tensor, *versions: Tensor) -> list[ErrorSum]:
    """The errors of several versions of some rows (rows, columns), as errors of their outputs on the data that the Gram
    (columns, columns) was made of. One product for all, since reading the Gram is most of the work."""
    stacked = torch.cat([source, *(version - source for version in versions)])
    squares = ((stacked @ gram) * stacked).sum(1, dtype=torch.float64).view(-1, source.shape[0]).sum(1).tolist()
    return [ErrorSum(error, squares[0]) for error in squares[1:]]


def solve_rows(
    checkpoint: Checkpoint, site: Site, solver: WeightSolver, rows: slice, stats: SiteStatistics
) -> tuple[Tensor, Compressed]:
    """Solve some rows of a site: (source in float32, value). A solver that is not row-independent needs all rows.

    Raises:
        InputError: NaN or Inf in the source, named with the tensor.
    """
    source = site_rows(checkpoint, site, rows).to(torch.float32).contiguous()
    try:
        return source, solver.solve(source, stats)
    except InputError as error:
        if not torch.isfinite(source).all():
            raise InputError(
                f"The tensor '{site.name}' of {checkpoint.path} holds NaN or Inf (rows {rows.start} to "
                f"{rows.stop - 1}): repair or replace the checkpoint."
            ) from None
        raise InputError(f"'{site.name}': {error}") from None


def without_data(solver: WeightSolver) -> WeightSolver:
    """What stands for a solver that needs data where there is none: rounding on its grid, plain SVD for factors."""
    if not solver.needs:
        return solver
    return solver_for(str(method_on(solver.form.spec, DEFAULT_METHOD)), solver.form)


def plain_rounding(solver: WeightSolver) -> WeightSolver | None:
    """Plain rounding on the solver's grid, or None where the solver is that already. Of factors it is plain SVD, of a
    corrected weight rounding without the correction."""
    form = solver.form
    plain: WeightSolver = (
        solver_for("factorize/svd", form)
        if isinstance(form, LowRankForm) and form.base is None
        else method("quantize/rtn", grid=solver.grid, clip="none")
    )
    return None if plain == solver else plain
