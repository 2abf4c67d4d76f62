"""Whether the service can work, and what it waits for."""

from collections.abc import Iterator

from redis import RedisError

from worker import presence
from worker.connection import UNREACHABLE, ServerState, check_writes
from worker.queue import QUEUES
from worker.rebuilding import under_way
from worker.service import Service


def faults(service: Service) -> dict[str, str]:
    """Of `redis`, `store`, and the workers of each queue, as `training`: what is wrong with it, in words.

    Where Redis does not answer, nothing is known of workers, and nothing is said.
    """
    return dict([*_of_redis(service), *_of_store(service)])


def _of_redis(service: Service) -> Iterator[tuple[str, str]]:
    try:
        check_writes(service.redis)
        if under_way(service):
            yield "redis", "Redis is being rebuilt by `flowpp reindex`; where that was interrupted, run it again"
        for queue in QUEUES:
            if not presence.count(service.redis, queue):
                yield queue, f"no {queue} worker"
    except ServerState as error:
        yield "redis", f"Redis refuses commands, as {error.meaning}: {error}"
    except UNREACHABLE as error:
        yield "redis", f"Redis does not answer: {type(error).__name__}"
    except RedisError as error:
        yield "redis", f"Redis takes no writes: {error}"


def _of_store(service: Service) -> Iterator[tuple[str, str]]:
    try:
        service.store.check()
    except OSError as error:
        yield "store", f"the store cannot be written: {error.strerror or type(error).__name__}"
