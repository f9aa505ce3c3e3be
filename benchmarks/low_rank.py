"""Low-rank forms against grids on the bundled language model: ``python -m benchmarks.low_rank``.

All linears of its blocks are solved at once, from statistics of 64 × 256 tokens of the calibration part; the nats that
this adds to a held-out token (48 × 256 of them) stand beside the bits a weight of these linears.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from benchmarks.common import Row, exit_code, publish
from slimwright.methods import SiteStatistics, WeightSolver, method, solver_for
from slimwright.methods.factorizing import damped, low_rank
from slimwright.plan import method_on
from slimwright.weights import Int, parse_form
from tests.methods.bundled import loss, original, sites, solved, statistics

FORMS = (
    "int2:g64", "int2:g32", "int3:row", "int3:g64", "int3:g32", "int4:g64",
    "int2:g64+lowrank:r16:int3:g32", "int2:g64+lowrank:r16:int4:g64", "int2:g64+lowrank:r16",
    "int3:g64+lowrank:r8:int4:g64", "int3:g64+lowrank:r16:int4:g64",
    "lowrank:r64:int8:g32", "lowrank:r64:int4:g32", "lowrank:r96:int4:g32",
)  # fmt: skip
ROUNDS = (1, 2, 3, 6)
RANKS = (4, 8, 16)
WINDOWS = 64
HELD_OUT = 48


class RemainderSolver:
    """The other order: factors of the weight first, then its remainder on a grid."""

    def __init__(self, base: WeightSolver, rank: int) -> None:
        self.base, self.rank = base, rank

    def change(self, weight: Tensor, stats: SiteStatistics) -> Tensor:
        """What stands for the weight."""
        assert stats.gram is not None
        product = low_rank(weight, self.rank, Int(8, group=32), damped(stats.gram, 0.001)).dense()
        return self.base.solve(weight - product, stats).dense() + product


@torch.no_grad()
def main() -> int:
    tensors = dict(original())
    stats, before = statistics(tensors, windows=WINDOWS), loss(tensors, windows=HELD_OUT)
    weights = sum(site.numel for site in sites())

    started, rows = time.time(), list[Row]()

    def line(name: str, bits: float, found: dict[str, Tensor]) -> None:
        rows.append({"form": name, "bits": bits, "nats": loss(found, windows=HELD_OUT) - before})

    def bits(spec: str) -> float:
        return 8 * sum(parse_form(spec).nbytes_of(site.weight_shape) for site in sites()) / weights

    for spec in FORMS:
        solver = solver_for(str(method_on(spec, "quantize/gptq")), parse_form(spec))
        line(spec, bits(spec), solved(tensors, solver, stats))
    spec = "int2:g64+lowrank:r16:int4:g64"
    for rounds in ROUNDS:
        solver = solver_for(f"factorize/corrected,rounds={rounds}", parse_form(spec))
        line(f"{spec}, rounds={rounds}", bits(spec), solved(tensors, solver, stats))
    for rank in RANKS:
        spec = f"int2:g64+lowrank:r{rank}:int8:g32"
        after = solver_for("factorize/corrected,rounds=1", parse_form(spec))
        line(f"{spec}, rounds=1", bits(spec), solved(tensors, after, stats))
        first = RemainderSolver(method("quantize/gptq", grid="int2:g64"), rank)
        found = {site.name: first.change(tensors[site.name].float(), stats[site.gram_group]) for site in sites()}
        line(f"{spec}, factors first", bits(spec), tensors | found)
        rows[-1]["ok"] = rows[-1]["nats"] > rows[-2]["nats"]
    columns = {"form": "form", "bits": "bits per weight", "nats": "nats added", "ok": "ok"}
    publish("low_rank", rows, columns, started)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
