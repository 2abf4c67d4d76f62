"""Which workers are there, and what memory they offer: each says so every few seconds, by Redis's clock."""

import logging
import threading
from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from redis import Redis

from flowpp.memory import of_machine
from worker.connection import UNREACHABLE, redis_time
from worker.gpus import gpus
from worker.jobs import Queue

log = logging.getLogger(__name__)

_SAY_SECONDS = 2
_FORGET_SECONDS = 10


class Memory(BaseModel):
    """What a worker has to compute in: each GPU's `bytes`, or the machine's, which all processes share."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    shared: bool

    def of_process(self, num_processes: int) -> float:
        """Bytes for each of so many."""
        return self.bytes / num_processes if self.shared else self.bytes


def own_memory() -> Memory:
    """This machine's."""
    if found := gpus():
        return Memory(bytes=min(gpu.total_bytes for gpu in found), shared=False)
    return Memory(bytes=of_machine(), shared=True)


class Presence:
    """While the block runs, worker `name` of a queue counts as present."""

    def __init__(self, redis: Redis, queue: Queue, name: str, memory: Memory | None = None) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._memory = memory or own_memory()
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
                self._redis.hset(_memory_key(self._key), self._name, self._memory.model_dump_json())
                self._redis.zadd(self._key, {self._name: now + _FORGET_SECONDS})
                self._forget(*self._redis.zrangebyscore(self._key, "-inf", now))
            except UNREACHABLE as error:
                log.warning("worker %s cannot say that it is there: %s", self._name, error)
            if self._ended.wait(_SAY_SECONDS):
                return

    def _forget(self, *names: str) -> None:
        if names:
            self._redis.zrem(self._key, *names)
            self._redis.hdel(_memory_key(self._key), *names)


def count(redis: Redis, queue: Queue) -> int:
    """How many workers of a queue are there."""
    return len(_present(redis, queue))


def memories(redis: Any, queue: Queue) -> list[Memory]:
    """What the workers of a queue have to compute in, each."""
    names = _present(redis, queue)
    found = redis.hmget(_memory_key(_key(queue)), names) if names else []
    return [Memory.model_validate_json(said) for said in found if said]


def _present(redis: Any, queue: Queue) -> list[str]:
    names: list[str] = redis.zrangebyscore(_key(queue), redis_time(redis), "+inf")
    return names


def _key(queue: Queue) -> str:
    return f"flowpp:workers:{queue}"


def _memory_key(key: str) -> str:
    return f"{key}:memory"
