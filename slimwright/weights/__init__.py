"""Number formats (grids) and compressed weights as values."""

from slimwright.weights.grid import Grid, Part, grid_kinds, parse_grid, register_grid
from slimwright.weights.integer import Int
from slimwright.weights.values import (
    Compressed,
    Dense,
    Quantized,
    Shared,
    disk_shapes,
    load_value,
    matrix_shape,
    unpack_rows,
)

__all__ = [
    "Compressed",
    "Dense",
    "Grid",
    "Int",
    "Part",
    "Quantized",
    "Shared",
    "disk_shapes",
    "grid_kinds",
    "load_value",
    "matrix_shape",
    "parse_grid",
    "register_grid",
    "unpack_rows",
]
