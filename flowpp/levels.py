"""Levels of the CPU kernels: the processor instructions that they use. Needs no torch.

| level | the kernels use | needs, as /proc/cpuinfo names it |
|---|---|---|
| plain | nothing: models compute by plain PyTorch | |
| baseline | what every processor of the architecture has: SSE2 on x86-64, NEON on aarch64 | |
| avx2 | registers of 256 bits | avx2, fma |
| avx512 | registers of 512 bits | avx512f, avx512bw, avx512cd, avx512dq, avx512vl |
| amx | matrix tiles, too | amx_tile, amx_bf16, avx512_bf16, and Linux's permission |

Each level includes those above it. The last three exist on x86-64 only. A process uses the highest level that its
processor and its operating system support. `FLOWPP_KERNELS` sets a lower one.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

VARIABLE = "FLOWPP_KERNELS"
PLAIN = "plain"

CPUINFO = Path("/proc/cpuinfo")


class UnsupportedLevel(ValueError):
    """A level that does not exist, or that this processor lacks. The message lists the supported ones."""


@dataclass(frozen=True)
class Level:
    """The features of a processor that kernels of this level may use, and the compiler's options for them."""

    name: str
    features: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def _above(level: Level, name: str, features: tuple[str, ...], options: tuple[str, ...]) -> Level:
    return Level(name, level.features + features, level.options + options)


# The options name each instruction set, not a processor: a model's name would include sets that a hypervisor can mask.
# They fix the tuning as well, since GCC contracts sums to FMA by it: the numbers of a level are the same everywhere.
_SSE2 = Level("baseline", (), ("-march=x86-64", "-mtune=generic"))
_AVX2 = _above(_SSE2, "avx2", ("avx2", "fma"), ("-mavx2", "-mfma"))
_AVX512 = _above(
    _AVX2,
    "avx512",
    ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    ("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
)
_AMX = _above(
    _AVX512,
    "amx",
    ("amx_tile", "amx_bf16", "avx512_bf16"),
    ("-mamx-tile", "-mamx-bf16", "-mavx512bf16", "-mtune=sapphirerapids"),
)
_OF_MACHINE = {
    "x86_64": (_SSE2, _AVX2, _AVX512, _AMX),
    "amd64": (_SSE2, _AVX2, _AVX512, _AMX),
    "aarch64": (Level("baseline", (), ("-march=armv8-a",)),),
    "arm64": (Level("baseline", (), ("-march=armv8-a",)),),
}


def levels() -> dict[str, Level]:
    """The levels of this machine's architecture that have kernels, from the lowest to the highest, by their names."""
    found = _OF_MACHINE.get(platform.machine().lower(), (Level("baseline"),))
    return {level.name: level for level in found}


@lru_cache
def lacking() -> dict[str, str]:
    """Returns the levels that this machine does not support, each with the missing features in words.

    A missing compiler is not among these reasons."""
    features = _features()
    missing = {name: [each for each in level.features if each not in features] for name, level in levels().items()}
    found = {name: f"the processor has no {', '.join(each)}" for name, each in missing.items() if each}
    if "amx" in levels() and "amx" not in found and not _tiles_permitted():
        found["amx"] = "Linux does not permit this process to use the processor's matrix tiles"
    return found


def supported() -> list[str]:
    """The levels that this machine supports, from `plain` to the highest."""
    return [PLAIN, *(name for name in levels() if name not in lacking())]


def usable() -> tuple[str, ...]:
    """The supported levels up to the one that is set, the highest first, `plain` last.

    The set level is that of the innermost `at`, else that of `FLOWPP_KERNELS`. Raises `UnsupportedLevel`.
    """
    return _up_to(_current.level or of_environment())


@lru_cache
def _up_to(level: str | None) -> tuple[str, ...]:
    found = supported()
    return tuple(reversed(found[: found.index(level) + 1] if level else found))


@lru_cache
def of_environment() -> str | None:
    """The level that `FLOWPP_KERNELS` sets, or None. Raises `UnsupportedLevel`. The first call reads the variable."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value:
        _check(value, f"{VARIABLE} is {value!r}")
    return value or None


@contextmanager
def at(level: str) -> Iterator[None]:
    """Inside, all threads of this process compute at this level. Raises `UnsupportedLevel`.

    A recording (`flowpp.replay`) keeps the level of its first pass.
    """
    _check(level, f"the level is {level!r}")
    before, _current.level = _current.level, level
    try:
        yield
    finally:
        _current.level = before


class _Current:
    level: str | None = None


_current = _Current()


def _check(level: str, given: str) -> None:
    if level in supported():
        return
    why = f": {lacking()[level]}" if level in lacking() else ", which is not a level of the CPU kernels"
    raise UnsupportedLevel(f"{given}{why}. This machine supports {', '.join(supported())}")


def _features() -> set[str]:
    """The processor's features as Linux reports them: it leaves out those that it does not support itself."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return set(found[0]) if found else set()


def _tiles_permitted() -> bool:
    """Requests the registers of matrix tiles: Linux grants them to processes that request them."""
    libc = ctypes.CDLL(None)
    libc.syscall.restype = ctypes.c_long
    return libc.syscall(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))) == 0


_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h, and the feature's number
