"""Products with packed weights, one by one: ``python -m benchmarks.products [--grids int4:g128,...] [--threads 1]``.

For matrices of Qwen2-0.5B's MLP (4864 x 896 and back) and batches from 1 to 512: every arithmetic of the packed
kernels, tiles with the library's product, and the dense product in the same dtype, taking turns; the best of several
runs counts. With one thread it is processor time that counts, so that other work on the machine does not. ``bytes`` is
the rate at which packed bytes are read, beside the rate of reading memory in the same run; only ``chosen``, which runs
after the dense product, finds its weight out of the caches. These are the figures behind the choice in
``slimwright/runtime/compute.py``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, exit_code, publish
from slimwright.kernels import packed
from slimwright.runtime import compute
from slimwright.weights import parse_grid
from slimwright.weights.matrix import kernel_matrix

SHAPES = ((4864, 896), (896, 4864))
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 512)
NAMES = {0: "floats", 1: "integers, 8-bit inputs", 2: "integers", 3: "integers", packed.BFLOATS: "bfloats"}


def compare(spec: str, shape: tuple[int, int], rounds: int, clock: Callable[[], float]) -> list[Row]:
    """A row for each dtype and batch."""
    grid, rows = parse_grid(spec), []
    weight = torch.randn(shape) * 0.05
    params = grid.fit(weight)
    parts = grid.pack(grid.encode(weight, params), params)
    matrix = kernel_matrix(grid, parts, shape)
    assert matrix is not None
    for dtype, batch in itertools.product((torch.bfloat16, torch.float32), BATCHES):
        x, dense = torch.randn(batch, shape[1]).to(dtype), matrix.decode(dtype=dtype)
        digits = [3 if dtype == torch.float32 else 2, 1] if matrix.layout.integer else []
        digits += [packed.BFLOATS] if dtype == torch.bfloat16 and matrix.library.bfloats else [0]
        works: dict[str, Callable[[], Tensor]] = {
            NAMES[d]: functools.partial(matrix.linear, x, digits=d)
            for d in digits
            if batch <= 64 or d in (0, packed.BFLOATS)
        }
        scratch = torch.empty(shape, dtype=dtype)
        works["tile"] = functools.partial(_tile, matrix, x, scratch)
        works["dense"] = functools.partial(F.linear, x, dense)
        works["chosen"] = functools.partial(compute.multiply, matrix, x, None, 0, shape[0])
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                before = clock()
                work()
                taken[name].append(clock() - before)
        best = {name: min(seconds) for name, seconds in taken.items()}
        row: Row = {"grid": spec, "shape": f"{shape[0]}x{shape[1]}", "dtype": str(dtype)[6:], "batch": batch}
        row |= {f"{name}_ms": seconds * 1e3 for name, seconds in best.items()}
        row["bytes"] = sum(part.nbytes for part in parts.values()) / best["chosen"] / 1e9
        row["of_dense"] = best["dense"] / best["chosen"]
        rows.append(row)
    return rows


def _tile(matrix: packed.Matrix, x: Tensor, scratch: Tensor) -> Tensor:
    return F.linear(x, matrix.decode(out=scratch))


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="int4:g128,int8:g128,int3:g64,q4_0,q8_0,nf4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    started, buffer = time.time(), torch.randn(64 << 20)
    rows: list[Row] = []
    times = []
    for _ in range(options.rounds):
        before = clock()
        buffer.sum()
        times.append(clock() - before)
    memory = buffer.nbytes / min(times)
    for spec in options.grids.split(","):
        for shape in SHAPES:
            if parse_grid(spec).illegal(*shape) is None:
                rows += compare(spec, shape, options.rounds, clock)
    columns = {"grid": "grid", "shape": "shape", "dtype": "dtype", "batch": "batch"}
    columns |= {f"{name}_ms": f"{name}, ms" for name in (*dict.fromkeys(NAMES.values()), "tile", "dense", "chosen")}
    columns |= {"bytes": "GB/s", "of_dense": "x dense"}
    library = packed.library()
    return publish(
        "products", rows, columns, started, threads=options.threads, memory_gb_per_second=memory / 1e9,
        isa=library.name if library else None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main()))
