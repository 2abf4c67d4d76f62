"""Word of jobs that have finished: one subscription a process, for all who wait in it."""

import asyncio
import logging
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from redis import RedisError
from redis.asyncio import Redis

from worker.connection import options_in_a_loop

log = logging.getLogger(__name__)

CHANNEL = "flowpp:finished"
_AGAIN_SECONDS = 0.5
_REMEMBERED = 4_096  # more than finish between the answer to a submission and the wait for it
_LISTEN_SECONDS = 5.0
_SILENCES = 2


class Finished:
    """Listens while its `listening` block runs. Word may be lost with the connection: look now and then, too."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._lately: OrderedDict[str, None] = OrderedDict()

    @contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """Set when the job has finished, while the block runs or shortly before."""
        event = asyncio.Event()
        if job_id in self._lately:
            event.set()
        self._waiting[job_id].add(event)
        try:
            yield event
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _listen(self) -> None:
        said = False
        while True:
            redis: Any = Redis.from_url(self._url, **options_in_a_loop())
            try:
                async with redis, redis.pubsub() as subscription:
                    await subscription.subscribe(CHANNEL)
                    said = False
                    await self._hear(subscription)
            except (RedisError, RuntimeError) as error:  # uvloop's word for what is closed
                if not said:
                    log.warning("no word of finished jobs until Redis gives it: %s", error)
                said = True
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _hear(self, subscription: Any) -> None:
        """Returns where even pings are not answered.

        A broken connection is silent at once, again and again: redis-py takes the system's ETIMEDOUT for the end of our
        own timeout.
        """
        silences = 0
        while silences < _SILENCES:
            message = await subscription.get_message(timeout=_LISTEN_SECONDS)
            if message is None:
                silences += 1
                await subscription.ping()
            else:
                silences = 0
                if message["type"] == "message":
                    for job_id in message["data"].split():
                        self._say(job_id)

    def _say(self, job_id: str) -> None:
        self._lately[job_id] = None
        while len(self._lately) > _REMEMBERED:
            self._lately.popitem(last=False)
        for event in self._waiting.get(job_id, ()):
            event.set()
