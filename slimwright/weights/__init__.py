"""Number formats (grids) and compressed weights as values."""

from slimwright.weights.cast import Float
from slimwright.weights.float8 import FP8
from slimwright.weights.form import Component, Form
from slimwright.weights.gguf import Q4_0, Q8_0
from slimwright.weights.grid import Grid, Levels, Part, grid_kinds, parse_grid, register_grid
from slimwright.weights.integer import Int
from slimwright.weights.kquants import Q4_K, Q6_K
from slimwright.weights.low_rank import LowRankForm, parse_form
from slimwright.weights.mxfp4 import MXFP4
from slimwright.weights.nf4 import NF4
from slimwright.weights.values import (
    Compressed,
    Dense,
    LowRank,
    Quantized,
    Shared,
    Sum,
    component_parts,
    decode_component,
    decode_rows,
    disk_shapes,
    load_value,
    matrix_ranges,
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
    "Component",
    "Compressed",
    "Dense",
    "Float",
    "Form",
    "Grid",
    "Int",
    "Levels",
    "LowRank",
    "LowRankForm",
    "Part",
    "Quantized",
    "Shared",
    "Sum",
    "component_parts",
    "decode_component",
    "decode_rows",
    "disk_shapes",
    "grid_kinds",
    "load_value",
    "matrix_ranges",
    "matrix_shape",
    "parse_form",
    "parse_grid",
    "quantize",
    "register_grid",
    "unpack_rows",
]
