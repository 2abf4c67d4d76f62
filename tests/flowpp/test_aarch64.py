"""The kernels on aarch64: Debian's cross compiler builds them, and QEMU runs them (`make test-aarch64`)."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flowpp import levels, native

pytestmark = pytest.mark.aarch64

CXX = "aarch64-linux-gnu-g++"
SYSROOT = "/usr/aarch64-linux-gnu"
PROGRAM = Path(__file__).with_name("kernels_alone.cpp")
REALS = sorted(native.REALS.values())
RUNS = [] if platform.machine() == "aarch64" else ["qemu-aarch64", "-L", SYSROOT]


def of_aarch64() -> levels.Level:
    (level,) = levels._OF_MACHINE["aarch64"]
    return level


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


def built(compiler: str, level: levels.Level, real: str, program: Path) -> Path:
    """`PROGRAM` as an executable, with the options of the kernels, and warnings as errors."""
    options = [*native._OPTIONS, *level.options, f"-DFLOWPP_REAL={real}", f"-I{native.SOURCES}", "-Wall", "-Werror"]
    run(compiler, *options, PROGRAM, "-o", program)
    return program


@pytest.mark.parametrize("real", REALS)
def test_the_kernels_compile_without_a_warning(real: str, tmp_path: Path) -> None:
    options = [*native._OPTIONS, *of_aarch64().options, f"-DFLOWPP_REAL={real}", "-Wall", "-Werror"]
    run(CXX, *options, "-c", native.SOURCES / "kernels.cpp", "-o", tmp_path / "kernels.o")
    assert "elf64-littleaarch64" in run("aarch64-linux-gnu-objdump", "-f", tmp_path / "kernels.o").stdout


@pytest.mark.skipif(bool(RUNS) and shutil.which("qemu-aarch64") is None, reason="no qemu-aarch64: install qemu-user")
@pytest.mark.parametrize("real", REALS)
def test_they_give_the_numbers_of_this_machine(real: str, tmp_path: Path) -> None:
    """But for rounding: aarch64 contracts products and sums, the baseline of x86-64 does not."""
    there = run(*RUNS, built(CXX, of_aarch64(), real, tmp_path / "there"))
    here = run(built("c++", levels.levels()["baseline"], real, tmp_path / "here"))
    assert (there.stderr, here.stderr) == ("baseline\n", "baseline\n")
    dtype = next(dtype for dtype, name in native.REALS.items() if name == real)
    found, expected = (torch.tensor([float(line) for line in each.stdout.split()]) for each in (there, here))
    tolerance = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert len(found) > 10_000
