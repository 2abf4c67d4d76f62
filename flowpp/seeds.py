"""Seeds: independent random streams, each named by whole numbers."""

import hashlib
from enum import IntEnum


class Stream(IntEnum):
    """What a training run draws for, as the second name of a stream, after the run's seed."""

    WEIGHTS = 0
    STEP = 1
    ORDER = 2
    VALIDATION = 3
    FLIPS = 4
    SAMPLES = 5


def seed_of(*names: int) -> int:
    """A 63-bit seed for the stream of these names, such as (seed, image index); other names give another."""
    digest = hashlib.sha256(",".join(str(int(name)) for name in names).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
