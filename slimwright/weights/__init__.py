"""Number formats (grids) and compressed weights as values."""

from slimwright.weights.cast import Float
from slimwright.weights.float8 import FP8
from slimwright.weights.gguf import Q4_0, Q8_0
from slimwright.weights.grid import Grid, Levels, Part, grid_kinds, parse_grid, register_grid
from slimwright.weights.integer import Int
from slimwright.weights.kquants import Q4_K, Q6_K
from slimwright.weights.mxfp4 import MXFP4
from slimwright.weights.nf4 import NF4
from slimwright.weights.values import (
    Compressed,
    Dense,
    Quantized,
    Shared,
    disk_shapes,
    load_value,
    matrix_shape,
    quantize,
    unpack_rows,
)

__all__ = [
    "FP8",
    "MXFP4",
    "NF4",
    "Q4_0",
    "Q4_K",
    "Q6_K",
    "Q8_0",
    "Compressed",
    "Dense",
    "Float",
    "Grid",
    "Int",
    "Levels",
    "Part",
    "Quantized",
    "Shared",
    "disk_shapes",
    "grid_kinds",
    "load_value",
    "matrix_shape",
    "parse_grid",
    "quantize",
    "register_grid",
    "unpack_rows",
]
