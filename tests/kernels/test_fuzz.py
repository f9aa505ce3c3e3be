"""The packed kernels under AddressSanitizer: random matrices in buffers of exactly their size, damaged descriptions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from slimwright.kernels import packed
from slimwright.kernels.compiling import INSTRUCTION_SETS, PACKED_SOURCES
from slimwright.kernels.packed import instruction_sets

NAMES = (*(name for name in PACKED_SOURCES if name.endswith(".cpp")), "attend.cpp")
SOURCES = [Path(packed.__file__).with_name(name) for name in NAMES]
DRIVERS = {"fuzz_packed": "matrices", "fuzz_step": "decoders"}
"""What each drives in its rounds."""
FLAGS = ("-O1", "-g", "-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno")


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_no_byte_outside_the_buffers_is_touched(name: str, driver: str, tmp_path: Path) -> None:
    program, flags = tmp_path / "fuzz", INSTRUCTION_SETS[name][0]
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    files = map(str, [Path(__file__).with_name(f"{driver}.cpp"), *SOURCES])
    subprocess.run(
        ["g++", *FLAGS, *sanitize, f"-DISA={name}", *flags, *files, "-o", str(program)], check=True, capture_output=True
    )
    done = subprocess.run([str(program), "2000", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{name}: 2000 {DRIVERS[driver]}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_an_emulator(driver: str, tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    files = map(str, [Path(__file__).with_name(f"{driver}.cpp"), *SOURCES])
    command = ["aarch64-linux-gnu-g++", "-static", "-O2", *FLAGS[2:], "-DISA=neon", *files]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True)
    done = subprocess.run(["qemu-aarch64", str(program), "400", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"neon: 400 {DRIVERS[driver]}" in done.stdout
