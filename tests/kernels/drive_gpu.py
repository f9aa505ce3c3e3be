"""Products of the Triton kernel against exact arithmetic: run by test_gpu.py in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch

from slimwright.errors import SlimwrightError
from slimwright.kernels import packed_gpu
from slimwright.methods import SiteStatistics, method
from slimwright.weights import parse_grid
from slimwright.weights.matrix import kernel_layout

SPECS = [
    *(f"int{bits}:g64" for bits in range(2, 9)),
    "int4:g128:sym", "int3:row:sym", "int4:g32", "int5:g20", "int4:g48:real", "int8:row", "int2:g16:real",
]  # fmt: skip


def main() -> None:
    count = 0
    for spec in SPECS:
        for rows, columns in ((33, 200), (9, 37)):
            grid: Any = parse_grid(spec)
            if grid.illegal(rows, columns):
                continue
            generator = torch.Generator().manual_seed(rows)
            weight = torch.randn(rows, columns, generator=generator) * 0.05
            weight[1] = 0
            value: Any = method("quantize/rtn", grid=spec).solve(weight, SiteStatistics.none())
            layout, dense = kernel_layout(grid, rows, columns), value.dense().double()
            assert layout is not None
            how = (value.save(), (rows, columns), layout.group, layout.bits, layout.zero)
            for dtype, batch in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 1), (torch.float32, 17)):
                x = torch.randn(batch, 1, columns, generator=generator).to(dtype)
                bias = torch.randn(rows - 2, generator=generator).to(dtype) if batch > 1 else None
                start, stop = (1, rows - 1) if bias is not None else (0, rows)
                got = packed_gpu.linear(x, *how, start, stop, bias).double()
                kept = dense[start:stop]
                exact = torch.nn.functional.linear(x.double(), kept, None if bias is None else bias.double())
                size = x.double().abs() @ kept.abs().T + (0 if bias is None else bias.double().abs())
                # the interpreter cuts bfloat16 off where a GPU rounds it
                unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
                assert bool(((got - exact).abs() <= unit * size + 1e-7).all()), (spec, rows, columns, dtype, batch)
                count += 1
            try:
                packed_gpu.linear(
                    torch.zeros(1, columns), {**value.save(), "_scale": torch.zeros(1)}, *how[1:], 0, rows
                )
            except SlimwrightError:
                continue
            raise AssertionError("scales of another size were taken")
    print(f"{count} products")


if __name__ == "__main__":
    main()
