"""The wheel has the kernels compiled for every instruction set of the kind of machine that it is built on; which of
them is loaded is decided where it runs. Without a compiler, or with SLIMWRIGHT_KERNELS=off, a wheel for any machine is
built without them: they are compiled at first use then, or torch does their work. The rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def compiling() -> ModuleType:
    """slimwright/kernels/compiling.py, without the package around it, which imports torch."""
    path = Path(__file__).parent / "slimwright" / "kernels" / "compiling.py"
    spec = importlib.util.spec_from_file_location("compiling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compiling"] = module
    spec.loader.exec_module(module)
    return module


def wanted() -> bool:
    off = os.environ.get("SLIMWRIGHT_KERNELS", "").lower() in ("off", "0", "no")
    return not off and compiling().compiler() is not None


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode or not wanted():
            return
        module, target = compiling(), Path(self.build_lib) / "slimwright" / "kernels" / "compiled"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda one: module.compile_into(one, target, 3600), module.all_recipes(os.uname().machine)))


class WheelForMachine(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class WithKernels(Distribution):
    def has_ext_modules(self) -> bool:
        return wanted()


setup(distclass=WithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForMachine})
