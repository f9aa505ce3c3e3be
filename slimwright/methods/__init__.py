"""Methods: one file each, found by walking this package.

``slimwright.methods`` is this package and can be called: ``slimwright.methods()`` gives all registered methods by name.
"""

import sys
import types

from slimwright.methods.registry import (
    GroupFold,
    Method,
    ModelFold,
    SiteStatistics,
    WeightSolver,
    knob,
    method,
    method_class,
    methods,
    parse_method,
    register,
    solver_for,
)

__all__ = [
    "GroupFold",
    "Method",
    "ModelFold",
    "SiteStatistics",
    "WeightSolver",
    "knob",
    "method",
    "method_class",
    "methods",
    "parse_method",
    "register",
    "solver_for",
]


class _Package(types.ModuleType):
    def __call__(self) -> dict[str, type[Method]]:
        return methods()


sys.modules[__name__].__class__ = _Package
