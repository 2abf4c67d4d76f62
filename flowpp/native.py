"""The CPU kernels of flowpp/kernels: built with this machine's C++ compiler when first needed, then kept in a cache.

    python -m flowpp.native    # builds them now

They are compiled for the very processor, so what names a library holds compiler, processor and sources. Without a
compiler, models compute by plain PyTorch and say so once.
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
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")

REALS = {torch.float32: "float", torch.float64: "double"}

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
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
    """The kernels for float32 or float64, built first where that was not done before; none where it cannot be done."""
    if dtype not in REALS:
        return None
    with _one_at_a_time:  # lanes may be the first to ask
        return _loaded(dtype)


@lru_cache
def _loaded(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(build(dtype)))
    except (NotBuilt, OSError) as error:
        logger.warning("models compute without CPU kernels, by plain PyTorch, several times slower: %s", error)
        return None
    _keep_memory()
    return library


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


def build(dtype: torch.dtype) -> Path:
    """The library for a dtype, which is built where the cache has none. Raises `NotBuilt`."""
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    sources = sorted(SOURCES.iterdir())
    named = [
        *compiler,
        version,
        _processor(),
        REALS[dtype],
        *_FLAGS,
        *(path.read_text(encoding="utf-8") for path in sources),
    ]
    key = hashlib.sha256("\0".join(named).encode()).hexdigest()[:16]
    path = _cache() / f"kernels-{key}-{REALS[dtype]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as temporary:
            objects, library = Path(temporary) / "kernels.o", Path(temporary) / "kernels.so"
            real = f"-DFLOWPP_REAL={REALS[dtype]}"
            _run([*compiler, *_FLAGS, real, "-c", str(SOURCES / "kernels.cpp"), "-o", str(objects)])
            _run([*compiler, "-shared", str(objects), "-o", str(library)])  # OpenMP's runtime is PyTorch's own
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
        raise NotBuilt(f"{' '.join(command)} failed: {error.stderr.strip()[:500]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]}: {error}") from error


def _processor() -> str:
    """What -march=native reads off it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache() -> Path:
    """A directory of this user that can be written to."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "flowpp"
    for directory in (home, Path(tempfile.gettempdir()) / f"flowpp-{os.getuid()}"):
        if not directory.is_absolute():  # "~" of a user without a home
            continue
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory
    raise NotBuilt(f"neither {home} nor {tempfile.gettempdir()} can be written to; set XDG_CACHE_HOME")


if __name__ == "__main__":
    try:
        with ThreadPoolExecutor() as compilers:
            print(*compilers.map(build, REALS), sep="\n")
    except NotBuilt as error:
        sys.exit(f"flowpp: {error}")
