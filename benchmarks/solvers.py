"""Every solver and fold on the cards' synthetic setups: relative proxy loss tr(Δ H Δᵀ) / tr(W H Wᵀ), mean of 3 draws.

    python -m benchmarks.solvers [--markdown]

S is a 256 x 256 weight under correlated inputs, S-out the same with six inputs twenty times as large. ``--markdown``
prints the tables of docs/solvers.md. On the bundled language model: what is added to its loss on held-out text.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Row, exit_code, publish
from slimwright.methods import GroupFold, SiteStatistics, WeightSolver, method
from slimwright.methods.folding import candidate_losses, chosen, folded_statistics
from slimwright.methods.orthogonal import orthogonal
from slimwright.methods.rotation import rotate
from tests.methods import bundled
from tests.methods.setups import Setup, setup

BITS = (2, 3, 4)
SEEDS = (0, 1, 2)
Solve = Callable[[Setup, str], Tensor]


def alone(name: str, real: bool = False, **knobs: object) -> Solve:
    """A solver by itself; ``real``: on the grid with a real zero point."""

    def solve(site: Setup, spec: str) -> Tensor:
        return method(name, grid=spec + (":real" if real else ""), **knobs).solve(site.weight, site.stats).dense()

    return solve


def folded(fold: str, name: str, **knobs: object) -> Solve:
    """A fold in front of a solver; SmoothQuant+ with the best of its strengths."""

    def solve(site: Setup, spec: str) -> Tensor:
        solver: WeightSolver = method(name, grid=spec, **knobs)
        made: GroupFold = method(fold)
        made = chosen(made, [candidate_losses(made, [site.weight], site.stats, solver)])
        scale = made.scales([site.weight], site.stats, solver)
        return solver.solve(site.weight * scale, folded_statistics(site.stats, scale)).dense() / scale

    return solve


def turned(name: str, **knobs: object) -> Solve:
    """A solver on the rotated weight and inputs."""

    def solve(site: Setup, spec: str) -> Tensor:
        turn = orthogonal(256).float()
        stats = SiteStatistics.from_inputs(site.inputs @ turn)
        return method(name, grid=spec, **knobs).solve(site.weight @ turn, stats).dense() @ turn.T

    return solve


SOLVERS: dict[str, Solve] = {
    "rtn, min-max": alone("quantize/rtn", clip="none"),
    "rtn": alone("quantize/rtn"),
    "hqq, real zero": alone("quantize/hqq", real=True),
    "imatrix": alone("quantize/imatrix"),
    "awq (clip only)": alone("quantize/awq"),
    "fold/awq + rtn, min-max": folded("fold/awq", "quantize/rtn", clip="none"),
    "fold/awq + awq": folded("fold/awq", "quantize/awq"),
    "fold/smoothquant_plus + rtn, min-max": folded("fold/smoothquant_plus", "quantize/rtn", clip="none"),
    "adaquant": alone("quantize/adaquant"),
    "gptq of the paper": alone("quantize/gptq", clip="none", act_order=False),
    "gptq": alone("quantize/gptq"),
    "fold/awq + gptq": folded("fold/awq", "quantize/gptq"),
    "ldlq": alone("quantize/ldlq"),
    "rotation + rtn, min-max": turned("quantize/rtn", clip="none"),
    "rotation + gptq": turned("quantize/gptq"),
    "rotation + rsq, equal weights": turned("quantize/rsq"),
    "decoupleq, real zero": alone("quantize/decoupleq", real=True),
}
BLOCKS: dict[str, Solve] = {
    "without data": lambda site, spec: (
        method("quantize/rtn", grid=spec).solve(site.weight, SiteStatistics.none()).dense()
    ),
    "imatrix": alone("quantize/imatrix"),
    "gptq": alone("quantize/gptq"),
}


def losses(solvers: dict[str, Solve], specs: list[str]) -> list[Row]:
    """One row per solver, one column per setup and grid."""
    rows: list[Row] = []
    for name, solve in solvers.items():
        row: Row = {"solver": name}
        for outliers in (False, True):
            for spec in specs:
                sites = [setup(outliers, seed) for seed in SEEDS]
                values = [float(site.loss(solve(site, spec))) for site in sites]
                row[f"{'S-out' if outliers else 'S'} {spec}"] = sum(values) / len(values)
        rows.append(row)
    return rows


def on_the_bundled_model() -> list[Row]:
    """Nats per held-out token that solvers add to the bundled model's, all linears of its blocks solved at once."""
    before = bundled.loss(bundled.original(), windows=48)
    stats = bundled.statistics(bundled.original(), windows=64)
    rows: list[Row] = [{"what": "original, nats", "nats": before}]
    for name in ("gptq", "decoupleq"):
        for how, knobs in (("min-max", {"clip": "none", "act_order": False}), ("weighted", {})):
            solver = method(f"quantize/{name}", grid="int2:g64:real", **knobs)
            values = bundled.solved(bundled.original(), solver, stats)
            rows.append({"what": f"{name}, {how}, int2:g64:real", "nats": bundled.loss(values, windows=48) - before})
    for r_min, convention in ((1.0, "code"), (0.1, "code"), (0.005, "code"), (0.1, "paper"), (0.005, "paper")):
        solver = method("quantize/rsq", r_min=r_min, convention=convention)
        added = []
        for seed in SEEDS:
            turned = rotate(bundled.original(), bundled.structure(), seed=seed)
            turned = {name: tensor.float() for name, tensor in turned.items()}
            own = bundled.statistics(turned, seed, solver.weighting, windows=64)
            added.append(bundled.loss(bundled.solved(turned, solver, own), windows=48) - before)
        what = f"rotation + rsq, r_min {r_min}, {convention}, int3:row:sym"
        rows.append({"what": what, "nats": sum(added) / len(added), "least": min(added), "most": max(added)})
    return rows


