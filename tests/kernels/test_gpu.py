"""The Triton kernel, run by Triton's interpreter on the CPU; and what is said where it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimwright.runtime import compute
from slimwright.weights import parse_grid


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (torch's CPU wheels have none)"
)
def test_products_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    driver = Path(__file__).with_name("drive_gpu.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(driver)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "products" in done.stdout, done.stderr[-3000:]


def test_what_a_gpu_would_run_is_said_by_grid() -> None:
    why = compute.gpu_why_not(parse_grid("int4:g128"), (256, 256), torch.bfloat16)
    if importlib.util.find_spec("triton") is None:
        assert why == "triton is not installed"
    else:
        assert why == ""
        assert "nf4" in compute.gpu_why_not(parse_grid("nf4"), (256, 256), torch.bfloat16)
        assert "float64" in compute.gpu_why_not(parse_grid("int4:g128"), (256, 256), torch.float64)
