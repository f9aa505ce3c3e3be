"""Products with packed weights, one by one: ``python -m benchmarks.products [--grids int4:g128,...] [--threads 1]``.

For matrices of Qwen2-0.5B's MLP (4864 x 896 and back) and batches from 1 to 512: every arithmetic of the packed kernels,
tiles with the library's product, and the dense product in the same dtype, taking turns; the best of several runs counts.
With one thread it is processor time that counts, so that other work on the machine does not. ``bytes`` is the rate at
which packed bytes are read, beside the rate of reading memory in the same run. These are the figures behind the choice in
``slimwright/runtime/compute.py``.
"""

from __future__ import annotations

import argparse
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


def main() -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="int4:g128,int8:g128,int3:g64,q4_0,q8_0,nf4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    started, rows, buffer = time.time(), [], torch.randn(64 << 20)
    times = []
    for _ in range(options.rounds):
        before = clock()
        buffer.sum()
        times.append(clock() - before)
    memory = buffer.nbytes / min(times)
    for spec in options.grids.split(","):
        for shape in SHAPES:
            grid = parse_grid(spec)
            if grid.illegal(*shape):
                continue
            weight = torch.randn(shape) * 0.05
            params = grid.fit(weight)
            parts = grid.pack(grid.encode(weight, params), params)
            matrix = kernel_matrix(grid, parts, shape)
            assert matrix is not None
            size = sum(part.nbytes for part in parts.values())
            for dtype in (torch.bfloat16, torch.float32):
                dense, scratch = matrix.decode(dtype=dtype), torch.empty(shape, dtype=dtype)
                digits = [3 if dtype == torch.float32 else 2, 1] if matrix.layout.integer else []
                digits += [packed.BFLOATS] if dtype == torch.bfloat16 and matrix.library.bfloats else [0]
                for batch in BATCHES:
                    x = torch.randn(batch, shape[1]).to(dtype)
                    works: dict[str, Callable[[], Tensor]] = {
                        NAMES[d]: lambda d=d, x=x: matrix.linear(x, digits=d)  # type: ignore[misc]
                        for d in digits
                        if batch <= 64 or d in (0, packed.BFLOATS)
                    }
                    works["tile"] = lambda x=x: F.linear(x, matrix.decode(out=scratch))  # type: ignore[misc]
                    works["dense"] = lambda x=x: F.linear(x, dense)  # type: ignore[misc]
                    works["chosen"] = lambda x=x: compute.multiply(matrix, x, None, 0, shape[0])  # type: ignore[misc]
                    taken: dict[str, list[float]] = {name: [] for name in works}
                    for _ in range(options.rounds):
                        for name, work in works.items():
                            before = clock()
                            work()
                            taken[name].append(clock() - before)
                    best = {name: min(seconds) for name, seconds in taken.items()}
                    row: Row = {
                        "grid": spec,
                        "shape": f"{shape[0]}x{shape[1]}",
                        "dtype": str(dtype)[6:],
                        "batch": batch,
                    }
                    row |= {f"{name}_ms": seconds * 1e3 for name, seconds in best.items()}
                    row["bytes"] = size / best["chosen"] / 1e9
                    row["of_dense"] = best["dense"] / best["chosen"]
                    rows.append(row)
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
