"""The cost of a computation, in a unit that a slow or busy machine does not change."""

import gc
import math
import time
import zlib
from collections.abc import Callable

_ATTEMPTS, _CHEAP = 3, 0.25


def cost(run: Callable[[], object]) -> float:
    """CPU time of `run` in units: one unit decompresses 256 MiB of zeros in pieces, just before.

    Returns the least of three measurements, or the first one below a quarter of a unit. Garbage is not collected
    meanwhile: its cost depends on everything that the process holds.
    """
    least = math.inf
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(_ATTEMPTS):
            unit = _seconds(_decompress)
            least = min(least, _seconds(run) / unit)
            if least < _CHEAP:
                break
    finally:
        if collects:
            gc.enable()
    return least


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _decompress() -> None:
    for _ in range(16):
        assert len(zlib.decompress(_ZEROS)) == 2**24


_ZEROS = zlib.compress(bytes(2**24), 1)
