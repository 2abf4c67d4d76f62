"""Word of jobs that have finished: one subscription a process, for all who wait in it."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from redis import RedisError
from redis.asyncio import Redis

log = logging.getLogger(__name__)

CHANNEL = "flowpp:finished"
_AGAIN_SECONDS = 0.5
_LISTEN_SECONDS = 5.0


class Finished:
    """Listens while its `listening` block runs. Word may be lost with the connection: look now and then, too."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """Set when the job has finished, if it does so while the block runs."""
        event = asyncio.Event()
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
        while True:
            try:
                async with Redis.from_url(self._url, decode_responses=True, socket_timeout=30) as redis:
                    subscription: Any = redis.pubsub(ignore_subscribe_messages=True)
                    async with subscription:
                        await subscription.subscribe(CHANNEL)
                        while True:
                            message = await subscription.get_message(timeout=_LISTEN_SECONDS)
                            if message is not None:
                                for event in self._waiting.get(message["data"], ()):
                                    event.set()
            except RedisError as error:
                log.warning("no word of finished jobs until Redis gives it: %s", error)
            await asyncio.sleep(_AGAIN_SECONDS)
