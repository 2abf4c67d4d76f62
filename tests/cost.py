"""The cost of a computation, in a unit that a slow or busy machine does not change."""

import time
import zlib
from collections.abc import Callable


def cost(run: Callable[[], object]) -> float:
    """Returns the CPU time of `run` in units: the CPU time to decompress 256 MiB of zeros, measured just before."""
    unit = _seconds(_decompress)
    return _seconds(run) / unit


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _decompress() -> None:
    for _ in range(16):
        assert len(zlib.decompress(_ZEROS)) == 2**24


_ZEROS = zlib.compress(bytes(2**24), 1)
