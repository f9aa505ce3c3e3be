"""Slimwright: fit a pretrained model to a budget.

``import slimwright`` registers the packed format with transformers, so that plain ``from_pretrained`` loads results.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from slimwright.runtime.registration import install as _install

_install()

if TYPE_CHECKING:
    from slimwright import methods
    from slimwright.job.export import export
    from slimwright.job.fit import fit
    from slimwright.job.inspect import inspect
    from slimwright.job.measure import measure
    from slimwright.job.merge import merge
    from slimwright.methods import SiteStatistics, method
    from slimwright.recipe import run
    from slimwright.runtime.loading import load
    from slimwright.serving.server import serve
    from slimwright.weights import Int

_LAZY = {
    "fit": "slimwright.job.fit",
    "export": "slimwright.job.export",
    "inspect": "slimwright.job.inspect",
    "measure": "slimwright.job.measure",
    "merge": "slimwright.job.merge",
    "run": "slimwright.recipe",
    "load": "slimwright.runtime.loading",
    "serve": "slimwright.serving.server",
    "method": "slimwright.methods",
    "SiteStatistics": "slimwright.methods",
    "Int": "slimwright.weights",
    "NF4": "slimwright.weights",
    "FP8": "slimwright.weights",
    "MXFP4": "slimwright.weights",
    "parse_grid": "slimwright.weights",
}


def __getattr__(name: str) -> Any:
    """The verbs are imported when they are first used, so that ``import slimwright`` stays cheap."""
    if name == "methods":
        return importlib.import_module("slimwright.methods")
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'slimwright' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, "methods"])


__all__ = [
    "Int",
    "SiteStatistics",
    "__version__",
    "export",
    "fit",
    "inspect",
    "load",
    "measure",
    "merge",
    "method",
    "methods",
    "run",
    "serve",
]
