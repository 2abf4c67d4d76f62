"""Lists of jobs by owner, type and status: sorted sets by creation, each job in one of them, whatever becomes of it.

There is no list of a type alone, or of a status alone: those are several lists that are read as one. So filters take no
more memory than one index, and the lists say how many jobs there are.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any, Literal, get_args

from redis import Redis

from worker.transitions import Transitions

JobType = Literal["training", "likelihood", "sampling"]
JobStatus = Literal["queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"]

_Counts = dict[JobType, dict[JobStatus, int]]


def lists(redis: Redis, owner: str | None, type: JobType | None, status: JobStatus | None) -> list[str]:
    """Those that hold what matches; none is any."""
    types = get_args(JobType) if type is None else [type]
    statuses = get_args(JobStatus) if status is None else [status]
    return [_list(*each) for each in product(_owners(redis, owner), types, statuses)]


def count(redis: Redis, owner: str | None) -> _Counts:
    """How many jobs there are of each type and status, everybody's or those of `owner`."""
    kinds = list(product(get_args(JobType), get_args(JobStatus)))
    owners = list(_owners(redis, owner))
    with redis.pipeline(transaction=False) as pipeline:
        for each, (type, status) in product(owners, kinds):
            pipeline.zcard(_list(each, type, status))
        numbers = pipeline.execute()
    found: _Counts = {type: dict.fromkeys(get_args(JobStatus), 0) for type in get_args(JobType)}
    for (_, (type, status)), number in zip(product(owners, kinds), numbers, strict=True):
        found[type][status] += number
    return found


def _owners(redis: Redis, owner: str | None) -> Iterable[str]:
    """One, or all; jobs that an older version has written are in the lists from the first time that this is asked."""
    client: Any = redis  # its annotations do not know of decode_responses
    if not client.exists("flowpp:indexed"):
        Transitions(redis).index()
    return [owner] if owner is not None else sorted(client.smembers("flowpp:owners"))


def _list(owner: str, type: JobType, status: JobStatus) -> str:
    return f"flowpp:jobs:status:{owner}:{type}:{status}"