def check(rows: list[Row]) -> None:
    """What the cards promise, as ``ok`` of the solvers' rows."""
    by = {row["solver"]: row for row in rows}

    def at_most(name: str, factor: float, other: str, columns: list[str]) -> None:
        held = all(by[name][column] <= factor * by[other][column] for column in columns)
        by[name]["ok"] = by[name].get("ok", True) and held

    every = [key for key in rows[0] if key.startswith("S")]
    at_most("gptq of the paper", 0.6, "rtn, min-max", [key for key in every if key.endswith(":row")])
    at_most("gptq", 1.02, "gptq of the paper", every)
    at_most("fold/awq + rtn, min-max", 0.75**2, "rtn, min-max", ["S-out int4:g64"])
    at_most("fold/awq + rtn, min-max", 1.0, "rtn, min-max", every)
    at_most("fold/smoothquant_plus + rtn, min-max", 0.75**2, "rtn, min-max", ["S-out int4:g64"])
    at_most("decoupleq, real zero", 0.95, "gptq", [key for key in every if "int2" in key])
    at_most("adaquant", 0.5, "rtn, min-max", every)


def markdown(rows: list[Row], specs: list[str]) -> str:
    """A table per setup."""
    lines = []
    for setting in ("S", "S-out"):
        lines += [f"{setting}:", "", f"| solver | {' | '.join(f'`{spec}`' for spec in specs)} |"]
        lines.append("|---|" + "---|" * len(specs))
        lines += [
            f"| {row['solver']} | " + " | ".join(f"{row[f'{setting} {spec}']:.5f}" for spec in specs) + " |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    started = time.time()
    torch.set_num_threads(1)
    specs = [f"int{bits}:{group}" for group in ("row", "g64") for bits in BITS]
    rows = losses(SOLVERS, specs)
    check(rows)
    blocks = losses(BLOCKS, ["q4_0", "q4_k", "q6_k"])
    if "--markdown" in sys.argv[1:]:
        print(markdown(rows, specs))
        print(markdown(blocks, ["q4_0", "q4_k", "q6_k"]))
    model = on_the_bundled_model()
    for row in model:
        print(row)
    columns = {"solver": "solver", **{key: key for key in rows[0] if key.startswith("S")}, "ok": "as the card says"}
    return exit_code(publish("solvers", rows, columns, started, blocks=blocks, model=model))


if __name__ == "__main__":
    sys.exit(main())
