"""Every grid on Gaussian weights: bits per weight, signal to noise, speed of rounding. Prints a Markdown table.

    python benchmarks/grids.py [--rows 1024] [--columns 4096]

Signal to noise is 10 log10(sum w² / sum (Q(w) - w)²) in dB. Speed is millions of weights per second of
processor time of a solver on a bfloat16 weight, one thread, best of several runs.
"""

import argparse
import math
import time

import torch

from slimwright.methods import SiteStatistics, WeightSolver, method
from slimwright.weights import grid_kinds

INTS = [f"int{bits}:{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("g32", "g64", "g128", "row")]
INTS += ["int4:g32:sym", "int4:g128:sym", "int8:row:sym", "int4:g64:real"]


def decibels(values: torch.Tensor, w: torch.Tensor) -> float:
    return 10 * math.log10(float(w.square().sum(dtype=torch.float64) / (values - w).square().sum(dtype=torch.float64)))


def speed(solver: WeightSolver, w: torch.Tensor, runs: int) -> float:
    """Millions of weights a second."""
    seconds = []
    for _ in range(runs + 1):  # the first warms up
        start = time.process_time()
        solver.solve(w, SiteStatistics.none())
        seconds.append(time.process_time() - start)
    return w.numel() / min(seconds[1:]) / 1e6


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=1024)
    arguments.add_argument("--columns", type=int, default=4096)
    arguments.add_argument("--runs", type=int, default=5)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    w = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0))
    tile = w[: max(1, (1 << 21) // options.columns)].bfloat16()
    others = [spec for kind in grid_kinds().values() if kind.key != "int" for spec in kind.examples or (kind.key,)]
    print(f"{options.rows} x {options.columns} Gaussian weights, one thread, torch {torch.__version__}\n")
    print(
        "| grid | bits per weight | dB, min-max or own rule | dB, MSE clip | M weights / s | MSE clip, M weights / s |"
    )
    print("|---|---|---|---|---|---|")
    for spec in [*INTS, *others]:
        plain = method("quantize/rtn", grid=spec, clip="none")
        cells = [f"{plain.grid.bits_per_weight(options.rows, options.columns):.3f}"]
        solvers = [plain] + ([method("quantize/rtn", grid=spec, clip="mse")] if spec.startswith("int") else [])
        loss = [f"{decibels(solver.solve(w, SiteStatistics.none()).dense(), w):.2f}" for solver in solvers]
        rate = [f"{speed(solver, tile, options.runs):.0f}" for solver in solvers]
        cells += [loss[0], loss[-1] if len(loss) > 1 else "", rate[0], rate[-1] if len(rate) > 1 else ""]
        print(f"| `{spec}` | {' | '.join(cells)} |")
    print("\nCoarse against exhaustive MSE clip (relative squared error, and how much the coarse one loses):\n")
    print("| grid | min-max | coarse | exhaustive | loss |")
    print("|---|---|---|---|---|")
    w = w[:256]
    for spec in (
        "int2:g32",
        "int2:g128",
        "int3:g128",
        "int4:g32",
        "int4:g128",
        "int4:g128:sym",
        "int4:row",
        "int8:row",
    ):
        found = []
        for knobs in ({"clip": "none"}, {"search": "coarse"}, {"search": "exhaustive"}):
            values = method("quantize/rtn", grid=spec, **knobs).solve(w, SiteStatistics.none()).dense()
            found.append(10 ** (-decibels(values, w) / 10))
        print(
            f"| `{spec}` | {found[0]:.4g} | {found[1]:.4g} | {found[2]:.4g} | {100 * (found[1] / found[2] - 1):.2f} % |"
        )


if __name__ == "__main__":
    main()
