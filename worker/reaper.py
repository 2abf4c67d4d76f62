"""The reaper: puts back jobs whose worker was lost, and rings bells that were."""

import logging
import threading
from typing import Self

from worker.connection import UNREACHABLE
from worker.queue import QUEUES
from worker.service import Service

log = logging.getLogger(__name__)

_LOOKS = 5  # a lease


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
        while not self._ended.wait(self._service.settings.lease_seconds / _LOOKS):
            try:
                reap(self._service)
            except UNREACHABLE as error:
                log.warning("the reaper waits for Redis: %s", error)


def reap(service: Service) -> list[str]:
    """Ends attempts whose lease ran out, and rings as many bells as jobs wait without one; the ids of those jobs."""
    ended = [] if _just_started(service) else service.jobs.reap()
    for job_id in ended:
        log.warning("job %s lost its worker: its lease ran out", job_id)
    for queue, name in QUEUES.items():
        for job_id in service.jobs.waiting(queue)[int(service.redis.llen(name)) :]:
            service.bells.ring(queue, job_id)
    return ended


def _just_started(service: Service) -> bool:
    """Whether leases may have run out because Redis was away, and their workers had no time yet to renew them."""
    uptime: int = service.redis.info("server")["uptime_in_seconds"]
    return uptime <= service.settings.lease_seconds
