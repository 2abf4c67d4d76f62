"""Which workers are there: each says so every few seconds, by Redis's clock."""

import logging
import threading
from typing import Self

from redis import Redis

from worker.connection import UNREACHABLE
from worker.jobs import Queue

log = logging.getLogger(__name__)

_SAY_SECONDS = 2
_FORGET_SECONDS = 10


class Presence:
    """While the block runs, worker `name` of a queue counts as present."""

    def __init__(self, redis: Redis, queue: Queue, name: str) -> None:
        self._redis = redis
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
            self._redis.zrem(self._key, self._name)
        except UNREACHABLE as error:  # it will be forgotten as a lost one is
            log.warning("worker %s did not sign off: %s", self._name, error)

    def _run(self) -> None:
        while True:
            try:
                now = _now(self._redis)
                self._redis.zadd(self._key, {self._name: now + _FORGET_SECONDS})
                self._redis.zremrangebyscore(self._key, "-inf", now)
            except UNREACHABLE as error:
                log.warning("worker %s cannot say that it is there: %s", self._name, error)
            if self._ended.wait(_SAY_SECONDS):
                return


def count(redis: Redis, queue: Queue) -> int:
    """How many workers of a queue are there."""
    return int(redis.zcount(_key(queue), _now(redis), "+inf"))


def _key(queue: Queue) -> str:
    return f"flowpp:workers:{queue}"


def _now(redis: Redis) -> float:
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1e6)
