"""Makes ``import slimwright`` enough for plain ``from_pretrained``, without importing transformers itself.

The quantizer is registered when transformers' table of quantizers is there: at once if it is, else in the moment it is
imported. Importing that table costs about a second beyond torch, which ``slimwright --help`` need not pay.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


class _RegisteringLoader(Loader):
    """Executes the table's module as its own loader does, then registers."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        importlib.import_module("slimwright.runtime.quantizer")


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Register the quantizer now or as soon as transformers' quantizers are imported. Twice does no harm."""
    if _TABLE in sys.modules:
        importlib.import_module("slimwright.runtime.quantizer")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
