"""The packed kernels under AddressSanitizer: random matrices in buffers of exactly their size, damaged descriptions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from slimwright.kernels import packed
from slimwright.kernels.compiling import INSTRUCTION_SETS, PACKED_SOURCES
from slimwright.kernels.packed import instruction_sets

SOURCES = [Path(packed.__file__).with_name(name) for name in PACKED_SOURCES if name.endswith(".cpp")]
DRIVER = Path(__file__).with_name("fuzz_packed.cpp")
FLAGS = ("-O1", "-g", "-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno")


@pytest.mark.slow
@pytest.mark.parametrize("name", instruction_sets())
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_no_byte_outside_the_buffers_is_touched(name: str, tmp_path: Path) -> None:
    program, flags = tmp_path / "fuzz", INSTRUCTION_SETS[name][0]
    sanitize = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    command = ["g++", *FLAGS, *sanitize, f"-DISA={name}", *flags, *map(str, [DRIVER, *SOURCES]), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([str(program), "2000", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{name}: 2000 matrices" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_an_emulator(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    command = ["aarch64-linux-gnu-g++", "-static", "-O2", *FLAGS[2:], "-DISA=neon", *map(str, [DRIVER, *SOURCES])]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True)
    done = subprocess.run(["qemu-aarch64", str(program), "400", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "neon: 400 matrices" in done.stdout, done.stdout + done.stderr[-3000:]
