"""Methods: one file each, found by walking this package."""

from slimwright.methods.registry import (
    Method,
    SiteStatistics,
    WeightSolver,
    knob,
    method,
    method_class,
    methods,
    parse_method,
    register,
)

__all__ = [
    "Method",
    "SiteStatistics",
    "WeightSolver",
    "knob",
    "method",
    "method_class",
    "methods",
    "parse_method",
    "register",
]
