"""The reaper: puts back jobs whose worker was lost, and rings bells that were."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Self

from worker.connection import UNREACHABLE, check_writes, redis_time
from worker.metrics import REAPED
from worker.queue import QUEUES
from worker.service import Service

log = logging.getLogger(__name__)

_LOOKS = 5  # a lease
_RENEWALS = 3  # a lease
_RINGS = 100  # a queue and look: it has other things to do, and each bell takes a millisecond


class Reaper:
    """A thread while the block runs. Any number of them do no more than one: each step is atomic in Redis."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        clock = Clock()
        lease = self._service.settings.lease_seconds
        while not self._ended.wait(lease / _LOOKS):
            try:
                check_writes(self._service.redis)
                moved = clock.moved(redis_time(self._service.redis), lease)
                reap(self._service, trusted=not moved)
            except UNREACHABLE as error:
                log.warning("the reaper waits for Redis: %s", error)
                clock.distrust(lease)


class Clock:
    """Decides whether leases that have run out count: not after Redis's clock was moved, nor after Redis was away.

    Redis's clock should go as fast as this process's own.
    """

    def __init__(self, own: Callable[[], float] = time.monotonic) -> None:
        self._own = own
        self._ahead: float | None = None
        self._trusted_from = 0.0

    def moved(self, seconds: float, lease_seconds: float) -> bool:
        """Whether a lease's time has not yet passed since a clock that now says `seconds` was moved."""
        now = self._own()
        ahead = seconds - now
        if self._ahead is not None and abs(ahead - self._ahead) > lease_seconds / _RENEWALS:
            log.warning("Redis's clock was moved by %+.0f s; leases are trusted again in a while", ahead - self._ahead)
            self.distrust(lease_seconds)
            REAPED.labels("clock_moved").inc()
        self._ahead = ahead
        return now < self._trusted_from

    def distrust(self, lease_seconds: float) -> None:
        """Gives the workers the time of a lease to renew theirs, which they could not meanwhile."""
        self._trusted_from = self._own() + lease_seconds


def reap(service: Service, trusted: bool = True) -> list[str]:
    """Ends attempts whose lease ran out, cancels and deletes what is due, and rings up to as many bells as jobs wait.

    The ids of the jobs whose attempt was ended; none is while Redis's clock is not to be trusted.
    """
    ended = service.jobs.reap(trusted and not _just_started(service))
    for job_id in ended:
        log.warning("job %s lost its worker: its lease ran out", job_id, extra={"job_id": job_id})
        REAPED.labels("attempt_ended").inc()
    if trusted:
        for job_id in service.jobs.cancel_due():
            log.info("job %s is cancelled: its Cancel-After ran out", job_id, extra={"job_id": job_id})
            REAPED.labels("cancelled").inc()
        REAPED.labels("expired").inc(service.delete_expired())
    REAPED.labels("deleted").inc(service.delete_ended())
    for queue, name in QUEUES.items():
        for job_id in service.jobs.waiting(queue, int(service.redis.llen(name)), _RINGS):
            service.bells.ring(queue, job_id)
            REAPED.labels("bell_rung").inc()
    return ended


def _just_started(service: Service) -> bool:
    """Whether leases may have run out because Redis was away, and their workers had no time yet to renew them."""
    uptime: int = service.redis.info("server")["uptime_in_seconds"]
    return 0 <= uptime <= service.settings.lease_seconds  # below zero after the clock was put back
