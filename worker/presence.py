"""Which workers are present, and what each offers a job: it writes so every few seconds, by Redis's clock."""

import logging
import os
import threading
from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from redis import Redis

from flowpp.memory import of_machine
from worker.connection import UNREACHABLE, redis_time
from worker.gpus import gpus, visible
from worker.jobs import Queue

log = logging.getLogger(__name__)

_SAY_SECONDS = 2
_FORGET_SECONDS = 10


MOST_PROCESSES = 64
"""Processes of a training job, as `TrainingConfig.num_processes` bounds them."""


class Offer(BaseModel):
    """The means of a worker.

    `bytes` is the memory of each GPU or, if it is `shared`, that of the machine. `processes` is how many a training
    job may have, or None if the worker is of a version that does not announce it.
    """

    model_config = ConfigDict(frozen=True)

    bytes: int
    shared: bool
    processes: int | None = None

    def of_process(self, num_processes: int) -> float:
        """Bytes for each of so many."""
        return self.bytes / num_processes if self.shared else self.bytes


def own_offer(max_processes: int | None = None) -> Offer:
    """The means of this process: a training process for each GPU, or without GPUs one for each core.

    `max_processes`, if given, is offered instead.
    """
    if found := visible(gpus()):
        size, shared, processes = min(gpu.total_bytes for gpu in found), False, len(found)
    else:
        size, shared, processes = of_machine(), True, _cores()
    return Offer(bytes=size, shared=shared, processes=max_processes or min(processes, MOST_PROCESSES))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Presence:
    """While the block runs, worker `name` of a queue counts as present."""

    def __init__(self, redis: Redis, queue: Queue, name: str, offer: Offer | None = None) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._offer = offer or own_offer()
        self._key = _key(queue)
        self._name = name
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._forget(self._name)
        except UNREACHABLE as error:  # it will be forgotten as a lost one is
            log.warning("worker %s did not sign off: %s", self._name, error)

    def _run(self) -> None:
        while True:
            try:
                now = redis_time(self._redis)
                self._redis.hset(_offers_key(self._key), self._name, self._offer.model_dump_json())
                self._redis.zadd(self._key, {self._name: now + _FORGET_SECONDS})
                self._forget(*self._redis.zrangebyscore(self._key, "-inf", now))
            except UNREACHABLE as error:
                log.warning("worker %s cannot say that it is there: %s", self._name, error)
            if self._ended.wait(_SAY_SECONDS):
                return

    def _forget(self, *names: str) -> None:
        if names:
            self._redis.zrem(self._key, *names)
            self._redis.hdel(_offers_key(self._key), *names)


def count(redis: Redis, queue: Queue) -> int:
    """How many workers of a queue are there."""
    return len(_present(redis, queue))


def offers(redis: Any, queue: Queue) -> list[Offer]:
    """The offer of each present worker of a queue."""
    names = _present(redis, queue)
    found = redis.hmget(_offers_key(_key(queue)), names) if names else []
    return [Offer.model_validate_json(written) for written in found if written]


def _present(redis: Any, queue: Queue) -> list[str]:
    names: list[str] = redis.zrangebyscore(_key(queue), redis_time(redis), "+inf")
    return names


def _key(queue: Queue) -> str:
    return f"flowpp:workers:{queue}"


def _offers_key(key: str) -> str:
    return f"{key}:memory"
