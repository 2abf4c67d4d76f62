"""The CPU kernels of flowpp/kernels: a C++ compiler builds them when they are first needed, and a cache keeps them.

    python -m flowpp.native    # builds them now

There is a library for each level (`flowpp.levels`) and dtype. Its name is a hash of the compiler, its options and the
sources. If the library of a level cannot be built or loaded, models compute at the next lower level, without a compiler
by plain PyTorch. One warning gives the reason.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from flowpp import levels
from flowpp.levels import PLAIN, UnsupportedLevel

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")

REALS = {torch.float32: "float", torch.float64: "double"}

_OPTIONS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    *("-Wno-psabi", "-fPIC", "-fopenmp"),
)


class NotBuilt(RuntimeError):
    """The kernels cannot be built here; the message says why and what would help."""


Key = TypeVar("Key")


class Listener(Protocol):
    """What records the kernels that are called."""

    def kernel(self, dtype: torch.dtype, name: str, arguments: tuple[object, ...]) -> None:
        """Hears of a kernel for this dtype that has been called."""

    def once(self, make: Callable[[Tensor, Key], Tensor], tensor: Tensor, key: Key) -> Tensor | None:
        """make(tensor, key), made once for all recordings of the same weights; none of a tensor that is no weight."""


class _OfThread(threading.local):
    tape: Listener | None = None
    """That of what is computed in this thread now."""


listening = _OfThread()

_one_at_a_time = threading.Lock()


def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Returns the kernels for float32 or float64 at the highest usable level, or None if there are none.

    Builds them first if the cache has none. Raises `UnsupportedLevel`.
    """
    if dtype not in REALS:
        return None
    usable = levels.usable()
    with _one_at_a_time:  # several lanes may need them first
        return _loaded(dtype, usable)


@lru_cache
def _loaded(dtype: torch.dtype, usable: tuple[str, ...]) -> ctypes.CDLL | None:
    """The kernels of the first of these levels that can be built, or None. Warns if that is not the first of all."""
    library, failures = _first(dtype, usable)
    if failures and usable not in _warned:
        _warned.add(usable)
        why = "; ".join(failures)
        if library is None:
            logger.warning("models compute without CPU kernels, by plain PyTorch, several times slower: %s", why)
        else:
            logger.warning("models compute with the %s kernels, not the %s ones: %s", level_of(library), usable[0], why)
    if library is not None:
        _keep_memory()
    return library


_warned: set[tuple[str, ...]] = set()
"""Levels with a reported failure: one warning serves both dtypes."""


def _first(dtype: torch.dtype, usable: tuple[str, ...]) -> tuple[ctypes.CDLL | None, list[str]]:
    """The kernels of the first of these levels that can be built, and why those before it cannot."""
    failures: list[str] = []
    for level in usable[: usable.index(PLAIN)]:
        try:
            return load(dtype, level), failures
        except NotBuilt as error:
            if str(error) not in failures:
                failures.append(str(error))
    return None, failures


def load(dtype: torch.dtype, level: str) -> ctypes.CDLL:
    """Returns the kernels of exactly this level, from the first directory that permits to build and load them.

    A user's cache may be full, or on a file system that does not execute programs. Raises `NotBuilt`.
    """
    command = _compiler()
    failures: list[str] = []
    for directory in _directories():
        try:
            library = ctypes.CDLL(str(_built(command, dtype, level, directory)))
        except (NotBuilt, OSError) as error:
            failures.append(str(error))
            continue
        if (found := level_of(library)) != level:
            raise NotBuilt(f"{shlex.join(command)} builds kernels for {found}; CXX must not choose the processor")
        return library
    raise NotBuilt(failures[0])


@lru_cache
def level_of(library: ctypes.CDLL) -> str:
    """The level that a library reports: the instructions that its compiler was permitted to use."""
    library.level.restype = ctypes.c_char_p
    return library.level().decode()


def cannot_build(level: str) -> str | None:
    """Why the compiler cannot build kernels of this level at all, or None: there is none, or it lacks an option."""
    try:
        _run([*_compiler(), *_OPTIONS, *levels.levels()[level].options, "-x", "c++", "-E", os.devnull])
    except NotBuilt as error:
        return str(error)
    return None


def _keep_memory() -> None:
    """Lets glibc hold on to what a forward pass frees, for the next one; of more it gives back the rest.

    It would give blocks of this size back to the kernel at once, which then makes each page anew: a third of the time
    of a small model's forward pass.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes
        libc.mallopt(_TRIM_THRESHOLD, 256 * 2**20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def _built(command: list[str], dtype: torch.dtype, level: str, directory: Path) -> Path:
    """The library in a directory; the compiler builds it if it is not there. Raises `NotBuilt` and OSError."""
    options = [*_OPTIONS, *levels.levels()[level].options, f"-DFLOWPP_REAL={REALS[dtype]}"]
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    named = [*command, _run([*command, "--version"]), *options, *sources]
    key = hashlib.sha256("\0".join(named).encode()).hexdigest()[:16]
    path = directory / f"kernels-{key}-{level}-{REALS[dtype]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory, prefix="building-") as temporary:
            objects, library = Path(temporary) / "kernels.o", Path(temporary) / "kernels.so"
            _run([*command, *options, "-c", str(SOURCES / "kernels.cpp"), "-o", str(objects)])
            _run([*command, "-shared", str(objects), "-o", str(library)])  # OpenMP's runtime is PyTorch's own
            os.replace(library, path)
    return path


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a kernel."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(numbers: Sequence[int]) -> ctypes.Array:
    """int64s, for a kernel."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _compiler() -> list[str]:
    """With arguments, if $CXX has any, as `ccache g++` has."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise NotBuilt(f"CXX is {command!r}, which is no command: {error}") from error
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise NotBuilt("there is no C++ compiler (c++, g++, clang++ or $CXX); install g++")


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=300
        ).stdout
    except subprocess.CalledProcessError as error:
        raise NotBuilt(f"{command[0]} failed: {error.stderr.strip()[:500]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]}: {error}") from error


def _directories() -> list[Path]:
    """The directories that this user owns and can write to: the cache, then a temporary one. Raises `NotBuilt`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "flowpp"
    found = [path for path in (home, Path(tempfile.gettempdir()) / f"flowpp-{os.getuid()}") if _is_own(path)]
    if not found:
        raise NotBuilt(f"neither {home} nor {tempfile.gettempdir()} can be written to; set XDG_CACHE_HOME")
    return found


def _is_own(directory: Path) -> bool:
    if not directory.is_absolute():  # "~" of a user without a home
        return False
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid()
    except OSError:
        return False


def main() -> None:
    """Builds the kernels of the highest usable level and prints their paths."""
    try:
        usable = levels.usable()
    except UnsupportedLevel as error:
        sys.exit(f"flowpp: {error}")
    with ThreadPoolExecutor() as compilers:
        for library, failures in compilers.map(partial(_first, usable=usable), REALS):
            if library is not None:
                print(library._name)
            elif failures:
                sys.exit(f"flowpp: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
