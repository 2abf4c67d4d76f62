"""How tests wait: for a condition, never for a time, and so long that only a fault can exhaust it."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 300
"""Far longer than anything takes on one core that others use too. A test's own limit, in pyproject.toml, is longer."""

LEASE_SECONDS = 10
"""Of leases that must not run out while a worker lives: a busy machine keeps no thread waiting for so long."""


def until(condition: Callable[[], T], what: object = "the condition does not hold") -> T:
    """The first true value of `condition`. Fails with `what`, or with its value if it is a function."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.02)
    return found
