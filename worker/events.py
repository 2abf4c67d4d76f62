"""A job's events in a Redis stream: its statuses, metrics, log lines, checkpoints and warnings, in their order."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from worker.connection import UNREACHABLE, options_in_a_loop
from worker.jobs import TERMINAL, Job, StaleAttempt
from worker.paging import Order, Page
from worker.refusals import Invalid, not_found
from worker.transitions import Transitions, job_key, load_script

log = logging.getLogger(__name__)

EventType = Literal["status", "metrics", "log", "checkpoint", "warning"]

_METRICS: tuple[EventType, ...] = ("metrics",)
_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")
_BLOCK_MILLISECONDS = 5_000
_AGAIN_SECONDS = 1.0
_PAGE = 1_000
_CHUNK = 2_000
"""Events among which is looked for those of a type, at a time."""


class Event(BaseModel):
    """One entry of a job's stream.

    `data` of `status`: status, attempt, message (a sentence), and where known worker and code; of `metrics`: step,
    images_seen and the figures of metrics.jsonl; of `log`: line; of `checkpoint`: id, step and metrics; of `warning`:
    message.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["event"] = "event"
    type: EventType
    created_at: float
    data: dict[str, Any]

    @property
    def terminal(self) -> bool:
        """Whether it is the last event of its job."""
        return self.type == "status" and self.data["status"] in TERMINAL


class Events:
    """The event streams of one Redis server."""

    def __init__(self, redis: Redis, url: str) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._url = url
        self._scripts = Transitions(redis)
        self._matching = load_script(redis, "events")

    def append(self, job: Job, type: EventType, data: Mapping[str, Any]) -> str:
        """Writes an event of the job's attempt; its id. Raises `StaleAttempt`."""
        written = self._scripts.append(job.id, job.attempt, type, json.dumps(data))
        if written is None:
            raise StaleAttempt(f"attempt {job.attempt} of job {job.id} is not the current one")
        return written

    def page(
        self,
        job_id: str,
        after: str | None = None,
        limit: int = 100,
        *,
        order: Order = "asc",
        types: Collection[EventType] = (),
    ) -> Page[Event]:
        """Events of these types, or all, behind the event `after` in their order.

        Raises `NotFound`, and `Invalid` for what is no event id.
        """
        self._check(job_id, after)
        start = f"({after}" if after is not None else "-" if order == "asc" else "+"
        if types:
            entries = self._of_types(job_id, start, limit + 1, order, types)
        elif order == "asc":
            entries = self._redis.xrange(_key(job_id), start, "+", count=limit + 1)
        else:
            entries = self._redis.xrevrange(_key(job_id), start, "-", count=limit + 1)
        return Page([_parse(*entry) for entry in entries[:limit]], len(entries) > limit)

    def _of_types(self, job_id: str, start: str, most: int, order: Order, types: Collection[EventType]) -> list[Any]:
        """Up to `most` entries: their ids and fields."""
        found: list[Any] = []
        while start and len(found) < most:
            keys, arguments = [_key(job_id)], [order, start, most - len(found), _CHUNK, *types]
            entries, last = self._matching(keys=keys, args=arguments)
            found += [(event_id, dict(zip(fields[::2], fields[1::2], strict=True))) for event_id, fields in entries]
            start = f"({last}" if last else ""
        return found

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """The training's metrics so far, a row a step: what an interrupted attempt told twice is there once."""
        rows: list[dict[str, Any]] = []
        after, more = None, True
        while more:
            found = self.page(job_id, after, _PAGE, types=_METRICS)
            for event in found.data:
                while rows and rows[-1]["step"] >= event.data["step"]:
                    rows.pop()
                rows.append(event.data)
            after, more = (found.data[-1].id if found.data else after), found.has_more
        return rows

    async def follow(
        self, job_id: str, after: str | None = None, types: Collection[EventType] = ()
    ) -> AsyncIterator[Event]:
        """Events of these types, or all, behind the event `after` as they come, to the job's end. Raises as `page`.

        Waits while Redis cannot be reached.
        """
        async with AsyncRedis.from_url(self._url, protocol=2, **options_in_a_loop()) as redis:
            last = after or "0-0"
            _check_id(last)
            if not await redis.exists(job_key(job_id)):
                raise not_found("job", job_id)
            while True:
                try:
                    status = await redis.hget(job_key(job_id), "status")
                    block = None if status is None or status in TERMINAL else _BLOCK_MILLISECONDS
                    streams: Any = await redis.xread({_key(job_id): last}, count=_PAGE, block=block)
                except UNREACHABLE as error:
                    log.warning("the event stream of job %s waits for Redis: %s", job_id, error)
                    await asyncio.sleep(_AGAIN_SECONDS)
                    continue
                entries = streams[0][1] if streams else []
                for entry in entries:
                    event = _parse(*entry)
                    last = event.id
                    if not types or event.type in types:
                        yield event
                    if event.terminal:
                        return
                if block is None and not entries:
                    return  # it was finished, or deleted, and all is told

    def _check(self, job_id: str, after: str | None) -> None:
        if after is not None:
            _check_id(after)
        if not self._redis.exists(job_key(job_id)):
            raise not_found("job", job_id)


def _key(job_id: str) -> str:
    return f"{job_key(job_id)}:events"


def _check_id(event_id: str) -> None:
    if not _ID.fullmatch(event_id):
        raise Invalid(
            "invalid_event_id", f"{event_id[:64]!r} is no event's id; they look like 1700000000000-0", "after"
        )


def _parse(event_id: str, fields: dict[str, str]) -> Event:
    created_at = int(event_id.partition("-")[0]) / 1000
    return Event.model_validate(
        {"id": event_id, "type": fields["type"], "created_at": created_at, "data": json.loads(fields["data"])}
    )
