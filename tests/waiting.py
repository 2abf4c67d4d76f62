"""Tests wait for a condition, not for a time. The limit is so long that only a fault can reach it."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 300
"""Far longer than any wait on one shared core. The limit of a whole test, in pyproject.toml, is longer still."""

LEASE_SECONDS = 10
"""A lease that a live worker must not lose. No thread waits this long for a core on a busy machine."""


def until(condition: Callable[[], T], what: object = "the condition does not hold") -> T:
    """Returns the first true value of `condition`. Fails with `what`, or with its result if it is a function."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.02)
    return found
