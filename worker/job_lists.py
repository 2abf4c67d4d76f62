"""Lists of jobs by owner, type and status: sorted sets by creation, each job in one of them, whatever becomes of it.

There is no list of a type alone, or of a status alone: those are several lists that are read as one. So filters take no
more memory than one index, and the lists say how many jobs there are.
"""

from itertools import product
from typing import Any, get_args

from redis import Redis

from worker.transitions import JobStatus, JobType, load_script

_SLICE = 500
"""Jobs that one script puts into the lists: meanwhile Redis does nothing else."""

_Counts = dict[JobType, dict[JobStatus, int]]


def lists(redis: Redis, owner: str | None, type: JobType | None, status: JobStatus | None) -> list[str]:
    """Those that hold what matches; none is any."""
    _list_older(redis)
    client: Any = redis  # its annotations do not know of decode_responses
    owners = [owner] if owner is not None else sorted(client.smembers("flowpp:owners"))
    types = get_args(JobType) if type is None else [type]
    statuses = get_args(JobStatus) if status is None else [status]
    return [f"flowpp:jobs:status:{':'.join(each)}" for each in product(owners, types, statuses)]


def count(redis: Redis, owner: str | None) -> _Counts:
    """How many jobs there are of each type and status, everybody's or those of `owner`."""
    count_all = load_script(redis, "count")
    while (counted := count_all(args=[] if owner is None else [owner])) is None:
        _list_older(redis)
    found: Any = {type: {} for type in get_args(JobType)}
    for type, status, number in counted:
        found[type][status] = number
    counts: _Counts = found
    return counts


def _list_older(redis: Redis) -> None:
    """Jobs that an older version has written are in the lists from the first time on that these are asked for.

    Whoever asks meanwhile does a part of it, and none is told of lists that are not whole.
    """
    if redis.get("flowpp:indexed") == "1":
        return
    list_next = load_script(redis, "index")
    while list_next(args=[_SLICE]):
        pass
