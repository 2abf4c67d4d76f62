"""The recorder: writes what Redis knows of jobs into the artifact store, from which `flowpp reindex` has it again.

Each change of a job's status, and each checkpoint of it, marks the job in `flowpp:changed`. It is stored then as
`jobs/<id>/record-<changed>.json`, in one object: a new one, so that one who is late overwrites nothing newer; the one
before is deleted. The mark goes when what it marks is stored. What a training job tells between two checkpoints is
stored with the second, since from the first it would go on.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from worker.artifacts import ALONE, Together
from worker.connection import UNREACHABLE, Script, redis_time
from worker.service import Service
from worker.transitions import Transitions, job_key

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
LEAVE_SECONDS = 3.0
"""Of those who answer requests: training workers have more time."""

LAST_SECONDS = 5
"""So long the end of the block waits for what has changed to be stored."""

_RECORD = "record-"
_TURN_SECONDS = 60
_JOBS = 200  # at a time
_THREADS = 8  # where each waits for an object store
_TOGETHER = 25  # jobs that are read at once, of which each thread has so many
_FEW = 100  # events
_Events = Sequence[tuple[str, dict[str, str]]]
_TAKE = """
local whose = redis.call('GET', KEYS[1])
if whose and whose ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1
"""
_LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Recorder:
    """A thread while the block runs. Of any number of them one works at a time; two would do no harm.

    It leaves what has changed within `leave_seconds` to others: whose threads people wait for should not do it, where
    somebody else can. At the end of the block nothing is left to others, who may be gone already.
    """

    def __init__(self, service: Service, leave_seconds: float = 0) -> None:
        self._service = service
        self._leave_seconds = leave_seconds
        self._redis: Any = service.redis  # its annotations do not know of decode_responses
        self._scripts = Transitions(service.redis)
        self._take, self._leave = Script(service.redis, _TAKE), Script(service.redis, _LEAVE)
        self._name = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(LAST_SECONDS)  # where the store or Redis is away it goes with the process

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._attempt(self._look)
        self._leave_seconds = 0
        self._attempt(self._record_all)

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except UNREACHABLE as error:
            log.warning("the recorder waits for Redis: %s", error)
        except Exception:  # one that ended would be missed only when Redis is lost
            log.exception("jobs were not recorded in the store, and will be tried again")

    def _look(self) -> None:
        while self._is_my_turn() and self.record() == _JOBS and not self._ended.is_set():
            pass
        self._leave(keys=["flowpp:recorder"], args=[self._name])

    def _record_all(self) -> None:
        deadline = time.monotonic() + LAST_SECONDS
        while self.record() == _JOBS and time.monotonic() < deadline:
            pass

    def _is_my_turn(self) -> bool:
        return bool(self._take(keys=["flowpp:recorder"], args=[self._name, _TURN_SECONDS]))

    def record(self) -> int:
        """Stores jobs that have changed, those first that have waited longest; how many.

        Raises `OSError` where one could not be stored; the others are.
        """
        last = f"{1e6 * (redis_time(self._redis) - self._leave_seconds):.0f}" if self._leave_seconds else "+inf"
        marks = self._redis.zrangebyscore("flowpp:changed", "-inf", last, start=0, num=_JOBS, withscores=True)
        if marks:
            parts = [marks[start : start + _TOGETHER] for start in range(0, len(marks), _TOGETHER)]
            together, failed = Together(), list[Exception]()
            with ThreadPoolExecutor(_THREADS if self._service.store.directory is None else 1, "record") as threads:
                written = list(threads.map(lambda part: self._write(part, together, failed), parts))
                missing = together.finish()
                # Where a job's directory is gone, so is the job: the next look sees it.
                failed += [error for error in missing.values() if not isinstance(error, FileNotFoundError)]
                stored = [[each for each in part if place(*each) not in missing] for part in written]
                list(threads.map(lambda part: self._clear(part, failed), stored))
            if failed:
                raise failed[0]
        return len(marks)

    def _write(
        self, marks: Sequence[tuple[str, float]], together: Together, failed: list[Exception]
    ) -> list[tuple[str, str]]:
        """Writes jobs as they are now; which, as of when, also those that are not there: the failed stay marked."""
        written = []
        for (job_id, marked), (fields, events) in zip(marks, self._read([job_id for job_id, _ in marks]), strict=True):
            changed = fields.get("changed", f"{marked:.0f}")
            try:
                if fields:
                    fields.pop("recorded", None)
                    record = {"fields": fields | {"id": job_id}, "events": _as_lines(events)}
                    self._service.store.put_record(place(job_id, changed), record, together)
            except Exception as error:  # it does not keep the others from being stored
                failed.append(error)
            else:
                written.append((job_id, changed))
        return written

    def _clear(self, stored: Sequence[tuple[str, str]], failed: list[Exception]) -> None:
        """Deletes what was stored of jobs before; of one that is not there, all."""
        for (job_id, _), outdated in zip(stored, self._scripts.recorded(stored), strict=True):
            try:
                if outdated == "missing":  # it was deleted, maybe since we have read it
                    self._service.store.delete(f"jobs/{job_id}")
                elif outdated:
                    self._service.store.delete(place(job_id, outdated))
            except Exception as error:
                failed.append(error)

    def _read(self, ids: Sequence[str]) -> list[tuple[dict[str, str], _Events]]:
        """The record of each job, none of which may be there, and its events as of that record.

        Those of jobs that have many are read alone, so that a few are in memory at a time.
        """
        with self._redis.pipeline(transaction=True) as pipeline:
            for job_id in ids:
                pipeline.hgetall(job_key(job_id))
                pipeline.xrange(f"{job_key(job_id)}:events", count=None if len(ids) == 1 else _FEW)
            found = pipeline.execute()
        pairs = list(zip(found[::2], found[1::2], strict=True))
        if len(ids) == 1:
            return pairs
        return [
            pair if len(pair[1]) < _FEW else self._read([job_id])[0] for job_id, pair in zip(ids, pairs, strict=True)
        ]


def place(job_id: str, changed: str) -> str:
    """Where in the store a job is as of `changed`."""
    return f"jobs/{job_id}/{_RECORD}{changed}{ALONE}"


def changed_of(name: str) -> str | None:
    """As of when a record is, by its name in a job's directory of the store; none: it is no record.

    Older versions have made directories of them, without the end of the name.
    """
    return name.removeprefix(_RECORD).removesuffix(ALONE) if name.startswith(_RECORD) else None


def _as_lines(events: _Events) -> str:
    """A job's stream as JSON lines: each an event's id, type and data."""
    return "".join(json.dumps([event_id, fields["type"], fields["data"]]) + "\n" for event_id, fields in events)
